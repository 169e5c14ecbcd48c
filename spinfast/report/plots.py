"""A plot as data, and three ways to write it: SVG for the page (colours from the page's CSS), PNG, CSV.

The SVG is ours, not matplotlib's: it follows the reader's light or dark theme and stays small. One plot has one
y axis; a series' slot, a colour and a dash, says what it is (a run, a kind of answer, a phase) on every plot.
"""

from __future__ import annotations

import csv
import io
import math
import textwrap
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 18, 40
LEGEND = 8  # entries of one that has room in a picture's axes; a longer one stands beside them
SVG_POINTS = 600  # drawn of a longer line; the CSV has all
# colour slots on white, for PNG; page.css has the same ones for both themes
COLOURS = ("#2563c9", "#d9480f", "#0b8a6a", "#9c36b5", "#a37f00", "#c2255c", "#5c7080", "#0c8599")
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 2)))  # of the first eight, the next eight, ...; .lap1 and .lap2 in page.css


@dataclass(frozen=True)
class Series:
    label: str
    slot: int
    x: list[float]
    y: list[float]
    low: list[float] | None = None  # 95 % interval of each y
    high: list[float] | None = None
    left: list[float] | None = None  # 95 % interval of each x
    right: list[float] | None = None
    tag: str = ""  # beside its points and before its label, where colours are too few

    @property
    def lap(self) -> int:
        """How often the colours were used up before this series."""
        return self.slot // len(COLOURS) % len(DASHES)

    @property
    def colour(self) -> str:
        return COLOURS[self.slot % len(COLOURS)]

    @property
    def look(self) -> str:
        """Its CSS classes."""
        return f"s{self.slot % len(COLOURS)} lap{self.lap}"


@dataclass(frozen=True)
class Plot:
    """kind: line; band (a line over its intervals); points (with intervals, joined); steps (histogram outlines);
    bars (stacked, one bar per x tick); forest (points with intervals of x, a named row of y each).
    """

    name: str  # of its files
    title: str
    x_label: str
    y_label: str
    kind: Literal["line", "band", "points", "steps", "bars", "forest"]
    series: list[Series]
    x_ticks: tuple[tuple[float, str], ...] = ()
    y_ticks: tuple[tuple[float, str], ...] = ()  # of a forest: the rows' names
    marks: tuple[tuple[float, str], ...] = ()  # vertical lines, labelled at the top
    level: tuple[float, str] | None = None  # a horizontal line
    group: str = ""  # the section of the page

    @property
    def height(self) -> int:
        """Of the SVG; a forest has room for each row and its name."""
        return HEIGHT if self.kind != "forest" else TOP + BOTTOM + 34 * len(self.y_ticks)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(x0, x1, y0, y1) that hold everything finite."""
        xs = [x for s in self.series for x in s.x] + [x for x, _ in self.x_ticks]
        ys = [y for s in self.series for values in (s.y, s.low or [], s.high or []) for y in values]
        if self.kind == "bars":
            ys = [0.0, *(sum(s.y[i] for s in self.series) for i in range(len(self.series[0].x)))]
            xs = [min(xs) - 0.5, max(xs) + 0.5]
        if self.kind == "steps":
            ys.append(0.0)
        if self.kind == "points" and self.x_ticks:
            xs += [min(xs) - 0.3, max(xs) + 0.3]
        if any(s.left for s in self.series):
            sides = [x for s in self.series if s.left for x in (*s.left, *s.right)]
            xs += [x for x in sides if math.isfinite(x)] + [x for x, _ in self.marks]
            room = 0.06 * (max(xs) - min(xs))
            xs += [min(xs) - room, max(xs) + room]
        if self.kind == "forest":
            return *_spread(min(xs), max(xs)), min(ys) - 0.4, max(ys) + 0.6
        if self.level:
            ys.append(self.level[0])
        ys = [y for y in ys if math.isfinite(y)] or [0.0]
        x0, x1 = _spread(min(xs), max(xs))
        y0, y1 = _spread(min(ys), max(ys))
        room = 0.06 * (y1 - y0)
        return x0, x1, y0 if y0 == 0 else y0 - room, y1 + room


def _spread(low: float, high: float) -> tuple[float, float]:
    """A range of equal values is widened, so that it can be drawn."""
    return (low, high) if high > low else (low - (abs(low) or 1) * 0.05, high + (abs(high) or 1) * 0.05)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) within the range."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Short: 0.25, 1,200, 1.3e-05."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.3g}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def svg(plot: Plot) -> str:
    """The plot alone; title and legend are the page's."""
    x0, x1, y0, y1 = plot.bounds

    def px(x: float) -> float:
        return round(LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), 1)

    height = plot.height

    def py(y: float) -> float:
        return round(height - BOTTOM - (y - y0) / (y1 - y0) * (height - TOP - BOTTOM), 1)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(plot.title)}" '
        f'data-plot="{escape(plot.name)}">'
    ]
    for y in ticks(y0, y1) if plot.kind != "forest" else ():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y)}" y2="{py(y)}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{py(y) + 4}" text-anchor="end">{number(y)}</text>')
    whole = plot.x_label == "step"
    for x, text in plot.x_ticks or [(x, number(x)) for x in ticks(x0, x1) if x == int(x) or not whole]:
        parts.append(
            f'<text class="tick" x="{px(x)}" y="{height - BOTTOM + 15}" text-anchor="middle">{escape(text)}</text>'
        )
    labels, free = [], 0.0  # drawn above the lines; where the last mark's ends
    for x, text in plot.marks:
        parts.append(f'<line class="mark" x1="{px(x)}" x2="{px(x)}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        place = min(px(x), WIDTH - RIGHT - 6 * len(text))
        if place >= free:
            labels.append(f'<text class="tick" x="{place}" y="{TOP - 5}">{escape(text)}</text>')
            free = place + 7 * len(text)
    if plot.level:
        y, text = plot.level
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y)}" y2="{py(y)}"/>')
        labels.append(f'<text class="over" x="{WIDTH - RIGHT}" y="{py(y) - 4}" text-anchor="end">{escape(text)}</text>')
    for y, text in plot.y_ticks:
        labels.append(f'<text class="over" x="{LEFT}" y="{py(y) - 9}">{escape(text)}</text>')
    below = [0.0] * (len(plot.series[0].x) if plot.kind == "bars" else 0)
    for series in plot.series:
        parts += DRAW[plot.kind](series, px, py, len(plot.series), below)
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y0)}" y2="{py(y0)}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{height - 6}" text-anchor="middle">{escape(plot.x_label)}</text>')
    return "".join(parts + labels) + "</svg>"


def _path(points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x} {y}" for x, y in points)


def _line(series: Series, px, py, count, below) -> list[str]:
    stride = max(1, math.ceil(len(series.x) / SVG_POINTS))
    kept = [i for i in range(len(series.x)) if i % stride == 0 or i == len(series.x) - 1]
    pieces: list[list[tuple[float, float]]] = [[]]
    for i in kept:  # a value that is not finite interrupts the line
        if math.isfinite(series.y[i]):
            pieces[-1].append((px(series.x[i]), py(series.y[i])))
        elif pieces[-1]:
            pieces.append([])
    dots = [piece[0] for piece in pieces if len(piece) == 1]
    return [f'<path class="line {series.look}" d="{_path(piece)}"/>' for piece in pieces if len(piece) > 1] + [
        f'<circle class="dot {series.look}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in dots
    ]


def _band(series: Series, px, py, count, below) -> list[str]:
    """A line over its interval."""
    stride = max(1, math.ceil(len(series.x) / SVG_POINTS))
    known = [
        i for i in range(0, len(series.x), stride) if math.isfinite(series.low[i]) and math.isfinite(series.high[i])
    ]
    around = [(px(series.x[i]), py(series.low[i])) for i in known]
    around += [(px(series.x[i]), py(series.high[i])) for i in reversed(known)]
    area = [f'<path class="band {series.look}" d="{_path(around)}Z"/>'] if around else []
    return area + _line(series, px, py, count, below)


def _points(series: Series, px, py, count, below) -> list[str]:
    places = [(px(x), py(y)) for x, y in zip(series.x, series.y, strict=True)]
    parts = [f'<path class="line thin {series.look}" d="{_path(places)}"/>'] if len(places) > 1 else []
    for i, (x, y) in enumerate(places):
        if series.low and math.isfinite(series.low[i]):
            low, high = py(series.low[i]), py(series.high[i])
            parts.append(
                f'<path class="whisker {series.look}" d="M{x} {low}V{high}M{x - 4} {low}h8M{x - 4} {high}h8"/>'
            )
        if series.left and math.isfinite(series.left[i]):
            left, right = px(series.left[i]), px(series.right[i])
            parts.append(
                f'<path class="whisker {series.look}" d="M{left} {y}H{right}M{left} {y - 4}v8M{right} {y - 4}v8"/>'
            )
        parts.append(f'<circle class="dot {series.look}" cx="{x}" cy="{y}" r="4"/>')
        if series.tag:
            parts.append(f'<text class="over" x="{x + 6}" y="{y - 5}">{escape(series.tag)}</text>')
    return parts


def _steps(series: Series, px, py, count, below) -> list[str]:
    """x are the bins' edges, one more than y."""
    points = [(px(series.x[0]), py(0))]
    for i, y in enumerate(series.y):
        points += [(px(series.x[i]), py(y)), (px(series.x[i + 1]), py(y))]
    points.append((px(series.x[-1]), py(0)))
    return [f'<path class="area {series.look}" d="{_path(points)}"/>']


def _bars(series: Series, px, py, count, below: list[float]) -> list[str]:
    parts, width = [], min(46.0, 0.6 * (px(1) - px(0)))
    for i, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
        top, bottom = py(below[i] + y), py(below[i])
        if bottom - top > 0.4:
            height = round(max(0.5, bottom - top - 1), 1)  # a gap of the background between two parts
            parts.append(
                f'<rect class="bar {series.look}" x="{px(x) - width / 2:.1f}" y="{top}" width="{width:.1f}" '
                f'height="{height}"/>'
            )
        below[i] += y
    return parts


DRAW = {"line": _line, "band": _band, "points": _points, "steps": _steps, "bars": _bars, "forest": _points}


def to_csv(plot: Plot) -> str:
    """One line per point: series, x, y and, where there is one, the interval."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    sides = any(series.left for series in plot.series)
    writer.writerow(["series", plot.x_label, plot.y_label, "low", "high", *(["left", "right"] if sides else [])])
    for series in plot.series:
        for i, y in enumerate(series.y):
            bounds = [series.low[i], series.high[i]] if series.low and series.high else ["", ""]
            bounds += [series.left[i], series.right[i]] if series.left and series.right else []
            writer.writerow([series.label, series.x[i], y, *bounds])
    return text.getvalue()


def write_png(plot: Plot, path: Path) -> None:
    """The same plot by matplotlib, on white."""
    from matplotlib.figure import Figure

    height = max(4.0, 1.0 + 0.22 * max(len(plot.y_ticks), len(plot.series)))
    figure = Figure(figsize=(6.4 if len(plot.series) <= LEGEND else 8.4, height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    below = [0.0] * len(plot.series[0].x)
    for series in plot.series:
        label = f"{series.tag} {series.label}".lstrip()
        style = {"color": series.colour, "linestyle": DASHES[series.lap], "label": label}
        if plot.kind == "bars":
            axes.bar(series.x, series.y, 0.6, below, **style)
            below = [b + y for b, y in zip(below, series.y, strict=True)]
        elif plot.kind == "steps":
            axes.stairs(series.y, series.x, fill=True, alpha=0.35, **style)
        elif plot.kind in ("points", "forest"):
            axes.plot(series.x, series.y, marker="o", linewidth=1, **style)
            if series.low and series.high:
                axes.vlines(series.x, series.low, series.high, color=series.colour, linewidth=1.5)
            if series.left and series.right:
                axes.hlines(series.y, series.left, series.right, color=series.colour, linewidth=1.5)
            for at in zip(series.x, series.y, strict=True) if series.tag else ():
                axes.annotate(series.tag, at, (4, 4), textcoords="offset points", fontsize=7)
        else:
            if plot.kind == "band":
                axes.fill_between(series.x, series.low, series.high, color=series.colour, alpha=0.2, linewidth=0)
            axes.plot(series.x, series.y, marker="o" if len(series.x) == 1 else None, linewidth=1.5, **style)
    for x, text in plot.marks:
        axes.axvline(x, color="#999", linewidth=0.8, linestyle=":")
        axes.annotate(text, (x, 1), (3, -9), xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=7)
    if plot.level:
        axes.axhline(plot.level[0], color="#999", linewidth=0.8, linestyle="--")
    if plot.x_ticks:
        axes.set_xticks([x for x, _ in plot.x_ticks], [text for _, text in plot.x_ticks])
    if plot.y_ticks:
        axes.set_yticks([y for y, _ in plot.y_ticks], [text for _, text in plot.y_ticks])
    axes.set(title=plot.title, xlabel=plot.x_label, ylabel=textwrap.fill(plot.y_label, 44))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4)
    handles = {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    if len(handles) > 1 and plot.kind != "forest":
        beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if len(handles) > LEGEND else {}
        axes.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, **beside)
    figure.savefig(path)
