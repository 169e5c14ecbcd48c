"""Self-play fine-tuning, in order: generate, pair, score, train, evaluate; then again against the better self.

    for t in iterations:
        y'  ~ p_theta_t(. | x)                                   generate
        (x, y, y')  + those of t-1                               pair
        log p_theta_t(y|x), log p_theta_t(y'|x)                  score
        theta_{t+1} = argmin E l(margin)   (objectives/spin.py)  train
        held-out accuracy and the game on unseen prompts         evaluate

(arXiv 2401.01335, Algorithm 1.) Phases hand over through files in the stage's directory; one whose outputs are
whole is skipped, and generation and training continue where they stopped.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence

import torch
from safetensors.torch import load_file, save_file

from spinfast.config import at
from spinfast.data.pairs import make_pairs, read_pairs, write_pairs
from spinfast.errors import UserError
from spinfast.evaluate import heldout
from spinfast.generation import prompt_seed
from spinfast.interrupt import finishing_steps, stop_if_asked
from spinfast.names import stage_name
from spinfast.objectives import Objective
from spinfast.objectives.sft import Sft
from spinfast.objectives.spin import Spin, loss_at_zero_margin
from spinfast.policy.adapters import files as adapters
from spinfast.report.card import write_card
from spinfast.session import Game
from spinfast.store import checkpoint, failed_step, files
from spinfast.store.record import Stage
from spinfast.train import NonFinite, TrainPlan, score, start_training, train
from spinfast.types import Adapter, Completion, Group, Request

log = logging.getLogger("spinfast")


def self_play(game: Game) -> Iterator[dict]:
    """Play the configured iterations, yielding each row of results.json: the base's, the SFT stage's, then each t."""
    previous = base_stage(game)
    yield conclude(game, previous, "base", previous, game.policy.adapter())
    played = [previous]
    if game.config.sft.epochs:
        stage = game.run.stage("sft", previous)
        opponent = game.become_opponent(previous)
        warm_up(game, stage)
        yield conclude(game, stage, "sft", previous, opponent)
        played.append(previous := stage)
    for iteration in range(game.config.spin.iterations):
        stage = game.run.stage(stage_name(iteration), previous)
        opponent = game.become_opponent(previous)
        generate(game, stage, iteration)
        pair(game, stage, iteration)
        score_opponent(game, stage, iteration)
        train_policy(game, stage, iteration)
        yield conclude(game, stage, iteration, previous, opponent)
        played.append(previous := stage)
        if reason := heldout.stop_reason(played, game.config.spin.stop_patience):
            log.info("the game is over: %s", reason)
            break
    heldout.keep_best(game.run, played)


def base_stage(game: Game) -> Stage:
    """The adapter before any training (B = 0), so that every round starts from a file."""
    stage = game.run.stage("base")
    if not stage.finished("save"):
        with stage.phase("save", "adapter"):
            files.write_directory(stage.path("adapter"), game.policy.save_adapter)
    return stage


def generate(game: Game, stage: Stage, iteration: int) -> None:
    """The opponent answers every training prompt; answers are appended as they come, sorted at the end."""
    if stage.finished("generate"):
        return
    path, adapter = stage.path("completions.jsonl"), game.policy.adapter()
    owner = f"{stage.name} {game.config.seed} {adapters.fingerprint(adapter)}"
    rows = {row["index"]: files.seal(row, owner) for row in files.sealed_lines(path, owner)}
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows.values()))
    requests = [
        Request(example.index, example.prompt_ids, prompt_seed(game.config.seed, iteration, example.index))
        for example in game.examples
        if example.index not in rows
    ]
    settings = game.config.generation
    sampling = game.sampling(settings.temperature, settings.max_tokens)
    answers = game.generator.generate(requests, sampling, adapter)
    with (
        stage.phase("generate", path.name),
        game.display.phase(f"{stage.name} generate", len(requests), "answers") as tick,
    ):
        with path.open("a", encoding="utf-8") as file:
            for answer in answers:
                row = {
                    "index": answer.index,
                    "token_ids": answer.token_ids,
                    "finish_reason": answer.finish_reason,
                    "logp": answer.logp,
                    "text": game.renderer.text(answer.token_ids),
                }
                rows[answer.index] = files.seal(row, owner)
                file.write(json.dumps(rows[answer.index]) + "\n")
                file.flush()
                tick.advance(tokens=len(answer.token_ids))
                stop_if_asked()
        ordered = [rows[example.index] for example in game.examples]
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in ordered))


def pair(game: Game, stage: Stage, iteration: int) -> None:
    """Real against generated; from the second iteration on with the previous iteration's own pairs."""
    if stage.finished("pair"):
        return
    with stage.phase("pair", "pairs.parquet", "rejected.json"):
        completions = [
            Completion(row["index"], tuple(row["token_ids"]), row["finish_reason"])
            for row in files.read_jsonl(stage.path("completions.jsonl"))
        ]
        pairs, rejected = make_pairs(game.examples, completions, iteration)
        if iteration > 0 and game.config.spin.mix_previous:
            before = read_pairs(game.run.stage(stage_name(iteration - 1)).path("pairs.parquet"))
            pairs += [pair for pair in before if pair.iteration == iteration - 1]
        with files.replacing(stage.path("pairs.parquet")) as path:
            write_pairs(path, pairs, game.examples, game.renderer.text)
        files.write_json(stage.path("rejected.json"), rejected)


def score_opponent(game: Game, stage: Stage, iteration: int) -> None:
    """Log-probs of both answers under the opponent, which is the policy before its first step."""
    if stage.finished("score"):
        return
    groups = [pair.group for pair in read_pairs(stage.path("pairs.parquet"))]
    with stage.phase("score", "opponent_logps.safetensors"):
        with game.display.phase(f"{stage.name} score", len(groups), "pairs") as tick:
            logps_P2, fitted = score(game.policy, groups, game.spin_plan(iteration), tick.advance)
        if not logps_P2.isfinite().all():
            first = int((~logps_P2.isfinite().all(1)).nonzero()[0])
            raise UserError(
                f"{stage.name}: pair {first} has log-probs {logps_P2[first].tolist()} under the opponent, expected "
                "finite ones; the adapter has diverged (lower train.lr) or the base's weights are damaged"
            )
        opponent = {"adapter": adapters.fingerprint(game.policy.adapter())}  # one entry: their order is not fixed
        scores = {"logps": logps_P2, "microbatch_tokens": torch.tensor(fitted.microbatch_tokens)}
        with files.replacing(stage.path("opponent_logps.safetensors")) as path:
            save_file(scores, path, metadata=opponent)


def train_policy(game: Game, stage: Stage, iteration: int) -> None:
    """Learn to tell real from generated. Before the first step the margin is 0 and the loss l(0), or it is a bug."""
    if stage.finished("train"):
        return
    groups = [pair.group for pair in read_pairs(stage.path("pairs.parquet"))]
    settings = game.config.spin
    scores = load_file(stage.path("opponent_logps.safetensors"))
    objective = Spin(
        opponent_logps=scores["logps"].to(game.policy.device),
        beta=at(settings.beta, iteration),
        kind=settings.loss,
        ops=game.policy.ops,
        scored_tokens=int(scores["microbatch_tokens"]),
    )
    identity = {"pairs": files.sha256(stage.path("pairs.parquet"))}
    optimise(game, stage, groups, objective, game.spin_plan(iteration), identity)


def warm_up(game: Game, stage: Stage) -> None:
    """Supervised fine-tuning on the real answers; SPIN starts from its result."""
    if not stage.finished("train"):
        groups = [Group(example.prompt_ids, (example.real_ids,)) for example in game.examples]
        optimise(game, stage, groups, Sft(), game.sft_plan(), identity={})


def optimise(
    game: Game, stage: Stage, groups: Sequence[Group], objective: Objective, plan: TrainPlan, identity: dict[str, str]
) -> None:
    """Train the adapter from the newest checkpoint to the end and save it; one metrics line per step."""
    settings, scaled = game.config.train, game.device.scaled_loss
    game.generator.rest()
    identity = identity | {"stage": stage.name, "basis": stage.basis("train")}
    identity |= {"config": game.config.hash(), "model": game.model.revision}
    saves, policy = stage.path("checkpoints"), game.policy
    state = start_training(policy, settings.optimizer, settings.weight_decay, scaled)
    rows = checkpoint.load_latest(saves, policy, state, identity)
    game.run.restore_metrics(stage.name, rows)
    if state.step:
        log.info("%s: training continues after step %d", stage.name, state.step)
    saved, saved_at = state.step, time.monotonic()

    def save() -> None:
        nonlocal saved, saved_at
        if saved < state.step:
            checkpoint.save(saves, policy, state, identity, rows)
        saved, saved_at = state.step, time.monotonic()

    with (
        finishing_steps(),
        stage.phase("train", "adapter", "train.json", "metrics.jsonl"),
        game.display.phase(f"{stage.name} train", plan.steps(len(groups)), "steps") as tick,
    ):
        tick.advance(state.step)
        try:
            for metrics in train(policy, groups, objective, plan, state, scaled):
                untouched = (rows[-1]["train/overflows"] if rows else 0) == state.step - 1  # all before were skipped
                if untouched and isinstance(objective, Spin):
                    check_first_loss(metrics, objective, game.device.dtype)
                rows.append(game.run.metrics(stage.name, "train", state.step, metrics))
                tick.advance(tokens=int(metrics["train/tokens"]), metrics=_shown(metrics))
                game.run.system(stage.name, "train", {"step": state.step, "tokens_per_second": tick.rate})
                due = state.step % settings.save_every_steps == 0
                if due or time.monotonic() - saved_at > settings.save_every_seconds:
                    save()
                stop_if_asked(save)
        except NonFinite as error:
            raise failed_step.keep(game, stage, groups, objective, error) from None
        checkpoint.finite_adapter(policy, state)
        files.write_directory(stage.path("adapter"), policy.save_adapter)
        files.write_json(stage.path("train.json"), summary(rows))
        files.write_text(stage.path("metrics.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))


def check_first_loss(metrics: dict[str, float], objective: Spin, dtype: torch.dtype) -> None:
    """The free invariant of self-play: the policy starts as its own opponent. A skipped step says nothing yet.

    Equal microbatches give equal log-probs; where memory made the step's smaller, they are equal to rounding only.
    """
    if not math.isfinite(metrics["train/loss"]):
        return
    expected = loss_at_zero_margin(objective.kind, objective.beta)
    bound = 1e-5 if dtype == torch.float32 else 1e-3
    if metrics["train/microbatch_tokens"] != objective.scored_tokens:
        bound *= 100
    if not abs(metrics["train/loss"] - expected) <= bound * max(1.0, expected):
        raise RuntimeError(
            f"the first loss is {metrics['train/loss']:.6f}, expected {expected:.6f} ± {bound:g}: policy and opponent "
            "differ before the first step. Usual causes: another adapter than the one that was scored, dropout left "
            "on, another chat template or packing between scoring and training. Delete opponent_logps.safetensors to "
            "score again; if it stays, please report it with the run's log.txt"
        )


def conclude(game: Game, stage: Stage, label: str | int, previous: Stage, opponent: Adapter) -> dict:
    """Evaluate the stage's adapter on held-out data and add its row to results.json."""
    if label == "base":
        game.run.forget_results()
    checkpoint.clear(stage.path("checkpoints"))
    if stage.path("metrics.jsonl").exists():
        game.run.restore_metrics(stage.name, files.read_jsonl(stage.path("metrics.jsonl")))
    game.policy.restore(adapters.load(stage.path("adapter")))
    if game.heldout and game.config.evaluate.problems and not stage.finished("evaluate"):
        with stage.phase("evaluate", *heldout.OUTPUTS):
            heldout.evaluate(game, stage, previous, opponent, at(game.config.spin.beta, stage.round))
    pairs = stage.path("pairs.parquet")
    row = {
        "iteration": label,
        "pairs": len(read_pairs(pairs)) if pairs.exists() else 0,
        "rejected": stage.read("rejected.json"),
        "train": stage.read("train.json"),
        "evaluation": stage.read("eval.json"),
        "seconds": stage.seconds(),
    }
    game.check_base()
    game.run.result(row)
    write_card(stage.path("adapter"), game.run.path, label)
    return row


def summary(rows: Sequence[dict]) -> dict[str, float]:
    """The training phase in a few figures, from its metrics lines; losses are those of steps that were made."""
    losses = [row["train/loss"] for row in rows if not isinstance(row["train/loss"], str)]  # "nan" was skipped
    last = rows[-1]
    names = [name for name in last if name.startswith("train/")]
    return {
        "steps": last["step"],
        "first_loss": losses[0],
        "last_loss": losses[-1],
        **{f"last/{name.removeprefix('train/')}": last[name] for name in names if name != "train/loss"},
    }


def _shown(metrics: dict[str, float]) -> str:
    parts = [f"loss {metrics['train/loss']:.4f}"]
    if "train/margin" in metrics:
        parts += [f"margin {metrics['train/margin']:.3f}", f"accuracy {metrics['train/pair_accuracy']:.2f}"]
    return "  ".join(parts)
