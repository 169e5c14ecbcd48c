"""Run tasks on a model: prompts in, verdicts out, results under the lm-evaluation-harness's names.

Generation goes through the run's own generator, likelihoods through the packed forward and the one-sweep head;
choices that share a prompt share its tokens in the packed row too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spinfast.data.renderer import plain_ids
from spinfast.evaluate.answers import SCORERS
from spinfast.evaluate.statistics import estimate
from spinfast.evaluate.tasks import Row, Task, cut, introductions
from spinfast.generation import prompt_seed
from spinfast.types import Completion, Group, Request, Sampling

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Engine:
    """What a benchmark needs of a model."""

    tokenizer: object
    render: Callable[[Sequence[dict[str, str]]], Ids]  # the chat template, generation prompt included
    generate: Callable[[Sequence[Request], Sampling], Iterable[Completion]]
    sequence_logps: Callable[[list[Group]], list[list[float]]]
    stop_ids: Ids
    max_length: int  # tokens of the context
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)  # system turn and template variables among them

    def conversation(self, turns: Sequence[dict[str, str]]) -> list[dict[str, str]]:
        """The turns after the system turn that there is, unless they have their own."""
        system = self.settings.get("system")
        return [{"role": "system", "content": system}, *turns] if system and turns[0]["role"] != "system" else [*turns]

    def prompt_ids(self, turns: Sequence[dict[str, str]]) -> Ids:
        return self.render(self.conversation(turns))

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def ids(self, text: str) -> Ids:
        """Of plain text, or of a rendered template, which writes its own begin-of-text token."""
        return plain_ids(self.tokenizer, text)


@dataclass(frozen=True)
class Result:
    """One task's outcome: scores[metric][item] and, beside them, what was seen."""

    task: Task
    scores: dict[str, list[float]]
    samples: list[dict]

    def summary(self) -> dict[str, float | str]:
        """{"alias", "METRIC,FILTER": value, "METRIC_stderr,FILTER": standard error} as the harness writes it."""
        entry: dict[str, float | str] = {"alias": self.task.name}
        for name, values in self.scores.items():
            metric, _, filtered = name.partition(",")
            mean = estimate(values)
            entry[name] = mean["value"]
            entry[f"{metric}_stderr,{filtered}"] = "N/A" if mean["stderr"] is None else mean["stderr"]
        return entry


def evaluate(task: Task, engine: Engine, rows: Sequence[Row], pool: Sequence[Row] = ()) -> Result:
    """Play the task on these rows; `pool` is where few-shot examples come from."""
    play = _choose if task.options else _generate
    samples = play(task, engine, rows, introductions(task, rows, pool))
    return Result(task, {name: [s["scores"][name] for s in samples] for name in samples[0]["scores"]}, samples)


def _generate(task: Task, engine: Engine, rows: Sequence[Row], before: Sequence[str]) -> list[dict]:
    temperature = 1.0 if task.samples > 1 else 0.0
    sampling = Sampling(temperature, 1.0, min(task.max_tokens, engine.max_length // 2), engine.stop_ids)
    room = engine.max_length - sampling.max_tokens
    prompts = [before[i] + task.text(row) for i, row in enumerate(rows)]
    requests = []
    for i, prompt in enumerate(prompts):
        ids = engine.prompt_ids([{"role": "user", "content": prompt}]) if task.chat else engine.ids(prompt)
        for k in range(task.samples):
            index = i * task.samples + k
            requests.append(Request(index, ids[-room:], prompt_seed(engine.seed, 0, index, task.name)))
    answers = {answer.index: answer for answer in engine.generate(requests, sampling)}
    samples = []
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        own = [answers[i * task.samples + k] for k in range(task.samples)]
        texts = [cut(engine.text(answer.token_ids), task.until) for answer in own]
        reference = task.target(row)
        verdicts = [SCORERS[task.scorer](text, reference) for text in texts]
        scores = {name: float(np.mean([v[name] for v in verdicts])) for name in verdicts[0]}
        ends = [answer.finish_reason for answer in own]
        samples.append(
            {"prompt": prompt, "texts": texts, "reference": reference, "scores": scores, "finish_reasons": ends}
        )
    return samples


def _choose(task: Task, engine: Engine, rows: Sequence[Row], before: Sequence[str]) -> list[dict]:
    options = [[(before[i] + text, rest) for text, rest in task.options(row)] for i, row in enumerate(rows)]
    groups, places = [], []
    for i, pairs in enumerate(options):
        by_prompt: dict[Ids, list[tuple[int, Ids]]] = {}
        for k, (text, rest) in enumerate(pairs):
            prompt, answer = encode_pair(engine, text, rest)
            by_prompt.setdefault(prompt, []).append((k, answer))
        for prompt, members in by_prompt.items():
            groups.append(Group(prompt, tuple(answer for _, answer in members)))
            places.append([(i, k) for k, _ in members])
    logps = [np.zeros(len(pairs)) for pairs in options]
    for place, sums in zip(places, engine.sequence_logps(groups), strict=True):
        for (i, k), value in zip(place, sums, strict=True):
            logps[i][k] = value
    return [
        {
            "prompt": pairs[0][0],
            "choices": [rest for _, rest in pairs],
            "logps": values.tolist(),
            "scores": judge_choices(task, row, [rest for _, rest in pairs], values),
        }
        for row, pairs, values in zip(rows, options, logps, strict=True)
    ]


def judge_choices(task: Task, row: Row, choices: Sequence[str], logps: np.ndarray) -> dict[str, float]:
    """acc: the likeliest choice; acc_norm: per character; with labels the probability on the true ones (mc2)."""
    if task.labels:
        true = np.asarray(task.labels(row)) == 1
        weights = np.exp(logps - logps.max())
        return {"acc,none": float(weights[true].sum() / weights.sum())}
    characters = np.array([len(choice.removeprefix(" ")) for choice in choices])
    measures = {"acc": logps, "acc_norm": logps / characters}
    gold = task.gold(row)
    return {f"{name},none": float(np.argmax(measures[name]) == gold) for name in task.metrics}


def encode_pair(engine: Engine, text: str, rest: str) -> tuple[Ids, Ids]:
    """Tokens of prompt and continuation as the harness splits them: encoded together, cut after the prompt's own.

    Blanks at the prompt's end go to the continuation; what does not fit the context is cut on the left.
    """
    stripped = text.rstrip()
    prompt = engine.ids(stripped)
    answer = engine.ids(text + rest)[len(prompt) :]
    return prompt[-max(1, engine.max_length + 1 - len(answer)) :], answer


def report(results: Sequence[Result], config: dict) -> dict:
    """The harness's results.json in its own keys, for those of them that mean something here."""
    return {
        "results": {result.task.name: result.summary() for result in results},
        "n-shot": {result.task.name: result.task.shots for result in results},
        "n-samples": {result.task.name: {"effective": len(result.samples)} for result in results},
        "config": config,
    }
