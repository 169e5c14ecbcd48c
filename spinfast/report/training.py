"""Curves over the steps of a run's last method: its losses, and of GRPO what its answers were rewarded with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

from spinfast.evaluate.learning import BY_FUNCTION
from spinfast.objectives import loss_at_zero_margin
from spinfast.report.bounds import bounds
from spinfast.report.plots import Plot, Series
from spinfast.report.read import Run

TRAINING = {  # metric -> (title, level)
    "train/loss": ("Training loss", None),  # its level is _first_loss
    "train/margin": ("Training margin", (0.0, "")),
    "train/pair_accuracy": ("Training pair accuracy", (0.5, "chance")),
    "train/real_logp_change": ("log p(real), change since the round began", (0.0, "")),
    "train/generated_logp_change": ("log p(generated), change since the round began", (0.0, "")),
    "train/chosen_logp_change": ("log p(chosen) against the reference", (0.0, "")),
    "train/rejected_logp_change": ("log p(rejected) against the reference", (0.0, "")),
    "heldout/loss": ("Held-out loss on the way", None),
    "train/grad_norm": ("Gradient norm before clipping", None),
    "train/lr": ("Learning rate", None),
    "train/loss_scale": ("Loss scale", None),
}
ANSWERS = {  # of GRPO: metric -> (title, level)
    "reward_std": ("Spread of rewards", None),
    "groups/dead": ("Dead groups: all rewards equal", None),
    "groups/refilled": ("Groups replaced by fresh prompts", None),
    "completions/mean_length": ("Tokens of an answer", None),
    "completions/mean_terminated_length": ("Tokens of an answer that ended", None),
    "completions/clipped_ratio": ("Answers cut at the length limit", None),
    "entropy": ("Entropy (nats per token)", None),
    "kl": ("KL to the reference (nats per token)", None),
    "clip_ratio/region_mean": ("Clipped tokens", None),
    "cispo_clip_ratio": ("Clipped tokens (cispo)", None),
    "sampling/sampling_logp_difference/mean": ("Sampler and trainer apart (nats per token)", None),
}
LOOKS = {
    "heldout/reward": "Held-out reward",
    "heldout/accuracy_strict": "Held-out accuracy, strict",
    "heldout/accuracy_flexible": "Held-out accuracy, flexible",
}
POINTS = 1000  # that a longer line of means is thinned to, at most twice as many; every step is in metrics.jsonl
SMOOTHED = 20  # a running mean is over this part of the steps, but at least 5; of fewer each stands for itself


def plots(runs: Sequence[Run]) -> list[Plot]:
    """Those before a run's last method minimise something else and are left out; some plots may have no series."""
    names = dict.fromkeys(name for run in runs for row in run.steps for name in row if BY_FUNCTION.fullmatch(name))
    rewards = {"reward": ("Reward", None)}
    rewards |= {name: (f"Reward by {name.split('/', 1)[1][:-5]}", None) for name in names if name.endswith("/mean")}
    made = [_answers(runs, metric, *look) for metric, look in (rewards | ANSWERS).items()]
    made += [_look(runs, metric, title) for metric, title in LOOKS.items()]
    return made + [_curve(runs, metric, *look) for metric, look in TRAINING.items()]


def _stages(run: Run, metric: str) -> Iterator[tuple[str, list[float], list[dict]]]:
    """(label, x, rows) of each stage of the last method that has the metric, end to end."""
    offset = 0
    for stage, rows in groupby(run.steps, key=lambda row: row["stage"]):
        rows = [row for row in rows if metric in row]
        if rows and run.method(stage) == run.config["method"][-1]:
            x = [float(offset + row["step"]) for row in rows]
            yield run.label(stage), x, rows
            offset = int(x[-1])


def _curve(runs: Sequence[Run], metric: str, title: str, level) -> Plot:
    series, marks = [], {}
    for position, run in enumerate(runs):
        for name, x, rows in _stages(run, metric):
            marks.setdefault(x[0], name)
            series.append(Series(run.name, position, x, [row[metric] for row in rows]))
    if metric == "train/loss_scale" and all(y == 1.0 for s in series for y in s.y):
        series = []  # there is none
    shown = tuple(marks.items()) if len(runs) == 1 else ()
    if metric == "train/loss":
        level = _first_loss(runs)
    return _plot(metric, title, "line", series, "training", marks=shown, level=level)


def _plot(metric: str, title: str, kind: str, series: list[Series], group: str, name: str = "", **more) -> Plot:
    file = (name or metric).replace("/", "-")
    return Plot(file, title, "step", metric, kind, series, group=group, **more)


def _first_loss(runs: Sequence[Run]) -> tuple[float, str] | None:
    """What every iteration starts at, by the loss that was trained; None where iterations or runs differ in it."""
    played = [run.config["spin"] for run in runs if run.config["method"][-1] == "spin"]
    found = {loss_at_zero_margin(c["loss"], beta) for c in played for beta in c["beta"][: c["iterations"]]}
    if len(found) != 1 or len(played) < len(runs):
        return None
    (value,) = found
    return value, "ln 2" if value == math.log(2) else "l(0)"


def _answers(runs: Sequence[Run], metric: str, title: str, level) -> Plot:
    series = []
    for position, run in enumerate(runs):
        for _, x, rows in _stages(run, metric):
            if any(row[metric] != 0 for row in rows) and "reward" in rows[0]:
                thinned = slice(None, None, max(1, len(x) // POINTS))
                drawn = (values[thinned] for values in (x, *_running([row[metric] for row in rows])))
                series.append(Series(run.name, position, *drawn))
    return _plot(metric, title, "band", series, "rewards", level=level)


def _running(values: Sequence[float]) -> tuple[list[float], list[float], list[float]]:
    """Means over a window around each step, and ± 2 standard errors of them within what there is; nan without."""
    y = np.asarray(values, dtype=np.float64)
    known = np.isfinite(y)
    centre = y[known].mean() if known.any() else 0.0  # so that squares do not cancel
    y = np.where(known, y - centre, 0.0)
    half = max(5, len(y) // SMOOTHED) // 2 if len(y) >= SMOOTHED else 0
    at = np.arange(len(y))
    first, last = np.maximum(0, at - half), np.minimum(len(y), at + half + 1)
    sums = (np.append(0.0, np.cumsum(of)) for of in (known, y, y * y))
    n, total, squares = (of[last] - of[first] for of in sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / n
        error = np.sqrt(np.maximum(squares / n - mean**2, 0.0) / (n - 1))
    error[n < 2] = np.nan
    mean += centre
    least, greatest = (y[known] + centre).min(initial=math.inf), (y[known] + centre).max(initial=-math.inf)
    low, high = np.maximum(mean - 2 * error, least), np.minimum(mean + 2 * error, greatest)
    return mean.tolist(), low.tolist(), high.tolist()


def _look(runs: Sequence[Run], metric: str, title: str) -> Plot:
    series = []
    for position, run in enumerate(runs):
        for _, x, rows in _stages(run, metric):
            seen = [{"value": row[metric], "stderr": row.get(f"{metric}_stderr"), "n": None} for row in rows]
            low, high = zip(*(bounds(run, metric, look) for look in seen), strict=True)
            series.append(Series(run.name, position, x, [row[metric] for row in rows], list(low), list(high)))
    return _plot(metric, f"{title} on the way", "points", series, "rewards", name=f"look-{metric}")
