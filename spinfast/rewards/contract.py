"""The call of reward functions: what they are given, what they may give back, and one line for what goes wrong."""

from __future__ import annotations

import asyncio
import copy
import difflib
import inspect
import json
import logging
import math
import re
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spinfast.errors import UserError
from spinfast.rewards.kinds import Kind, kind
from spinfast.rewards.limits import Overtime, event_loop, limited, staying
from spinfast.store.files import sha256

log = logging.getLogger("spinfast")

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
NO_COLUMNS = ("prompt", "completion", "completion_ids")  # columns that no function is given, as in TRL
TRAINERS = re.compile(  # names of metrics that no function may take (docs/metrics.md)
    r"(train|heldout|rewards|groups|sampling|clip_ratio)/.*|reward(_std)?|frac_reward_zero_std|entropy|kl|num_tokens|"
    r"cispo_clip_ratio|completions/(clipped_ratio|(mean|min|max)_(terminated_)?length)|stages?|phase|steps?"
)
SHOWN = 80  # characters of a text in a message

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class TrainerState:
    """What functions see as trainer_state, for rewards that change with training."""

    global_step: int  # optimizer steps done
    max_steps: int
    epoch: float  # passes over the data done


@dataclass(frozen=True)
class Batch:
    """What one call scores: n completions, their prompts repeated beside them."""

    prompts: Sequence[str | Messages]
    completions: Sequence[str | Messages]  # strings, or [{"role": "assistant", "content": text}]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence]  # every other column of the data, one value per completion
    state: TrainerState

    def __len__(self) -> int:
        return len(self.completions)

    def sample(self, i: int) -> Batch:
        """The batch of completion i alone."""
        prompts, completions, ids = ([part[i]] for part in (self.prompts, self.completions, self.completion_ids))
        return Batch(prompts, completions, ids, {name: [each[i]] for name, each in self.columns.items()}, self.state)


@dataclass(frozen=True)
class Scores:
    """What a batch's functions gave, by their report names."""

    values: dict[str, list[float | None]]  # finite, or None where the function does not apply; unweighted
    extra: dict[str, list]  # log_extra: one plain JSON value per completion
    metrics: dict[str, float]  # log_metric: the mean of what was logged


@dataclass
class _Notes:
    """What one function logs in one call."""

    extra: dict[str, list] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def log_extra(self, column: str, values: Iterable) -> None:
        plain = json.dumps(_listed(values), default=lambda value: _listed(value, str(value)), skipkeys=True)
        self.extra.setdefault(str(column), []).extend(json.loads(plain))

    def log_metric(self, name: str, value: float) -> None:
        if not math.isfinite(value := float(value)):
            raise ValueError(f"log_metric({name!r}, {value}): expected a finite number")
        if TRAINERS.fullmatch(str(name)):
            raise ValueError(f"log_metric({name!r}, ...): the trainer has a metric of this name; expected another")
        self.metrics.setdefault(str(name), []).append(value)


@dataclass(frozen=True)
class Reward:
    """One function of the config: how it is called, and what messages call it."""

    name: str  # in reports, unique
    weight: float
    call: Callable
    file: str | None = None  # where a user's function is from
    options: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of every call, before any column

    @property
    def kind(self) -> Kind:
        return "penalty" if self.weight < 0 else kind(self.name)

    @property
    def label(self) -> str:
        return f"reward {self.name}" + (f" ({Path(self.file).name})" if self.file else "")

    def lacks(self, columns: Collection[str]) -> str | None:
        """What the function needs and is not given where the data has these columns; None where it has all."""
        if hasattr(self.call, "lacks"):
            return self.call.lacks(columns)
        return without(arguments(self.call)[1] - self.options.keys() - {*GIVEN}, columns)

    def start(self, batch: Batch, notes: _Notes) -> Any:
        """The function's list for a batch, or the awaitable of one. It gets copies, and only what it accepts."""
        accepted = arguments(self.call)[0]

        def takes(name: str) -> bool:
            return name not in self.options and (accepted is None or name in accepted)

        columns = {name: values for name, values in batch.columns.items() if name not in NO_COLUMNS}
        data = {**columns, "prompts": batch.prompts, "completions": batch.completions}
        ours = {
            "completion_ids": [[*ids] for ids in batch.completion_ids],
            "trainer_state": batch.state,
            "log_extra": notes.log_extra,
            "log_metric": notes.log_metric,
        }
        call = {name: [*map(copy.deepcopy, values)] for name, values in data.items() if takes(name)}
        call |= copy.deepcopy(dict(self.options)) | {name: value for name, value in ours.items() if takes(name)}
        result = self.call(**call)
        return result if inspect.isawaitable(result) else _listed(result)

    def numbers(self, result: Any, batch: Batch, notes: _Notes) -> list[float | None]:
        """The function's result as finite floats and None; anything else is one line."""
        if not isinstance(result, list):
            raise UserError(f"{self.label}: expected a list of {len(batch)} numbers, got {_short(result)}")
        for what, values in (("", result), *((f"log_extra({name!r}): ", v) for name, v in notes.extra.items())):
            if len(values) != len(batch):
                raise UserError(
                    f"{self.label}: {what}expected {len(batch)} values, one per completion, got {len(values)}"
                )
        return [self._number(value, i, batch) for i, value in enumerate(result)]

    def _number(self, value: Any, i: int, batch: Batch) -> float | None:
        if value is None:
            return None
        try:
            number = float("nan" if isinstance(value, str | bytes) else value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"{self.label}: expected a finite number or None, got {_short(value)} for {said(batch, i)}")
        return number

    def fault(self, error: BaseException, batch: Batch, i: int | None) -> UserError:
        """One line for what the function raised; i: the first sample that raises alone."""
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == self.file]
        line = f"line {frames[-1].lineno}: " if frames else ""
        where = f"only with the whole batch of {len(batch)}" if i is None else f"for {said(batch, i)}"
        hint = _hint(str(error), batch)
        return UserError(f"{self.label}: {line}{type(error).__name__}: {error}, {where}{hint}")


class Rewards:
    """The functions of a config, called together."""

    def __init__(self, functions: Sequence[Reward], timeout: float):
        self.functions, self._timeout, self._warned = tuple(functions), timeout, False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(reward.name for reward in self.functions)

    @property
    def weights(self) -> dict[str, float]:
        """By name."""
        return {reward.name: reward.weight for reward in self.functions}

    def fingerprints(self) -> dict[str, str]:
        """The sha256 of the file of every function that is a user's; what that file imports is not looked at."""
        return {each.name: sha256(Path(each.file)) for each in self.functions if each.file}

    def check(self, columns: Collection[str]) -> None:
        """Raises UserError where a function needs what neither the data's columns nor the trainer give."""
        for reward in self.functions:
            if lacking := reward.lacks([name for name in columns if name not in NO_COLUMNS]):
                raise UserError(f"{reward.label} {lacking}")

    def __call__(self, batch: Batch) -> Scores:
        """What every function gives to a batch; UserError names the function at fault. Call it in the main thread,
        where the time limit per call holds; coroutines run at the same time, in a thread of their own."""
        scores = self.tried(batch)
        self._warn_of_rows_without(scores.values, batch)
        return scores

    def tried(self, batch: Batch) -> Scores:
        """The same of answers that nobody learns from: no word of those that no function applies to."""
        notes = [_Notes() for _ in self.functions]
        results = self._results(self.functions, batch, notes, self._timeout)
        values, extra = {}, {}
        for reward, result, noted in zip(self.functions, results, notes, strict=True):
            if isinstance(result, Overtime):
                raise UserError(
                    f"{reward.label}: took longer than {self._timeout:g} s for {len(batch)} completions; "
                    "make it faster or raise grpo.reward_timeout"
                ) from None
            if isinstance(result, BaseException):
                raise reward.fault(result, batch, self._raises_alone(reward, batch)) from result
            values[reward.name] = reward.numbers(result, batch, noted)
            for name, column in noted.extra.items():
                extra[name if extra.get(name, column) == column else f"{name} ({reward.name})"] = column
        logged: dict[str, list[float]] = {}
        for name, each in (item for noted in notes for item in noted.metrics.items()):
            logged.setdefault(name, []).extend(each)
        return Scores(values, extra, {name: math.fsum(each) / len(each) for name, each in logged.items()})

    def _results(
        self, rewards: Sequence[Reward], batch: Batch, notes: Sequence[_Notes], seconds: float
    ) -> list[Any | BaseException]:
        """For each function its list, or what it raised."""
        results = [_outcome(lambda r=r, n=n: r.start(batch, n), seconds) for r, n in zip(rewards, notes, strict=True)]
        waiting = {i: result for i, result in enumerate(results) if inspect.isawaitable(result)}
        if waiting:
            together = asyncio.run_coroutine_threadsafe(_gathered(waiting.values(), seconds), event_loop())
            ended = _outcome(lambda: together.result(), seconds + 1)  # a second for those that do not block the loop
            together.cancel()
            if isinstance(ended, BaseException):
                event_loop.cache_clear()  # one of them blocks the loop
                ended = [ended] * len(waiting)
            for i, result in zip(waiting, ended, strict=True):
                results[i] = result
        return results

    def _raises_alone(self, reward: Reward, batch: Batch) -> int | None:
        """The first sample with which a function that raised for a batch raises too; None: there is none."""
        end = time.monotonic() + self._timeout
        for i in range(len(batch)):
            if (left := end - time.monotonic()) <= 0:
                return None
            (result,) = self._results([reward], batch.sample(i), [_Notes()], left)
            if isinstance(result, BaseException):
                return None if isinstance(result, Overtime) else i
        return None

    def _warn_of_rows_without(self, values: Mapping[str, list[float | None]], batch: Batch) -> None:
        rows = [i for i in range(len(batch)) if all(column[i] is None for column in values.values())]
        if rows and not self._warned:
            self._warned = True
            log.warning(
                "no reward function applies to %d of %d completions (all gave None), which are not learnt from; "
                "the first is %s, its columns %s",
                len(rows),
                len(batch),
                said(batch, rows[0]),
                _short({name: column[rows[0]] for name, column in batch.columns.items()}, 3 * SHOWN),
            )


def text_of(completion: str | Messages) -> str:
    """A completion's text, whichever way it is given."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def arguments(fn: Callable) -> tuple[frozenset[str] | None, frozenset[str]]:
    """The keywords that fn accepts (None: all) and those that it requires."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except ValueError:  # some functions in C have none
        return None, frozenset()
    every = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    accepted = frozenset(p.name for p in named if p.kind is not p.POSITIONAL_ONLY)
    return None if every else accepted, frozenset(p.name for p in named if p.default is p.empty)


def without(needed: Collection[str], columns: Collection[str]) -> str | None:
    """What to say of names that are needed and no columns; None where all are there."""
    if not (lacking := sorted({*needed} - {*columns})):
        return None
    near = difflib.get_close_matches(lacking[0], [*columns, *GIVEN], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "; give the data this column, or the argument a default"
    return f"needs {', '.join(map(repr, lacking))}; {the_data_has(columns)}{hint}"


def the_data_has(columns: Collection[str]) -> str:
    return f"the data has the columns {', '.join(sorted(columns)) or '(none)'}"


def said(batch: Batch, i: int) -> str:
    """A sample as messages name it."""
    return f"sample {i + 1} of {len(batch)} (completion {_short(text_of(batch.completions[i]))})"


def _short(value: Any, length: int = SHOWN) -> str:
    shown = repr(value)
    return shown if len(shown) <= length else f"{shown[: length - 3]}..."


_WANT_MESSAGES = ("string indices must be integers", "'str' object has no attribute", "'str' object does not support")
_WANT_TEXT = (
    "expected string or bytes-like object",
    "'list' object has no attribute",
    "not list",
    "not dict",
    "'dict' object has no",
)


def _hint(message: str, batch: Batch) -> str:
    """Where a function may take strings for messages or the other way round: the key that says which it gets."""
    text = isinstance(batch.completions[0], str)
    if not any(sign in message for sign in (_WANT_MESSAGES if text else _WANT_TEXT)):
        return ""
    now, other = ("strings", "messages") if text else ("lists of messages", "text")
    return f"; completions are {now} here: for the other form set grpo.completions={other}"


def _listed(values: Any, otherwise: Any = None) -> Any:
    """A list of what an array, a tensor or an iterable holds; anything else as it is, or `otherwise`."""
    if hasattr(values, "tolist"):
        return values.tolist()
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        return values if otherwise is None else otherwise
    return [*values]


def _outcome(call: Callable[[], Any], seconds: float) -> Any:
    """What a call gives, or what it raised."""
    try:
        with staying():
            return limited(call, seconds)
    except (Exception, SystemExit, Overtime) as error:
        return error


async def _gathered(waiting: Iterable, seconds: float) -> list[Any]:
    return await asyncio.gather(*(_awaited(each, seconds) for each in waiting))


async def _awaited(awaitable, seconds: float) -> Any:
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return _listed(await awaitable)
    except (Exception, SystemExit) as error:
        return Overtime() if limit.expired() else error
