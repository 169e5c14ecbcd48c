"""What is measured of a cell's adapter, a number for every item; the same items for all cells, so that they are paired.

Of problems with worked answers, from the most sensitive reading to the least:
    worked      log p of the gold worked answer, nats per token
    result      log p of the result, given the question and the gold reasoning, nats
    margin      the same, less that of the likeliest of four false results, nats; choice: is it above 0 (chance 0.2;
                more where a set of results that are no numbers has fewer than five)
    restated    log p of the result after "The answer is", without reasoning: the same knowledge in another form
    exact       the greedy answer is right, as the data states it; ended: it ended by itself; length: its tokens
Of a benchmark task (tasks.py) margin and choice, or exact. Of texts, and of the base's own answers, nll: nats a token.
"""

from __future__ import annotations

import hashlib
import logging
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from spinfast.data.examples import load_examples
from spinfast.data.renderer import Renderer
from spinfast.data.sources import open_table
from spinfast.errors import UserError
from spinfast.evaluate import benchmark
from spinfast.evaluate.answers import same_math
from spinfast.evaluate.references import STRICT, score
from spinfast.evaluate.tasks import find_task, load_rows
from spinfast.generation import prompt_seed
from spinfast.scoring import Budget, sequence_logps
from spinfast.session import Session
from spinfast.studies.design import Items
from spinfast.types import Adapter, Completion, Example, Group, Request

log = logging.getLogger("spinfast")
Readings = dict[str, list[float]]  # a number per item
LEARNING = ("worked", "result", "margin", "restated", "choice", "exact")  # what may rank, most sensitive first
FALSE = 4  # results beside the right one
UNITS = {
    "worked": "nats per token",
    "result": "nats",
    "restated": "nats",
    "margin": "nats",
    "choice": "share",
    "exact": "share",
}


@dataclass(frozen=True)
class Player:
    """The model that is asked: the session's policy as it stands; `adapter` is its own, for the generator."""

    session: Session
    budget: Budget
    adapter: Adapter | None

    def logps(self, groups: Sequence[Group]) -> list[list[float]]:
        """Sums per group and answer, nats."""
        return sequence_logps(self.session.policy, groups, self.budget)

    def answers(self, prompts: Sequence[Sequence[int]], max_tokens: int, purpose: str) -> list[Completion]:
        """Greedy ones, in the prompts' order."""
        requests = [
            Request(number, tuple(prompt), prompt_seed(0, 0, number, purpose)) for number, prompt in enumerate(prompts)
        ]
        made = self.session.generator.generate(requests, self.session.sampling(0.0, max_tokens), self.adapter)
        return sorted(made, key=lambda answer: answer.index)


class Probe(Protocol):
    name: str
    generates: bool
    items: int
    groups: Sequence[Group]  # what of it is scored

    def fingerprint(self) -> str:
        """Of what is asked."""

    def measure(self, player: Player) -> Readings: ...


@dataclass(frozen=True)
class Problems:
    """Problems with worked answers."""

    name: str
    examples: Sequence[Example]
    worked: Sequence[Group]
    results: Sequence[Group]  # question and gold reasoning; the right result first, then false ones
    restated: Sequence[Group]
    max_tokens: int  # of a written answer; 0: none is written
    text: Callable[[Sequence[int]], str]

    @property
    def generates(self) -> bool:
        return bool(self.max_tokens)

    @property
    def items(self) -> int:
        return len(self.examples)

    @property
    def groups(self) -> Sequence[Group]:
        return [*self.worked, *self.results, *self.restated]

    def fingerprint(self) -> str:
        return digest([self.worked, self.results, self.restated, self.max_tokens])

    def measure(self, player: Player) -> Readings:
        worked = player.logps(self.worked)
        found = {"worked": [sums[0] / group.lengths[0] for sums, group in zip(worked, self.worked, strict=True)]}
        if self.results:
            sums = player.logps(self.results)
            margins = [right - max(wrong) for right, *wrong in sums]
            found |= {
                "result": [right for right, *_ in sums],
                "margin": margins,
                "choice": [float(margin > 0) for margin in margins],
            }
            found["restated"] = [sums[0] for sums in player.logps(self.restated)]
        return found | (self._exact(player) if self.max_tokens else {})

    def _exact(self, player: Player) -> Readings:
        return self.verdicts(player.answers([each.prompt_ids for each in self.examples], self.max_tokens, self.name))

    def verdicts(self, answers: Sequence[Completion]) -> Readings:
        """Of one answer to each problem."""
        verdicts = [
            score(self.text(answer.token_ids), example.reference, example.answer)
            for answer, example in zip(answers, self.examples, strict=True)
        ]
        return {
            "exact": [verdict.get(STRICT, max(verdict.values(), default=0.0)) for verdict in verdicts],
            "ended": [float(answer.finish_reason == "stop") for answer in answers],
            "length": [float(len(answer.token_ids)) for answer in answers],
        }


@dataclass(frozen=True)
class Benchmark:
    """A task of `spinfast eval`."""

    name: str
    task: benchmark.Task
    rows: Sequence[dict]
    pool: Sequence[dict]
    groups = ()  # made as it is asked

    @property
    def generates(self) -> bool:
        return not self.task.options

    @property
    def items(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        return digest([self.task.name, self.task.shots, self.rows, self.pool])

    def measure(self, player: Player) -> Readings:
        session, renderer = player.session, player.session.machine.renderer
        engine = benchmark.Engine(
            tokenizer=renderer.tokenizer,
            render=renderer.prompt_ids,
            generate=lambda requests, sampling: session.generator.generate(requests, sampling, player.adapter),
            sequence_logps=player.logps,
            stop_ids=renderer.stop_ids,
            max_length=session.config.prompt.max_prompt_tokens + session.config.prompt.max_answer_tokens,
        )
        result = benchmark.evaluate(self.task, engine, self.rows, self.pool)
        if self.generates:
            return {"exact": next(iter(result.scores.values()))}
        margins = []
        for row, sample in zip(self.rows, result.samples, strict=True):
            right, logps = self.task.gold(row), sample["logps"]
            margins.append(logps[right] - max(logp for k, logp in enumerate(logps) if k != right))
        return {"margin": margins, "choice": next(iter(result.scores.values()))}


@dataclass(frozen=True)
class Told:
    """Token ids whose likelihood is asked: of unrelated texts, or of the base's own answers."""

    name: str
    groups: Sequence[Group]
    generates = False

    @property
    def items(self) -> int:
        return len(self.groups)

    def fingerprint(self) -> str:
        return digest(self.groups)

    def measure(self, player: Player) -> Readings:
        sums = player.logps(self.groups)
        return {"nll": [-each[0] / group.lengths[0] for each, group in zip(sums, self.groups, strict=True)]}


def measured(probes: Iterable[Probe], player: Player) -> Readings:
    """{"SET/READING": a number per item}. Raises UserError where one is not finite."""
    found = {
        f"{probe.name}/{reading}": [float(value) for value in values]
        for probe in probes
        for reading, values in probe.measure(player).items()
    }
    for name, values in found.items():
        if not np.isfinite(values).all():
            raise UserError(f"study: {name} is not finite, the model has diverged; lower the learning rate")
    return found


def probe_of(name: str, items: Items, prompt, renderer: Renderer) -> Probe:
    """By a study's `learning`; `prompt` is the section of the cells' configs."""
    if items.task:
        task, where = find_task(items.task), items.rows
        place = Path(where) if where and Path(where).is_dir() else where
        rows = load_rows(task, task.split, place)[: items.size]
        return Benchmark(name, task, rows, load_rows(task, task.shot_split, place) if task.shots else [])
    table = open_table(
        items.source,
        subset=items.subset,
        split=items.split,
        revision=items.revision,
        rows=items.size,
        seed=items.seed,
    )
    loaded = load_examples(
        table,
        size=items.size,
        seed=items.seed,
        turns=items.turns,
        columns=items.columns,
        bad_rows=items.bad_rows,
        system=prompt.system,
        renderer=renderer,
        max_prompt_tokens=prompt.max_prompt_tokens,
        max_answer_tokens=prompt.max_answer_tokens,
    )
    return problems(name, [e for e in loaded.examples if e.wanted], items.max_tokens * items.exact, renderer)


def problems(name: str, examples: Sequence[Example], max_tokens: int, renderer: Renderer) -> Problems:
    """Of examples that have real answers; those with a reference are asked for their result too."""
    if not examples:
        raise UserError(f"study: learning.{name}: no item has a worked answer; expected question and answer")
    parts = [_result_part(example, renderer) for example in examples]
    if any(parts) and not all(parts):  # some results are not where they could be cut out: the items must be the same
        lost = sum(part is None for part in parts)
        log.warning(
            "learning.%s: left out, their answers do not end in their results: %d of %d", name, lost, len(parts)
        )
        examples = [example for example, part in zip(examples, parts, strict=True) if part]
        parts = [part for part in parts if part]
    if max_tokens and not all(example.reference for example in examples):
        raise UserError(f"study: learning.{name}.exact: an item has no reference to compare an answer with")
    results, restated = [], []
    if all(parts):
        pool = sorted({example.reference for example in examples})
        stem = _ids(renderer, "The answer is")
        for example, (before, tail) in zip(examples, parts, strict=True):
            wrong = false_results(example.reference, pool, random.Random(f"{name}/{example.index}"))
            tails = [tail.replace(example.reference, other, 1) for other in wrong]
            answers = tuple((*_ids(renderer, text), renderer.end_id) for text in (tail, *tails))
            results.append(Group(example.prompt_ids + before, answers))
            restated.append(Group(example.prompt_ids + stem, (_ids(renderer, f" {example.reference}"),)))
    return Problems(name, examples, [e.group for e in examples], results, restated, max_tokens, renderer.text)


def _result_part(example: Example, renderer: Renderer) -> tuple[tuple[int, ...], str] | None:
    """(the answer's tokens before its result, the text from there); None where it does not end in its reference."""
    ids, text = example.real_ids, renderer.text(example.real_ids)
    if example.reference is None or example.scored is not None:
        return None
    places = [*re.finditer(rf"(?<!\w){re.escape(example.reference)}(?!\w)", text)]
    if not places:
        return None
    start = places[-1].start()
    low, high = 0, len(ids)  # the most tokens whose text does not reach into the result
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(renderer.text(ids[:middle])) <= start else (low, middle - 1)
    tail = text[len(renderer.text(ids[:low])) :]
    return None if len(tail.strip()) > len(example.reference) + 8 else (ids[:low], tail)


def false_results(reference: str, pool: Sequence[str], draw: random.Random) -> list[str]:
    """FALSE others: of a whole number, near ones and one with a digit changed; else results of other items, as many as
    there are.
    """
    if not re.fullmatch(r"-?(?:0|[1-9][0-9]*)", reference):
        others = [each for each in pool if not same_math(each, reference)]
        if not others:
            raise UserError(f"study: {reference!r} is no whole number and the result of all items; give other items")
        return draw.sample(others, min(FALSE, len(others)))
    value = int(reference)
    digits = [d for d in range(10) if d != abs(value) // 10 % 10]
    near = [value + step for step in (-10, -2, -1, 1, 2, 10)]
    changed = value + 10 * (draw.choice(digits) - abs(value) // 10 % 10) * (1 if value >= 0 else -1)
    near = [str(each) for each in dict.fromkeys([*near, changed]) if each != value]
    return draw.sample(near, FALSE)


def own_answers(player: Player, questions: Sequence[str], max_tokens: int, system: str | None) -> list[Group]:
    """The base's greedy answers to general questions, as groups to be scored."""
    renderer = player.session.machine.renderer
    before = [{"role": "system", "content": system}] if system else []
    prompts = [renderer.prompt_ids([*before, {"role": "user", "content": question}]) for question in questions]
    answers = player.answers(prompts, max_tokens, "own answers")
    return [
        Group(prompt, (answer.token_ids,)) for prompt, answer in zip(prompts, answers, strict=True) if answer.token_ids
    ]


def _ids(renderer: Renderer, text: str) -> tuple[int, ...]:
    return tuple(renderer.tokenizer(text, add_special_tokens=False).input_ids)


def digest(value) -> str:
    """sha256 of how the value is written."""
    return hashlib.sha256(repr(value).encode()).hexdigest()
