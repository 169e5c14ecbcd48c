"""Where rows come from: JSON, JSON lines and Parquet files, hub data sets or copies of them, reasoning-gym.

A Table knows its columns and length and reads rows by number, so that a sample of a large file costs only its rows.
Every row comes with the words that find it again in an editor ("train.jsonl, line 12").
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spinfast.data import problems
from spinfast.errors import UserError
from spinfast.store.files import expanded

MAX_LINE_BYTES = 8 << 20  # one row of text; a longer line is a file of another kind
FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # a bare name may be one of the library's readers, which take pickles


@dataclass(frozen=True)
class Table:
    name: str
    columns: tuple[str, ...]
    length: int
    row: Callable[[int], dict[str, Any]]  # by number from 0
    where: Callable[[int], str]  # the same row for a reader
    shuffled: bool = False  # rows are drawn at random already


def open_table(
    source: str, *, subset: str | None, split: str, revision: str | None, rows: int | None, seed: int
) -> Table:
    """The table a config names. `rows` and `seed` say which problems reasoning-gym makes."""
    if source.startswith("reasoning_gym:"):
        return _reasoning_gym(source, split, rows, seed)
    path = expanded(source)
    if path.suffix in FILE_SUFFIXES:
        if not path.is_file():
            raise UserError(f"data {source}: no such file")
        table = _parquet(path) if path.suffix == ".parquet" else _json(path)
    elif path.is_file():
        raise UserError(f"data {source}: expected a file ending in {', '.join(FILE_SUFFIXES)}")
    elif path.is_dir():
        table = _hub(str(path.absolute()), subset, split, revision)
    elif HUB_ID.fullmatch(source):
        table = _hub(source, subset, split, revision)
    else:
        raise UserError(f"data {source}: expected a hub id, a local file or reasoning_gym:gsm_symbolic")
    if not table.length:
        raise UserError(f"data {source}: no rows; expected at least one example")
    return table


def _json(path: Path) -> Table:
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return _json_array(path) if start == b"[" else _json_lines(path)


def _json_array(path: Path) -> Table:
    rows = _parse(path.read_bytes(), str(path))

    def where(i: int) -> str:
        return f"{path}, row {i + 1}"

    for i, row in enumerate(rows):
        _expect_object(row, where(i))
    return Table(str(path), tuple(rows[0]) if rows else (), len(rows), rows.__getitem__, where)


def _json_lines(path: Path) -> Table:
    lines: list[tuple[int, int, int]] = []  # line number, offset and bytes of each line that is not blank
    with path.open("rb") as file:
        offset, number = 0, 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise UserError(
                    f"{path}, line {number}: longer than {MAX_LINE_BYTES >> 20} MiB; expected one JSON object per line"
                )
            if line.strip():
                lines.append((number, offset, len(line)))
            offset += len(line)

    def where(i: int) -> str:
        return f"{path}, line {lines[i][0]}"

    def row(i: int) -> dict[str, Any]:
        with path.open("rb") as file:
            file.seek(lines[i][1])
            value = _parse(file.read(lines[i][2]), where(i))
        _expect_object(value, where(i))
        return value

    return Table(str(path), tuple(row(0)) if lines else (), len(lines), row, where)


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: invalid UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _expect_object(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(value).__name__}")


def _parquet(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        names = tuple(table.column_names)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are no UTF-8
        raise UserError(f"data {path}: not a readable Parquet file: {_one_line(error)}") from None

    def where(i: int) -> str:
        return f"{path}, row {i + 1}"

    def row(i: int) -> dict[str, Any]:
        try:
            return table.slice(i, 1).to_pylist()[0]
        except UnicodeDecodeError:
            raise UserError(f"{where(i)}: invalid UTF-8") from None
        except (pa.ArrowException, ValueError, OverflowError) as error:  # a time that Python's calendar has not
            raise UserError(f"{where(i)}: cannot be read: {_one_line(error)}") from None

    return Table(str(path), names, table.num_rows, row, where)


def _hub(source: str, subset: str | None, split: str, revision: str | None) -> Table:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(source, subset, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        named = " ".join(part for part in (source, subset, f"split {split}", revision and f"@{revision}") if part)
        raise UserError(
            f"data {named}: cannot be loaded: {_one_line(error)}; check its name, subset and split, "
            "the connection and HF_HUB_OFFLINE, or name a local file"
        ) from None
    return Table(
        source, tuple(rows.column_names), len(rows), rows.__getitem__, lambda i: f"{source} {split}, row {i + 1}"
    )


def _reasoning_gym(source: str, split: str, rows: int | None, seed: int) -> Table:
    make = problems.SOURCES.get(source.removeprefix("reasoning_gym:"))
    if make is None:
        raise UserError(f"data {source}: only {', '.join(problems.SOURCES)} have worked solutions to learn from")
    if rows is None:
        raise UserError(f"data {source}: the problems are made on demand; set data.size to a number")
    try:
        import reasoning_gym
    except ModuleNotFoundError:
        raise UserError(f"data {source}: needs the package: pip install reasoning-gym") from None
    made = make(reasoning_gym.create_dataset, split, rows, seed)
    return Table(
        source, tuple(made[0]), len(made), made.__getitem__, lambda i: f"{source}, problem {i + 1}", shuffled=True
    )


def choose_rows(table: Table, size: int | None, seed: int) -> Sequence[int]:
    """The first `size` rows of a shuffle that depends on the seed alone."""
    order: Sequence[int] = range(table.length)
    if not table.shuffled:
        order = sorted(order, key=lambda i: hashlib.blake2b(f"{seed}/{i}".encode(), digest_size=8).digest())
    return order[:size]
