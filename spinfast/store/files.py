"""Files that are whole or absent: write beside, fsync, rename, fsync the directory; sha256 to tell later.

Everything that a run leaves goes through here, so a crash or a full disk at any instant leaves what was there.
Three ways to tell that a file is as it was written: a directory has a manifest, a JSON file that the run goes by
carries its own sum, and so does each line of a file that grows. A sum covers an `owner` too, the name of what the
file belongs to, so that a file put in another's place is found out.

Of several ranks (spread.py) the first one writes; what the others write goes nowhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from spinfast import spread

log = logging.getLogger("spinfast")
MANIFEST = "manifest.json"
ADDED_LATER = "README.md"  # a model card: people edit it, an adapter's is written once its evaluation is known


def expanded(name: str) -> Path:
    """A path as a person writes it; the ~ of a user who is not there stays, where Path.expanduser raises."""
    return Path(os.path.expanduser(name))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """fsync a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success it takes the name `path` in one step."""
    if not spread.first():
        with tempfile.TemporaryDirectory() as nowhere:
            yield Path(nowhere) / path.name
        return
    beside = path.with_name(f".{path.name}.partial")
    try:
        yield beside
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    if not spread.first():
        return
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def jsonl(rows: Iterable) -> str:
    """The rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def seal(value: dict, owner: str) -> dict:
    """`value` with a sum over itself and its owner's name under "seal"."""
    content = json.dumps(value, sort_keys=True)
    return value | {"seal": hashlib.blake2b(f"{owner}\n{content}".encode(), digest_size=16).hexdigest()}


def unseal(text: str, owner: str) -> dict | None:
    """The value that was sealed for this owner, or None if the text is anything else."""
    try:
        sealed = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(sealed, dict):
        return None
    value = {name: item for name, item in sealed.items() if name != "seal"}
    return value if seal(value, owner) == sealed else None


def write_sealed(path: Path, value: dict, owner: str) -> None:
    write_json(path, seal(value, owner))


def read_sealed(path: Path, owner: str) -> dict | None:
    """What write_sealed wrote; None if there is no such file or, with a warning, if it is not as it was written."""
    if not path.exists():
        return None
    value = unseal(path.read_bytes().decode("utf-8", errors="replace"), owner)
    if value is None:
        log.warning("%s is not as it was written; it is not used", path)
    return value


def sealed_lines(path: Path, owner: str) -> list[dict]:
    """The lines of an append-only file up to the first that is not as it was written."""
    rows = []
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                row = unseal(line, owner)
                if row is None:
                    log.warning("%s: line %d is not as it was written; cut there", path, len(rows) + 1)
                    break
                rows.append(row)
    return rows


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """`fill` a directory beside, add a manifest of sha256 sums last, and give it the name `path`."""
    if not spread.first():
        return
    beside, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (beside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir()
    try:
        fill(beside)
        written = [file for file in sorted(beside.rglob("*")) if file.is_file()]
        sums = {
            name: sha256(beside / name) for file in written if (name := str(file.relative_to(beside))) != ADDED_LATER
        }
        for file in written:
            with contextlib.suppress(OSError):  # not every file system has modes
                file.chmod(beside.stat().st_mode & 0o666)  # safetensors makes its files the owner's alone
            sync(file)
        (beside / MANIFEST).write_text(json.dumps(sums, indent=2))
        sync(beside / MANIFEST)
        sync(beside)
        if path.exists():
            path.rename(old)
        beside.rename(path)
        sync(path.parent)
    finally:
        for leftover in (beside, old):
            shutil.rmtree(leftover, ignore_errors=True)


def damage(path: Path) -> str | None:
    """Why the directory is not whole, or None: its manifest is missing, or names a file that is not as written."""
    try:
        sums = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        return f"{path.name} has no readable {MANIFEST}"
    if not isinstance(sums, dict):
        return f"{path.name} has no readable {MANIFEST}"
    present = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {MANIFEST, ADDED_LATER}
    if present != set(sums):
        return f"{path.name} holds other files than its manifest names ({', '.join(sorted(present ^ set(sums)))})"
    changed = [name for name, expected in sums.items() if sha256(path / name) != expected]
    return f"{path.name}/{changed[0]} is not as it was written" if changed else None
