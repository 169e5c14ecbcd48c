"""Where rows come from: files, folders and globs of them, saved data sets, hub data sets, reasoning-gym; mixtures.

Local files are read by readers.py, so a fault is told by its file and line; the `datasets` library reads what it
saved itself and what is on the hub.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from spinfast.data import problems
from spinfast.data.conversations import RowError, unpadded_row
from spinfast.data.readers import MAX_LINE_BYTES, Table, one_line, read_file
from spinfast.errors import UserError
from spinfast.names import FILE_SUFFIXES, HUB_ID, suffix_of
from spinfast.store.files import expanded

__all__ = ["MAX_LINE_BYTES", "Table", "choose_rows", "draw", "is_local", "open_table", "shares"]

log = logging.getLogger("spinfast")
METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # beside the rows
SPLIT_WORDS = {  # in the names of files and folders, as the hub reads them
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def is_local(source: str) -> bool:
    """Whether the source is meant to be on this machine."""
    path = expanded(source)
    return os.path.exists(path) or suffix_of(path) in FILE_SUFFIXES or not HUB_ID.fullmatch(source)


def open_table(
    source: str,
    *,
    subset: str | None = None,
    split: str = "train",
    revision: str | None = None,
    rows: int | None = None,
    seed: int = 0,
) -> Table:
    """The table a config names. `rows` and `seed` say which problems reasoning-gym makes."""
    generated, local = source.startswith("reasoning_gym:"), is_local(source)
    if generated or local:
        kind = "generated problems have" if generated else "a local source has"
        if revision is not None:
            raise UserError(f"data {source}: revision {revision}: {kind} no revisions; leave it out")
        if subset is not None and not os.path.isdir(expanded(source)):
            raise UserError(f"data {source}: subset {subset}: {kind} no subsets; leave it out")
    if generated:
        table = _reasoning_gym(source, split, rows, seed)
    elif local:
        table = _select(source, _local(source, subset, split), split)
    else:
        table = _hub(source, subset, split, revision)
    if not table.length:
        raise UserError(f"data {source}: no rows; expected at least one example")
    if not table.columns:
        try:
            table.row(0)
        except RowError as error:  # as all others are
            raise UserError(f"{table.where(0)}: {error}") from None
    return table


# -- local ----------------------------------------------------------------------------------------------------------


def _local(source: str, subset: str | None, split: str) -> dict[str, Table]:
    """The source's splits by name, at least those wanted; the one of a source that names none is ""."""
    path = expanded(source)
    if os.path.isdir(path):  # of a name that no file can have, Path.is_dir would raise
        return _saved(path, subset) or _folder(path, subset, split)
    if os.path.isfile(path):
        return read_file(path)
    if os.path.islink(path):
        raise UserError(f"data {source}: a link to a file that is not here; fetch it (git annex get, git lfs pull)")
    files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
    if files:
        return _shards(source, [("", file) for file in files])
    if "://" in source:
        raise UserError(f"data {source}: a URL is not read; download the file and name it here, or name a hub id")
    if any(letter in source for letter in "*?["):
        raise UserError(f"data {source}: no such file, and no file matches it")
    if suffix_of(path) in FILE_SUFFIXES:
        raise UserError(f"data {source}: no such file")
    raise UserError(
        f"data {source}: expected a hub id, a local file or folder, a pattern (data/*.jsonl) or "
        f"reasoning_gym:{' or '.join(problems.SOURCES)}"
    )


def _select(source: str, tables: dict[str, Table], split: str) -> Table:
    """The rows that a split's name, slice or sum ("train[:25%]+test") names.

    What has no splits is the split train, and whatever its own file's name says (test.jsonl is also test).
    """
    if "" in tables:
        words = [word for word in re.findall(r"\w+", split) if word in expanded(source).name]
        named = {name: table for name, table in tables.items() if name}
        tables = dict.fromkeys(["train", *words], tables[""]) | named
    if split in tables:
        return tables[split]
    from datasets import ReadInstruction

    try:
        wanted = ReadInstruction.from_spec(split).to_absolute({name: table.length for name, table in tables.items()})
    except ValueError as error:
        raise UserError(
            f"data {source}: split {split}: {one_line(error)}; it has {', '.join(tables)}, "
            "and slices such as train[:25%]"
        ) from None
    return _chained(source, [(tables[part.splitname], part.from_, max(part.from_, part.to)) for part in wanted])


def _chained(name: str, pieces: Sequence[tuple[Table, int, int]]) -> Table:
    """The rows `start` to `stop` of one table after another's."""
    ends = list(accumulate(stop - start for _, start, stop in pieces))

    def at(i: int) -> tuple[Table, int]:
        number = bisect_right(ends, i)
        table, _, stop = pieces[number]
        return table, stop + i - ends[number]

    def row(i: int) -> dict[str, Any]:
        table, number = at(i)
        return table.row(number)

    def where(i: int) -> str:
        table, number = at(i)
        return table.where(number)

    columns = tuple(dict.fromkeys(column for table, _, _ in pieces for column in table.columns))
    return Table(name, columns, ends[-1], row, where)


def _shards(source: str, files: Sequence[tuple[str, Path]]) -> dict[str, Table]:
    """(split, file) -> the tables of each split; a file may name splits of its own."""
    found: dict[str, list[Table]] = {}
    for split, file in files:
        for own, table in read_file(file).items():
            found.setdefault(own or split, []).append(table)
    for tables in found.values():
        _tell_other_columns(source, [table for table in tables if table.length])
    return {split: _chained(source, [(table, 0, table.length) for table in tables]) for split, tables in found.items()}


def _tell_other_columns(source: str, tables: Sequence[Table]) -> None:
    odd = [table for table in tables if {*table.columns} != {*tables[0].columns}]
    if odd:
        first, other = tables[0], odd[0]
        lacks, adds = ({*first.columns} - {*other.columns}), ({*other.columns} - {*first.columns})
        log.warning(
            "data %s: %d of %d files have other columns than %s: %s lacks %s, has %s; what a row lacks is null",
            source,
            len(odd),
            len(tables),
            Path(first.name).name,
            other.name,
            ", ".join(sorted(lacks)) or "none",
            ", ".join(sorted(adds)) or "no others",
        )


def _folder(path: Path, subset: str | None, split: str) -> dict[str, Table]:
    """A folder of files, or a copy of a hub data set: splits by README.md's configs, else by names, as on the hub."""
    seen = [
        file
        for file in sorted(path.rglob("*"))
        if not any(part.startswith(".") for part in file.relative_to(path).parts) and file.is_file()
    ]
    files = [file for file in seen if suffix_of(file) in FILE_SUFFIXES and file.name not in METADATA]
    if others := [file.name for file in seen if suffix_of(file) not in FILE_SUFFIXES]:
        log.info("data %s: %d files of other kinds are not read: %s", path, len(others), ", ".join(others[:10]))
    patterns = _card_patterns(path, subset)
    if patterns is not None:
        files_of = {name: {file for p in globs for file in path.glob(p)} for name, globs in patterns.items()}
        named = [(name, file) for name, chosen in files_of.items() for file in files if file in chosen]
    elif subset is not None:
        raise UserError(f"data {path}: subset {subset}: the folder's README.md names no subsets; leave it out")
    else:
        named = [(_split_of(file.relative_to(path)), file) for file in files]
    if not named:
        raise UserError(f"data {path}: no data files in this folder; expected {', '.join(FILE_SUFFIXES)}")
    unnamed = [str(file) for name, file in named if not name]
    if 0 < len(unnamed) < len(named):
        left_out = ", ".join(unnamed)
        log.warning("data %s: not read, their names say no split and others' do: %s", path, left_out)
        named = [(name, file) for name, file in named if name]
    wanted = {part.partition("[")[0] for part in split.split("+")}
    if wanted <= {name for name, _ in named}:
        named = [(name, file) for name, file in named if name in wanted]
    return _shards(str(path), named)


def _split_of(file: Path) -> str:
    """data/train_sft-00000-of-00003.parquet -> train_sft, dev/a.jsonl -> validation, a.jsonl -> ""."""
    if file.parent.name == "data" and (shard := re.match(r"(\w+)-\d{5}-of-\d{5}", file.name)):
        return shard[1]
    for part in [*reversed(file.parts[:-1]), file.name]:
        for word in re.split(r"[\W\d_]+", part.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return ""


def _card_patterns(path: Path, subset: str | None) -> dict[str, list[str]] | None:
    """split -> patterns of its files, by the configs in the header of README.md; None if it has none."""
    if not (path / "README.md").is_file():
        return None
    import yaml
    from datasets.data_files import sanitize_patterns
    from huggingface_hub import metadata_load

    try:
        configs = {each["config_name"]: each for each in (metadata_load(path / "README.md") or {}).get("configs", ())}
        patterns = {name: sanitize_patterns(each.get("data_files", "**/*")) for name, each in configs.items()}
        defaults = [name for name, each in configs.items() if each.get("default") or name == "default"]
        bases = {name: Path(each.get("data_dir", "")) for name, each in configs.items()}
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"data {path}: README.md's configs cannot be read: {one_line(error)}") from None
    if not configs:
        return None
    name = subset or next(iter(defaults or configs))
    if name not in configs or (subset is None and not defaults and len(configs) > 1):
        wanted = f"subset {subset}: it has" if subset else "name one of its subsets in data.subset:"
        raise UserError(f"data {path}: {wanted} {', '.join(configs)}")
    return {str(split): [str(bases[name] / pattern) for pattern in globs] for split, globs in patterns[name].items()}


# -- the datasets library -------------------------------------------------------------------------------------------


def _saved(path: Path, subset: str | None) -> dict[str, Table] | None:
    """What Dataset.save_to_disk or DatasetDict.save_to_disk wrote."""
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return None
    import datasets

    if subset is not None:
        raise UserError(f"data {path}: subset {subset}: a saved data set has no subsets; leave it out")
    try:
        loaded = datasets.load_from_disk(str(path))
        sets = loaded if isinstance(loaded, dict) else {"": loaded}
    except Exception as error:  # whatever its damaged files make of the library
        raise UserError(f"data {path}: saved data set that cannot be read: {cause(error)}") from None
    return {name: _dataset(f"{path} {name}".strip(), rows) for name, rows in sets.items()}


def _hub(source: str, subset: str | None, split: str, revision: str | None) -> Table:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(source, subset, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        named = " ".join(part for part in (source, subset, f"split {split}", revision and f"@{revision}") if part)
        raise UserError(
            f"data {named}: cannot be loaded: {cause(error)}; check its name, subset and split, "
            "the connection and HF_HUB_OFFLINE, or name a local file"
        ) from None
    return _dataset(f"{source} {split}", rows)


def _dataset(name: str, rows: Any) -> Table:
    plain, arrow = rows.with_format(None), rows.with_format("arrow")

    def row(i: int) -> dict[str, Any]:
        try:
            arrow[i].validate(full=True)  # offsets that point outside would be read as they are
            return unpadded_row(plain[i])
        except Exception as error:  # of whichever decoder: pictures, sound, dates
            raise RowError("cannot be read", f"cannot be read: {one_line(error)}") from None

    return Table(name, tuple(plain.column_names), len(plain), row, lambda i: f"{name}, row {i + 1}")


def cause(error: BaseException) -> str:
    """What is behind the library's "An error occurred while generating the dataset"."""
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__:
        error = error.__cause__
    return one_line(error)


# -- generated -------------------------------------------------------------------------------------------------------


def _reasoning_gym(source: str, split: str, rows: int | None, seed: int) -> Table:
    make = problems.SOURCES.get(source.removeprefix("reasoning_gym:"))
    if make is None:
        raise UserError(f"data {source}: only {', '.join(problems.SOURCES)} have worked solutions to learn from")
    if not re.fullmatch(r"[\w.-]+", split):
        raise UserError(f"data {source}: split {split}: generated problems have no slices; use data.size")
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


# -- choice and mixture ---------------------------------------------------------------------------------------------


def draw(seed: int, i: int) -> bytes:
    """What row i is sorted by in the shuffle of this seed."""
    return hashlib.blake2b(f"{seed}/{i}".encode(), digest_size=8).digest()


def choose_rows(table: Table, size: int | None, seed: int) -> Sequence[int]:
    """The first `size` rows of a shuffle that depends on the seed alone."""
    order: Sequence[int] = range(table.length)
    if not table.shuffled:
        order = sorted(order, key=lambda i: draw(seed, i))
    return order[:size]


def shares(weights: Sequence[float], size: float) -> list[int]:
    """`size` rows divided by weight; each part is within a row of its share."""
    ends = [int(size * end / sum(weights) + 0.5) for end in accumulate(weights)]
    return [end - start for start, end in pairwise([0, *ends])]
