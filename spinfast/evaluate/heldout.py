"""One look at held-out problems after a round: greedy answers scored, and the game played on fresh samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from spinfast.evaluate import stopping
from spinfast.evaluate.preferences import (
    likelihood_metrics,
    preference_metrics,
    ranking_metrics,
    unpaired_metrics,
)
from spinfast.evaluate.references import ACCURACY, score
from spinfast.evaluate.rewarded import reward_metrics
from spinfast.evaluate.selfplay import (
    Metrics,
    fresh_opponent_metrics,
    generation_metrics,
    kl_metrics,
    log_ratios,
    selfplay_metrics,
)
from spinfast.evaluate.statistics import estimate
from spinfast.generation import prompt_seed
from spinfast.interrupt import stop_if_asked
from spinfast.objectives import Pairwise, Preference, Unpaired
from spinfast.policy import Policy
from spinfast.store import files
from spinfast.store.record import RunDir, Stage
from spinfast.train import Budget, as_step, logps_in_cut, sequence_logps, with_room, within_memory
from spinfast.types import Adapter, Completion, Example, Group, Request, Sampling

log = logging.getLogger("spinfast")
LOGPS = "heldout_logps.safetensors"
OUTPUTS = ("heldout.jsonl", "heldout_samples.jsonl", LOGPS, "eval.json")


def evaluate(
    run,
    stage: Stage,
    previous: Stage,
    opponent: Adapter,
    game: Pairwise,
    judged: tuple[Preference | Unpaired, Sequence[Group]] | None = None,
) -> None:
    """Write OUTPUTS for the policy as it stands; `opponent` is the adapter that the stage started from.

    SPIN plays its game on held-out prompts; the base stage plays itself: previous is its own stage, pair accuracy 0.5,
    margin 0. Without pairs to play there are no samples and no log-probs of them. Elsewhere the data's own answers are
    scored, and where `judged` says how, their preferences.
    """
    settings, session, metrics = run.config.evaluate, run.session, {}
    text = session.machine.renderer.text
    problems = answered(run)
    players = [example for example in run.heldout if example.wanted][: settings.pairs]
    if problems:
        answers = draw(run, stage, problems, session.sampling(0.0, settings.max_tokens))
        scores = verdict(problems, answers, text)
        write_transcripts(stage, problems, answers, scores, text)
        metrics |= accuracies(scores)
        if run.rewards:
            metrics |= reward_metrics(run, problems, answers)[0]
    if "spin" in run.config.method and (players := playable(players)):
        generation = run.config.generation
        sampling = session.sampling(generation.temperature, generation.max_tokens)
        samples = draw(run, stage, players, sampling)
        rows = [{"index": c.index, "token_ids": c.token_ids, "finish_reason": c.finish_reason} for c in samples]
        files.write_text(stage.path("heldout_samples.jsonl"), files.jsonl(rows))
        rivals = read_samples(previous)
        alone = stage.method == "base" and session.machine.start is None
        metrics |= play(run.policy, run.budget, stage, players, samples, rivals, None if alone else opponent, game)
    elif players:
        metrics |= likelihood(run, stage, players)
    if settings.pairs and judged is not None and judged[1]:
        metrics |= judge(run, *judged)
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
    logps = np.array(sequence_logps(run.policy, groups, run.budget))[:, 0]
    save_file({"policy.real": torch.from_numpy(logps)}, stage.path(LOGPS))
    base = load_file(run.directory.path / "base" / LOGPS)["policy.real"].numpy()
    metrics = likelihood_metrics(
        logps, [group.lengths[0] for group in groups], None if stage.method == "base" else base
    )
    if ranked := [example.ranked for example in players if example.others]:
        metrics |= ranking_metrics(ranked, sequence_logps(run.policy, ranked, run.budget))
    return metrics


def judge(run, objective: Preference | Unpaired, groups: Sequence[Group]) -> Metrics:
    """Held-out preferences."""
    objective, groups, logps = as_step(run.policy, objective, groups, run.budget)
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
) -> None:
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
    files.write_text(stage.path("heldout.jsonl"), files.jsonl(transcripts))


def play(
    policy: Policy,
    budget: Budget,
    stage: Stage,
    players: Sequence[Example],
    samples: Sequence[Completion],
    rivals: Sequence[Completion],
    opponent: Adapter | None,
    game: Pairwise,
) -> Metrics:
    """Score real answers, the opponent's samples (rivals) and the policy's own under policy, opponent and base.

    Without an opponent the policy is the base.
    """
    groups = [Group(e.prompt_ids, (e.real_ids, c.token_ids)) for e, c in zip(players, samples, strict=True)]
    groups += [Group(e.prompt_ids, (c.token_ids,)) for e, c in zip(players, rivals, strict=True)]
    budget = with_room(budget, groups)
    scored, _ = within_memory(budget, groups, partial(score_players, policy, groups, opponent))
    sides = {"real": [e.real_ids for e in players], "sample": [c.token_ids for c in samples]}
    sides["rival"] = [c.token_ids for c in rivals]
    columns = {who: answer_columns(groups, logps, players, sides) for who, logps in scored.items()}
    own, before, base = columns["policy"], columns["opponent"], columns.get("base")
    arrays = {f"{who}.{what}": torch.from_numpy(x) for who, has in columns.items() for what, x in has.items()}
    save_file(arrays, stage.path(LOGPS))
    real_lengths = [len(e.real_ids) for e in players]
    sample_lengths = [len(c.token_ids) for c in samples]
    metrics = selfplay_metrics(
        own["real"],
        own["rival"],
        before["real"],
        before["rival"],
        real_lengths,
        [len(c.token_ids) for c in rivals],
        game.beta,
        game.kind,
        base_real_logps=base["real"] if base else None,
        base_generated_logps=base["rival"] if base else None,
    )
    ended = [c.finish_reason == "stop" for c in samples]
    metrics |= generation_metrics([c.token_ids for c in samples], real_lengths, ended)
    metrics |= fresh_opponent_metrics(
        log_ratios(own["real"], before["real"]),
        log_ratios(own["sample"], before["sample"]),
        real_lengths,
        sample_lengths,
        [True] * len(players),
        ended,
    )
    return metrics | (kl_metrics(own["sample"], base["sample"], sample_lengths) if base else {})


def answer_columns(
    groups: Sequence[Group],
    logps: Sequence[Sequence[float]],
    players: Sequence[Example],
    sides: Mapping[str, Sequence[tuple[int, ...]]],
) -> dict[str, np.ndarray]:
    """side -> log-prob of its answer to each player; equal answers have one, or rounding would tell them apart."""
    known: dict[tuple, float] = {}
    for group, sums in zip(groups, logps, strict=True):
        for answer, value in zip(group.answers, sums, strict=True):
            known.setdefault((group.prompt_ids, answer), value)
    return {
        side: np.array([known[e.prompt_ids, answer] for e, answer in zip(players, answers, strict=True)])
        for side, answers in sides.items()
    }


def score_players(
    policy: Policy, groups: Sequence[Group], opponent: Adapter | None, budget: Budget
) -> dict[str, list[list[float]]]:
    """Log-probs of the groups under policy, opponent and, where it is still there, base: all in one cut.

    They are compared, and another cut rounds otherwise. Without an opponent the policy is the base, which plays
    itself and is scored once.
    """
    parts = {"policy": nullcontext, "opponent": partial(policy.playing, opponent)}
    if not policy.folded:
        parts["base"] = policy.base_only
    if opponent is None:
        return dict.fromkeys(parts, logps_in_cut(policy, groups, budget))
    scored = {}
    for who, playing in parts.items():
        with playing():
            scored[who] = logps_in_cut(policy, groups, budget)
    return scored


def draw(run, stage: Stage, examples: Sequence[Example], sampling: Sampling) -> list[Completion]:
    """One completion per example, in their order."""
    requests = [
        Request(e.index, e.prompt_ids, prompt_seed(run.config.seed, stage.number, e.index, f"heldout {stage.name}"))
        for e in examples
    ]
    answers = {}
    with run.display.phase(f"{stage.name} evaluate", len(requests), "answers") as tick:
        for completion in run.generator.generate(requests, sampling, run.policy.adapter()):
            answers[completion.index] = completion
            tick.advance(tokens=len(completion.token_ids))
            stop_if_asked()
    return [answers[example.index] for example in examples]


def verdicts(played: Sequence[Stage]) -> list[list[float]]:
    """By stage, 1 or 0 per held-out problem: the greedy answers' strict scores, or the flexible ones where no problem
    has a strict verdict or no stage a strict success; empty without references."""
    paths = [stage.path("heldout.jsonl") for stage in played]
    scores = [[row["scores"] for row in files.read_jsonl(path)] if path.exists() else [] for path in paths]
    readings = [[[s[reading] for s in of_stage if reading in s] for of_stage in scores] for reading in ACCURACY]
    return next((r for r in readings if any(map(any, r))), next((r for r in readings if any(r)), [[] for _ in played]))


def stop_reason(played: Sequence[Stage], patience: int) -> str | None:
    """Why to play no further iteration, or None."""
    results = verdicts(played)
    if not patience or not results[0]:
        return None
    before = [stage.method for stage in played if stage.method != played[-1].method]
    starts = ["the base" if method == "base" else method.upper() for method in before]
    return stopping.stop_reason(results, patience, starts=starts)


def keep_best(run: RunDir, played: Sequence[Stage]) -> None:
    """Name the stage with the highest held-out accuracy in best.json; the last one without held-out problems."""
    results = verdicts(played)
    position = stopping.kept(results) if results[0] else len(played) - 1
    best = {"stage": played[position].name, "adapter": f"{played[position].name}/adapter"}
    files.write_json(run.path / "best.json", best | {"of": [stage.name for stage in played]})
    log.info("best: %s, %s", best["adapter"], "by held-out accuracy" if results[0] else "the last stage")


def read_samples(stage: Stage) -> list[Completion]:
    return [
        Completion(row["index"], tuple(row["token_ids"]), row["finish_reason"])
        for row in files.read_jsonl(stage.path("heldout_samples.jsonl"))
    ]
