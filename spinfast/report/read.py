"""A run directory as values: everything the report and the model card show, finished or not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import load_file

from spinfast.config import parse_config
from spinfast.errors import UserError
from spinfast.names import control_of, label, run_name
from spinfast.store import files, rollouts
from spinfast.store.record import KIND, whole_lines


@dataclass(frozen=True)
class Run:
    """One run directory; read once, so a report is of one moment."""

    path: Path
    name: str
    control: str | None  # which control of its run this is (controls.py), None for a run of its own
    config: dict
    environment: dict
    rows: list[dict]  # results.json: base, sft, 0, 1, ...
    steps: list[dict]  # metrics.jsonl
    system: list[dict]  # system.jsonl
    predicted_mib: dict[str, float]  # phase -> peak that was simulated before the run, where it was
    expected: int | None  # rows that it ends with, once that is known

    @property
    def played(self) -> Path:
        """The run's directory, for a control that of the run it belongs to."""
        return control_of(self.path) or self.path

    @property
    def finished(self) -> bool:
        return self.expected is not None and len(self.rows) >= self.expected

    def method(self, stage: str) -> str:
        """Which method made a stage."""
        return self._kind(stage).get("method", stage)

    def label(self, stage: str) -> str:
        """A stage's directory for people."""
        return label(self._kind(stage).get("label", stage))

    def _files(self, name: str) -> dict[str, Path]:
        """stage -> its file of that name, for the stages that have a row."""
        paths = {stage: path / name for stage, path in _directories(self.path, self.stages).items()}
        return {stage: path for stage, path in paths.items() if path.exists()}

    @cached_property
    def rollouts(self) -> dict[str, list[Path]]:
        """stage -> the files of its rollouts (store/rollouts.py), in their order; of stages under way too."""
        stages = dict.fromkeys([*self.stages, *(row["stage"] for row in self.steps)])
        found = {stage: rollouts.kept(path) for stage, path in _directories(self.path, stages).items()}
        return {stage: paths for stage, paths in found.items() if paths}

    def _kind(self, stage: str) -> dict:
        try:
            kind = json.loads((self.path / stage / KIND).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return kind if isinstance(kind, dict) else {}

    @cached_property
    def stages(self) -> list[str]:
        """Directory names of the stages that have a row."""
        return [row["stage"] for row in self.rows]

    @cached_property
    def transcripts(self) -> dict[str, list[dict]]:
        """stage -> its lines of heldout.jsonl, for the stages that were evaluated."""
        paths = self._files("heldout.jsonl")
        return {stage: files.read_jsonl(path) for stage, path in paths.items()}

    @cached_property
    def logps(self) -> dict[str, dict[str, np.ndarray]]:
        """stage -> {"policy.real", "policy.rival", "opponent.real", ...} -> one value per held-out pair."""
        paths = self._files("heldout_logps.safetensors")
        return {stage: load_file(path) for stage, path in paths.items()}

    def real_logps(self, stage: str) -> dict[str, float]:
        """log p(real) by problem under the stage's policy; model and problem are part of the key."""
        values = self.logps.get(stage, {}).get("policy.real", ())
        rows = self.transcripts.get(stage, [])
        model = self.config["model"]["name"]
        return {f"{row['prompt']} {model}": float(value) for row, value in zip(rows, values, strict=False)}

    def scores(self, stage: str, metric: str) -> dict[str, float]:
        """Verdicts by problem; the problem's text is part of the key, so that runs on other data share none."""
        rows = self.transcripts.get(stage, [])
        return {f"{row['index']} {row['prompt']}": row["scores"][metric] for row in rows if metric in row["scores"]}

    def rewards(self, stage: str) -> dict[str, float]:
        """What the reward functions gave for greedy answers, their weighted sum, by problem as scores are."""
        rows = self.transcripts.get(stage, [])
        return {f"{row['index']} {row['prompt']}": row["reward"] for row in rows if row.get("reward") is not None}

    @cached_property
    def paid(self) -> tuple[float, float] | None:
        """The least and the greatest reward of a greedy answer to a held-out problem, of all stages."""
        found = [reward for stage in self.stages for reward in self.rewards(stage).values()]
        return (min(found), max(found)) if found else None


def read_run(path: Path) -> Run:
    """Raises UserError if `path` is not a run directory."""
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path}: expected a run directory with config.yaml and results.json")

    def lines(name: str) -> list[dict]:
        return whole_lines(path / name) if (path / name).exists() else []

    stored = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    config = parse_config(stored, f"report {path}: config.yaml").model_dump(mode="json")
    played = control_of(path) or path  # a control plays what its run did
    ended = _best(played / "best.json")
    return Run(
        path=path.resolve(),
        name=run_name(path),
        control=path.name if control_of(path) else None,
        config=config,
        environment=_json(path / "environment.json", {}),
        rows=_json(path / "results.json", []),
        steps=[{key: _number(value) for key, value in row.items()} for row in lines("metrics.jsonl")],
        system=lines("system.jsonl"),
        predicted_mib=_json(path / "plan.json", {}).get("predicted_mib", {}),
        expected=ended and len(ended),
    )


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Runs and their controls, with distinct names: the directory's, with its parent's where two would be equal."""
    found = [each.resolve() for path in paths for each in (path, *sorted(path.glob("controls/*/")))]
    runs = [read_run(each) for each in dict.fromkeys(found)]
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else replace(run, name=f"{run.played.parent.name}/{run.name}") for run in runs
    ]


def seeds_apart(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs grouped by control and config, the seed aside; groups in the order of their first run."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.control, json.dumps(run.config | {"seed": None}, sort_keys=True)), []).append(run)
    return list(groups.values())


def _directories(run: Path, stages: Iterable[str]) -> dict[str, Path]:
    """stage -> its directory; a stage is a word out of a file and may lead anywhere."""
    return {stage: run / stage for stage in stages if Path(stage).name == stage}


def _json(path: Path, default):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default


def _best(path: Path) -> list[str] | None:
    """The stages that a run which has ended played; best.json is what it writes last, and may be damaged."""
    try:
        return list(_json(path, {})["of"])
    except (ValueError, KeyError, TypeError):
        return None


def _number(value):
    """Non-finite values are written as words, see record.py."""
    return float(value) if value in ("nan", "inf", "-inf") else value
