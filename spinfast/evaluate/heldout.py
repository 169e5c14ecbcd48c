"""One look at held-out problems after a round: greedy answers scored, and the game played on fresh samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from spinfast import spread
from spinfast.evaluate import game, stopping
from spinfast.evaluate.preferences import (
    likelihood_metrics,
    preference_metrics,
    ranking_metrics,
    unpaired_metrics,
)
from spinfast.evaluate.references import ACCURACY, score
from spinfast.evaluate.rewarded import reward_metrics
from spinfast.evaluate.selfplay import Metrics
from spinfast.evaluate.statistics import estimate
from spinfast.generation import prompt_seed
from spinfast.interrupt import stop_if_asked
from spinfast.objectives import Pairwise, Preference, Unpaired
from spinfast.scoring import as_step, sequence_logps
from spinfast.store import files
from spinfast.store.record import RunDir, Stage
from spinfast.types import Adapter, Completion, Example, Group, Request, Sampling

log = logging.getLogger("spinfast")
REWARD = "reward"
LOGPS = "heldout_logps.safetensors"
SAMPLES = "heldout_samples.jsonl"
OUTPUTS = ("heldout.jsonl", SAMPLES, LOGPS, "eval.json")


def evaluate(
    run,
    stage: Stage,
    previous: Stage,
    opponent: Adapter,
    objective: Pairwise,
    judged: tuple[Preference | Unpaired, Sequence[Group]] | None = None,
) -> None:
    """Write OUTPUTS for the policy as it stands; `opponent` is the adapter that the stage started from.

    SPIN plays its game on held-out prompts; the base stage plays itself: previous is its own stage, pair accuracy 0.5,
    margin 0. Without pairs to play there are no samples and no log-probs of them. Elsewhere the data's own answers are
    scored, and where `judged` says how, their preferences.
    """
    settings, generation, session, metrics = run.config.evaluate, run.config.generation, run.session, {}
    text = session.machine.renderer.text
    problems = answered(run)
    players = [example for example in run.heldout if example.wanted][: settings.pairs]
    if plays := "spin" in run.config.method:
        players = playable(players)
    greedy = problems, session.sampling(0.0, settings.max_tokens)
    drawn = players if plays else [], session.sampling(generation.temperature, generation.max_tokens)
    answers, samples = draw(run, stage, run.policy.adapter(), greedy, drawn)
    if problems:
        scores = verdict(problems, answers, text)
        metrics |= accuracies(scores)
        paid = None
        if run.rewards:
            found, paid = reward_metrics(run, problems, answers)
            metrics |= found
        write_transcripts(stage, problems, answers, scores, text, paid)
    if samples:
        rows = [{"index": c.index, "token_ids": c.token_ids, "finish_reason": c.finish_reason} for c in samples]
        files.write_text(stage.path(SAMPLES), files.jsonl(rows))
        if spread.told("the opponent's samples: there?", previous.path(SAMPLES).exists):
            rivals = read_samples(previous)
        else:  # the last iteration was not looked at
            (rivals,) = draw(run, stage, opponent, drawn, of=previous)
        metrics |= play(run, stage, previous, players, samples, rivals, opponent, objective)
    elif players:
        metrics |= likelihood(run, stage, players)
    if settings.pairs and judged is not None and judged[1]:
        metrics |= judge(run, stage, *judged)
    files.write_json(stage.path("eval.json"), metrics)


def asked(examples: Sequence[Example]) -> list[Example]:
    """Those that have a question: plain text has none."""
    return [example for example in examples if example.messages]


def answered(run) -> list[Example]:
    """The held-out problems that are answered."""
    problems = [example for example in asked(run.heldout) if example.desirable is not False]
    return problems[: run.config.evaluate.problems]


def playable(examples: Sequence[Example]) -> list[Example]:
    """Those that are one prompt and one answer, as SPIN plays them."""
    return [example for example in asked(examples) if example.scored is None]


def likelihood(run, stage: Stage, players: Sequence[Example]) -> Metrics:
    """The data's answers under the policy, and beside the base's; of ranked ones who is likelier."""
    groups = [example.group for example in players]
    ranked = [example.ranked for example in players if example.others]
    with run.display.phase(f"{stage.name} score held-out", len(groups) + len(ranked), "rows") as tick:
        logps = np.array(sequence_logps(run.policy, groups, run.budget, tick.advance))[:, 0]
        of_ranked = sequence_logps(run.policy, ranked, run.budget, tick.advance)
    with files.replacing(stage.path(LOGPS)) as beside:
        save_file({"policy.real": torch.from_numpy(logps)}, beside)
    base = None
    if stage.method != "base":
        base = load_file(run.directory.path / "base" / LOGPS)["policy.real"].numpy()
    metrics = likelihood_metrics(logps, [group.lengths[0] for group in groups], base)
    if ranked:
        metrics |= ranking_metrics(ranked, of_ranked)
    return metrics


def judge(run, stage: Stage, objective: Preference | Unpaired, groups: Sequence[Group]) -> Metrics:
    """Held-out preferences."""
    with run.display.phase(f"{stage.name} judge held-out", len(groups), "rows") as tick:
        objective, groups, logps = as_step(run.policy, objective, groups, run.budget, tick.advance)
    return (preference_metrics if isinstance(objective, Preference) else unpaired_metrics)(objective, groups, logps)


def verdict(
    problems: Sequence[Example], answers: Sequence[Completion], text: Callable[[Sequence[int]], str]
) -> list[dict[str, float]]:
    """The scores of each answer by reading; none where its problem has no reference."""
    return [
        {} if e.reference is None else score(text(answer.token_ids), e.reference, e.answer)
        for e, answer in zip(problems, answers, strict=True)
    ]


def accuracies(scores: Sequence[dict[str, float]]) -> Metrics:
    """Their means."""
    found = {name: [each[reading] for each in scores if reading in each] for reading, name in ACCURACY.items()}
    return {name: estimate(np.array(values)) for name, values in found.items() if values}


def write_transcripts(
    stage: Stage,
    problems: Sequence[Example],
    answers: Sequence[Completion],
    scores: Sequence[dict[str, float]],
    text: Callable[[Sequence[int]], str],
    rewards: Sequence[float] | None = None,
) -> None:
    """`rewards` has what each answer was paid, NaN where no function applies."""
    transcripts = [
        {
            "index": example.index,
            "prompt": list(example.messages),
            "real": example.answer,
            "reference": example.reference,
            "text": text(completion.token_ids),
            "scores": found,
            "finish_reason": completion.finish_reason,
            "tokens": len(completion.token_ids),
        }
        for example, completion, found in zip(problems, answers, scores, strict=True)
    ]
    for line, reward in zip(transcripts, () if rewards is None else rewards, strict=False):
        line["reward"] = None if np.isnan(reward) else float(reward)
    files.write_text(stage.path("heldout.jsonl"), files.jsonl(transcripts))


def play(
    run,
    stage: Stage,
    previous: Stage,
    players: Sequence[Example],
    samples: Sequence[Completion],
    rivals: Sequence[Completion],
    opponent: Adapter,
    objective: Pairwise,
) -> Metrics:
    """Score real answers, the opponent's samples (rivals) and the policy's own, as far as the last look did not."""
    sides = {"real": [e.real_ids for e in players]}
    sides |= {"rival": [c.token_ids for c in rivals], "sample": [c.token_ids for c in samples]}
    columns, keys = game.scored(
        run.policy,
        opponent,
        [e.prompt_ids for e in players],
        sides,
        run.budget,
        game.Known(previous.path(LOGPS)),
        partial(run.display.phase, f"{stage.name} score held-out"),
    )
    game.write(stage.path(LOGPS), columns, keys)
    return game.metrics(columns, players, samples, rivals, objective)


def draw(
    run, stage: Stage, adapter: Adapter, *asked: tuple[Sequence[Example], Sampling], of: Stage | None = None
) -> list[list[Completion]]:
    """For each (examples, how they are answered) the answers in their order, all of them drawn in one batch.

    Answers to one prompt stand side by side, so that they share its keys and values. `of`: the stage whose adapter
    answers, where it is another.
    """
    of = of or stage
    wanted = sorted(
        ((example, kind) for kind, (examples, _) in enumerate(asked) for example in examples),
        key=lambda each: (each[0].index, each[1]),
    )
    seeds = [prompt_seed(run.config.seed, of.number, e.index, f"heldout {of.name}") for e, _ in wanted]
    requests = [Request(e.index, e.prompt_ids, seed, kind) for (e, kind), seed in zip(wanted, seeds, strict=True)]
    answers = {}
    if not requests:
        return [[] for _ in asked]
    with run.display.phase(f"{stage.name} evaluate", len(requests), "answers") as tick:
        for completion in run.generate(requests, [asked[kind][1] for _, kind in wanted], adapter):
            answers[completion.index, completion.sample] = completion
            tick.advance(tokens=len(completion.token_ids))
            stop_if_asked()
    return [[answers[example.index, kind] for example in examples] for kind, (examples, _) in enumerate(asked)]


def verdicts(played: Sequence[Stage]) -> list[list[float]]:
    """By stage, a number per held-out problem: the greedy answers' rewards where the run has such, else 1 or 0 by their
    strict scores, or by the flexible ones where no problem has a strict verdict or no stage a strict success.

    A reward of which all are 0 says nothing either. Empty without references and rewards.
    """
    paths = [stage.path("heldout.jsonl") for stage in played]
    told = [
        [row["scores"] | {REWARD: row.get("reward")} for row in files.read_jsonl(path)] if path.exists() else []
        for path in paths
    ]
    readings = {
        name: [[each[name] for each in of_stage if each.get(name) is not None] for of_stage in told]
        for name in (REWARD, *ACCURACY)
    }
    return readings[stopping.telling(readings) or REWARD]


def looked_at(played: Sequence[Stage]) -> tuple[list[Stage], list[list[float]]]:
    """The stages that have verdicts, and those."""
    looks = [look for look in zip(played, verdicts(played), strict=True) if look[1]]
    return [stage for stage, _ in looks], [found for _, found in looks]


def stop_reason(played: Sequence[Stage], patience: int) -> str | None:
    """Why to play no further iteration, or None. Stages that were not looked at do not count."""
    stages, results = looked_at(played)
    if not patience or not results:
        return None
    numbers = [stage.number for stage in stages if stage.method == played[-1].method]
    before = [stage.method for stage in stages if stage.method != played[-1].method]
    starts = ["the base" if method == "base" else method.upper() for method in before]
    return stopping.stop_reason(results, patience, starts=starts, numbers=numbers)


def keep_best(run: RunDir, played: Sequence[Stage]) -> None:
    """Name the stage with the best held-out verdicts in best.json; the last one where these do not tell."""
    stages, results = looked_at(played)
    told = stopping.apart(results)
    name = stages[stopping.kept(results)].name if told else played[-1].name
    best = {"stage": name, "adapter": f"{name}/adapter", "of": [stage.name for stage in played]}
    files.write_json(run.path / "best.json", best)
    why = "by held-out problems" if told else "the last stage" + ": all did equally well" * bool(results)
    log.info("best: %s, %s", best["adapter"], why)


def read_samples(stage: Stage) -> list[Completion]:
    return [
        Completion(row["index"], tuple(row["token_ids"]), row["finish_reason"])
        for row in files.read_jsonl(stage.path(SAMPLES))
    ]
