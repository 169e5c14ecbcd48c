"""Rows of a data set -> Examples: every row checked and rendered, rejections counted.

Faults of a row (no answer, nothing but spaces, turns that the template refuses) are errors that name the row;
properties that data sets may well have (over-long texts, duplicates) are counted and left out.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, Literal

from spinfast.data.conversations import RowError, learnt, template_variables, with_system
from spinfast.data.formats import ASKED, HINT, IMAGES, KNOWN, Noting, Row, parsed, recognise
from spinfast.data.renderer import Renderer
from spinfast.data.sources import Table, choose_rows, open_table
from spinfast.errors import UserError
from spinfast.evaluate.references import reference_of
from spinfast.types import Example

CONTROL = "spell control tokens in their text; they are kept as text"


@dataclass(frozen=True)
class LoadedData:
    examples: list[Example]
    rejected: dict[str, int]  # reason -> count
    warnings: list[str]
    fingerprint: str = field(repr=False)  # sha256 of what the run sees: rows, token ids, references, columns
    compared: tuple[str, ...] = ()  # the data's columns of answers that are compared, the best one's first


def load_examples(
    source: str | Table,
    *,
    renderer: Renderer,
    max_prompt_tokens: int,
    max_answer_tokens: int,
    overlong: Literal["drop", "cut"] = "drop",
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    size: int | None = None,
    seed: int = 0,
    turns: Literal["first", "last", "all"] = "first",
    system: str | None = None,
    columns: Mapping[str, str] | None = None,
    bad_rows: Literal["error", "skip"] = "error",
    prompts_alone: bool = False,
    keep_columns: bool = False,
) -> LoadedData:
    """Read, check and render a data set.

    `size` rows are chosen by a shuffle that depends on `seed` alone. `turns` says which answers of a longer
    conversation are learnt from. `system` is put before conversations that have no system turn. `columns` maps a
    recognised column's name to the data's ({"question": "problem"}). `bad_rows` "skip" counts faulty rows as rejected.
    `overlong` "cut" keeps the beginning of answers that are too long, which then have no end-of-turn token.
    `prompts_alone` takes rows whose answer is missing, no text or too long as prompts, for methods that write answers
    themselves. `keep_columns` gives every example its row, for reward functions: text and numbers, recognised names
    beside the data's own.
    """
    table = source
    if isinstance(source, str):
        table = open_table(source, subset=subset, split=split, revision=revision, rows=size, seed=seed)
    source = table.name
    columns = dict(columns or {})
    if strangers := sorted({*columns} - KNOWN):
        known = ", ".join(sorted(KNOWN - {*IMAGES}))
        raise UserError(f"data {source}: columns: {strangers[0]!r} is no recognised column; expected {known}")
    if missing := sorted(set(columns.values()) - set(table.columns)):
        raise UserError(f"data {source}: no column {missing[0]!r}; columns are {', '.join(table.columns)}")
    named = [*(column for column in table.columns if column not in columns.values()), *columns]
    form = recognise(source, named, prompts_alone)

    chosen = choose_rows(table, size, seed)
    examples: list[Example] = []
    rejected: Counter[str] = Counter()  # rows
    noted: Counter[str] = Counter()  # rows that are used, but not whole
    kinds: set[str] = set()
    ignored: dict[str, None] = {}  # columns of used rows that nobody asked for, in their order
    heavy: set[str] = set()  # columns that are not kept: pictures, sound, bytes
    seen: set[tuple] = set()
    for index in chosen:
        try:
            found = table.row(index)
            others = {name: value for name, value in found.items() if name not in columns.values()}
            given = Noting(others | {name: found.get(actual) for name, actual in columns.items()})
            row, told = parsed(form, given, prompts_alone)
            example, also = render(row, given, index, renderer, turns, system, prompts_alone)
            example, cut = fitted(example, max_prompt_tokens, max_answer_tokens, overlong, prompts_alone)
        except TooLong as error:
            rejected[error.reason] += 1
            continue
        except RowError as error:
            if bad_rows == "error":
                raise UserError(f"{table.where(index)}: {error}") from None
            rejected[error.reason] += 1
            continue
        if keep_columns:
            kept = {name: value for name, value in (found | given).items() if name not in IMAGES and _light(value)}
            heavy |= found.keys() - kept
            example = replace(example, columns=kept)
        if row.worse and example.real_ids and not example.others:
            rejected["chosen equals rejected"] += 1
        elif example.content in seen:
            rejected["duplicate"] += 1
        else:
            seen.add(example.content)
            noted.update([*told, *also, *cut])
            ignored |= {} if keep_columns else dict.fromkeys(given.unused())
            kinds.add("text" if row.text is not None or row.ids else "conversation" if row.answer is None else "answer")
            examples.append(example)
    if not examples:
        raise UserError(
            f"data {source}: all {len(chosen)} rows were rejected ({_counts(rejected)}); raise "
            "prompt.max_prompt_tokens or prompt.max_answer_tokens, or use other data"
        )
    warnings = []
    if size is not None and len(chosen) < size:
        warnings.append(f"data {source}: asked for {size} rows, it has {len(chosen)}")
    if rejected:
        warnings.append(f"data {source}: {rejected.total()} of {len(chosen)} rows rejected ({_counts(rejected)})")
    warnings += [f"data {source}: {count} rows {what}" for what, count in noted.items()]
    if turns != "first" and "conversation" not in kinds:
        warnings.append(f"data {source}: data.turns: {turns} has no use, its rows say what is learnt themselves")
    if system is not None and kinds == {"text"}:
        warnings.append(f"data {source}: prompt.system has no use, plain text has no system turn")
    if ignored:
        verb = "is" if len(ignored) == 1 else "are"
        warnings.append(f"data {source}: read as {' + '.join(form.needs)}; {', '.join(ignored)} {verb} not used")
    if heavy:
        warnings.append(
            f"data {source}: not kept for reward functions, neither text nor numbers: {', '.join(sorted(heavy))}"
        )
    compared = tuple(columns.get(name, name) for name in form.compared)
    return LoadedData(examples, dict(rejected), warnings, _fingerprint(examples), compared)


class TooLong(Exception):
    """A property of the data, not a fault of the row."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def render(
    row: Row, given: Mapping, index: int, renderer: Renderer, turns: str, system: str | None, alone: bool = False
) -> tuple[Example, list[str]]:
    """The row as an example, and what of it is worth telling; with `alone` turns that end in a question are a prompt.

    Raises RowError.
    """
    if row.text is not None or row.ids:
        text = renderer.text(row.ids) if row.ids else row.text
        rendered = renderer.given_ids(row.ids, row.learnt) if row.ids else renderer.text_ids(row.text)
        return Example(index, (), text, rendered.prompt_ids, rendered.answer_ids, scored=rendered.scored), []
    conversation = with_system(row.conversation, system)
    whole = row.answer is not None  # the row itself says what its answer is
    start = len(conversation) - len(row.conversation) + row.answer if whole else 0
    template = template_variables(given)
    if alone and conversation and conversation[-1]["role"] in ASKED:
        control = any(renderer.has_control_tokens(message["content"]) for message in conversation)
        prompt_ids = renderer.prompt_ids(conversation, template)
        return Example(index, tuple(conversation), "", prompt_ids, (), reference_of(given, "")), [CONTROL] * control
    try:
        positions = learnt(conversation, "all" if whole else turns, start)
    except RowError as error:
        hint = HINT if conversation and conversation[-1]["role"] in ASKED else ""
        raise RowError(error.reason, f"{error}{hint}") from None
    rendered = renderer.conversation(conversation, positions, template)
    others = []
    for worse in row.worse:
        other = renderer.conversation([*conversation[:-1], worse], positions, template)
        if other.prompt_ids != rendered.prompt_ids:
            raise RowError("no shared prompt", "the chat template writes the prompt otherwise before another answer")
        if other.answer_ids != rendered.answer_ids:
            others.append(other.answer_ids)
    messages, answer = conversation[: positions[0]], conversation[positions[0]]["content"]
    example = Example(
        index,
        tuple(messages),
        answer,
        rendered.prompt_ids,
        rendered.answer_ids,
        (reference_of(given, "") if alone else None)
        or reference_of(given, answer if row.desirable is not False else ""),
        rendered.scored,
        tuple(dict.fromkeys(others)),
        row.desirable,
    )
    texts = [message["content"] for message in (*conversation[: positions[-1] + 1], *row.worse)]
    noted = {
        CONTROL: any(map(renderer.has_control_tokens, texts)),
        f"have answers that are not learnt from (data.turns: {turns})": not whole
        and turns != "all"
        and len(learnt(conversation, "all")) > len(positions),
        "have answers of equal score; the first of them is taken": row.equal > 0,
    }
    return example, [what for what, holds in noted.items() if holds]


def fitted(
    example: Example, max_prompt_tokens: int, max_answer_tokens: int, overlong: str, alone: bool = False
) -> tuple[Example, list[str]]:
    """The example within the limits, and what was cut for it. Raises TooLong."""
    if len(example.prompt_ids) > max_prompt_tokens:
        raise TooLong(f"prompt longer than {max_prompt_tokens} tokens")
    if max(map(len, (example.real_ids, *example.others))) <= max_answer_tokens:
        return example, []
    if overlong == "drop" and alone and example.messages:
        prompt = replace(example, answer="", real_ids=(), scored=None, others=(), desirable=None)
        return prompt, [f"have answers longer than {max_answer_tokens} tokens; they are prompts alone"]
    if overlong == "drop":
        raise TooLong(f"answer longer than {max_answer_tokens} tokens")
    kept = slice(max_answer_tokens)
    real_ids, others = example.real_ids[kept], (answer[kept] for answer in example.others)
    example = replace(
        example,
        real_ids=real_ids,
        scored=example.scored and example.scored[kept],
        others=tuple(dict.fromkeys(answer for answer in others if answer != real_ids)),
    )
    return example, [f"have answers that are cut after {max_answer_tokens} tokens"]


def check_overlap(train: Sequence[Example], heldout: Sequence[Example]) -> int:
    """How many held-out prompts also occur in training, letter case and white space aside."""
    known = {_plain(example) for example in train}
    return sum(_plain(example) in known for example in heldout)


def _plain(example: Example) -> str:
    asked = [m["content"] for m in example.messages if m["role"] != "system"] or [example.answer]
    return " ".join(" ".join(asked).casefold().split())


def _light(value: Any) -> bool:
    """Whether it is text, numbers, dates or made of them."""
    if isinstance(value, dict | list | tuple):
        return all(map(_light, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, str | int | float | Decimal | date | time | timedelta)


def _counts(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in reasons.items())


def _fingerprint(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for e in examples:
        seen = (e.index, e.prompt_ids, e.real_ids, e.reference, e.scored, e.others, e.desirable)
        digest.update(repr((*seen, sorted(e.columns.items())) if e.columns else seen).encode())
    return digest.hexdigest()
