"""When to stop and what to keep, decided on the same held-out items for every iteration.

results[0] are the base's verdicts (or margins, or any score per item); those of a stage before self-play may follow,
then the iterations'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from spinfast.evaluate.statistics import compare


def best(results: Sequence[Sequence[float]]) -> int:
    """The position with the highest mean; the earliest of equals."""
    return int(np.argmax([np.mean(items) for items in results]))


def apart(results: Sequence[Sequence[float]]) -> bool:
    """Whether any did better than another."""
    return len({float(np.mean(items)) for items in results}) > 1


def kept(results: Sequence[Sequence[float]]) -> int:
    """The position to keep: the best, or the last where all are equal and so say nothing."""
    return best(results) if apart(results) else len(results) - 1


def telling(readings: Mapping[str, Sequence[Sequence[float]]]) -> str | None:
    """Of several readings, each by stage, the first in which a stage has a success, else the first that there is."""
    some = [name for name, of_stages in readings.items() if any(of_stages)]
    return next((name for name in some if any(map(any, readings[name]))), next(iter(some), None))


def stop_reason(
    results: Sequence[Sequence[float]],
    patience: int,
    confidence: float = 0.95,
    starts: Sequence[str] = ("the base",),
    numbers: Sequence[int] = (),
) -> str | None:
    """Why to stop: none of the last `patience` iterations is significantly better than the best before them.

    None means go on. patience counts iterations; what they start from never stops a run.
    starts: names of the first results, which are no iterations: the base and, where there was one, the SFT stage.
    numbers: the iterations' own, where not every one was looked at; 0, 1, ... without.
    """
    if patience < 1:
        raise ValueError(f"patience: expected at least 1 iteration, got {patience}")
    if len(results) - len(starts) < patience:
        return None
    champion = best(results[:-patience])
    changes = [compare(results[champion], items, confidence) for items in results[-patience:]]
    if any(change["verdict"] == "better" for change in changes):
        return None
    last = changes[-1]
    names = [*starts, *(f"iteration {number}" for number in numbers or range(len(results) - len(starts)))]
    against = names[champion]
    return (
        f"no held-out gain over {against} in the last {patience} iteration{'s' * (patience > 1)}: the last one is "
        f"{last['difference']:+.4f} [{last['low']:+.4f}, {last['high']:+.4f}] on {last['n']} items, "
        f"p = {last['p']:.3g}"
    )
