"""One file -> tables of rows: JSON lines, JSON, CSV, TSV, Parquet and Arrow, plain or compressed (gzip, zstd, bzip2).

A Table knows its columns and length and reads rows by number, so that a sample of a large file costs only its rows.
Every row comes with the words that find it again in an editor ("train.jsonl, line 12"); a fault of one row is raised
when that row is read. The file's first bytes say what it is; its name only tells CSV from TSV and JSON.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from spinfast.data.conversations import RowError, unpadded_row
from spinfast.errors import UserError
from spinfast.names import FILE_SUFFIXES, PACKED_SUFFIXES, suffix_of

MAX_LINE_BYTES = 8 << 20  # one row of text; a longer line is a file of another kind
SAMPLE = 100  # rows whose keys are a text file's columns
CODECS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}  # a file's first bytes -> Arrow's name
FOREIGN = (  # how files begin that hold no rows for us -> what they are and what to do
    (rb"version https://git-lfs", "a Git LFS pointer; the data is not here: run git lfs pull"),
    (rb"/annex/objects/", "a git-annex pointer; the data is not here: run git annex get"),
    (rb"(?i)\s*<(!doctype|html|head|body)", "a web page, saved in place of the data: download the file itself"),
    (rb"\s*<\?xml", "XML; convert it to JSON lines"),
    (rb"\xff\xfe|\xfe\xff|[\[{]\0|\0[\[{\0]", "no UTF-8 text (UTF-16, or null bytes); save it as UTF-8"),
    (rb"PK\x03\x04", "a ZIP archive or an Excel workbook; unpack it, or save the sheet as CSV"),
    (rb"\xd0\xcf\x11\xe0", "an Excel workbook; save the sheet as CSV"),
    (rb"\x80[\x02-\x05]", "a pickle, which could run code and is not read; save its rows as JSON lines"),
    (rb"\xfd7zXZ|7z\xbc\xaf|Rar!|\x04\x22\x4d\x18", "an archive of a kind that is not read; unpack it"),
    (rb"(?s).{257}ustar", "a tar archive; unpack it"),
    (rb"SQLite format 3|%PDF|\x89HDF|\x93NUMPY|Obj\x01", "no table of rows that is read; convert it to JSON lines"),
    (rb"ORC[^\w\s,;|]", "an ORC table; convert it to JSON lines or Parquet"),
)
ROW_LISTS = ("data", "rows", "examples", "instances", "items", "records")  # {"data": [...]}: the rows of a JSON file
SPLIT = re.compile(r"(train|training|test|testing|val|valid|validation|dev|eval|evaluation|heldout)(_\w+)?")

Opened = Callable[[], contextlib.AbstractContextManager[BinaryIO]]


@dataclass(frozen=True)
class Table:
    name: str
    columns: tuple[str, ...]
    length: int
    row: Callable[[int], dict[str, Any]]  # by number from 0; raises RowError
    where: Callable[[int], str]  # the same row for a reader
    shuffled: bool = False  # rows are drawn at random already


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_file(path: Path) -> dict[str, Table]:
    """The file's splits by name; the one of a file that names none is ""."""
    suffix = suffix_of(path)
    if suffix not in FILE_SUFFIXES:
        kinds = f"{', '.join(FILE_SUFFIXES)}, or one of these and {', '.join(PACKED_SUFFIXES)}"
        raise UserError(f"data {path}: expected a file ending in {kinds}")
    try:
        opened = unpacked(path)
        with opened() as file:
            head = file.read(4096)
        for beginning, what in FOREIGN:
            if re.match(beginning, head):
                raise UserError(f"data {path}: this file is {what}")
        return _reader(head, suffix)(path, opened)
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are no UTF-8
        raise UserError(f"data {path}: cannot be read as {suffix[1:]}: {one_line(error)}") from None


def unpacked(path: Path) -> Opened:
    """How to open the file's plain bytes, as often as rows are read."""
    with path.open("rb") as file:
        start = file.read(4)
    codec = next((codec for magic, codec in CODECS.items() if start.startswith(magic)), None)
    if codec is None:
        return lambda: path.open("rb")
    spool = tempfile.SpooledTemporaryFile(MAX_LINE_BYTES)  # noqa: SIM115 - open as long as the table is
    with pa.CompressedInputStream(pa.OSFile(str(path)), codec) as stream:
        shutil.copyfileobj(stream, spool)

    def opened():
        spool.seek(0)
        return contextlib.nullcontext(spool)

    return opened


def _reader(head: bytes, suffix: str) -> Callable[[Path, Opened], dict[str, Table]]:
    if head.startswith(b"PAR1"):
        return _parquet
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return _arrow
    return {".parquet": _parquet, ".arrow": _arrow, ".feather": _arrow, ".csv": _csv, ".tsv": _csv}.get(suffix, _json)


# -- JSON -----------------------------------------------------------------------------------------------------------


def _json(path: Path, opened: Opened) -> dict[str, Table]:
    """JSON lines if the first line is a row and not all there is; else one document, or several one after another."""
    with opened() as file:
        lines = list(islice((line for line in _lines(file) if line.strip()), 10))
    rows = [_is_object(line) for line in lines]
    if len(lines) != 1 and rows[:1] != [False]:
        return _json_lines(path, opened)
    try:
        return _json_document(path, opened)
    except UserError:
        if (any(rows) or len(rows) == 1) and not lines[0].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            return _json_lines(path, opened)  # a row is at fault
        raise


def _lines(file: BinaryIO) -> Iterable[bytes]:
    """The lines; a longer one than MAX_LINE_BYTES comes in pieces."""
    return iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8-sig", errors="replace")), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(path: Path, opened: Opened) -> dict[str, Table]:
    spans: list[tuple[int, int, int]] = []  # line number, offset and bytes of each line that is not blank
    with opened() as file:
        offset, number, blank, size = 0, 1, True, 0
        for piece in _lines(file):
            size += len(piece)
            blank = blank and not piece.strip()
            if piece.endswith(b"\n"):
                if not blank:
                    spans.append((number, offset, size))
                offset, number, blank, size = offset + size, number + 1, True, 0
        if not blank:
            spans.append((number, offset, size))
    return {"": _text_table(path, opened, spans, _json_row)}


def _text_table(
    path: Path, opened: Opened, spans: Sequence[tuple[int, int, int]], parse: Callable[[bytes], dict], columns=None
) -> Table:
    """Rows that lie in the text at (line number, offset, bytes)."""

    def row(i: int) -> dict[str, Any]:
        _, offset, size = spans[i]
        if size > MAX_LINE_BYTES:
            raise RowError("row too long", f"longer than {MAX_LINE_BYTES >> 20} MiB; expected one row per line")
        try:
            with opened() as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise UserError(f"data {path}: cannot be read any more: {one_line(error)}") from None
        return parse(data)

    return _table(path, row, lambda i: f"{path}, line {spans[i][0]}", len(spans), columns)


def _table(path: Path, row: Callable, where: Callable, length: int, columns: tuple[str, ...] | None = None) -> Table:
    """Rows need not have the same columns: they are the keys of the first ones that can be read."""
    keys: dict[str, None] = {}
    for i in range(0 if columns else min(length, SAMPLE)):
        with contextlib.suppress(RowError):  # told when the row is read
            keys |= dict.fromkeys(row(i))
    return Table(str(path), columns or tuple(keys), length, row, where)


def _json_row(data: bytes) -> dict[str, Any]:
    line = _text(data)
    try:
        value = json.loads(line, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise RowError("not valid JSON", f"not valid JSON: {one_line(error)}") from None
    return _object(value)


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError("invalid UTF-8", f"invalid UTF-8 at byte {error.start}; save the file as UTF-8") from None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RowError("no JSON object", f"expected a JSON object, got {type(value).__name__}")
    return dict(value)


def _constant(name: str) -> None:
    """NaN is how pandas writes that a value is missing."""
    if name != "NaN":
        raise ValueError(f"{name} is no JSON number")


def _json_document(path: Path, opened: Opened) -> dict[str, Table]:
    with opened() as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, byte = before.count(b"\n") + 1, error.start - before.rfind(b"\n") - 1
        raise UserError(f"{path}, line {line}: invalid UTF-8 at byte {byte}; save the file as UTF-8") from None
    values, lines = _values(text, path)
    if len(values) == 1 and isinstance(values[0], list):
        return {"": _listed(path, values[0], lambda i: f"{path}, row {i + 1}")}
    if len(values) == 1 and (lists := _row_lists(values[0])):
        return {
            "" if key in ROW_LISTS else key: _listed(path, rows, lambda i, key=key: f"{path}, {key} row {i + 1}")
            for key, rows in lists.items()
        }
    return {"": _listed(path, values, lambda i: f"{path}, line {lines[i]}")}


def _values(text: str, path: Path) -> tuple[list[Any], list[int]]:
    """The JSON values that stand one after another, and the lines where they begin."""
    decoder, space = json.JSONDecoder(parse_constant=_constant), re.compile(r"\s*")
    values: list[Any] = []
    lines: list[int] = []
    line, seen, at = 1, 0, space.match(text).end()
    while at < len(text):
        line, seen = line + text.count("\n", seen, at), at
        if values and text[at] == ",":
            raise UserError(
                f"{path}, line {line}: a comma after the row; expected one JSON object per line without commas, "
                "or all rows in [ ]"
            )
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            fault = f"line {getattr(error, 'lineno', line)}: not valid JSON: {getattr(error, 'msg', one_line(error))}"
            found = repr(text[getattr(error, "pos", at) :][:40])
            raise UserError(f"{path}, {fault}, found {found}; expected rows as JSON objects") from None
        values.append(value)
        lines.append(line)
        at = space.match(text, at).end()
    return values, lines


def _row_lists(value: Any) -> dict[str, list]:
    """The lists of rows in {"data": [...]} or {"train": [...], "test": [...]}; none in what is a row itself."""
    if not isinstance(value, dict):
        return {}
    return {
        key: rows
        for key, rows in value.items()
        if (key in ROW_LISTS or SPLIT.fullmatch(key))
        and isinstance(rows, list)
        and all(isinstance(row, dict) for row in rows[:1])
    }


def _listed(path: Path, rows: list, where: Callable[[int], str]) -> Table:
    def row(i: int) -> dict[str, Any]:
        return _object(rows[i])

    return _table(path, row, where, len(rows))


# -- CSV ------------------------------------------------------------------------------------------------------------


def _csv(path: Path, opened: Opened) -> dict[str, Table]:
    """The first row names the columns. Each cell is text as it is written ("007", "null"); an empty one is null."""
    csv.field_size_limit(MAX_LINE_BYTES)
    with opened() as file:
        first = file.readline(MAX_LINE_BYTES)
    tabs = suffix_of(path) == ".tsv"
    delimiter = "\t" if tabs else max(",;\t|", key=first.decode("latin-1").count)

    def cells(data: bytes) -> list[str]:
        try:
            return next(csv.reader(io.StringIO(_text(data), newline=""), delimiter=delimiter, strict=True), [])
        except csv.Error as error:
            raise RowError(
                "not valid CSV", f"not valid CSV: {error}; quotes inside a quoted text are doubled"
            ) from None

    spans = _csv_spans(opened, delimiter)
    if not spans:
        return {"": Table(str(path), (), 0, lambda i: {}, lambda i: str(path))}
    head = _text_table(path, opened, spans[:1], lambda data: dict(enumerate(cells(data))))
    try:
        names = [str(name).strip() for name in head.row(0).values()]
    except RowError as error:
        raise UserError(f"{head.where(0)}: {error}") from None
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{head.where(0)}: two columns are called {repeated!r}; rename one")

    def parse(data: bytes) -> dict[str, Any]:
        values = cells(data)
        if len(values) != len(names):
            raise RowError(
                "wrong number of cells",
                f"expected {len(names)} cells ({', '.join(names)}), got {len(values)}; quote texts that hold "
                f"{delimiter!r} or a line break",
            )
        return {name: value or None for name, value in zip(names, values, strict=True)}

    return {"": _text_table(path, opened, spans[1:], parse, tuple(names))}


def _csv_spans(opened: Opened, delimiter: str) -> list[tuple[int, int, int]]:
    """Where the rows that are not blank lie: line number, offset, bytes. Read as Latin-1: a byte is a character."""
    spans = []
    with opened() as file:
        line, offset = 1, 0

        def lines() -> Iterable[str]:
            nonlocal line, offset
            for text in _lines(file):
                line, offset = line + 1, offset + len(text)
                yield text.decode("latin-1")

        reader = csv.reader(lines(), delimiter=delimiter, strict=True)
        while True:
            start = line, offset
            try:
                written = any(map(str.strip, next(reader)))
            except StopIteration:
                return spans
            except csv.Error:
                written = True  # told when the row is read
            if written:
                spans.append((*start, offset - start[1]))


# -- Parquet and Arrow ----------------------------------------------------------------------------------------------


def _parquet(path: Path, opened: Opened) -> dict[str, Table]:
    with opened() as file:
        parquet = pq.ParquetFile(file)
        return {"": _mapped(path, parquet.schema_arrow, parquet.iter_batches())}


def _arrow(path: Path, opened: Opened) -> dict[str, Table]:
    with opened() as file:
        if file.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            file.seek(0)
            reader = batches = pa.ipc.open_stream(file)
        return {"": _mapped(path, reader.schema, map(_checked, batches))}


def _checked(batch: pa.RecordBatch) -> pa.RecordBatch:
    batch.validate(full=True)  # offsets that point outside would be read as they are
    return batch


def _mapped(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Table:
    """The batches in a file that has no name any more and is read where rows are: memory holds one batch."""
    with tempfile.NamedTemporaryFile() as spool:
        with pa.ipc.new_stream(spool.file, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        spool.flush()
        with pa.memory_map(spool.name) as mapped:
            table = pa.ipc.open_stream(mapped.read_buffer()).read_all()

    def row(i: int) -> dict[str, Any]:
        try:
            return unpadded_row(table.slice(i, 1).to_pylist()[0])
        except UnicodeDecodeError:
            raise RowError("invalid UTF-8", "invalid UTF-8") from None
        except (pa.ArrowException, ValueError, OverflowError) as error:  # a time that Python's calendar has not
            raise RowError("cannot be read", f"cannot be read: {one_line(error)}") from None

    return Table(str(path), tuple(table.column_names), table.num_rows, row, lambda i: f"{path}, row {i + 1}")
