"""Texts to be rated: a name, the plain words, where they come from.

moby.txt, notes.md, page.html, book.epub, paper.pdf    a file, also packed (.gz, .dz, .zst, .bz2)
rows.jsonl, rows.parquet ...                           the texts of one column, "text" unless told otherwise
essays/                                                a folder: its files' texts in the order of their names
package:NAME/FILE, package:NAME.MODULE                 a file or folder of an installed package, a module's source;
                                                       of a module that is a dict of texts (pydoc_data.topics) those
sums:right, sums:wrong, sums:right/gcd ...             worked solutions of problems.py's families, by reasoning-gym;
                                                       wrong: the same questions and form, the worked numbers false
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import itertools
import logging
import operator
import platform
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from spinfast.data import problems
from spinfast.data.sources import open_table
from spinfast.errors import UserError
from spinfast.models import in_package
from spinfast.names import FILE_SUFFIXES, suffix_of
from spinfast.store.files import expanded
from spinfast.studies.documents import KINDS, read_document

log = logging.getLogger("spinfast")

PROBLEMS = 500  # of a text of worked solutions
FAMILIES = [name for name in problems.SOURCES if name != "chain_sum/pairs"]
EBOOK = r"(?:THE|THIS) PROJECT GUTENBERG"
GUTENBERG = (  # what ends the header, what begins the licence
    re.compile(rf"\*\*\* ?START OF {EBOOK}[^\n]*(?:\n[^\n]+)?\*\*\*|\*END\* ?THE SMALL PRINT!.*", re.I),
    re.compile(rf"^(?:\*\*\* ?END OF {EBOOK}|End of (?:the |this )?Project Gutenberg)", re.M | re.I),
)
SENTENCE = re.compile(r"(?<=[.!?;:])\s+|\n\s*\n")
NUMBER = re.compile(r"(?<![\d.])-?\d+(?:\.\d+)?(?!\d)")  # a minus behind a digit is no sign
CALCULATED = problems.OPERATORS | {"/": operator.truediv}


@dataclass(frozen=True)
class Text:
    name: str
    text: str = field(repr=False)
    note: str = ""  # source, licence where known, what was cut

    @functools.cached_property
    def sha256(self) -> str:
        """Of the words as UTF-8: two names of one content have one."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_text(source: str, *, name: str | None = None, column: str = "text", seed: int = 0) -> Text:
    """The text that a source names, see above; `name` in place of the one made of it, `seed` for worked solutions.

    Raises UserError, in one line that names the source, for what is missing, empty, binary or not UTF-8.
    """
    if source.startswith("sums:"):
        found = _sums(source, seed)
    elif source.startswith("package:"):
        found = _of_package(source, column)
    else:
        path = expanded(source)
        if not path.exists():
            raise UserError(
                f"text {source}: no such file or folder; expected one, package:NAME/FILE, or sums:right, sums:wrong"
            )
        found = Text(_stem(path), _at(path, column), str(path))
    found = _without_gutenberg(source, replace(found, name=name or found.name))
    if not found.text.strip():
        raise UserError(f"text {source}: empty; expected words")
    return found


def read_texts(sources: Iterable[str], column: str = "text", seed: int = 0) -> list[Text]:
    """The sources' texts, each under a name of its own; texts of one content are told."""
    texts = [read_text(source, column=column, seed=seed) for source in sources]
    if twice := [name for name, count in Counter(text.name for text in texts).items() if count > 1]:
        raise UserError(f"text {twice[0]}: two texts have this name; rename one of their files")
    known: dict[str, str] = {}
    for text in texts:
        if (first := known.setdefault(text.sha256, text.name)) != text.name:
            log.warning("text %s: the same words as %s", text.name, first)
    return texts


def sentence_shuffled(text: Text, seed: int) -> Text:
    """The text's sentences, each as it is, in random order: its words and phrases without its course."""
    sentences = [sentence for part in SENTENCE.split(text.text) if (sentence := part.strip())]
    random.Random(f"{seed}/{text.sha256}").shuffle(sentences)
    note = "; ".join(filter(None, (text.note, "sentences in random order")))
    return Text(f"{text.name}-sentences", " ".join(sentences), note)


# -- files ----------------------------------------------------------------------------------------------------------


def _at(path: Path, column: str) -> str:
    return _folder(path, column) if path.is_dir() else read_document(path, column)


def _folder(path: Path, column: str) -> str:
    """The files' texts by the order of their paths, linked ones once; files of other kinds are told, not read."""
    files = {
        file.resolve(): file
        for file in sorted(path.rglob("*"), key=Path.is_symlink, reverse=True)
        if not any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(path).parts)
        and file.is_file()
    }
    texts, others = [], []
    for file in sorted(files.values()):
        try:
            texts.append(read_document(file, column))
        except UserError:
            if file.suffix in ("", ".txt", ".md", ".rst", *KINDS) or suffix_of(file) in FILE_SUFFIXES:
                raise
            others.append(file.name)
    if others:
        log.warning("text %s: files that are no texts are not read: %d, %s", path, len(others), ", ".join(others[:10]))
    return "\n\n".join(text for text in texts if text.strip())


def _stem(path: Path) -> str:
    """A name that may be a folder's: essays.txt.gz -> essays."""
    path = path.resolve()
    return path.name.split(".")[0] if path.is_file() and not path.name.startswith(".") else path.name


def _without_gutenberg(source: str, text: Text) -> Text:
    """Without Project Gutenberg's header and licence, where the text has them."""
    start, end = (pattern.search(text.text) for pattern in GUTENBERG)
    if not start and not end:
        return text
    kept = text.text[start.end() if start else 0 : end.start() if end else None]
    cut = len(text.text) - len(kept)
    log.info("text %s: Project Gutenberg's header and licence are cut, %d characters", source, cut)
    note = f"{text.note}; Project Gutenberg, its header and licence cut ({cut} characters)"
    return replace(text, text=kept.strip("\n") + "\n", note=note)


# -- packages -------------------------------------------------------------------------------------------------------


def _of_package(source: str, column: str) -> Text:
    head, slash, rest = source.removeprefix("package:").partition("/")
    package, *modules = head.split(".")
    path = in_package("/".join((f"package:{package}", *modules, *([rest] if slash else []))), "text")
    module = path.with_name(f"{path.name}.py")
    if modules and not path.exists() and module.is_file():
        path = module
    if not path.exists():
        raise UserError(f"text {source}: the package has no such file, folder or module")
    text = _texts_of_module(path) if path.suffix == ".py" and not rest else None
    return Text(_stem(path), _at(path, column) if text is None else text, f"{source} of {_origin(package)}")


def _texts_of_module(path: Path) -> str | None:
    """The texts of a module that assigns nothing but dicts of them; None of any other, which is not run."""
    try:
        body = ast.parse(path.read_bytes()).body
        values = [ast.literal_eval(node.value) for node in body if isinstance(node, ast.Assign)]
    except (ValueError, SyntaxError):
        return None
    dicts = bool(values) and len(values) == len(body) and all(isinstance(value, dict) for value in values)
    texts = [text for value in values for text in value.values()] if dicts else []
    return "\n\n".join(texts) if texts and all(isinstance(text, str) for text in texts) else None


def _origin(package: str) -> str:
    """Whose package it is, and under which licence, as far as its metadata say."""
    if package in sys.stdlib_module_names:
        return f"Python {platform.python_version()}, PSF licence"
    try:
        data = importlib.metadata.metadata(package)
    except importlib.metadata.PackageNotFoundError:
        return package
    licence = data.get("License-Expression") or data.get("License") or "see the package"
    return f"{data['Name']} {data['Version']}, licence {licence.splitlines()[0]:.60}"


# -- worked solutions -----------------------------------------------------------------------------------------------


def _sums(source: str, seed: int) -> Text:
    kind, _, family = source.removeprefix("sums:").partition("/")
    family = family or "chain_sum"
    if kind not in ("right", "wrong") or family not in FAMILIES:
        raise UserError(
            f"text {source}: expected sums:right or sums:wrong, or one of them with a family: /{', /'.join(FAMILIES)}"
        )
    table = open_table(f"reasoning_gym:{family}", rows=PROBLEMS, seed=seed)
    rows = [table.row(i) for i in range(table.length)]
    solutions = [
        row["answer"] if kind == "right" else falsified(row["answer"], random.Random(f"{seed}/{row['question']}"))
        for row in rows
    ]
    text = "\n\n".join(f"{row['question']}\n{solution}" for row, solution in zip(rows, solutions, strict=True))
    note = f"{len(rows)} problems of {family} by {_origin('reasoning_gym')}"
    return Text(re.sub(r"[:/]", "-", source), text, note)


def falsified(solution: str, draw: random.Random) -> str:
    """A worked solution in its form, with every line's result another number of as many digits, carried on.

    "8 + 4 = 12\\n12 - 7 = 5\\n#### 5" -> "8 + 4 = 57\\n57 - 7 = 3\\n#### 3". No line that is sums alone holds.
    """
    instead: dict[str, str] = {}
    lines = []
    for line in solution.splitlines():
        true = NUMBER.findall(line)
        carried = NUMBER.sub(lambda number: instead.get(number[0], number[0]), line)
        if true and not (line.startswith("####") and carried != line):
            *_, last = NUMBER.finditer(carried)
            drawn = (_other(true[-1], draw) for _ in itertools.count())
            written = ((number, carried[: last.start()] + number + carried[last.end() :]) for number in drawn)
            instead[true[-1]], carried = next(each for each in written if each[0] != true[-1] and not _holds(each[1]))
        lines.append(carried)
    return "\n".join(lines)


def _other(number: str, draw: random.Random) -> str:
    """A number of the same form, with digits drawn anew; none begins with a 0 that this one could not."""
    first = number.startswith("-")
    longer = number[first:] != "0" and (first or number[1:2].isdigit())
    return re.sub(r"\d", lambda digit: str(draw.randrange(longer and digit.start() == first, 10)), number)


def _holds(line: str) -> bool:
    """Whether a line's sides that are sums alone, "1 * 36 + 12 = 48", are equal; from left to right."""
    values = [value for side in line.split("=") if (value := _value(side.split())) is not None]
    return len(values) > 1 and len({*values}) == 1


def _value(parts: list[str]) -> float | None:
    if not parts or not all(map(NUMBER.fullmatch, parts[::2])) or not {*parts[1::2]} <= CALCULATED.keys():
        return None
    total, *rest = parts
    value = float(total)
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        if sign == "/" and not float(term):
            return None
        value = CALCULATED[sign](value, float(term))
    return value
