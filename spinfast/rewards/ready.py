r"""Ready reward functions. Where TRL 1.16 has one too (math, cosine, think_format, repetition, soft_overlong), it is
TRL's function of the same numbers; format, strict_format, integer and tag_count are the popular GSM8K ones, mended:
theirs use re.match without DOTALL, so that reasoning of more than one line never has their format.

Sources: DAPO (arXiv 2503.14476, Eq. 13) for soft_overlong; Demystifying Long Chain-of-Thought Reasoning (2502.03373,
C.1 and C.2) for cosine and repetition.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import logging
import math
import random
import re
import threading
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, validate_call

from spinfast.errors import UserError
from spinfast.evaluate.references import (
    EXPLICIT,
    FLEXIBLE,
    IMPLICIT,
    STRICT,
    in_box,
    reference_of,
    same_result,
    score,
    stated,
)
from spinfast.rewards.contract import text_of, the_data_has

REFERENCES = (*EXPLICIT, *IMPLICIT)  # columns that hold a result, first come, first served

Judge = Callable[[str, dict[str, Any]], float | None]  # a completion's text, its row's reference columns
Tags = Annotated[tuple[str, str], Field(description="of the reasoning and of the answer, without < and >")]
Tokens = Annotated[int, Field(gt=0)]
_XML: Tags = ("reasoning", "answer")


def by_text(judge: Callable[[str], float]) -> Callable:
    """A reward function that looks at each completion's text."""
    return lambda completions: [judge(text_of(completion)) for completion in completions]


def by_reference(judge: Judge) -> Callable:
    """A reward function that compares each completion with its row's reference."""

    def reward(completions, **columns):
        rows = [{n: columns[n][i] for n in REFERENCES if n in columns} for i in range(len(completions))]
        return [judge(text_of(completion), row) for completion, row in zip(completions, rows, strict=True)]

    reward.lacks = _without_reference
    return reward


def _without_reference(columns: Collection[str]) -> str | None:
    if {*REFERENCES} & {*columns}:
        return None
    return f"needs a column with the result ({', '.join(REFERENCES)}); {the_data_has(columns)}; data.columns names one"


def gsm8k(reading: Literal["flexible", "strict", "tags"] = "flexible", tags: Tags = _XML) -> Callable:
    """1 if the answer gives the row's result, else 0; None where the row has none (evaluate/references.py).

    reading: flexible takes the result wherever it is, else the last number; strict as the row's real answer states it
    (#### or a box); tags the content of the last <answer>.
    """

    def judge(text: str, row: dict[str, Any]) -> float | None:
        if (reference := reference_of(row, "")) is None:
            return None
        if reading == "tags":
            return float(same_result(_inside(text, tags[1]), reference))
        real = next((str(row[n]) for n in IMPLICIT if same_result(stated(str(row.get(n) or "")), reference)), None)
        return score(text, reference, real or f"#### {reference}").get(STRICT if reading == "strict" else FLEXIBLE)

    return by_reference(judge)


def math_(
    comparison: Literal["auto", "math_verify", "normalised"] = "auto", reasoning_delimiters: list[str] | None = None
) -> Callable:
    r"""1 if the answer's \boxed{} is the row's result, else 0; None where the row's result cannot be read.

    comparison: math_verify decides as TRL's accuracy_reward; normalised compares the text of the last box after MATH's
    normalisation; auto is math_verify where it is installed. reasoning_delimiters: what ends the reasoning, of which
    only what follows counts; an answer without it is wrong (TRL's reasoning_accuracy_reward).
    """
    return by_reference(_after(_math(comparison), reasoning_delimiters or []))


def _math(comparison: str) -> Judge:
    there = importlib.util.find_spec("math_verify") is not None
    if comparison == "math_verify" and not there:
        raise UserError("grpo.rewards: math: comparison math_verify needs the package: pip install math-verify")
    if comparison == "auto" and not there:
        logging.getLogger("spinfast").warning(
            "reward math: math-verify is not installed; boxed answers are compared as text after MATH's normalisation, "
            "so that equal forms as x + 1 and 1 + x differ (pip install math-verify)"
        )
    return _verified if there and comparison != "normalised" else _normalised


def _normalised(text: str, row: dict[str, Any]) -> float | None:
    reference = reference_of(row, "")
    return None if reference is None else float(same_result(in_box(text), reference))


def _verified(text: str, row: dict[str, Any]) -> float | None:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    patience = 5 if threading.current_thread() is threading.main_thread() else None  # its limit is an alarm
    result = reference_of({name: value for name, value in row.items() if name != "solution"}, "")
    # out of a box or a formula's signs math-verify reads the last number only: 2x + 1 would be 1
    written = str(row.get("solution") or "") if result is None else f"\\boxed{{{result}}}"
    if not (gold := parse(written, parsing_timeout=patience)):
        return None
    boxed = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
    )
    answer = parse(text, extraction_config=[boxed], extraction_mode="first_match", parsing_timeout=patience)
    return float(verify(gold, answer, timeout_seconds=patience))


def _after(judge: Judge, delimiters: list[str]) -> Judge:
    def judge_rest(text: str, row: dict[str, Any]) -> float | None:
        found = next((delimiter for delimiter in delimiters if delimiter in text), None)
        return 0.0 if found is None else judge(text.rsplit(found, 1)[1], row)

    return judge_rest if delimiters else judge


def integer(tags: Tags = _XML) -> Callable:
    """0.5 if the content of the last <answer>, or the whole text without one, is an integer (42, -7, 1,234)."""
    whole = re.compile(r"\s*[-+]?(?:\d+|\d{1,3}(?:,\d{3})+)\s*")
    return by_text(lambda text: 0.5 * bool(whole.fullmatch(_inside(text, tags[1]))))


def format_(tags: Tags = _XML, opened: bool = False) -> Callable:
    """1 if the text begins <reasoning>...</reasoning> <answer>...</answer>, neither empty.

    opened: the prompt's end opens the first tag already, as chat templates of reasoning models do.
    """
    first, second = map(re.escape, tags)
    pattern = re.compile(
        rf"\s*<{first}>(?!\s*</{first}>).*?</{first}>\s*<{second}>(?!\s*</{second}>).*?</{second}>", re.DOTALL
    )
    return by_text(lambda text: float(bool(pattern.match(_opened(text, tags[0], opened)))))


def strict_format(tags: Tags = _XML, opened: bool = False) -> Callable:
    """1 if the text is nothing but both elements, each tag once and on a line of its own."""
    first, second = map(re.escape, tags)
    pattern = re.compile(rf"<{first}>\n(.+)\n</{first}>\n<{second}>\n(.+)\n</{second}>\n?", re.DOTALL)
    names = [f"<{slash}{tag}>" for tag in tags for slash in ("", "/")]

    def judge(text: str) -> float:
        text = _opened(text, tags[0], opened, "\n")
        found = pattern.fullmatch(text)
        return float(bool(found) and all(map(str.strip, found.groups())) and all(text.count(n) == 1 for n in names))

    return by_text(judge)


def think_format(tag: str = "think", opened: bool = False) -> Callable:
    """1 if the text begins with one <think>...</think> (TRL's think_format_reward)."""
    name = re.escape(tag)
    pattern = re.compile(rf"<{name}>(?!.*<{name}>).*?</{name}>", re.DOTALL)
    return by_text(lambda text: float(bool(pattern.match(_opened(text, tag, opened)))))


def tag_count(tags: Tags = _XML, opened: bool = False) -> Callable:
    """1/8 for each of the four tags that is there just once, less 0.001 per character after </answer>; at least 0."""
    names = [f"<{slash}{tag}>" for tag in tags for slash in ("", "/")]

    def judge(text: str) -> float:
        text = _opened(text, tags[0], opened)
        rest = text.rpartition(names[-1])[2].strip() if names[-1] in text else ""
        return max(0.0, 0.125 * sum(text.count(name) == 1 for name in names) - 0.001 * len(rest))

    return by_text(judge)


def cosine(
    max_tokens: int,
    max_len: Tokens | None = None,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    correct: Literal["math", "gsm8k"] = "math",
) -> Callable:
    """Right answers earn more if short, wrong ones lose less if long; the length is in tokens, max_len the longest."""
    longest, right = max_len or max_tokens, {"math": math_, "gsm8k": gsm8k}[correct]()

    def value(verdict: float | None, length: int) -> float | None:
        if verdict is None:
            return None
        ends = (min_value_correct, max_value_correct) if verdict else (max_value_wrong, min_value_wrong)
        return ends[0] + 0.5 * (ends[1] - ends[0]) * (1 + math.cos(min(length / longest, 1.0) * math.pi))

    def reward(completions, completion_ids, **columns):
        return [*map(value, right(completions, **columns), map(len, completion_ids))]

    reward.lacks = right.lacks
    return reward


def repetition(ngram_size: Tokens = 3, max_penalty: Annotated[float, Field(le=0)] = -1.0) -> Callable:
    """max_penalty times the share of a completion's token n-grams that are repeats of another."""

    def penalty(ids: list[int]) -> float:
        grams = [*zip(*(ids[i:] for i in range(ngram_size)), strict=False)]
        return max_penalty * (1 - len({*grams}) / len(grams)) if grams else 0.0

    return lambda completion_ids: [*map(penalty, completion_ids)]


def soft_overlong(max_tokens: int, max_len: Tokens | None = None, cache: Annotated[int, Field(ge=0)] | None = None):
    """0 up to max_len - cache tokens, then down to -1 at max_len; cache: max_len / 5 (DAPO's 4096 of 20480)."""
    longest = max_len or max_tokens
    room = longest // 5 if cache is None else cache
    if room > longest:
        raise UserError(f"grpo.rewards: soft_overlong: cache: expected at most max_len {longest}, got {room}")

    def penalty(ids: list[int]) -> float:
        over = len(ids) - (longest - room)
        return 0.0 if over <= 0 else max(-1.0, -over / room) if room else -1.0

    return lambda completion_ids: [*map(penalty, completion_ids)]


def coin(p: Annotated[float, Field(gt=0, lt=1)] = 0.5) -> Callable:
    """1 with probability p, else 0, whatever the answer is: a control, under which nothing is to be learnt.

    Spurious Rewards (arXiv 2506.10947). The same rollout of the same step falls the same way.
    """

    def reward(completions, completion_ids, trainer_state):
        keys = (f"{trainer_state.global_step} {i} {list(ids)}" for i, ids in enumerate(completion_ids))
        return [float(random.Random(key).random() < p) for key in keys]

    return reward


READY: dict[str, Callable[..., Callable]] = {
    "gsm8k": gsm8k,
    "math": math_,
    "integer": integer,
    "format": format_,
    "strict_format": strict_format,
    "think_format": think_format,
    "tag_count": tag_count,
    "cosine": cosine,
    "repetition": repetition,
    "soft_overlong": soft_overlong,
    "coin": coin,
}


def make(name: str, options: dict[str, Any], max_tokens: int) -> Callable:
    """The ready function with its options, checked."""
    factory, label = READY[name], f"grpo.rewards: {name}"
    takes = [*inspect.signature(factory).parameters]
    known = [each for each in takes if each != "max_tokens"]
    if strangers := [each for each in options if each not in known]:
        near = difflib.get_close_matches(str(strangers[0]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
        raise UserError(f"{label}: no option {strangers[0]!r}; {hint}")
    given = {"max_tokens": max_tokens} if "max_tokens" in takes else {}
    try:
        return validate_call(config=ConfigDict(allow_inf_nan=False))(factory)(**given, **options)
    except ValidationError as error:
        first = error.errors()[0]
        option, said = ".".join(map(str, first["loc"])), first["msg"]
        raise UserError(f"{label}: {option}: {said[0].lower()}{said[1:]}, got {first['input']!r}") from None


def _inside(text: str, tag: str) -> str:
    """The content of the last element of this name; the whole text where there is none."""
    return text.rpartition(f"<{tag}>")[2].partition(f"</{tag}>")[0].strip()


def _opened(text: str, tag: str, opened: bool, break_: str = "") -> str:
    """The text with the tag that the prompt opened before it."""
    return f"<{tag}>{break_}{text}" if opened else text
