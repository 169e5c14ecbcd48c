"""Estimates with their errors: everything the report and the stopping rule say rests on these few functions.

An estimate is {"value", "stderr", "n"}; stderr is None where n is too small to have one. Numpy only, seeded
where random. Sources: Wilson 1927; McNemar 1947 (exact, as a binomial test of the discordant pairs); DeLong,
DeLong & Clarke-Pearson 1988 for the AUC's error, Obuchowski 1997 where real and generated share a prompt;
Schulman 2020, "Approximating KL divergence", for k1 and k3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

Estimate = dict[str, float | int | None]


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """The mean and its standard error (sample deviation over sqrt n, as lm-eval reports it)."""
    values = np.asarray(values, dtype=np.float64)
    if not values.size:
        raise ValueError("expected at least one value to estimate a mean from, got none")
    stderr = float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else None
    return {"value": float(values.mean()), "stderr": stderr, "n": int(values.size)}


def ratio_of_sums(values: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray) -> Estimate:
    """Sum of values over sum of weights, item by item; its error by the delta method."""
    values, weights = (np.asarray(x, dtype=np.float64) for x in (values, weights))
    ratio = values.sum() / weights.sum()
    return {**estimate((values - ratio * weights) / weights.mean()), "value": float(ratio)}


def over_seeds(values: Sequence[float]) -> Estimate:
    """One metric over independent runs: the spread between runs, not the items within one, is the error."""
    return estimate(values)


def interval(of: Estimate, confidence: float = 0.95) -> tuple[float, float]:
    """The normal interval of an estimate; unbounded where it has no standard error."""
    half = math.inf if of["stderr"] is None else _z(confidence) * of["stderr"]
    return of["value"] - half, of["value"] + half


def apart(a: Estimate, b: Estimate) -> bool:
    """More than two standard errors between two estimates, taken as independent (the cautious side)."""
    if a["stderr"] is None or b["stderr"] is None:
        return False
    return abs(a["value"] - b["value"]) > 2 * math.hypot(a["stderr"], b["stderr"])


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a proportion that holds for small n and for 0 or n successes; a tie may count half."""
    z, p = _z(confidence), successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bounded(of: Estimate, low: float, high: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a mean of values within [low, high], of as many items as give its standard error.

    At a bound there is no error, and its own n counts; (nan, nan) where all values are equal or nothing is known.
    """
    if not low < high:
        return math.nan, math.nan
    size, share = high - low, (of["value"] - low) / (high - low)
    n = share * (1 - share) * (size / of["stderr"]) ** 2 if of["stderr"] else (of["n"] or 0) * (share in (0, 1))
    if not n:
        return math.nan, math.nan
    first, last = wilson(share * n, n, confidence)
    return low + size * first, low + size * last


def bootstrap(
    values: Sequence[float] | np.ndarray,
    statistic: Callable[..., np.ndarray] = np.mean,
    confidence: float = 0.95,
    resamples: int = 4000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of statistic(values, axis) over resampled rows; give differences for a paired one."""
    values = np.asarray(values, dtype=np.float64)
    random, n = np.random.default_rng(seed), len(values)
    at_once = max(1, 2**22 // n)  # resamples held in memory together
    sizes = [min(at_once, resamples - done) for done in range(0, resamples, at_once)]
    drawn = [statistic(values[random.integers(0, n, size=(size, n))], axis=1) for size in sizes]
    low, high = np.quantile(np.concatenate(drawn), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Exact two-sided p-value that two systems, judged on the same items, are right equally often."""
    before, after = _paired(before, after)
    gained, lost = int((before < after).sum()), int((before > after).sum())
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)  # integers until the last division: no underflow


def compare(
    before: Sequence[float], after: Sequence[float], confidence: float = 0.95, seed: int = 0
) -> dict[str, float | int | str]:
    """after - before on the same items: difference, paired bootstrap interval, p-value and a plain verdict.

    0/1 items are judged by McNemar's exact test, others by whether the interval leaves zero out (p is then
    the two-sided normal p-value of the mean difference).
    """
    before, after = _paired(before, after)
    difference = after - before
    low, high = bootstrap(difference, confidence=confidence, seed=seed)
    if np.isin(np.concatenate([before, after]), (0.0, 1.0)).all():
        p = mcnemar(before, after)
        significant = p < 1 - confidence
    else:
        change = estimate(difference)
        spread = change["stderr"] or 0.0
        p = 2 * NormalDist().cdf(-abs(change["value"]) / spread) if spread else float(change["value"] == 0)
        significant = low > 0 or high < 0
    mean = float(difference.mean())
    verdict = "within noise" if not significant else "better" if mean > 0 else "worse"
    return {"difference": mean, "low": low, "high": high, "p": p, "n": len(difference), "verdict": verdict}


def auc(positive: Sequence[float], negative: Sequence[float], paired: bool = False) -> Estimate:
    """P(positive > negative) + P(tie)/2, the area under the ROC curve (Mann-Whitney U / mn).

    paired: positive[i] and negative[i] come from one prompt, so their placements are correlated.
    """
    positive, negative = (np.asarray(x, dtype=np.float64) for x in (positive, negative))
    if paired and len(positive) != len(negative):
        raise ValueError(f"expected as many positives as negatives, got {len(positive)} and {len(negative)}")
    above = _share_below(positive, negative)
    below = 1 - _share_below(negative, positive)
    m, n = len(positive), len(negative)
    if min(m, n) < 2:
        stderr = None
    elif paired:
        stderr = float((above + below).std(ddof=1) / math.sqrt(n))
    else:
        stderr = float(math.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n))
    return {"value": float(above.mean()), "stderr": stderr, "n": n if paired else m + n}


def _share_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each value the share of `others` below it, a tie counted half."""
    others = np.sort(others)
    left, right = (np.searchsorted(others, values, side) for side in ("left", "right"))
    return (left + right) / (2 * len(others))


def kl_k1(policy_logps: np.ndarray, base_logps: np.ndarray) -> np.ndarray:
    """log p/q for samples of p: unbiased for KL(p || q), each term may be negative."""
    return np.asarray(policy_logps, np.float64) - np.asarray(base_logps, np.float64)


def kl_k3(policy_logps: np.ndarray, base_logps: np.ndarray) -> np.ndarray:
    """q/p - 1 - log q/p for samples of p: unbiased where q << p, never negative, less noisy near p = q."""
    log_ratio = -kl_k1(policy_logps, base_logps)
    return np.expm1(log_ratio) - log_ratio


def distinct_n(sequences: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams of all sequences together (Li et al. 2016); 0 where there are none."""
    grams = [gram for sequence in sequences for gram in _ngrams(sequence, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repeated_ngrams(sequence: Sequence[int], n: int) -> float:
    """The share of a sequence's n-grams that occurred in it before; 0 where it is shorter than n."""
    grams = _ngrams(sequence, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(sequence: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(sequence[i:] for i in range(n)), strict=False))


def _paired(a: Sequence[float], b: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or not a.size:
        raise ValueError(f"expected two results on the same items, got {a.size} and {b.size} items")
    return a, b


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)
