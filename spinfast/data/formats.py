"""Rows of a data set -> Examples: formats recognised by their columns, every row checked, rejections counted.

Faults of a row (no answer, turns out of order, nothing but spaces) are errors that name the row; properties that
data sets may well have (over-long texts, duplicates) are counted and left out.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from spinfast.data.renderer import Renderer
from spinfast.data.sources import choose_rows, open_table
from spinfast.errors import UserError
from spinfast.types import Example

Turns = list[dict[str, str]]
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
REFERENCE = re.compile(r"####\s*([^\n]*\S)")


@dataclass(frozen=True)
class LoadedData:
    examples: list[Example]
    rejected: dict[str, int]  # reason -> count
    warnings: list[str]
    fingerprint: str = field(repr=False)  # sha256 of what the run sees: rows, token ids, references


class RowError(Exception):
    """A row that is no example. The message says expected and got; `reason` is what rejections are counted by."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def load_examples(
    source: str,
    *,
    renderer: Renderer,
    max_prompt_tokens: int,
    max_answer_tokens: int,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    size: int | None = None,
    seed: int = 0,
    turns: Literal["first", "last"] = "first",
    system: str | None = None,
    columns: Mapping[str, str] | None = None,
    bad_rows: Literal["error", "skip"] = "error",
) -> LoadedData:
    """Read, check and render a data set.

    `size` rows are chosen by a shuffle that depends on `seed` alone. `turns` says which answer of a longer
    conversation is learnt from. `system` is put before conversations that have no system turn. `columns` maps a
    recognised column's name to the data's ({"question": "problem"}). `bad_rows` "skip" counts faulty rows as rejected.
    """
    table = open_table(source, subset=subset, split=split, revision=revision, rows=size, seed=seed)
    columns = dict(columns or {})
    if missing := sorted(set(columns.values()) - set(table.columns)):
        raise UserError(f"data {source}: no column {missing[0]!r}; columns are {', '.join(table.columns)}")
    form = _recognise(source, set(table.columns) | set(columns))

    chosen = choose_rows(table, size, seed)
    examples: list[Example] = []
    rejected: Counter[str] = Counter()
    seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    spelled = 0
    for index in chosen:
        row = table.row(index)
        row |= {name: row.get(actual) for name, actual in columns.items()}
        try:
            messages, answer = _split(form.conversation(row), form.turns or turns, system)
            reference = _reference(row, answer)
        except RowError as error:
            if bad_rows == "error":
                raise UserError(f"{table.where(index)}: {error}") from None
            rejected[error.reason] += 1
            continue
        try:
            prompt_ids, real_ids = renderer.example_ids(messages, answer)
        except UserError as error:
            raise UserError(f"{table.where(index)}: {error}") from None
        if len(prompt_ids) > max_prompt_tokens:
            rejected[f"prompt longer than {max_prompt_tokens} tokens"] += 1
        elif len(real_ids) > max_answer_tokens:
            rejected[f"answer longer than {max_answer_tokens} tokens"] += 1
        elif (prompt_ids, real_ids) in seen:
            rejected["duplicate"] += 1
        else:
            seen.add((prompt_ids, real_ids))
            spelled += any(map(renderer.has_control_tokens, [answer, *(m["content"] for m in messages)]))
            examples.append(Example(index, tuple(messages), answer, prompt_ids, real_ids, reference))
    if not examples:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in rejected.items())
        raise UserError(
            f"data {source}: all {len(chosen)} rows were rejected ({reasons}); raise prompt.max_prompt_tokens or "
            "prompt.max_answer_tokens, or use other data"
        )
    warnings = []
    if size is not None and len(chosen) < size:
        warnings.append(f"data {source}: asked for {size} rows, it has {len(chosen)}")
    if rejected:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in rejected.items())
        warnings.append(f"data {source}: {rejected.total()} of {len(chosen)} rows rejected ({reasons})")
    if spelled:
        warnings.append(f"data {source}: {spelled} rows spell control tokens in their text; they are kept as text")
    return LoadedData(examples, dict(rejected), warnings, _fingerprint(examples))


def check_overlap(train: Sequence[Example], heldout: Sequence[Example]) -> int:
    """How many held-out prompts also occur in training, letter case and white space aside."""
    known = {_plain(example) for example in train}
    return sum(_plain(example) in known for example in heldout)


def _plain(example: Example) -> str:
    return " ".join(" ".join(m["content"] for m in example.messages if m["role"] != "system").casefold().split())


def _fingerprint(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for e in examples:
        digest.update(repr((e.index, e.prompt_ids, e.real_ids, e.reference)).encode())
    return digest.hexdigest()


# -- formats ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    columns: tuple[str, ...]
    conversation: Callable[[Mapping[str, Any]], Turns]
    turns: Literal["last"] | None = None  # set where the row itself says which answer is meant


def _prompt_completion(row: Mapping[str, Any]) -> Turns:
    prompt, completion = row.get("prompt"), row.get("completion")
    start = _turns(prompt) if isinstance(prompt, list) else [_turn("user", prompt, "prompt")]
    if isinstance(completion, list):
        return start + _turns(completion)
    return [*start, _turn("assistant", completion, "completion")]


def _alpaca(row: Mapping[str, Any]) -> Turns:
    prompt = _text(row.get("instruction"), "instruction")
    if row.get("input"):
        prompt += "\n\n" + _text(row["input"], "input")
    return [_turn("user", prompt, "instruction"), _turn("assistant", row.get("output"), "output")]


def _question_answer(row: Mapping[str, Any]) -> Turns:
    return [_turn("user", row.get("question"), "question"), _turn("assistant", row.get("answer"), "answer")]


FORMATS = (  # the first whose columns are all there
    Format(("real", "generated"), lambda row: _turns(row.get("real"))),  # SPIN's own files
    Format(("messages",), lambda row: _turns(row.get("messages"))),
    Format(("conversations",), lambda row: _turns(row.get("conversations"))),  # ShareGPT
    Format(("prompt", "completion"), _prompt_completion, "last"),
    Format(("instruction", "output"), _alpaca),
    Format(("question", "answer"), _question_answer),
)


def _recognise(source: str, columns: set[str]) -> Format:
    for form in FORMATS:
        if columns.issuperset(form.columns):
            return form
    known = "; ".join(" + ".join(form.columns) for form in FORMATS)
    raise UserError(
        f"data {source}: columns {', '.join(sorted(columns))} are no known format; expected one of: {known}"
    )


def _turns(value: Any) -> Turns:
    if value is None:
        raise RowError("no conversation", "no conversation: it is null")
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise RowError("not a conversation", f"expected a list of turns, got {str(value)[:60]!r}")
    turns = []
    for number, turn in enumerate(value, 1):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise RowError("unknown role", f"turn {number} has role {role!r}; expected one of {', '.join(ROLES)}")
        if role == "system" and not content:  # how many data sets write "no system turn"
            continue
        turns.append(_turn(ROLES[role], content, f"turn {number} ({role})"))
    return turns


def _turn(role: str, content: Any, what: str) -> dict[str, str]:
    return {"role": role, "content": _text(content, what)}


def _text(content: Any, what: str) -> str:
    if content is None or content == []:
        raise RowError("empty text", f"no {what}: it is null")
    if not isinstance(content, str):
        raise RowError("not text", f"{what}: expected text, got {type(content).__name__}")
    if not content.strip():
        raise RowError("empty text", f"no {what}: it is empty")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise RowError("invalid Unicode", f"{what}: half of a surrogate pair; it cannot be written as UTF-8")
    return content


def _split(conversation: Turns, turns: str, system: str | None) -> tuple[Turns, str]:
    """(the prompt's turns, the real answer) after checking the order of turns."""
    start = 1 if conversation and conversation[0]["role"] == "system" else 0
    for number, turn in enumerate(conversation[start:]):
        expected = ("user", "assistant")[number % 2]
        if turn["role"] != expected:
            raise RowError(
                "turns out of order", f"turn {start + number + 1}: expected the {expected}, got the {turn['role']}"
            )
    end = start + 2 if turns == "first" else start + (len(conversation) - start) // 2 * 2
    if len(conversation) < end or end < start + 2:
        raise RowError("no answer", "no answer: the conversation has no assistant turn")
    prompt = conversation[: end - 1]
    if system is not None and not start:
        prompt = [{"role": "system", "content": system}, *prompt]
    return prompt, conversation[end - 1]["content"]


def _reference(row: Mapping[str, Any], answer: str) -> str | None:
    """The row's `reference`, else what follows the last #### of the answer (gsm8k), thousands commas taken out."""
    if row.get("reference") is not None:
        return str(row["reference"])
    found = REFERENCE.findall(answer)
    return found[-1].replace(",", "") if found else None
