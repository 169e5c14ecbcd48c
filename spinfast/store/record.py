"""The run directory: what a run leaves, and what of it is finished.

    RUN/config.yaml environment.json log.txt metrics.jsonl system.jsonl results.json
    RUN/base/ sft/ iter_000/ ...    one stage each, with its files and phases.json

metrics.jsonl holds what the run computed and is the same for every undisturbed or resumed run; system.jsonl holds
clocks and memory. A phase is finished when phases.json names its outputs, their sha256 sums still hold, and so do
those of everything it was made from: the phases before it and the stage before its own. Of several ranks (spread.py)
the first one has the directory, the others follow it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path

import psutil
import torch
import yaml

from spinfast import spread
from spinfast.config import Config, parse_config
from spinfast.device import fresh_memory
from spinfast.errors import Busy, UserError
from spinfast.store import files
from spinfast.store.trackers import Trackers, check_installed

log = logging.getLogger("spinfast")
_LOCKS: weakref.WeakSet = weakref.WeakSet()  # of this process's runs; what outlives them must not hold them
os.register_at_fork(after_in_child=lambda: [lock.close() for lock in _LOCKS])
KIND = "stage.json"  # what a stage is, for readers of the directory


class RunDir:
    """An opened run directory; one process at a time, one config for its life."""

    def __init__(self, path: Path, config: Config):
        check_installed(config.report_to)
        self.path, self.config = path, config
        _check_ours(path)
        self._new = not (path / "config.yaml").exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run directory {path}: cannot be made: {error.strerror}") from None
        self.inputs: dict[str, str] = {}
        self._lock = (path / "lock").open("w")
        _LOCKS.add(self._lock)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _check_config(path, config)
            files.write_text(path / "config.yaml", config.dump())
        except BlockingIOError:
            self.close()
            raise Busy(f"run directory {path}: another process is running in it") from None
        except OSError as error:
            self.close()
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
            raise UserError(
                f"run directory {path}: its file system has no locks ({error.strerror}), so two processes could spoil "
                "one run; give a --run-dir on a local disk"
            ) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        try:
            self._close_trackers()
        finally:
            self._lock.close()

    def _close_trackers(self) -> None:
        if trackers := self.__dict__.pop("trackers", None):
            trackers.close()

    @cached_property
    def trackers(self) -> Trackers:
        """Opened by the first figure there is to show."""
        return Trackers(self.path, self.config.model_dump(mode="json"), self.steps(), self.results())

    def mark(self) -> str:
        """What its lock holds from now on, by which another rank knows the directory as this one."""
        mark = uuid.uuid4().hex
        self._lock.write(mark)
        self._lock.flush()
        os.fsync(self._lock.fileno())
        return mark

    def remember(self, inputs: dict[str, str]) -> None:
        """Note the fingerprints of model and data; a resumed run must find the same."""
        check_inputs(self.path, inputs)
        files.write_sealed(self.path / "inputs.json", inputs, "inputs")
        self.inputs = inputs

    def remember_rewards(self, fingerprints: dict[str, str]) -> None:
        """Note the reward functions' files; they may be mended on the way, and that is told."""
        path = self.path / "rewards.json"
        known = files.read_sealed(path, "rewards") or {}
        for name in (name for name in fingerprints if known.get(name, fingerprints[name]) != fingerprints[name]):
            log.warning(
                "reward %s: its file is not what the run went by so far; answers that are rated already keep their "
                "rewards, only new ones get the changed function's",
                name,
            )
        files.write_sealed(path, fingerprints, "rewards")

    def discard_unused(self) -> None:
        """Remove a run directory that this process began and in which nothing was computed yet."""
        if self._new and not any(path.is_dir() for path in self.path.iterdir()):
            shutil.rmtree(self.path)

    def metrics(self, stage: str, phase: str, step: int, values: dict[str, float]) -> dict:
        """Add, and return, one line of what was computed; non-finite values stand as "nan" or "inf"."""
        row, trackers = _line(stage, phase, step, values), self.trackers
        _append(self.path / "metrics.jsonl", row)
        trackers.step(row)
        return row

    def steps(self) -> list[dict]:
        path = self.path / "metrics.jsonl"
        return whole_lines(path) if path.exists() else []

    def restore_metrics(self, stage: Stage, rows: list[dict]) -> None:
        """Make `rows` the lines of this stage: what came after a checkpoint, a crash or damage goes."""
        path = self.path / "metrics.jsonl"
        known = self.steps()
        place = {name: number for number, name in enumerate(stage.line)}  # stages that come later stay behind it
        before = [row for row in known if row["stage"] in place and row["stage"] != stage.name]
        after = [row for row in known if row["stage"] not in place]
        before.sort(key=lambda row: (place[row["stage"]], row["step"]))
        text = files.jsonl([*before, *rows, *after])
        if not path.exists() or path.read_bytes() != text.encode():
            self._close_trackers()
            files.write_text(path, text)

    def system(self, stage: str, phase: str, values: dict[str, float]) -> None:
        """One line of clocks and memory."""
        row = {"time": round(time.time(), 3), "stage": stage, "phase": phase}
        _append(self.path / "system.jsonl", row | values | memory_now())

    def result(self, row: dict) -> None:
        """Add or replace the row of one stage in results.json."""
        trackers, known = self.trackers, self.results()
        if row not in known:
            rows = [old for old in known if old["stage"] != row["stage"]]
            files.write_json(self.path / "results.json", [*rows, row])
            trackers.result(row)

    def forget_results(self) -> None:
        """Drop the rows of an earlier process: their stages are looked at again one by one, and may be damaged."""
        self._close_trackers()
        (self.path / "results.json").unlink(missing_ok=True)

    def results(self) -> list[dict]:
        """The rows so far. Each process writes every row anew, so what is unreadable is left out."""
        path = self.path / "results.json"
        try:
            rows = json.loads(path.read_bytes()) if path.exists() else []
        except (ValueError, RecursionError):
            rows = None
        if isinstance(rows, list) and all(isinstance(row, dict) and "stage" in row for row in rows):
            return rows
        log.warning("%s is not as it was written; its rows are made again", path)
        return []


class Followed(RunDir):
    """The directory for a rank that does not write: it finds there what the first rank has written."""

    def __init__(self, path: Path, config: Config, mark: str):
        self.path, self.config, self.inputs = path, config, {}
        if not (path / "lock").exists() or (path / "lock").read_text() != mark:
            raise UserError(
                f"run directory {path}: rank {spread.rank()} does not see what rank 0 writes there; give a --run-dir "
                "on a file system that all machines share, the same on each"
            )
        _check_config(path, config)

    def close(self) -> None:
        pass

    def discard_unused(self) -> None:
        pass

    def metrics(self, stage: str, phase: str, step: int, values: dict[str, float]) -> dict:
        return _line(stage, phase, step, values)

    def restore_metrics(self, stage: Stage, rows: list[dict]) -> None:
        pass

    def system(self, stage: str, phase: str, values: dict[str, float]) -> None:
        pass

    def result(self, row: dict) -> None:
        pass

    def forget_results(self) -> None:
        pass


@contextmanager
def open_directory(path: Path, config: Config) -> Iterator[RunDir]:
    """The run directory, for as long as the block; each rank's own view of it.

    One that was begun here goes again where a user's error ends it before anything was computed.
    """
    directory = RunDir(path, config) if spread.first() else None
    mark = spread.told("the run directory", lambda: directory.mark())
    directory = directory or Followed(path, config, mark)
    try:
        yield directory
    except (UserError, OSError):
        directory.discard_unused()
        raise
    finally:
        directory.close()


class Stage:
    """One stage's directory and its finished phases.

    `method` made it ("base": nothing was trained), and it is number `number` of that method's stages.
    """

    def __init__(self, run: RunDir, name: str, after: Stage | None = None, method: str = "base", number: int = 0):
        self.run, self.name, self.after, self.method, self.number = run, name, after, method, number
        self.directory = run.path / name
        self.directory.mkdir(exist_ok=True)
        kind = json.dumps({"method": method, "number": number, "label": self.label}) + "\n"
        if not self.path(KIND).exists() or self.path(KIND).read_bytes() != kind.encode():
            files.write_text(self.path(KIND), kind)

    @property
    def label(self) -> str | int:
        """How a row of results.json calls it: by its number, unless it is called as its method is."""
        return self.name if self.name == self.method else self.number

    @property
    def line(self) -> list[str]:
        """The names of the stages up to this one, in order."""
        return [*(self.after.line if self.after else ()), self.name]

    def read(self, name: str) -> dict:
        """A JSON file of the stage, {} if the stage has none."""
        path = self.path(name)
        return json.loads(path.read_text()) if path.exists() else {}

    def path(self, name: str) -> Path:
        return self.directory / name

    def finished(self, phase: str) -> bool:
        """True if the phase's outputs are all there as they were written, and made from what is there now."""
        return spread.told(f"{self.name}, {phase}: finished?", partial(self._finished, phase))

    def _finished(self, phase: str) -> bool:
        entry = self._phases().get(phase)
        if entry is None:
            return False
        if entry["basis"] != self.basis(phase):
            log.warning("%s: what %s was made from was made again; doing %s again", self.name, phase, phase)
            return False
        changed = [name for name, digest in entry["files"].items() if _digest(self.path(name)) != digest]
        if changed:
            log.warning("%s: %s is not as it was written; doing %s again", self.name, changed[0], phase)
        return not changed

    @contextmanager
    def phase(self, phase: str, *outputs: str) -> Iterator[None]:
        """Time the phase; on success note its outputs (files, or directories written by files.write_directory)."""
        fresh_memory()
        started = time.monotonic()
        yield
        spread.told(f"{self.name}, {phase}: finished", partial(self._note, phase, outputs, time.monotonic() - started))

    def _note(self, phase: str, outputs: tuple[str, ...], seconds: float) -> None:
        phases = self._phases()
        phases[phase] = {
            "seconds": round(seconds, 3),
            "files": {name: _digest(self.path(name)) for name in outputs},
            "basis": self.basis(phase),
        }
        files.write_sealed(self.path("phases.json"), phases, self.name)
        self.run.system(self.name, phase, {"phase/seconds": round(seconds, 3)})

    def basis(self, phase: str) -> str:
        """Names what a phase is made from: the outputs of this stage's earlier phases and of the stage before."""
        before = self.after.outputs() if self.after else {}
        digests = json.dumps([before, self.outputs(until=phase)], sort_keys=True)
        return hashlib.blake2b(digests.encode(), digest_size=16).hexdigest()

    def outputs(self, until: str | None = None) -> dict[str, dict[str, str]]:
        """Phase -> file -> digest, of all phases or of those made before `until`."""
        phases = self._phases()
        names = list(phases)
        return {name: phases[name]["files"] for name in names[: names.index(until) if until in names else None]}

    def seconds(self) -> dict[str, float]:
        return {phase: entry["seconds"] for phase, entry in self._phases().items()}

    def _phases(self) -> dict:
        return files.read_sealed(self.path("phases.json"), self.name) or {}


def memory_now() -> dict[str, float]:
    """Resident memory of this process in MiB and, with a GPU, its allocator's figures."""
    figures = {"memory/rss_mib": round(psutil.Process().memory_info().rss / 2**20, 1)}
    if torch.cuda.is_available():
        figures["memory/allocated_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        figures["memory/reserved_mib"] = round(torch.cuda.max_memory_reserved() / 2**20, 1)
    return figures


def whole_lines(path: Path) -> list[dict]:
    """The JSON lines of an append-only file up to the first that a crash or damage left unreadable."""
    rows = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def _line(stage: str, phase: str, step: int, values: dict[str, float]) -> dict:
    return {"stage": stage, "phase": phase, "step": step} | {name: _finite(value) for name, value in values.items()}


def _append(path: Path, row: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(files.jsonl([row]))


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _digest(path: Path) -> str | None:
    if path.is_dir():
        return files.sha256(path / files.MANIFEST) if files.damage(path) is None else None
    return files.sha256(path) if path.is_file() else None


def check_inputs(path: Path, inputs: dict[str, str]) -> None:
    """Raises UserError where a run in this directory started with other fingerprints of model and data."""
    known = files.read_sealed(path / "inputs.json", "inputs") or inputs
    if changed := [name for name in inputs if known.get(name) != inputs[name]]:
        raise UserError(
            f"run directory {path}: {changed[0]} is not what the run started with; give another --run-dir, of a study "
            "--dir"
        )


def _check_ours(path: Path) -> None:
    """Nothing of anybody else's is touched: the directory is new, empty or a run's."""
    if path.exists() and not path.is_dir():
        raise UserError(f"run directory {path}: a file of that name exists")
    begun = {"lock", ".config.yaml.partial"}  # all that a run killed in its first instant leaves
    # a config.yaml alone may be the user's
    known = (path / "config.yaml").exists() and any((path / name).exists() for name in ("lock", "log.txt"))
    if path.is_dir() and not known and {entry.name for entry in path.iterdir()} - begun:
        raise UserError(f"run directory {path}: not empty and not a run of spinfast; give another --run-dir")


def _check_config(path: Path, config: Config) -> None:
    existing = path / "config.yaml"
    if not existing.exists():
        return
    try:
        stored = yaml.safe_load(existing.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError):
        raise UserError(
            f"{existing}: damaged, so the run cannot be told from another config's; give another --run-dir"
        ) from None
    try:
        same = parse_config(stored, str(existing), type(config)).identity() == config.identity()
    except UserError as error:
        raise UserError(f"{error}: damaged, or of another edition of spinfast; give another --run-dir") from None
    except TypeError:
        same = False
    if not same:
        raise UserError(
            f"run directory {path}: made by another config (see its config.yaml); "
            "give the same config to resume it, or another --run-dir"
        )
