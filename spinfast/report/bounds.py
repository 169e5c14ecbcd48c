"""95 % intervals of what a run measured, within what a mean of its values can be."""

from __future__ import annotations

import math

from spinfast.evaluate.statistics import Estimate, bounded, interval, wilson
from spinfast.report.read import Run

REWARD = "heldout/reward"
SHARES = (  # of 0/1 items: Wilson's interval, which holds at 0 % and 100 % too
    *("heldout/accuracy_strict", "heldout/accuracy_flexible"),
    *("heldout/pair_accuracy", "heldout/eos_rate", "heldout/preference_accuracy", "heldout/chosen_likelier"),
)
AREAS = ("fresh/auc_log_ratio", "fresh/auc_length", "fresh/auc_eos")


def bounds(run: Run, metric: str, of: Estimate) -> tuple[float, float]:
    """The interval of a metric's estimate; (nan, nan) where it has none or its items are all equal."""
    if metric in SHARES and of["n"]:
        return wilson(of["value"] * of["n"], of["n"])
    span = (0.0, 1.0) if metric in (*SHARES, *AREAS) else run.paid if metric == REWARD else None
    if span and span[0] <= of["value"] <= span[1]:
        return bounded(of, *span)
    return interval(of) if of["stderr"] else (math.nan, math.nan)
