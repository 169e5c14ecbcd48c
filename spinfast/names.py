"""What stages and runs are called: base, sft and 0, 1, 2 in results.json; base, sft, iter_000 as directories."""

from __future__ import annotations

from pathlib import Path


def stage_name(iteration: str | int) -> str:
    """The directory of a row of results.json."""
    return iteration if isinstance(iteration, str) else f"iter_{iteration:03d}"


def label(iteration: str | int) -> str:
    """A row of results.json for people."""
    return {"base": "base", "sft": "SFT"}.get(iteration, f"iteration {iteration}")


def stage_label(stage: str) -> str:
    """A stage's directory for people."""
    return label(int(stage.removeprefix("iter_")) if stage.startswith("iter_") else stage)


def control_of(run: Path) -> Path | None:
    """The run directory that `run` is a control of (controls.py), None for a run of its own."""
    run = run.resolve()
    return run.parent.parent if run.parent.name == "controls" else None


def run_name(run: Path) -> str:
    """The directory's name; a control's has its run's before it."""
    run = run.resolve()
    return f"{control_of(run).name}/{run.name}" if control_of(run) else run.name
