"""Texts -> rows of token ids with one budget for all: equal trained tokens, equal rows, equal lengths.

A row is what {"text": ...} trains (renderer.text_ids): what the tokenizer puts before a text, a piece, the end token.
Its first token is the prompt, the others are trained. Rows are ids from here on: shuffled tokens would not survive
being written out and tokenised again.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from spinfast.data.renderer import Renderer
from spinfast.data.sources import shares
from spinfast.errors import UserError
from spinfast.studies.texts import Text
from spinfast.types import Example

Ids = tuple[int, ...]
PROBE = "One text.\n\n"  # between what the tokenizer puts around any
WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, eq=False)
class Encoded:
    """A text's ids, and what stands before and after each piece of it that becomes a row."""

    name: str
    ids: np.ndarray = field(repr=False)  # (n,) int64
    before: Ids
    after: Ids


@dataclass(frozen=True, eq=False)
class Sample:
    """What one run trains: `ids`, over and over, cut into rows of `length` tokens until `tokens` of them are trained.

    The last row is cut where the budget ends, all others are full. `passes` is how often the text was gone through.
    """

    ids: np.ndarray = field(repr=False)  # (n,) int64, each at least once in the rows
    before: Ids
    after: Ids
    length: int
    tokens: int
    passes: float

    @property
    def rows(self) -> list[Ids]:
        """The rows, `tokens` + len(rows) ids together."""
        content, rows = _content(self.before, self.after, self.tokens, self.length)
        size = self.length - len(self.before) - len(self.after)
        drawn = np.resize(self.ids, content).tolist()
        whole = [(*self.before, *drawn[at : at + size], *self.after) for at in range(0, rows * size, size)]
        return [*whole[:-1], whole[-1][: self.tokens - (rows - 1) * (self.length - 1) + 1]]

    @property
    def fingerprint(self) -> str:
        """sha256 of the rows."""
        return hashlib.sha256(repr(self.rows).encode()).hexdigest()

    def examples(self, renderer: Renderer) -> list[Example]:
        """The rows as a run takes them (methods.run.begin)."""
        return [Example(i, (), renderer.text(row), row[:1], row[1:]) for i, row in enumerate(self.rows)]


def encode(text: Text, renderer: Renderer) -> Encoded:
    """The whole text's ids, once for all seeds; an empty line ends it, where it is gone through again."""
    ids = renderer.tokenizer(f"{text.text.rstrip()}\n\n", add_special_tokens=False).input_ids
    rendered, alone = renderer.text_ids(PROBE), renderer.tokenizer(PROBE, add_special_tokens=False).input_ids
    whole = [*rendered.prompt_ids, *rendered.answer_ids]
    start = next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), None)
    if start is None:
        raise UserError(f"tokenizer {renderer.tokenizer.name_or_path}: its end token changes the words before it")
    return Encoded(text.name, np.array(ids), tuple(whole[:start]), tuple(whole[start + len(alone) :]))


def take(text: Encoded, tokens: int, length: int, seed: int) -> Sample:
    """`tokens` trained tokens of a text in rows of `length`.

    Of a longer text, pieces of a row's size drawn at random; a shorter one whole, over and over from a random place.
    """
    content, rows = _content(text.before, text.after, tokens, length)
    random = np.random.default_rng(seed)
    n, size = len(text.ids), length - len(text.before) - len(text.after)
    if n >= rows * size:
        starts = size * random.permutation(n // size)[:rows] + random.integers(n % size + 1)
        ids = np.concatenate([text.ids[start : start + size] for start in starts])[:content]
    else:
        ids = np.roll(text.ids, -int(random.integers(n)))[:content]
    return Sample(ids, text.before, text.after, length, tokens, content / n)


def mixture(texts: Sequence[Encoded], tokens: int, length: int, seed: int) -> Sample:
    """A stretch of equal length of each text, in random order: what any text does.

    `passes` is of the mixture, not of the texts: 1.
    """
    first = texts[0]
    content, _ = _content(first.before, first.after, tokens, length)
    random = np.random.default_rng(seed)
    stretches = [
        np.resize(np.roll(text.ids, -int(random.integers(len(text.ids)))), share)
        for text, share in zip(texts, shares([1] * len(texts), content), strict=True)
    ]
    ids = np.concatenate([stretches[i] for i in random.permutation(len(stretches))])
    return Sample(ids, first.before, first.after, length, tokens, 1.0)


def token_shuffled(sample: Sample, seed: int) -> Sample:
    """The same ids in random order: the rows hold each as often as the sample's do, and come again as often.

    Where the last time through ends early, the ids that come once more are shuffled among themselves.
    """
    content, _ = _content(sample.before, sample.after, sample.tokens, sample.length)
    random, more = np.random.default_rng((seed, 1)), content % len(sample.ids)
    ids = np.concatenate([random.permutation(part) for part in np.split(sample.ids, [more])])
    return replace(sample, ids=ids)


def _content(before: Ids, after: Ids, tokens: int, length: int) -> tuple[int, int]:
    """How many of a text's ids and how many rows train so many tokens."""
    size = length - len(before) - len(after)
    if size < 1 or tokens < 1:
        raise UserError(
            f"rows of {length} tokens: expected room for a piece beside {len(before) + len(after)} of the tokenizer, "
            f"and a token or more to train, got {tokens}"
        )
    rows = math.ceil(tokens / (length - 1))
    last = tokens - (rows - 1) * (length - 1) + 1
    return (rows - 1) * size + min(size, max(last - len(before), 0)), rows


# -- contamination --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contamination:
    """`share` of the items have a run of words in common with the text; `worst` has most of its runs there."""

    n: int
    share: float
    whole: int  # items all of whose runs are in the text
    worst: int  # its position among the items
    worst_share: float


def contamination(text: Text, items: Sequence[str], n: int = 13) -> Contamination:
    """How much of evaluation items a text holds: runs of `n` words and signs, letter case aside (Brown et al. 2020,
    appendix C); of a shorter item all of it. Items of one form share its words: then look at `whole` and `worst`.
    """
    runs = [_runs(_words(item), n) for item in items]
    words = _words(text.text)
    sizes = {len(next(iter(each))) for each in runs if each}
    wanted = set().union(*runs)
    found = {run for size in sizes for run in zip(*(words[i:] for i in range(size)), strict=False) if run in wanted}
    held = [len(each & found) / len(each) if each else 0.0 for each in runs]
    if not held:
        raise ValueError("expected evaluation items to look for, got none")
    worst = max(range(len(held)), key=held.__getitem__)
    return Contamination(n, sum(map(bool, held)) / len(held), sum(h == 1 for h in held), worst, held[worst])


def _words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def _runs(words: list[str], n: int) -> set[tuple[str, ...]]:
    return {*zip(*(words[i:] for i in range(min(n, len(words)))), strict=False)}
