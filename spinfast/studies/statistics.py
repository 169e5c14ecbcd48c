"""What the runs of a study show: effects with their errors, families of tests, groups, the size that can be seen.

Everything is made of differences d, an array (texts, seeds, items): a text's run against its twin's (or another
text's) of the same seed, on the same item. Seeds and items are both samples, crossed: a claim is one about other seeds
and other items of their kind. Items that share a template are one item: give their mean. The model,

    d = effect + seed + item + rest,   Var(mean d) = (MS_seed + MS_item - MS_rest) / (seeds items)

with the mean squares of the analysis of variance, which are the mixed model's REML estimates where data are balanced.
Few seeds decide how it is judged: each part of the variance is given the t quantile of its own freedom,

    reach^2 = (t_(seeds-1)^2 MS_seed + t_(items-1)^2 max(MS_item - MS_rest, 0)) / (seeds items)

(Banerjee 1960, for sums of independent variances). Simulated over shares of the three variances it keeps to its level,
at 0.05 and at the fractions of it that Holm asks for. Satterthwaite's freedom (1946) does not: with 5 seeds noise
passes 0.05 / 28 up to 2.6 times as often as it should, with 3 seeds 5 times. Percentiles of resampled seeds and items
rate noise in a third of studies of 8 texts and 5 seeds where only seeds vary (tests/studies). Numpy only; scipy is
what the tests hold it against.
"""

from __future__ import annotations

import functools
import itertools
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 20_000  # of a design's mean squares, where its power is worked out
NODES, WEIGHTS = np.polynomial.legendre.leggauss(128)


@dataclass(frozen=True)
class Effects:
    """Of each text, arrays (texts,): the mean difference, its interval, its two-sided p, its standard error."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    stderr: np.ndarray


@dataclass(frozen=True)
class Variances:
    """Of one difference: between seeds, between items, and what is left in each seed and item."""

    seed: float
    item: float
    rest: float


@dataclass(frozen=True)
class Confirmation:
    """The text that is best on one half of the items, and its effect on the other; p adjusted for all texts there.

    Both halves come of the same runs: held-out items take the luck of items away, not that of seeds.
    """

    text: int
    chosen_by: float  # its mean on the half by which it was chosen
    mean: float
    low: float
    high: float
    p_holm: float


def effects(differences: np.ndarray, confidence: float = 0.95) -> Effects:
    """The effect of every text, (..., seeds, items) -> (...), with intervals and p values that count both samples.

    p is the tail whose interval ends at 0, to 3 digits, and not below 1e-15.
    """
    mean, squares, shape = _mean_squares(_checked(differences))
    parts = _parts(*squares, *shape)
    reach = _reach(1 - confidence, parts, *shape)
    logs, *quantiles = _quantiles(*shape)
    ends = np.sqrt(sum(t**2 * part[..., None] for t, part in zip(quantiles, parts, strict=True)))
    after = np.clip((ends < np.abs(mean)[..., None]).sum(-1), 1, len(logs) - 1)
    near, far = (np.take_along_axis(ends, at[..., None], -1)[..., 0] for at in (after - 1, after))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(mean == 0, 0.0, np.clip((np.abs(mean) - near) / (far - near), 0, 1))
    p = np.exp(logs[after - 1] + share * (logs[after] - logs[after - 1]))
    return Effects(mean, mean - reach, mean + reach, p, np.sqrt(sum(parts)))


def sign_flips(differences: np.ndarray) -> np.ndarray:
    """Exact two-sided p of each text on these very items: every seed's mean difference with either sign.

    Text and twin share a seed, so the pairs are what is exchangeable (Fisher 1935), not all runs; it assumes no
    normal distribution, and says nothing of other items. It cannot be below `smallest_p(seeds)`.
    """
    by_seed = _checked(differences).mean(-1)
    signs = np.array(list(itertools.product((1, -1), repeat=by_seed.shape[-1] - 1)))  # the first seed's stays
    flipped = np.abs(by_seed[..., :1] + by_seed[..., 1:] @ signs.T)
    return (flipped >= flipped[..., :1] * (1 - 1e-12)).mean(-1)


def smallest_p(seeds: int) -> float:
    """The least two-sided p that flipping signs can give: 0.25 with 3 seeds, 0.0625 with 5, 0.03125 with 6."""
    return 2.0 ** (1 - seeds)


# -- many texts -----------------------------------------------------------------------------------------------------


def holm(p: np.ndarray) -> np.ndarray:
    """p values adjusted for all of them, (n,) -> (n,): the family's error is kept under any dependence (Holm 1979)."""
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return adjusted[np.argsort(order, kind="stable")]


def pairwise(differences: np.ndarray) -> np.ndarray:
    """p of every two texts' difference, (texts, texts), Holm over the pairs; 1 on the diagonal."""
    d = _checked(differences)
    first, second = np.triu_indices(len(d), 1)
    table = np.ones((len(d), len(d)))
    if len(first):
        table[first, second] = table[second, first] = holm(effects(d[first] - d[second]).p)
    return table


def groups(differences: np.ndarray, alpha: float = 0.05) -> list[str]:
    """Letters of each text, "a" with the best: texts that share one cannot be told apart, those that share none can.

    All largest sets of such texts, by insertion and absorption (Piepho 2004).
    """
    apart = pairwise(differences) < alpha
    rank = np.argsort(np.argsort(-np.asarray(differences).mean((-2, -1)), kind="stable"), kind="stable")
    columns = {frozenset(range(len(apart)))}
    for i, j in zip(*np.nonzero(np.triu(apart)), strict=True):
        parts = {part for c in columns for part in ((c - {i}, c - {j}) if {i, j} <= c else (c,))}
        columns = {part for part in parts if not any(part < other for other in parts)}
    named = list(zip(_letters(), sorted(columns, key=lambda c: sorted(rank[i] for i in c)), strict=False))
    return ["".join(letter for letter, column in named if i in column) for i in range(len(apart))]


def _letters() -> itertools.chain[str]:
    """a ... z, then (a1) ... (z1), (a2) ..."""
    more = (f"({letter}{number})" for number in itertools.count(1) for letter in string.ascii_lowercase)
    return itertools.chain(string.ascii_lowercase, more)


def reliability(differences: np.ndarray) -> float:
    """How well one half of the seeds orders the texts as the other does: Spearman's rho over all splits, its mean
    stepped up to all seeds (Spearman-Brown) where it is positive. nan where there is no order: fewer than two texts
    or seeds, or all equal.
    """
    by_seed = np.asarray(differences, dtype=np.float64).mean(-1)
    texts, seeds = by_seed.shape
    if min(texts, seeds) < 2:
        return float("nan")
    halves = np.array(list(itertools.combinations(range(seeds), seeds // 2)))
    picked = np.zeros((len(halves), seeds))
    np.put_along_axis(picked, halves, 1.0, axis=1)
    ranks = [_ranks(half @ by_seed.T / half.sum(1, keepdims=True)) for half in (picked, 1 - picked)]
    a, b = (each - each.mean(1, keepdims=True) for each in ranks)
    norm = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    with np.errstate(invalid="ignore"):
        rho = float(((a * b).sum(1) / norm).mean())
    return 2 * rho / (1 + rho) if rho > 0 else rho


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks within each row, a tie's shared; (n, k) -> (n, k)."""
    below, equal = (compare(values[:, None, :], values[:, :, None]).sum(-1) for compare in (np.less, np.equal))
    return below + (equal - 1) / 2


# -- design ---------------------------------------------------------------------------------------------------------


def variances(differences: np.ndarray) -> Variances:
    """A pilot's, the mean over its texts; what comes out below zero is zero."""
    _, (seed, item, rest), (seeds, items) = _mean_squares(_checked(differences))
    parts = np.mean((seed - rest) / items), np.mean((item - rest) / seeds), np.mean(rest)
    return Variances(*(max(0.0, float(part)) for part in parts))


def detectable(
    of: Variances, seeds: int, items: int, texts: int, alpha: float = 0.05, power: float = 0.8, draws: int = DRAWS
) -> float:
    """The smallest effect of one text among `texts` that is found with this power, after Holm, with its right sign."""
    return float(np.quantile(_needed(of, seeds, items, texts, alpha, draws), power))


def power_of(
    effect: float, of: Variances, seeds: int, items: int, texts: int, alpha: float = 0.05, draws: int = DRAWS
) -> float:
    """The chance that an effect is found, as `detectable` has it."""
    return float((_needed(of, seeds, items, texts, alpha, draws) <= effect).mean())


def _needed(of: Variances, seeds: int, items: int, texts: int, alpha: float, draws: int) -> np.ndarray:
    """The effect that each of many drawn studies would have needed, (draws,).

    Under the model mean and mean squares are independent, normal and chi squared: drawn as such, judged as `effects`
    judges.
    """
    if min(seeds, items) < 2 or texts < 1:
        raise ValueError(f"expected 2 seeds and items or more and a text, got {seeds}, {items} and {texts}")
    random = np.random.default_rng(0)
    freedoms = np.array([seeds - 1, items - 1, (seeds - 1) * (items - 1)])
    expected = of.rest + np.array([items * of.seed, seeds * of.item, 0.0])
    squares = (expected / freedoms)[:, None] * random.chisquare(freedoms[:, None], (3, draws))
    error = np.sqrt((expected[0] + expected[1] - expected[2]) / (seeds * items)) * random.standard_normal(draws)
    return _reach(alpha / texts, _parts(*squares, seeds, items), seeds, items) - error


def halves(items: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the items to choose by and of those to confirm by, in random halves."""
    order = np.random.default_rng(seed).permutation(items)
    return np.sort(order[: items // 2]), np.sort(order[items // 2 :])


def confirmed(differences: np.ndarray, seed: int = 0, confidence: float = 0.95) -> Confirmation:
    """Choose the best text by half of the items, look at it on the other half."""
    d = _checked(differences)
    choose, confirm = halves(d.shape[-1], seed)
    scores, held = d[..., choose].mean((-2, -1)), effects(d[..., confirm], confidence)
    best = int(scores.argmax())
    found = (each[best] for each in (scores, held.mean, held.low, held.high, holm(held.p)))
    return Confirmation(best, *map(float, found))


def pareto(learning: Sequence[float], forgetting: Sequence[float]) -> np.ndarray:
    """Which points no other one beats: none learns as much and forgets as little, and one of the two better; (n,)."""
    more, less = (np.asarray(values, dtype=np.float64) for values in (learning, forgetting))
    as_good = (more[None] >= more[:, None]) & (less[None] <= less[:, None])
    better = (more[None] > more[:, None]) | (less[None] < less[:, None])
    return ~(as_good & better).any(1)


# -- the model ------------------------------------------------------------------------------------------------------


def _checked(differences: np.ndarray) -> np.ndarray:
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim < 2 or min(d.shape[-2:]) < 2 or not d.size:
        raise ValueError(f"expected differences (texts, seeds, items) of 2 seeds and 2 items or more, got {d.shape}")
    if not np.isfinite(d).all():
        raise ValueError(f"expected numbers, got {d[~np.isfinite(d)][0]} at {np.argwhere(~np.isfinite(d))[0].tolist()}")
    return d


def _mean_squares(d: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...], tuple[int, int]]:
    """(means, (MS_seed, MS_item, MS_rest), (seeds, items)) of (..., seeds, items)."""
    seeds, items = d.shape[-2:]
    by_seed, by_item, mean = d.mean(-1), d.mean(-2), d.mean((-2, -1))
    rest = ((d - by_seed[..., None] - by_item[..., None, :] + mean[..., None, None]) ** 2).sum((-2, -1))
    squares = items * by_seed.var(-1, ddof=1), seeds * by_item.var(-1, ddof=1), rest / ((seeds - 1) * (items - 1))
    return mean, squares, (seeds, items)


def _parts(seed: np.ndarray, item: np.ndarray, rest: np.ndarray, seeds: int, items: int) -> tuple[np.ndarray, ...]:
    """What varies with the seeds, and what with the items alone, in the variance of the mean, of mean squares."""
    return seed / (seeds * items), np.maximum(item - rest, 0.0) / (seeds * items)


def _reach(tail: float, parts: tuple[np.ndarray, ...], seeds: int, items: int) -> np.ndarray:
    """Half the interval that leaves out `tail`."""
    quantiles = quantile_t(tail, np.array([seeds - 1, items - 1]))
    return np.sqrt(sum(t**2 * part for t, part in zip(quantiles, parts, strict=True)))


@functools.lru_cache
def _quantiles(seeds: int, items: int) -> tuple[np.ndarray, ...]:
    """(log p, t of the seeds' freedom, t of the items') for p from 1 to 1e-15."""
    logs = np.linspace(0, np.log(1e-15), 600)
    return logs, *(quantile_t(np.exp(logs), np.full(len(logs), freedom)) for freedom in (seeds - 1, items - 1))


def tail_t(t: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """P(|T| > |t|) of Student's t, by Gauss-Legendre: t = sqrt(freedom) / tan(angle) makes it a mean of sines."""
    t, freedom = np.broadcast_arrays(np.abs(t), np.asarray(freedom, dtype=np.float64))
    return _sines(np.arctan2(np.sqrt(freedom), t), freedom) / _sines(np.full(t.shape, np.pi / 2), freedom)


def quantile_t(tail: float | np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """The t that |T| goes beyond with probability `tail`, by bisection."""
    freedom = np.asarray(freedom, dtype=np.float64)
    low, high = np.zeros(freedom.shape), np.full(freedom.shape, np.pi / 2)
    for _ in range(60):
        middle = (low + high) / 2
        small = tail_t(np.sqrt(freedom) / np.tan(middle), freedom) < tail
        low, high = np.where(small, middle, low), np.where(small, high, middle)
    return np.sqrt(freedom) / np.tan(high)


def _sines(angle: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """The integral of sin^(freedom - 1) from 0 to the angle."""
    at = angle[..., None] / 2 * (NODES + 1)
    return angle / 2 * (WEIGHTS * np.sin(at) ** (freedom[..., None] - 1)).sum(-1)
