"""Answers rated by the run's reward functions: those of a rollout, and greedy ones to held-out problems."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spinfast.config import Config
from spinfast.evaluate.selfplay import Metrics
from spinfast.evaluate.statistics import estimate
from spinfast.rewards import Batch, Rewards, Scores, TrainerState, load
from spinfast.types import Completion, Example


def load_rewards(config: Config, *sets: Sequence[Example]) -> Rewards | None:
    """The reward functions of grpo, which must be able to rate these examples; None without that method."""
    if "grpo" not in config.method:
        return None
    rewards = load(config.grpo.rewards, timeout=config.grpo.reward_timeout, max_tokens=config.generation.max_tokens)
    for examples in filter(None, sets):
        rewards.check(column_names(examples))
    return rewards


def rated(run, examples: Sequence[Example], answers: Sequence[Completion], state: TrainerState) -> Scores:
    """What every function gives for every answer; `examples` has the example of each."""
    text = [run.session.machine.renderer.text(answer.token_ids) for answer in answers]
    mode = run.config.grpo.completions
    if mode == "auto":
        mode = "text" if all(isinstance(example.columns.get("prompt"), str) for example in examples) else "messages"
    if mode == "messages":
        prompts = [[dict(turn) for turn in example.messages] for example in examples]
        completions = [[{"role": "assistant", "content": words}] for words in text]
    else:
        prompts = [example.columns.get("prompt", example.messages[-1]["content"]) for example in examples]
        completions = text
    ids = [list(answer.token_ids) for answer in answers]
    return run.rewards(Batch(prompts, completions, ids, columns(examples), state))


def columns(examples: Sequence[Example]) -> dict[str, list]:
    """The data's other columns, and the reference that evaluation compares with, where the data has no such column."""
    own = {"reference": [example.reference for example in examples]}
    return {name: own.get(name) or [e.columns.get(name) for e in examples] for name in column_names(examples)}


def column_names(examples: Sequence[Example]) -> list[str]:
    """Their names."""
    names = dict.fromkeys(name for example in examples for name in example.columns)
    return [*names, *(["reference"] if "reference" not in names and any(e.reference for e in examples) else [])]


def totals(run, scores: Scores) -> list[float | None]:
    """The weighted sum of each answer's rewards; None where no function applies."""
    weights = dict(zip(run.rewards.names, run.rewards.weights, strict=True))
    rows = zip(
        *([value and weights[name] * value for value in values] for name, values in scores.values.items()), strict=True
    )
    return [sum(known) if (known := [value for value in row if value is not None]) else None for row in rows]


def reward_metrics(
    run, problems: Sequence[Example], answers: Sequence[Completion], step: int = 0
) -> tuple[Metrics, list]:
    """Held-out rewards of greedy answers with their standard errors, and each answer's weighted sum."""
    scores = rated(run, problems, answers, TrainerState(step, run.config.grpo.steps, 0.0))
    sums = totals(run, scores)
    known = {"heldout/reward": sums, **{f"heldout/rewards/{name}": values for name, values in scores.values.items()}}
    known = {name: [value for value in values if value is not None] for name, values in known.items()}
    return {name: estimate(np.array(values, dtype=float)) for name, values in known.items() if values}, sums
