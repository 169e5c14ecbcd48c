"""What a row means: formats are recognised by their columns, and every one comes to the same few things.

    text                                            plain text, no template
    input_ids (+ labels, attention_mask)            token ids of the model's tokenizer; label -100: not learnt
    messages | conversations                        a conversation (OpenAI's, ShareGPT's)
    prompt + completion | response                  each text, or turns
    instruction (+ input) + output (Alpaca), question + answer
    chosen + rejected (+ prompt)                    a better and a worse answer, or conversations that share their start
    real + generated                                SPIN's own pairs
    prompt + responses (+ scores)                   any number of answers, best first unless scores say otherwise
    prompt + completion + label                     an answer that is desirable or not
    prompt | question | problem | instruction       a prompt alone, where the run's methods write the answers

A prompt may stand in `prompt`, `question` or `instruction`, with a `system` text and a `history` of (question, answer)
before it. References (evaluate/references.py), `tools` and `chat_template_kwargs` go with every format.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import yaml

from spinfast.data.conversations import RowError, text, turn, turns, with_system
from spinfast.errors import UserError
from spinfast.evaluate.references import EXPLICIT, IMPLICIT

Messages = list[dict[str, Any]]
RowOf = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A row in one form. The conversation ends in its real answer, or in turns after it that nobody answers."""

    conversation: Messages
    answer: int | None = None  # where the row itself says which turns are the answer: those from here on, if any
    worse: tuple[dict[str, Any], ...] = ()  # answers in place of the last turn, best first
    desirable: bool | None = None
    text: str | None = None  # plain text instead of a conversation
    ids: tuple[int, ...] = ()  # token ids instead of a conversation
    learnt: tuple[bool, ...] = ()  # which of them are
    equal: int = 0  # answers left out because their score is another's


@dataclass(frozen=True)
class Format:
    needs: tuple[str, ...]
    parse: Callable[[RowOf], Row]
    compared: tuple[str, ...] = ()  # its columns of answers that are compared, the best one's first


PROMPTS = ("prompt", "question", "instruction")
BEFORE = (*PROMPTS, "input", "system", "history")
EVERYWHERE = (*EXPLICIT, *IMPLICIT, "tools", "chat_template_kwargs")
OTHERS = (  # columns that mean something to other trainers
    *("system_prompt", "context", "reasoning", "reasoning_content", "thinking", "weight", "kto_tag"),
    *("rank", "ranks", "score_chosen", "score_rejected", "margin"),
)
IMAGES = ("image", "images", "video", "videos", "audio", "audios")


def _text(row: RowOf) -> Row:
    return Row([], text=text(row.get("text"), "text"))


def _ids(row: RowOf) -> Row:
    ids, labels, seen = (row.get(column) for column in ("input_ids", "labels", "attention_mask"))
    given = [of for of in (ids, labels, seen) if of is not None or of is ids]
    if not all(isinstance(of, list) and all(type(one) is int for one in of) for of in given):
        raise RowError("not token ids", f"input_ids, labels: expected lists of whole numbers, got {ids!r:.60}")
    labels, seen = ids if labels is None else labels, [1] * len(ids) if seen is None else seen
    if not len(ids) == len(labels) == len(seen) or any(
        label not in (-100, own) for own, label in zip(ids, labels, strict=True)
    ):
        raise RowError("labels that are others", "labels: expected input_ids, or -100 where nothing is learnt")
    kept = [(own, label != -100) for own, label, there in zip(ids, labels, seen, strict=True) if there]  # no padding
    return Row([], ids=tuple(own for own, _ in kept), learnt=tuple(learnt for _, learnt in kept))


def _conversation(column: str) -> Callable[[RowOf], Row]:
    return lambda row: Row(_with_system(row, turns(row.get(column))))


def _completion(column: str, prompt: str = "prompt") -> Callable[[RowOf], Row]:
    def parse(row: RowOf) -> Row:
        asked = _prompt(row, prompt)
        return Row(asked + _answer(row.get(column), column), len(asked))

    return parse


def _labelled(column: str) -> Callable[[RowOf], Row]:
    def parse(row: RowOf) -> Row:
        label = row.get("label")
        if isinstance(label, str):  # CSV has nothing else
            label = {"true": True, "1": True, "false": False, "0": False}.get(label.strip().lower(), label)
        if not isinstance(label, bool) and label not in (0, 1):
            raise RowError("no label", f"label: expected true or false, got {label!r:.60}")
        found = _completion(column)(row)
        if len(found.conversation) != found.answer + 1:
            raise RowError("answers of several turns", f"{column}: expected one turn beside a label")
        return replace(found, desirable=bool(label))

    return parse


def _asked(prompt: str) -> Callable[[RowOf], Row]:
    def parse(row: RowOf) -> Row:
        asked = _prompt(row, prompt)
        if not asked or asked[-1]["role"] not in ASKED:
            raise RowError("no question", f"{prompt}: expected turns that end in a user's, for the answer to follow")
        return Row(asked, len(asked))

    return parse


def _compared(better: str, worse: str) -> Callable[[RowOf], Row]:
    def parse(row: RowOf) -> Row:
        sides = [_side(row.get(column), column) for column in (better, worse)]
        alone = [side[0]["role"] == "assistant" for side in sides]
        if all(alone):
            start = _prompt(row)
        elif any(alone):
            raise RowError("no shared prompt", f"{better} and {worse}: one begins with a prompt, the other does not")
        else:
            start = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*sides, strict=False))]
            while start and start[-1]["role"] == "assistant":  # equal answers, or one is the other's beginning
                start.pop()
            sides = [side[len(start) :] for side in sides]
            start = _with_system(row, start)
            if row.get("prompt") and start:
                start = _same(_prompt(row), start, better)
        scores = [row.get(f"score_{column}") for column in (better, worse)]
        if all(isinstance(score, int | float) for score in scores) and scores[0] < scores[1]:
            raise RowError("the rejected scores more", f"{better} scores {scores[0]:g}, {worse} {scores[1]:g}")
        if not start or not all(sides):
            raise RowError("no shared prompt", f"{better} and {worse} share no prompt, and the row has none")
        if any(len(side) != 1 for side in sides):
            raise RowError("answers of several turns", f"{better} and {worse}: expected one turn after the shared ones")
        return Row(start + sides[0], len(start), tuple(sides[1]))

    return parse


def _ranked(column: str) -> Callable[[RowOf], Row]:
    def parse(row: RowOf) -> Row:
        given, scores = row.get(column), row.get("scores")
        if not isinstance(given, Sequence) or isinstance(given, str) or len(given) < 2:
            raise RowError("not answers", f"{column}: expected a list of two answers or more, got {given!r:.60}")
        answers = [_answer(value, f"{column} {number}") for number, value in enumerate(given, 1)]
        if any(len(answer) != 1 for answer in answers):
            raise RowError("answers of several turns", f"{column}: expected one turn each")
        order = list(range(len(answers)))
        if scores is not None:
            numbers = isinstance(scores, list) and all(isinstance(s, int | float) and math.isfinite(s) for s in scores)
            if not numbers or len(scores) != len(answers):
                raise RowError("no scores", f"scores: expected a number for each of {len(answers)} answers")
            order = sorted({score: i for i, score in reversed([*enumerate(scores)])}.values(), key=lambda i: -scores[i])
        best, *worse = (answers[i][0] for i in order)
        if not worse:
            raise RowError("answers of equal score", "all answers have one score; none is better than another")
        asked = _prompt(row)
        return Row([*asked, best], len(asked), tuple(worse), equal=len(answers) - len(order))

    return parse


FORMATS = (  # the first whose columns are all there
    *(Format(both, _compared(*both), both) for both in (("real", "generated"), ("chosen", "rejected"))),
    *(Format(("prompt", column), _ranked(column), (column,)) for column in ("responses", "answers")),
    *(Format(("prompt", c, "label"), _labelled(c)) for c in ("completion", "response")),
    Format(("messages",), _conversation("messages")),
    Format(("conversations",), _conversation("conversations")),
    *(Format(("prompt", column), _completion(column)) for column in ("completion", "response")),
    *(Format(("instruction", column), _completion(column, "instruction")) for column in ("output", "response")),
    Format(("question", "answer"), _completion("answer", "question")),
    Format(("input_ids",), _ids),
    Format(("text",), _text),
)
ALONE = tuple(Format((column,), _asked(column)) for column in ("prompt", "question", "problem", "instruction"))
KNOWN = {*BEFORE, *EVERYWHERE, *OTHERS, *IMAGES, *(column for form in FORMATS for column in form.needs), "scores"}


def recognise(source: str, columns: Sequence[str], alone: bool = False) -> Format:
    """The format of rows with these columns; with `alone` a prompt without an answer is one, before plain text."""
    forms = (*FORMATS[:-1], *ALONE, FORMATS[-1]) if alone else FORMATS
    for form in forms:
        if {*columns}.issuperset(form.needs):
            return form
    known = "; ".join(" + ".join(form.needs) for form in forms)
    hint = HINT if columns and any({*columns}.issuperset(form.needs) for form in ALONE) else ""
    raise UserError(
        f"data {source}: columns {', '.join(sorted(columns))} are no known format{_naming(columns)}{hint}; expected "
        f"one of: {known}"
    )


def _naming(columns: Sequence[str]) -> str:
    """How data.columns could name columns of these so that they are a format: an example to paste and to correct."""
    usual = (("question", "answer"), ("prompt", "completion"), ("instruction", "output"), ("chosen", "rejected"))
    needs = max(usual, key=lambda names: len({*names} & {*columns}))
    lacking = [name for name in needs if name not in columns]
    own = [name for name in columns if name not in KNOWN] or [name for name in columns if name not in needs]
    if not own:
        return ""
    names = dict(zip(lacking if len(own) >= len(lacking) else ("text",), own, strict=False))
    example = yaml.safe_dump(names, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
    meant = " and ".join(f"{column!r} is the {name}" for name, column in names.items())
    return f"; if {meant}, say so: {shlex.quote(f'data.columns={example.strip()}')}"


def parsed(form: Format, row: RowOf, alone: bool) -> tuple[Row, list[str]]:
    """The row, and what is worth telling of it; with `alone` its prompt where the answer is none to learn from.

    Raises RowError.
    """
    try:
        return form.parse(row), []
    except RowError as error:
        if not alone or form.needs[0] not in PROMPTS:
            raise
        return _asked(form.needs[0])(row), [f"have no answer to learn from ({error.reason}); they are prompts alone"]


class Noting(dict):
    """A row that remembers which of its columns were asked for."""

    def __init__(self, row: RowOf):
        super().__init__(row)
        self.read: set[str] = set()

    def get(self, column, default=None):
        self.read.add(column)
        return super().get(column, default)

    def __getitem__(self, column):
        self.read.add(column)
        return super().__getitem__(column)

    def unused(self) -> list[str]:
        """Columns with a value that look like something to learn from and were not asked for."""
        return [column for column, value in self.items() if column in KNOWN - self.read and value not in (None, "", [])]


def _with_system(row: RowOf, conversation: Messages) -> Messages:
    """The conversation, the row's own system text before it."""
    column = next((name for name in SYSTEMS if row.get(name)), None)
    if column is None:
        return conversation
    own = text(row[column], column)
    spoken = with_system(conversation, own)
    if spoken[0]["content"] != own:
        raise RowError("two system texts", f"{column} and the conversation's own system turn differ")
    return spoken


def _prompt(row: RowOf, first: str = "prompt") -> Messages:
    """The turns that a prompt column stands for, the row's system text and history before it."""
    columns = (first, *(name for name in PROMPTS if name != first))
    column = next((name for name in columns if row.get(name)), None)
    if column is None:
        column = next((name for name in columns if name in row), first)
    value = row.get(column)
    if isinstance(value, list):
        return _with_system(row, turns(value))
    if isinstance(value, str) and TRANSCRIPT.match(value):
        return _with_system(row, _transcript(value, column))
    asked = text(value, column)
    for more in BESIDE if column == "instruction" else ():
        if row.get(more):
            asked += "\n\n" + text(row[more], more)
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError("not a history", f"history: expected pairs of a question and an answer, got {history!r:.60}")
    before = [turn(role, part, "history") for pair in history for role, part in zip(ASKING, pair, strict=True)]
    return _with_system(row, [*before, {"role": "user", "content": asked}])


def _same(asked: Messages, start: Messages, better: str) -> Messages:
    """The prompt of a row that says it twice: in a column and at the start of its conversations."""
    contents = [[m["content"] for m in turns if m["role"] != "system"] for turns in (asked, start)]
    if contents[0] != contents[1] and contents[0] != contents[1][:1] and contents[0] != contents[1][-1:]:
        raise RowError(
            "two prompts", f"prompt and the start of {better} differ: {contents[0]!r:.40}, {contents[1]!r:.40}"
        )
    return asked if len(asked) > len(start) else start


ASKING = ("user", "assistant")
ASKED = ("user", "tool")  # whose turn an answer follows
HINT = "; method grpo takes prompts alone"
SYSTEMS = ("system", "system_prompt")
BESIDE = ("input", "context")  # of an instruction: Alpaca's, Dolly's
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant): ?")  # hh-rlhf


def _answer(value: Any, what: str) -> Messages:
    """An answer: a text, a message, or turns."""
    if isinstance(value, dict):
        value = [value]
    return turns(value) if isinstance(value, list) else [turn("assistant", value, what)]


def _side(value: Any, what: str) -> Messages:
    """One side of a comparison: an answer, or a conversation with it; an hh-rlhf transcript is one."""
    if isinstance(value, str) and TRANSCRIPT.match(value):
        return _transcript(value, what)
    side = _answer(value, what)
    if not side:
        raise RowError("no answer", f"{what}: no turns")
    return side


def _transcript(value: str, what: str) -> Messages:
    """hh-rlhf's "\\n\\nHuman: ...\\n\\nAssistant: ..." as turns; an open last one is where the answer goes."""
    _, *parts = TRANSCRIPT.split(value)
    roles = {"Human": "user", "Assistant": "assistant"}
    said = list(zip(parts[::2], parts[1::2], strict=True))
    if not said[-1][1].strip() and len(said) > 1:
        said.pop()
    return [turn(roles[who], words, what) for who, words in said]
