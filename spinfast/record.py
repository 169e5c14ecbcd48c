"""The run directory: what a run leaves, and what of it is finished.

    RUN/config.yaml environment.json log.txt metrics.jsonl system.jsonl results.json
    RUN/base/ sft/ iter_000/ ...    one stage each, with its files and phases.json

metrics.jsonl holds what the run computed and is the same for every undisturbed or resumed run; system.jsonl holds
clocks and memory. A phase is finished when phases.json names its outputs and their sha256 sums still hold.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
import yaml

from spinfast import files
from spinfast.config import Config
from spinfast.errors import UserError

log = logging.getLogger("spinfast")


class RunDir:
    """An opened run directory; one process at a time, one config for its life."""

    def __init__(self, path: Path, config: Config):
        self.path = path
        _check_config(path, config)
        path.mkdir(parents=True, exist_ok=True)
        self._lock = (path / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"run directory {path}: another process is running in it") from None
        files.write_text(path / "config.yaml", config.dump())

    def close(self) -> None:
        self._lock.close()

    def remember(self, inputs: dict[str, str]) -> None:
        """Note the fingerprints of model and data; a resumed run must find the same."""
        path = self.path / "inputs.json"
        known = json.loads(path.read_text()) if path.exists() else inputs
        changed = [name for name in inputs if known.get(name) != inputs[name]]
        if changed:
            raise UserError(
                f"run directory {self.path}: {changed[0]} is not what the run started with; give another --run-dir"
            )
        files.write_json(path, inputs)

    def discard_unused(self) -> None:
        """Remove a run directory in which nothing was computed yet."""
        if not any(path.is_dir() for path in self.path.iterdir()):
            shutil.rmtree(self.path)

    def stage(self, name: str) -> Stage:
        return Stage(self, name)

    def metrics(self, stage: str, phase: str, step: int, values: dict[str, float]) -> None:
        """One line of what was computed; non-finite values stand as "nan" or "inf"."""
        row = {"stage": stage, "phase": phase, "step": step}
        _append(self.path / "metrics.jsonl", row | {name: _finite(value) for name, value in values.items()})

    def system(self, stage: str, phase: str, values: dict[str, float]) -> None:
        """One line of clocks and memory."""
        row = {"time": round(time.time(), 3), "stage": stage, "phase": phase}
        _append(self.path / "system.jsonl", row | values | memory_now())

    def forget_metrics(self, stage: str, phase: str, after_step: int) -> None:
        """Drop the lines of steps that will be made again, and a line torn by a crash."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = [
            row
            for row in whole_lines(path)
            if (row["stage"], row["phase"]) != (stage, phase) or row["step"] <= after_step
        ]
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def result(self, row: dict) -> None:
        """Add or replace the row of one iteration in results.json."""
        path = self.path / "results.json"
        rows = json.loads(path.read_text()) if path.exists() else []
        rows = [old for old in rows if old["iteration"] != row["iteration"]]
        files.write_json(path, [*rows, row])

    def results(self) -> list[dict]:
        path = self.path / "results.json"
        return json.loads(path.read_text()) if path.exists() else []


class Stage:
    """One stage's directory and its finished phases."""

    def __init__(self, run: RunDir, name: str):
        self.run, self.name, self.directory = run, name, run.path / name
        self.directory.mkdir(exist_ok=True)

    @property
    def round(self) -> int:
        """Which round of training this is the result of: 0 for base and SFT, t for iteration t."""
        return int(self.name.removeprefix("iter_")) if self.name.startswith("iter_") else 0

    def read(self, name: str) -> dict:
        """A JSON file of the stage, {} if the stage has none."""
        path = self.path(name)
        return json.loads(path.read_text()) if path.exists() else {}

    def path(self, name: str) -> Path:
        return self.directory / name

    def finished(self, phase: str) -> bool:
        """True if the phase's outputs are all there as they were written."""
        outputs = self._phases().get(phase)
        if outputs is None:
            return False
        changed = [name for name, digest in outputs["files"].items() if _digest(self.path(name)) != digest]
        if changed:
            log.warning("%s: %s is not as it was written; doing %s again", self.name, changed[0], phase)
        return not changed

    @contextmanager
    def phase(self, phase: str, *outputs: str) -> Iterator[None]:
        """Time the phase; on success note its outputs (files, or directories written by files.write_directory)."""
        started = time.monotonic()
        yield
        phases = self._phases()
        seconds = time.monotonic() - started
        phases[phase] = {
            "seconds": round(seconds, 3),
            "files": {name: _digest(self.path(name)) for name in outputs},
        }
        files.write_json(self.path("phases.json"), phases)
        self.run.system(self.name, phase, {"phase/seconds": round(seconds, 3)})

    def seconds(self) -> dict[str, float]:
        return {phase: entry["seconds"] for phase, entry in self._phases().items()}

    def _phases(self) -> dict:
        path = self.path("phases.json")
        try:
            return json.loads(path.read_text()) if path.exists() else {}
        except ValueError:
            log.warning("%s: phases.json is damaged; doing the stage again", self.name)
            return {}


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


def _append(path: Path, row: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _digest(path: Path) -> str | None:
    if path.is_dir():
        return files.sha256(path / files.MANIFEST) if files.damage(path) is None else None
    return files.sha256(path) if path.is_file() else None


def _check_config(path: Path, config: Config) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"run directory {path}: a file of that name exists")
    existing = path / "config.yaml"
    if existing.exists():
        if yaml.safe_load(existing.read_text()) != yaml.safe_load(config.dump()):
            raise UserError(
                f"run directory {path}: made by another config (see its config.yaml); "
                "give the same config to resume it, or another --run-dir"
            )
    elif path.is_dir() and any(path.iterdir()):
        raise UserError(f"run directory {path}: not empty and not a run of spinfast; give another --run-dir")
