"""Self-play fine-tuning (SPIN, arXiv 2401.01335, Algorithm 1): generate, pair, score, train, evaluate; and again.

    for t in iterations:
        y'  ~ p_theta_t(. | x)                                   rollout
        (x, y, y')  + those of t-1                               pair
        log p_theta_t(y|x), log p_theta_t(y'|x)                  with_reference
        theta_{t+1} = argmin E l(margin)   (objectives)          fit
        held-out accuracy and the game on unseen prompts         conclude

Phases hand over through files in the stage's directory; one whose outputs are whole is skipped, and generation and
training continue where they stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from spinfast.config import Config, at
from spinfast.data.pairs import make_pairs, read_pairs, write_pairs
from spinfast.errors import UserError
from spinfast.evaluate import heldout
from spinfast.fit import fit
from spinfast.memory.planner import Load, steps
from spinfast.methods.phases import conclude, epochs, rollout, with_reference
from spinfast.methods.run import Run
from spinfast.methods.sft import answered
from spinfast.objectives import Pairwise
from spinfast.store import files
from spinfast.store.record import Stage
from spinfast.types import Completion, Example, Group, Pair

log = logging.getLogger("spinfast")


def spin(run: Run, last: Stage) -> Iterator[dict]:
    c, examples = run.config.spin, [example for example in run.examples if example.wanted]
    for key, values in {"lr": c.lr, "beta": c.beta}.items():
        if len(values) > c.iterations:
            log.warning("spin.%s has %d values, only the first %d have an iteration", key, len(values), c.iterations)
    if c.stop_patience and not heldout.verdicts(run.played[:1])[0]:
        log.warning("spin.stop_patience has no use: no held-out problem with a reference is answered; all are played")
    for t in range(c.iterations):
        stage = run.stage(f"iter_{t:03d}", last, "spin", t)
        start = run.become(last)
        sampling = run.session.sampling(run.config.generation.temperature, run.config.generation.max_tokens)
        pairs = pair(run, stage, examples, rollout(run, stage, examples, sampling), last)
        if not pairs:
            log.info("the game is won: every answer of the opponent is the real one, nothing is left to learn")
            if t and not due(run.config, t - 1):  # the last one played always is
                yield conclude(run, last, last.after, run.become(last.after), game(run.config, t - 1))
            return
        train_policy(run, stage, pairs)
        yield conclude(run, stage, last, start, game(run.config, t), look=due(run.config, t))
        last = stage
        if reason := heldout.stop_reason(run.played, c.stop_patience):
            log.info("the game is over: %s", reason)
            return


def pair(
    run: Run, stage: Stage, examples: Sequence[Example], completions: Sequence[Completion], last: Stage
) -> list[Pair]:
    """Real against generated; from the second iteration on with the previous iteration's own pairs."""
    path = stage.path("pairs.parquet")
    if not stage.finished("pair"):
        with stage.phase("pair", path.name, "rejected.json"):
            pairs, rejected = make_pairs(examples, completions, stage.number)
            if stage.number > 0 and run.config.spin.mix_previous:
                before = read_pairs(last.path("pairs.parquet"))
                pairs += [pair for pair in before if pair.iteration == stage.number - 1]
            with files.replacing(path) as partial:
                write_pairs(partial, pairs, examples, run.session.machine.renderer.text)
            files.write_json(stage.path("rejected.json"), rejected)
    return read_pairs(path)


def train_policy(run: Run, stage: Stage, pairs: Sequence[Pair]) -> None:
    """Learn to tell real from generated. Before the first step the margin is 0 and the loss l(0), or it is a bug."""
    c, t = run.config.spin, stage.number
    objective = game(run.config, t)
    steps, cut = with_reference(run, stage, epochs(run, [pair.group for pair in pairs], c, t + 1), objective)
    fit(run, stage, steps, objective, c, at(c.lr, t), cut)


def game(config: Config, t: int) -> Pairwise:
    """What iteration t is played by."""
    return Pairwise(config.spin.loss, at(config.spin.beta, t))


def due(config: Config, t: int) -> bool:
    """Whether iteration t is evaluated: every evaluate.every-th, and the last."""
    return (t + 1) % config.evaluate.every == 0 or t + 1 == config.spin.iterations


def load(config: Config, examples: Sequence[Example]) -> Load:
    """Every generated answer at its limit; later iterations have the previous one's pairs as well."""
    if any(not example.messages or example.scored for example in examples):
        raise UserError("method spin: needs one prompt and one answer a row, not plain text nor data.turns: all")
    c, generated = config.spin, (0,) * config.generation.max_tokens
    groups = [Group(g.prompt_ids, (*g.answers, generated)) for g in answered(config, "spin", examples)]
    later = steps(c, len(groups) * (2 if c.mix_previous else 1))
    rounds = (steps(c, len(groups)), *[later] * (c.iterations - 1))
    answers = c.iterations * len(groups)
    return Load("spin", groups, game(config, 0), c, c.groups_per_step, rounds, 1 / c.epochs, answers)
