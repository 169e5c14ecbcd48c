"""Functions of one sample as reward functions: the styles of verifiers and of verl."""

from __future__ import annotations

import asyncio
import copy
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from spinfast.rewards.contract import arguments, text_of, without


def per_sample(fn: Callable, **constants: Any) -> Callable:
    """A reward function that calls fn once per completion, with the arguments that fn names.

    fn may name prompt, completion (a string or messages, as the batch has them), completion_ids, trainer_state, any
    column of the data, and any of `constants` (a parser, say). As in verifiers: state (a dict of what the sample has),
    task ("default"), info ({}). As in verl: solution_str (the completion's text), ground_truth (else that of the
    column reward_model), extra_info ({}). It may be async, and may return a dict: "score", the rest is logged.
    """
    return _PerSample(fn, constants)


class _PerSample:
    def __init__(self, fn: Callable, constants: Mapping[str, Any]):
        self.fn, self.constants = fn, constants
        self.accepted, self.required = arguments(fn)

    def lacks(self, columns: Collection[str]) -> str | None:
        """What fn needs and neither the data nor the trainer gives; None where it has all."""
        there = {"prompt", "completion", "completion_ids", "trainer_state", "solution_str", *_DEFAULTS, *self.constants}
        there |= {"ground_truth"} if "reward_model" in columns else set()
        return without(self.required - there, columns)

    def __call__(self, prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns):
        rows = [
            self._named(
                {
                    **copy.deepcopy(_DEFAULTS),
                    **{name: values[i] for name, values in columns.items()},
                    "prompt": prompts[i],
                    "completion": completions[i],
                    "completion_ids": completion_ids[i],
                    "trainer_state": trainer_state,
                }
            )
            for i in range(len(completions))
        ]
        results = [self.fn(**row) for row in rows]
        if any(map(inspect.isawaitable, results)):
            return self._awaited(results, log_extra)
        return _scores(results, log_extra)

    def _named(self, sample: dict[str, Any]) -> dict[str, Any]:
        """fn's arguments of one sample."""
        sample["solution_str"] = text_of(sample["completion"])
        if "ground_truth" not in sample and isinstance(sample.get("reward_model"), Mapping):
            sample["ground_truth"] = sample["reward_model"].get("ground_truth")
        sample["state"] = dict(sample)
        sample |= self.constants
        return sample if self.accepted is None else {n: v for n, v in sample.items() if n in self.accepted}

    async def _awaited(self, results: list, log_extra: Callable) -> list:
        return _scores(await asyncio.gather(*results), log_extra)


_DEFAULTS: dict[str, Any] = {"task": "default", "info": {}, "extra_info": {}, "state": {}}


def _scores(results: list, log_extra: Callable) -> list:
    """The numbers of the results; what a dict has beside its score goes to log_extra, None where others have it."""
    dicts = [result if isinstance(result, Mapping) else {"score": result} for result in results]
    for name in dict.fromkeys(name for each in dicts for name in each if name != "score"):
        log_extra(name, [each.get(name) for each in dicts])
    return [each["score"] for each in dicts]
