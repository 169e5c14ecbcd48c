"""What stages and runs are called by people, and what names of files and models look like."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")  # of data
PACKED_SUFFIXES = (".gz", ".zst", ".bz2")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # a bare name may be one of the datasets library's readers, which take pickles


def suffix_of(path: Path) -> str:
    """The suffix that names the format: of train.jsonl.gz it is .jsonl."""
    plain = path.with_suffix("") if path.suffix.lower() in PACKED_SUFFIXES else path
    return plain.suffix.lower()


def label(iteration: str | int) -> str:
    """A row of results.json: a stage that is alone of its method by its name, others by their number."""
    return (
        f"iteration {iteration}"
        if isinstance(iteration, int)
        else {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO"}.get(iteration, iteration)
    )


def rows_named(iterations: Iterable[str | int]) -> str:
    """What rows of results.json are called together: iterations where there is nothing else beside the base."""
    return "iteration" if all(each == "base" or isinstance(each, int) for each in iterations) else "stage"


def source_name(source: str | list[dict]) -> str:
    """What a saved config's data.source is: one source, or several with what each was given."""
    if isinstance(source, str):
        return source
    given = [{key: value for key, value in each.items() if value is not None} for each in source]
    words = [[each.pop("source"), *(f"{key} {value}" for key, value in each.items())] for each in given]
    return " + ".join(f"{name} ({', '.join(rest)})" if rest else name for name, *rest in words)


def rewards_named(c: dict) -> str:
    """A saved config's grpo section: its reward functions with their weights."""
    weights = {name: of["weight"] if isinstance(of, dict) else of for name, of in c["rewards"].items()}
    return " + ".join(f"{weight:g} {name}" for name, weight in weights.items())


def amount(c: dict) -> str:
    """A saved config's section of a method: how much it trains on."""
    if "steps" in c:
        return f"{c['steps']} steps of {c['prompts_per_step']} prompts"
    return f"{c['epochs']} epochs, {c['groups_per_step']} groups per step"


def control_of(run: Path) -> Path | None:
    """The run directory that `run` is a control of (controls.py), None for a run of its own."""
    run = run.resolve()
    return run.parent.parent if run.parent.name == "controls" else None


def run_name(run: Path) -> str:
    """The directory's name; a control's has its run's before it."""
    run = run.resolve()
    return f"{control_of(run).name}/{run.name}" if control_of(run) else run.name
