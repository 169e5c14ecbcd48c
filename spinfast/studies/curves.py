"""Outcomes over trained tokens within a cell: measured as it trains, between two steps, which changes nothing of it.

    STUDY/cells/NAME/curve.json     for each of `curve` points of a stage its tokens so far and the readings

Only what is read off likelihoods is asked; answers are written at the end alone. A curve is the mean over seeds, with
the intervals of scores.py: what is learnt over the control's at its own point, what is forgotten over the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from spinfast.report.plots import Plot, Series
from spinfast.store import files
from spinfast.store.record import Stage
from spinfast.studies import outcomes
from spinfast.studies.design import Cell, Design
from spinfast.studies.outcomes import Player, Probe, Problems, Readings
from spinfast.studies.scores import Found, control_of, effects_of, unit

CURVE = "curve.json"


def quiet(probes: Sequence[Probe]) -> list[Probe]:
    """What of them is read without writing answers."""
    probes = [replace(probe, max_tokens=0) if isinstance(probe, Problems) else probe for probe in probes]
    return [probe for probe in probes if not probe.generates]


@dataclass
class Curve:
    """The points of one cell that is being played; those that an earlier process measured stay."""

    path: Path
    owner: str
    points: int  # of each stage, its end one of them
    probes: Sequence[Probe]
    player: Callable[[], Player]

    def see(self, stage: Stage, step: int, steps: int, metrics: Mapping) -> None:
        """After a step: measure if it is a point's, or several points' of a short stage."""
        points = [k for k in range(1, self.points + 1) if max(1, round(steps * k / self.points)) == step]
        known = self.known()
        if points and all((row["stage"], row["step"]) != (stage.name, step) for row in known):
            before = max((row["tokens"] for row in known if row["stage"] != stage.name), default=0)
            found = outcomes.measured(self.probes, self.player())
            row = {"stage": stage.name, "points": points, "step": step, "tokens": before + metrics["num_tokens"]}
            files.write_sealed(self.path, {"points": [*known, row | {"readings": found}]}, self.owner)

    def known(self) -> list[dict]:
        """Its points so far, each with stage, step, tokens since the cell's start, readings."""
        found = files.read_sealed(self.path, self.owner) if self.points else None
        return found["points"] if found else []


def plots(
    design: Design,
    cells: Sequence[Cell],
    found: Found,
    base: Readings,
    points: Mapping[str, Sequence[dict]],
) -> list[Plot]:
    """What is learnt, and what is forgotten, over trained tokens, of the settings that rank; none without points."""
    settings: dict[tuple[str, ...], list[dict]] = {}
    for cell in cells:
        if cell.seed not in found.left_out and cell.setting not in found.failed:
            of = {(row["stage"], k): row for row in points.get(cell.name, ()) for k in row["points"]}
            settings.setdefault(cell.levels, []).append(of)
    lost = [name for name in base if name.endswith("/nll")]
    controls, learnt, forgotten = {*design.controls.values()}, [], []
    for levels, own in settings.items():
        control = control_of(design, levels)
        over = settings[control] if control else []
        common = [point for point in own[0] if all(point in of for of in (*own, *over))]
        if common and not {*levels} & controls and found.outcome in own[0][common[0]]["readings"]:
            label, slot = ", ".join(levels) or "base config", len(learnt)
            learnt.append(_series(label, slot, common, own, over, base, [found.outcome]))
            forgotten += [_series(label, slot, common, own, [], base, lost)] if lost else []
    drawn = [
        Plot(
            "curves",
            f"Effect on {found.outcome} over trained tokens",
            "trained tokens",
            f"effect, {unit(found)}",
            "band",
            learnt,
            level=(0.0, ""),
        ),
        Plot(
            "curves_forgetting",
            "Forgetting over trained tokens",
            "trained tokens",
            "nats per token more on other texts",
            "band",
            forgotten,
            level=(0.0, ""),
        ),
    ]
    return [plot for plot in drawn if plot.series]


def _series(label: str, slot: int, common: Sequence, own, over, base: Readings, names: Sequence[str]) -> Series:
    """From the start, where nothing is changed, through the points; own, over: of each seed the rows by point."""
    lines = [[0.0], [0.0], [0.0], [0.0]]  # tokens, mean, low, high
    of_base = np.array([value for name in names for value in base[name]])
    for point in common:
        mine, other = (
            np.array([[value for name in names for value in of[point]["readings"][name]] for of in each])
            for each in (own, over)
        )
        of = effects_of((mine - (other if over else of_base))[None])
        tokens = [float(np.mean([of[point]["tokens"] for of in own]))]
        for line, values in zip(lines, (tokens, of.mean, of.low, of.high), strict=True):
            line.append(float(values[0]))
    return Series(label, slot, lines[0], lines[1], low=lines[2], high=lines[3])
