"""One look at held-out problems after a round: greedy answers scored, and the game played on fresh samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from safetensors.torch import save_file

from spinfast.evaluate import stopping
from spinfast.evaluate.answers import score_gsm8k
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
from spinfast.store import files
from spinfast.store.record import RunDir, Stage
from spinfast.train import TrainPlan, logps_as_planned, within_memory
from spinfast.types import Adapter, Completion, Example, Group, Request, Sampling

OUTPUTS = ("heldout.jsonl", "heldout_samples.jsonl", "heldout_logps.safetensors", "eval.json")


def evaluate(game, stage: Stage, previous: Stage, opponent: Adapter, beta: float) -> None:
    """Write OUTPUTS for the policy as it stands; `opponent` is the adapter that the round started from.

    The base plays itself: previous is its own stage, pair accuracy 0.5, margin 0.
    Without pairs to play there are no samples and no log-probs of them.
    """
    settings = game.config.evaluate
    metrics = greedy_metrics(game, stage, game.heldout[: settings.problems])
    if players := game.heldout[: settings.pairs]:
        sampling = game.sampling(game.config.generation.temperature, game.config.generation.max_tokens)
        samples = draw(game, stage, players, sampling)
        rows = [{"index": c.index, "token_ids": c.token_ids, "finish_reason": c.finish_reason} for c in samples]
        files.write_text(stage.path("heldout_samples.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
        metrics |= play(game, stage, players, samples, read_samples(previous), opponent, beta)
    files.write_json(stage.path("eval.json"), metrics)


def greedy_metrics(game, stage: Stage, problems: Sequence[Example]) -> Metrics:
    """Answer greedily, write the transcripts, score those that have a reference."""
    answers = draw(game, stage, problems, game.sampling(0.0, game.config.evaluate.max_tokens))
    transcripts, strict, flexible = [], [], []
    for example, completion in zip(problems, answers, strict=True):
        text = game.renderer.text(completion.token_ids)
        scores = {} if example.reference is None else score_gsm8k(text, example.reference)
        if scores:
            strict.append(scores["exact_match,strict-match"])
            flexible.append(scores["exact_match,flexible-extract"])
        transcripts.append(
            {
                "index": example.index,
                "prompt": list(example.messages),
                "real": example.answer,
                "reference": example.reference,
                "text": text,
                "scores": scores,
                "finish_reason": completion.finish_reason,
                "tokens": len(completion.token_ids),
            }
        )
    files.write_text(stage.path("heldout.jsonl"), "".join(json.dumps(row) + "\n" for row in transcripts))
    if not strict:
        return {}
    return {
        "heldout/accuracy_strict": estimate(np.array(strict)),
        "heldout/accuracy_flexible": estimate(np.array(flexible)),
    }


def play(
    game,
    stage: Stage,
    players: Sequence[Example],
    samples: Sequence[Completion],
    rivals: Sequence[Completion],
    opponent: Adapter,
    beta: float,
) -> Metrics:
    """Score real answers, the opponent's samples (rivals) and the policy's own under policy, opponent and base."""
    groups = [Group(e.prompt_ids, (e.real_ids, c.token_ids)) for e, c in zip(players, samples, strict=True)]
    groups += [Group(e.prompt_ids, (c.token_ids,)) for e, c in zip(players, rivals, strict=True)]
    plan = TrainPlan(len(groups), game.microbatch_tokens, epochs=1, seed=0, attention=game.device.attention, lr=0.0)
    scored, _ = within_memory(plan, groups, partial(score_players, game, stage, groups, opponent))
    sides = {"real": [e.real_ids for e in players], "sample": [c.token_ids for c in samples]}
    sides["rival"] = [c.token_ids for c in rivals]
    columns = {who: answer_columns(groups, logps, players, sides) for who, logps in scored.items()}
    policy, before, base = columns["policy"], columns["opponent"], columns.get("base")
    arrays = {f"{who}.{what}": torch.from_numpy(x) for who, has in columns.items() for what, x in has.items()}
    save_file(arrays, stage.path("heldout_logps.safetensors"))
    real_lengths = [len(e.real_ids) for e in players]
    sample_lengths = [len(c.token_ids) for c in samples]
    metrics = selfplay_metrics(
        policy["real"],
        policy["rival"],
        before["real"],
        before["rival"],
        real_lengths,
        [len(c.token_ids) for c in rivals],
        beta,
        game.config.spin.loss,
        base_real_logps=base["real"] if base else None,
        base_generated_logps=base["rival"] if base else None,
    )
    ended = [c.finish_reason == "stop" for c in samples]
    metrics |= generation_metrics([c.token_ids for c in samples], real_lengths, ended)
    metrics |= fresh_opponent_metrics(
        log_ratios(policy["real"], before["real"]),
        log_ratios(policy["sample"], before["sample"]),
        real_lengths,
        sample_lengths,
        [True] * len(players),
        ended,
    )
    return metrics | (kl_metrics(policy["sample"], base["sample"], sample_lengths) if base else {})


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
    game, stage: Stage, groups: Sequence[Group], opponent: Adapter, plan: TrainPlan
) -> dict[str, list[list[float]]]:
    """Log-probs of the groups under policy, opponent and, where it is still there, base: all in one cut.

    They are compared, and another cut rounds otherwise. The base plays itself, so it is scored once.
    """
    policy = game.policy
    parts = {"policy": nullcontext, "opponent": partial(policy.playing, opponent)}
    if not policy.folded:
        parts["base"] = policy.base_only
    if stage.name == "base":
        return dict.fromkeys(parts, logps_as_planned(policy, groups, plan))
    scored = {}
    for who, playing in parts.items():
        with playing():
            scored[who] = logps_as_planned(policy, groups, plan)
    return scored


def draw(game, stage: Stage, examples: Sequence[Example], sampling: Sampling) -> list[Completion]:
    """One completion per example, in their order."""
    requests = [
        Request(e.index, e.prompt_ids, prompt_seed(game.config.seed, stage.round, e.index, f"heldout {stage.name}"))
        for e in examples
    ]
    answers = {}
    with game.display.phase(f"{stage.name} evaluate", len(requests), "answers") as tick:
        for completion in game.generator.generate(requests, sampling, game.policy.adapter()):
            answers[completion.index] = completion
            tick.advance(tokens=len(completion.token_ids))
            stop_if_asked()
    return [answers[example.index] for example in examples]


def verdicts(stage: Stage) -> list[float]:
    """1 or 0 per held-out problem: the strict score of the greedy answer; empty without references."""
    path = stage.path("heldout.jsonl")
    rows = files.read_jsonl(path) if path.exists() else []
    return [row["scores"]["exact_match,strict-match"] for row in rows if row["scores"]]


def stop_reason(played: Sequence[Stage], patience: int) -> str | None:
    """Why to play no further iteration, or None."""
    results = [verdicts(stage) for stage in played]
    if not patience or not results[0]:
        return None
    starts = ("the base", "SFT")[: sum(stage.name in ("base", "sft") for stage in played)]
    return stopping.stop_reason(results, patience, starts=starts)


def keep_best(run: RunDir, played: Sequence[Stage]) -> None:
    """Name the stage with the highest held-out accuracy in best.json; the last one without held-out problems."""
    results = [verdicts(stage) for stage in played]
    position = stopping.best(results) if results[0] else len(played) - 1
    files.write_json(
        run.path / "best.json", {"stage": played[position].name, "adapter": f"{played[position].name}/adapter"}
    )


def read_samples(stage: Stage) -> list[Completion]:
    return [
        Completion(row["index"], tuple(row["token_ids"]), row["finish_reason"])
        for row in files.read_jsonl(stage.path("heldout_samples.jsonl"))
    ]
