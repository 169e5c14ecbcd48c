"""How much each adapter lifts each task over the base: the table of LoRA Land (arXiv 2405.00732), with intervals.

An adapter's own task is the set of items that one of its levels is named as.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spinfast.studies import tables
from spinfast.studies.design import Cell
from spinfast.studies.outcomes import UNITS, Readings
from spinfast.studies.scores import effects_of
from spinfast.studies.tables import Strong


@dataclass(frozen=True)
class Lift:
    """Of a setting on a task: the change of a reading from the base, its 95 % interval over seeds and items."""

    reading: str
    task: str
    setting: str
    own: bool
    base: float
    lift: float
    low: float
    high: float


def lifts(cells: Sequence[Cell], measured: Mapping[str, Readings], base: Readings) -> list[Lift]:
    """Of the most sensitive reading that all sets have, and of exact answers; none where no level is named as a set."""
    readings: dict[str, set[str]] = {}
    for name in base:
        task, _, reading = name.rpartition("/")
        readings.setdefault(reading, set()).add(task)
    played = [cell for cell in cells if cell.name in measured]
    tasks = [name.rpartition("/")[0] for name in base if name.endswith("/worked")]
    if not any({*cell.levels} & {*tasks} for cell in played):
        return []
    shown = [reading for reading in ("worked", "exact") if {*tasks} <= readings.get(reading, set())]
    settings = {cell.setting: cell.levels for cell in played}
    found = []
    for reading in shown:
        for task in tasks:
            name = f"{task}/{reading}"
            for setting, levels in settings.items():
                own = [measured[cell.name][name] for cell in played if cell.setting == setting]
                of = effects_of((np.array(own) - np.array(base[name]))[None])
                numbers = (float(each[0]) for each in (of.mean, of.low, of.high))
                found.append(Lift(reading, task, setting, task in levels, float(np.mean(base[name])), *numbers))
    return found


def table(found: Sequence[Lift]) -> tuple[list[str], list[list[str]]]:
    """Of one reading: an adapter's row has its lift of every task, that of its own in bold."""
    tasks = {lift.task: lift.base for lift in found}
    rows = []
    for setting in dict.fromkeys(lift.setting for lift in found):
        rows.append([setting, *(_told(lift) for lift in found if lift.setting == setting)])
    for name, own in (("own adapter", True), ("others, mean", False)):
        rows.append([name, *(f"{np.mean(of):+.3f}" if (of := _of(found, task, own)) else "" for task in tasks)])
    return ["adapter", *(f"{task}\nbase {base:.3f}" for task, base in tasks.items())], rows


def _told(lift: Lift) -> str:
    text = f"{lift.lift:+.3f}" + ("" if math.isnan(lift.low) else f" ({lift.low:+.3f} to {lift.high:+.3f})")
    return Strong(text) if lift.own else text


def _of(found: Sequence[Lift], task: str, own: bool) -> list[float]:
    return [lift.lift for lift in found if lift.task == task and lift.own == own]


def by_reading(found: Sequence[Lift]) -> dict[str, list[Lift]]:
    names = dict.fromkeys(lift.reading for lift in found)
    return {name: [lift for lift in found if lift.reading == name] for name in names}


def sentences(found: Sequence[Lift]) -> list[str]:
    """Whether the diagonal of the table stands out."""
    said = []
    for reading, each in by_reading(found).items():
        tasks = list(dict.fromkeys(lift.task for lift in each if lift.own))
        best = [task for task in tasks if max(_of(each, task, True)) > max(_of(each, task, False), default=-math.inf)]
        own, others = ([lift for task in tasks for lift in _of(each, task, side)] for side in (True, False))
        said.append(
            f"Lift, {reading}: the own adapter lifts {len(best)} of {len(tasks)} tasks more than any other does; own "
            f"{np.mean(own):+.3f}"
            + (f", others {np.mean(others):+.3f}" if others else "")
            + f" {UNITS[reading]} in the mean."
        )
    return said


def to_csv(found: Sequence[Lift]) -> str:
    rows = []
    for lift in found:
        low, high = ("" if math.isnan(bound) else bound for bound in (lift.low, lift.high))
        named = {"reading": lift.reading, "task": lift.task, "setting": lift.setting, "own": int(lift.own)}
        rows.append(named | {"base": lift.base, "lift": lift.lift, "ci_low": low, "ci_high": high})
    return tables.to_csv(rows)
