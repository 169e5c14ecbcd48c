"""Answers rated by the run's reward functions: those of a rollout, and greedy ones to held-out problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from spinfast import spread
from spinfast.advantages import advantages
from spinfast.config import Config
from spinfast.data.renderer import Renderer
from spinfast.errors import UserError
from spinfast.evaluate.selfplay import Metrics
from spinfast.evaluate.statistics import estimate
from spinfast.rewards import Batch, Rewards, Scores, TrainerState, load
from spinfast.types import Completion, Example

TRIED = 2  # prompts


def load_rewards(config: Config, *sets: Sequence[Example]) -> Rewards | None:
    """The reward functions of grpo, which must be able to rate these examples; None without that method."""
    if "grpo" not in config.method:
        return None
    rewards = load(config.grpo.rewards, timeout=config.grpo.reward_timeout, max_tokens=config.generation.max_tokens)
    for examples in filter(None, sets):
        rewards.check(column_names(examples))
    return rewards


def tried(config: Config, renderer: Renderer, rewards: Rewards, examples: Sequence[Example]) -> tuple[Scores, str]:
    """Every function called once, as on a rollout of the first TRIED prompts: what it gives each, and what was rated.

    An answer is the data's own, or where it has none the prompt's last words. Raises UserError where a function fails.
    """
    asked = [example for example in examples if example.messages][:TRIED]
    answered = all(example.real_ids for example in asked)
    what = "the data's own answers" if answered else "the prompts' own words (the data has no answers)"
    words = renderer.tokenizer([e.messages[-1]["content"] for e in asked], add_special_tokens=False).input_ids
    ids = [e.real_ids for e in asked] if answered else map(tuple, words)
    answers = [Completion(e.index, tokens, "stop") for e, tokens in zip(asked, ids, strict=True)]
    whole = [[each for each in part for _ in range(config.grpo.samples)] for part in (asked, answers)]
    try:
        scores = rewards.tried(batch(config, renderer, examples, *whole, TrainerState(0, config.grpo.steps, 0.0)))
    except UserError as error:
        raise UserError(f"{error}; tried before the run on {what}") from None
    values = {name: given[:: config.grpo.samples] for name, given in scores.values.items()}
    return replace(scores, values=values), what


def rated(run, examples: Sequence[Example], answers: Sequence[Completion], state: TrainerState) -> Scores:
    """What every function gives for every answer, by rank 0; `examples` has the example of each."""

    def rate() -> tuple[dict, dict, dict]:
        given = run.rewards(batch(run.config, run.session.machine.renderer, run.examples, examples, answers, state))
        return given.values, given.extra, given.metrics

    return Scores(*spread.told("rewards", rate))


def batch(
    config: Config,
    renderer: Renderer,
    data: Sequence[Example],
    examples: Sequence[Example],
    answers: Sequence[Completion],
    state: TrainerState,
) -> Batch:
    """Answers as reward functions get them: as the prompts of the run's `data` are, where the config leaves it open."""
    text = [renderer.text(answer.token_ids) for answer in answers]
    mode = config.grpo.completions
    if mode == "auto":
        mode = "messages" if any(map(has_turns, data)) else "text"
    if mode == "messages":
        prompts = [[dict(turn) for turn in example.messages] for example in examples]
        completions = [[{"role": "assistant", "content": words}] for words in text]
    else:
        own = [example.columns.get("prompt") for example in examples]
        last = [example.messages[-1]["content"] for example in examples]
        prompts = [prompt if isinstance(prompt, str) else words for prompt, words in zip(own, last, strict=True)]
        completions = text
    return Batch(prompts, completions, [list(answer.token_ids) for answer in answers], columns(examples), state)


def has_turns(example: Example) -> bool:
    """Whether its row has a conversation, which is what TRL gives reward functions messages for."""
    turns = (value[0] for value in example.columns.values() if isinstance(value, list) and value)
    return any(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns)


def columns(examples: Sequence[Example]) -> dict[str, list]:
    """The data's other columns, and the reference that evaluation compares with, where the data has no such column."""
    rows = [{"reference": example.reference, **example.columns} for example in examples]
    return {name: [row.get(name) for row in rows] for name in column_names(examples)}


def column_names(examples: Sequence[Example]) -> list[str]:
    """Their names."""
    reference = {"reference": None} if any(example.reference for example in examples) else {}
    return [*(dict.fromkeys(name for example in examples for name in example.columns) | reference)]


def reward_metrics(run, problems: Sequence[Example], answers: Sequence[Completion]) -> tuple[Metrics, np.ndarray]:
    """Held-out rewards of greedy answers with their standard errors, and their weighted sums (NaN: none applies)."""
    steps = run.config.grpo.steps  # schedules of rewards are at their end
    scores = rated(run, problems, answers, TrainerState(steps, steps, 0.0))
    sums = advantages({name: [given] for name, given in scores.values.items()}, run.rewards.weights).rewards[0]
    found = {"heldout/reward": sums.numpy()}
    found |= {f"heldout/rewards/{name}": np.array(given, dtype=float) for name, given in scores.values.items()}
    known = {name: values[~np.isnan(values)] for name, values in found.items()}
    return {name: estimate(values) for name, values in known.items() if len(values)}, found["heldout/reward"]
