"""What a study leaves beside its cells: scores.csv, runs.jsonl, scores.md, two plots, one page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from rich.console import Console

from spinfast.progress import show
from spinfast.report import plots
from spinfast.report.page import document, figure
from spinfast.report.plots import Plot, Series
from spinfast.store import files
from spinfast.studies import lift, tables
from spinfast.studies.design import Cell
from spinfast.studies.lift import Lift
from spinfast.studies.outcomes import UNITS, Readings
from spinfast.studies.rate import Rated
from spinfast.studies.scores import Found, unit

GREY = 6  # a colour's slot


def write(
    directory: Path,
    found: Found,
    cells: Sequence[Cell],
    measured: Mapping[str, Readings],
    base: Readings,
    rated: Sequence[Rated] = (),
    notes: Sequence[str] = (),
    lifts: Sequence[Lift] = (),
    curves: Sequence[Plot] = (),
) -> list[Plot]:
    """All files but pictures, each whole or as it was; returns the plots."""
    files.write_text(directory / "runs.jsonl", files.jsonl(runs(cells, measured, base)))
    files.write_text(directory / "scores.csv", scores_csv(found, rated))
    if lifts:
        files.write_text(directory / "lift.csv", lift.to_csv(lifts))
    told = [tables.markdown(*table(found))]
    told += [
        f"Lift over the base, {reading}, {UNITS[reading]}:\n\n{tables.markdown(*lift.table(each))}"
        for reading, each in lift.by_reading(lifts).items()
    ]
    said = [*sentences(found), *lift.sentences(lifts), *notes]
    files.write_text(directory / "scores.md", "\n".join([*told, *(f"- {line}" for line in said)]) + "\n")
    drawn = [forest(found), *tradeoff(found), *curves]
    for plot in drawn:
        files.write_text(directory / f"{plot.name}.csv", plots.to_csv(plot))
    files.write_text(directory / "index.html", page(directory.name, found, drawn, said, base, lifts))
    return drawn


def draw(directory: Path, drawn: Sequence[Plot]) -> None:
    """The plots as PNG, where matplotlib is."""
    if find_spec("matplotlib"):
        for plot in drawn:
            plots.write_png(plot, directory / f"{plot.name}.png")


def tell(console: Console, found: Found, notes: Sequence[str] = ()) -> None:
    """The table and its sentences, for a person."""
    headings, rows = table(found)
    show(console, f"Effect on {found.outcome}, {unit(found)}", headings, rows)
    for line in (*sentences(found), *notes):
        console.print(line, markup=False, highlight=False)


def table(found: Found) -> tuple[list[str], list[list[str]]]:
    """Headings and rows, ranked settings first."""
    rows = []
    for score in found.scores:
        interval = "" if math.isnan(score.low) else f"{score.low:+.3f} to {score.high:+.3f}"
        p = "" if score.p_holm is None else _p(score.p_holm)
        lost = "" if math.isnan(score.forgetting) else f"{score.forgetting:+.3f}"
        rows.append([score.setting, f"{score.score:+.3f}", interval, p, score.group, lost, score.control or "base"])
    rows += [[setting, "failed", *[""] * 5] for setting in found.failed]
    headings = ["setting", "effect", "95 %", "p (Holm)", "group", "forgets", "less"]
    kept = len(headings) if any(score.control for score in found.scores) else -1  # where all are over the base
    return headings[:kept], [row[:kept] for row in rows]


def sentences(found: Found) -> list[str]:
    """What the table does and does not say."""
    ranked = [score for score in found.scores if score.p_holm is not None]
    said = [f"Failed in every seed: {setting}: {reason}" for setting, reason in found.failed.items()]
    if found.left_out:
        said.append(f"Left out, since not all cells have outcomes: seed {', '.join(map(str, found.left_out))}.")
    if not ranked:
        one = {score.seeds for score in found.scores} == {1}
        said.append("One seed: no intervals, no order. Play more." if one else "Nothing is left that ranks.")
        return said
    proven = [score.setting for score in ranked if score.p_holm < 0.05]
    said.append(
        f"{len(proven)} of {len(ranked)} are told from their controls (p < 0.05 after Holm)"
        + (f": {', '.join(proven)}." if proven else "; the others may have no effect, or one too small to be seen.")
    )
    said.append(f"This design finds an effect of {found.smallest:.3f} in 80 of 100 studies; smaller ones it may miss.")
    if len({score.group for score in ranked}) == 1 and len(ranked) > 1:
        said.append("No two can be told apart: the order in the table is no ranking.")
    elif len(ranked) > 1:
        said.append("Those that share a letter cannot be told apart.")
    seeds = ranked[0].seeds
    if seeds < 5:
        said.append(
            f"{seeds} seeds: of a test that flips their signs the smallest p is {2.0 ** (1 - seeds):.3g}; five are "
            "the least that is advised."
        )
    if not math.isnan(found.reliability):
        said.append(f"Split-half reliability of the order, by seeds: {found.reliability:.2f} (1 is perfect, 0 none).")
    if found.best is not None:
        best = found.best
        said.append(
            f"Best by one half of the items: {found.names[best.text]}; on the other half its effect is "
            f"{best.mean:+.3f} ({best.low:+.3f} to {best.high:+.3f}, p {_p(best.p_holm)} after Holm)."
        )
    if floor := [score.setting for score in found.scores if score.floor]:
        whose = f" of {', '.join(floor)}" if len(floor) < len(found.scores) else ""
        said.append(f"Exact answers{whose} are below 2 % with and without training: they tell nothing (floor).")
    return said


def scores_csv(found: Found, rated: Sequence[Rated]) -> str:
    """A row per setting; sha256, tokens and passes where it is a text."""
    by_name = {text.name: text for text in rated}
    rows = []
    for score in found.scores:
        of = by_name.get(score.setting)
        rows.append(
            {
                "text" if rated else "setting": score.setting,
                "sha256": of.sha256 if of else "",
                "tokens": of.tokens if of else "",
                "passes": of.passes if of else "",
                "seeds": score.seeds,
                "score": score.score,
                "ci_low": _number(score.low),
                "ci_high": _number(score.high),
                "p_holm": "" if score.p_holm is None else score.p_holm,
                "group": score.group,
                "forgetting": _number(score.forgetting),
                "floor_flag": int(score.floor),
                "reliability": _number(found.reliability),
                "control": score.control or "base",
                "learning": score.learning,
                "forgetting_low": _number(score.forgetting_low),
                "forgetting_high": _number(score.forgetting_high),
                "pareto": int(score.pareto),
                **score.changes,
            }
        )
    return tables.to_csv([*rows, *({"text" if rated else "setting": name, "seeds": 0} for name in found.failed)])


def runs(cells: Sequence[Cell], measured: Mapping[str, Readings], base: Readings) -> list[dict]:
    """A row per cell that is played: its levels, seed, and the mean of every outcome with its change from the base."""
    rows = []
    for cell in cells:
        if cell.name in measured:
            means = {name: float(np.mean(values)) for name, values in measured[cell.name].items()}
            changes = {name: mean - float(np.mean(base[name])) for name, mean in means.items()}
            own = {"cell": cell.name, "setting": cell.setting, "levels": list(cell.levels), "seed": cell.seed}
            rows.append(own | {"config": cell.config.hash(), "outcomes": means, "changes": changes})
    return rows


def forest(found: Found) -> Plot:
    """Effects with their intervals, ranked settings first."""
    series, names = [], []
    for row, score in enumerate(found.scores):
        low, high = (score.score if math.isnan(bound) else bound for bound in (score.low, score.high))
        slot = 0 if score.p_holm is not None else GREY
        series.append(Series(score.setting, slot, [score.score], [-float(row)], left=[low], right=[high]))
        letters = f" ({score.group})" if score.group else ""
        names.append((-float(row), score.setting + letters))
    return Plot(
        "forest",
        f"Effect on {found.outcome}",
        f"effect, {unit(found)}",
        "settings; in brackets who cannot be told apart; grey: not ranked",
        "forest",
        series,
        y_ticks=tuple(names),
        marks=((0.0, "no effect"),),
    )


def tradeoff(found: Found) -> list[Plot]:
    """Learning against forgetting, the base at the origin; what nothing beats in both is named so."""
    if any(math.isnan(score.forgetting) for score in found.scores):
        return []
    name, front = found.outcome, sorted((s.forgetting, s.learning) for s in found.scores if s.pareto)
    series = [Series("Pareto front", GREY, *map(list, zip(*front, strict=True))), Series("base", GREY, [0.0], [0.0])]
    for place, score in enumerate(found.scores):
        known = not math.isnan(score.learning_low)
        whisker = {"low": [score.learning_low], "high": [score.learning_high]} if known else {}
        if not math.isnan(score.forgetting_low):
            whisker |= {"left": [score.forgetting_low], "right": [score.forgetting_high]}
        label, slot = score.setting + (" (Pareto)" if score.pareto else ""), place % 7
        slot += slot == GREY
        series.append(Series(label, slot, [score.forgetting], [score.learning], tag=str(place + 1), **whisker))
    return [
        Plot(
            "tradeoff",
            "Learning against forgetting",
            "forgetting, nats per token more on other texts",
            f"learning: {name} more than the base, {unit(found)}",
            "points",
            series,
            marks=((0.0, ""),),
            level=(0.0, ""),
        )
    ]


def page(
    name: str, found: Found, drawn: Sequence[Plot], said: Sequence[str], base: Readings, lifts: Sequence[Lift]
) -> str:
    changes = [[score.setting, *(f"{score.changes[each]:+.3f}" for each in base)] for score in found.scores]
    columns = ["setting", *(f"{each}\nbase {np.mean(values):.3f}" for each, values in base.items())]
    figures = "".join(figure(plot, True) for plot in drawn)
    lifted = "".join(
        f"<h3>{escape(reading)}, {UNITS[reading]}</h3>{tables.html(*lift.table(each))}"
        for reading, each in lift.by_reading(lifts).items()
    )
    title = f"spinfast study: {name}"
    sections = [
        f'<section><h2>Scores</h2><p class="soft">Effect on {escape(found.outcome)}, {unit(found)}, more than the '
        f"control or the base; {found.items} items, the same for all.</p>{tables.html(*table(found))}"
        f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in said)}</ul></section>",
        '<section><h2>Lift</h2><p class="soft">Each adapter on each task, more than the base, with 95 % intervals; '
        f"bold: its own task.</p>{lifted}</section>"
        if lifts
        else "",
        f'<section><h2>Plots</h2><div class="plots">{figures}</div></section>',
        '<section><h2>All outcomes</h2><p class="soft">Mean change from the base; nll: more is forgotten.</p>'
        f"{tables.html(columns, changes)}</section>",
    ]
    return document(title, [f"<h1>{escape(title)}</h1>", *sections])


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _number(value: float) -> float | str:
    return "" if math.isnan(value) else value
