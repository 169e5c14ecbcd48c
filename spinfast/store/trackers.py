"""Metrics as they come, to TensorBoard (always, RUN/tensorboard) and to wandb and trackio (where report_to asks).

metrics.jsonl and results.json are the record and a tracker is a view of it, under the same names. A step's number is
its line in metrics.jsonl, so that stages stand end to end; a row of results.json has the number of its stage's last
step. TensorBoard's files are written anew from the record when a run is resumed; the services keep what they were sent
under the run's id.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from spinfast.errors import UserError
from spinfast.names import run_name

PROJECT = "spinfast"
PLACE = ("stage", "phase", "step", "steps")  # what says where a line belongs


class Tracker(Protocol):
    def log(self, values: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files for `tensorboard --logdir runs`."""

    def __init__(self, path: Path, steps: Sequence[dict], rows: Sequence[dict]):
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(path / "tensorboard", ignore_errors=True)
        self.writer = SummaryWriter(path / "tensorboard", flush_secs=10)
        for number, step in enumerate(steps, 1):
            self.log(scalars(step), number)
        for row in rows:
            self.log(outcomes(row), last_steps(steps).get(row["stage"], 0))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Service:
    """wandb or trackio, which share their calls; a resumed run goes on under the same id."""

    def __init__(self, package: str, path: Path, config: dict):
        module = importlib.import_module(package)
        name = run_name(path).replace("/", "-")
        where = {"dir": str(path), "id": name} if package == "wandb" else {}
        self.run = module.init(project=PROJECT, name=name, config=config, resume="allow", **where)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class Trackers:
    """All trackers of one run directory."""

    def __init__(self, path: Path, config: dict, steps: Sequence[dict], rows: Sequence[dict]):
        self.number, self.last = len(steps), last_steps(steps)
        self.shown = {row["stage"] for row in rows}
        self.members: list[Tracker] = [TensorBoard(path, steps, rows)]
        self.members += [Service(name, path, config) for name in config["report_to"]]

    def step(self, row: dict) -> None:
        self.number += 1
        self.last[row["stage"]] = self.number
        self._log(scalars(row), self.number)

    def result(self, row: dict) -> None:
        if row["stage"] in self.shown:  # a resumed run concludes its finished stages again
            return
        self.shown.add(row["stage"])
        self._log(outcomes(row), self.last.get(row["stage"], 0))

    def close(self) -> None:
        for member in self.members:
            member.close()

    def _log(self, values: Mapping[str, float], number: int) -> None:
        for member in self.members:
            member.log(values, number)


def check_installed(names: Sequence[str]) -> None:
    """Raises UserError for a service whose package is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"report_to: {name} is not installed; pip install {name}, or leave it out")


def scalars(row: dict) -> dict[str, float]:
    """The metrics of a line of metrics.jsonl; "nan" and "inf" are written as words there."""
    return {name: float(value) for name, value in row.items() if name not in PLACE}


def outcomes(row: dict) -> dict[str, float]:
    """The metrics of a row of results.json."""
    return {name: estimate["value"] for name, estimate in row["evaluation"].items()}


def last_steps(steps: Sequence[dict]) -> dict[str, int]:
    """The number of each stage's last step."""
    return {step["stage"]: number for number, step in enumerate(steps, 1)}
