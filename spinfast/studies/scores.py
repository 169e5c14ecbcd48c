"""From what was measured of the cells to scores: effects against a control, with intervals, and who can be told apart.

A setting's effect is its outcome less that of its control, item by item and seed by seed; of one without a control less
the base's. Those that serve as controls are listed, not ranked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spinfast.errors import UserError
from spinfast.studies import statistics
from spinfast.studies.design import Cell, Design
from spinfast.studies.outcomes import LEARNING, UNITS, Readings

FLOOR = 0.02  # exact answers of base and setting both below it say nothing
NAN = float("nan")


@dataclass(frozen=True)
class Score:
    """A setting; effects in the outcome's unit, intervals of 95 %. p is None of what is not ranked."""

    setting: str
    control: str  # "" is the base
    seeds: int
    score: float
    low: float
    high: float
    p: float | None
    p_holm: float | None
    group: str  # settings that share a letter cannot be told apart
    learning: float  # the outcome's change from the base, whatever the control
    learning_low: float
    learning_high: float
    forgetting: float  # nats per token more than the base; of unrelated texts and the base's own answers
    forgetting_low: float
    forgetting_high: float
    pareto: bool  # no other setting learns as much and forgets as little
    floor: bool
    changes: Mapping[str, float]  # of every outcome, against the base


@dataclass(frozen=True)
class Found:
    outcome: str  # that ranks
    scores: list[Score]  # ranked ones first, best first
    reliability: float  # of the order, nan where it has none
    best: statistics.Confirmation | None
    names: list[str]  # of the ranked, as `best.text` counts them
    smallest: float  # effect that this design finds in 80 of 100 studies, by the variances that it had
    items: int
    left_out: tuple[int, ...]  # seeds that are not whole
    failed: dict[str, str]  # settings without scores, and why


def compare(
    design: Design,
    cells: Sequence[Cell],
    measured: Mapping[str, Readings],
    base: Readings,
    failed: Mapping[str, str] | None = None,
) -> Found | None:
    """`measured` has outcomes by the name of a cell, `failed` why others have none; seeds that not all settings have
    yet are left out, and settings that failed in all of theirs, with those that they are the control of. None where
    nothing is left."""
    outcome, whole = ranking(design, base), cells
    gone = _gone(design, cells, measured, failed or {})
    cells = [cell for cell in whole if cell.levels not in gone]
    seeds = [s for s in design.seeds if all(cell.name in measured for cell in cells if cell.seed == s)]
    if not seeds or not cells:
        return None
    settings: dict[tuple[str, ...], list[Readings]] = {}
    for cell in cells:
        if cell.seed in seeds:
            settings.setdefault(cell.levels, []).append(measured[cell.name])
    names = {cell.levels: cell.setting for cell in cells}
    controls = {levels: control_of(design, levels) for levels in settings}
    ranked = [levels for levels in settings if not {*levels} & {*design.controls.values()}]
    aside = [levels for levels in settings if levels not in ranked]

    def array(levels: tuple[str, ...], outcomes: Sequence[str], control: tuple[str, ...] | None) -> np.ndarray:
        """(seeds, items) of the differences."""
        own = np.array([[value for name in outcomes for value in of[name]] for of in settings[levels]])
        of_base = np.array([value for name in outcomes for value in base[name]])
        other = [[v for name in outcomes for v in of[name]] for of in settings[control]] if control else of_base
        return own - np.array(other)

    lost = [name for name in base if name.endswith("/nll")]
    order = [*ranked, *aside]
    learnt = np.stack([array(levels, [outcome], controls[levels]) for levels in order])
    gained = np.stack([array(levels, [outcome], None) for levels in order])
    forgotten = np.stack([array(levels, lost, None) for levels in order]) if lost else np.full((len(order), 1, 1), NAN)
    effects, gains, forgets = map(effects_of, (learnt, gained, forgotten))
    judged = len(seeds) > 1 and bool(ranked)
    if judged:
        p_holm = statistics.holm(effects.p[: len(ranked)])
        letters = statistics.groups(learnt[: len(ranked)])
    front = statistics.pareto(gained.mean((1, 2)), forgotten.mean((1, 2))) if lost else np.zeros(len(order), bool)
    scores = []
    for i, levels in enumerate(order):
        rated = judged and i < len(ranked)
        changes = {name: float(array(levels, [name], None).mean()) for name in base}
        scores.append(
            Score(
                names[levels],
                names[controls[levels]] if controls[levels] else "",
                len(seeds),
                float(effects.mean[i]),
                float(effects.low[i]),
                float(effects.high[i]),
                float(effects.p[i]) if rated else None,
                float(p_holm[i]) if rated else None,
                letters[i] if rated else "",
                float(gains.mean[i]),
                float(gains.low[i]),
                float(gains.high[i]),
                float(forgets.mean[i]),
                float(forgets.low[i]),
                float(forgets.high[i]),
                bool(front[i]),
                _at_floor(settings[levels], base),
                changes,
            )
        )
    first, rest = scores[: len(ranked)], scores[len(ranked) :]
    several = len(seeds) > 1 and len(ranked) > 1
    spread = statistics.variances(learnt[: len(ranked)]) if judged else None
    items = learnt.shape[-1]
    return Found(
        outcome,
        sorted(first, key=lambda s: -s.score) + sorted(rest, key=lambda s: -s.score),
        statistics.reliability(learnt[: len(ranked)]),
        statistics.confirmed(learnt[: len(ranked)]) if several and items > 3 else None,
        [score.setting for score in first],
        statistics.detectable(spread, len(seeds), items, len(ranked)) if spread else NAN,
        items,
        tuple(seed for seed in design.seeds if seed not in seeds),
        {cell.setting: gone[cell.levels] for cell in whole if cell.levels in gone},
    )


def _gone(
    design: Design, cells: Sequence[Cell], measured: Mapping[str, Readings], failed: Mapping[str, str]
) -> dict[tuple[str, ...], str]:
    """Settings that nothing can be said of, and why."""
    there = {cell.levels for cell in cells if cell.name in measured}
    gone = {cell.levels: failed[cell.name] for cell in cells if cell.name in failed and cell.levels not in there}
    for levels in {cell.levels for cell in cells} - {*gone}:
        if (control := control_of(design, levels)) in gone:
            gone[levels] = f"its control failed: {gone[control]}"
    return gone


def effects_of(differences: np.ndarray) -> statistics.Effects:
    """Means alone where there is one seed, or nothing was measured."""
    if differences.shape[-2] > 1:
        return statistics.effects(differences)
    mean = differences.mean((-2, -1))
    return statistics.Effects(mean, *[np.full(len(mean), NAN)] * 4)


def unit(found: Found) -> str:
    return UNITS[found.outcome.rpartition("/")[2]]


def ranking(design: Design, base: Readings) -> str:
    """The outcome that ranks."""
    known = [name for name in base if name.rpartition("/")[2] in LEARNING]
    if design.score is None:
        first = next(iter(design.learning))
        return next(name for reading in LEARNING if (name := f"{first}/{reading}") in known)
    if design.score not in known:
        raise UserError(f"study: score: expected one of {', '.join(known)}, got {design.score!r}")
    return design.score


def control_of(design: Design, levels: tuple[str, ...]) -> tuple[str, ...] | None:
    """The setting whose effect is taken off; None: the base."""
    changed = tuple(design.controls.get(level, level) for level in levels)
    return changed if changed != levels else None


def _at_floor(measured: Sequence[Readings], base: Readings) -> bool:
    """Whether exact answers are so few that they could not tell anything."""
    exact = [name for name in base if name.endswith("/exact")]
    values = [np.mean(of[name]) for name in exact for of in (base, *measured)]
    return bool(values) and max(values) < FLOOR
