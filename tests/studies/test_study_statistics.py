"""A study's statistics against scipy, against brute force, and on simulated studies whose truth is known."""

from __future__ import annotations

import itertools
import json
import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from spinfast.studies.statistics import (
    Variances,
    confirmed,
    detectable,
    effects,
    groups,
    halves,
    holm,
    pairwise,
    pareto,
    power_of,
    quantile_t,
    reliability,
    sign_flips,
    smallest_p,
    tail_t,
    variances,
)

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "mixed_models.json").read_text())  # by statsmodels 0.15.0
TEXTS, SEEDS, ITEMS = 8, 5, 200
# Of one item's difference in log p; shares of the mean's variance: seeds and items 1 : 1, seeds alone, items mostly.
REALISTIC = Variances(seed=0.02, item=0.8, rest=1.0)
KINDS = {
    "seeds and items": REALISTIC,
    "seeds": Variances(0.05, 0.0, 0.2),
    "items": Variances(0.0, 2.0, 0.5),
    "rest": Variances(0.0, 0.0, 1.0),
}


def simulated(of: Variances, studies: int, seed: int, effect=0.0, shared: float = 0.5, heavy: bool = False):
    """Studies (studies, texts, seeds, items); texts share that part of their seeds' and items' variances.

    The mean over items of the rest is drawn as such where it is all that counts: rest is iid, in full.
    """
    random = np.random.default_rng(seed)

    def draw(variance: float, *shape: int) -> np.ndarray:
        values = random.standard_t(4, shape) / np.sqrt(2) if heavy else random.standard_normal(shape)
        return np.sqrt(variance) * values

    parts = []
    for variance, shape in ((of.seed, (SEEDS, 1)), (of.item, (1, ITEMS))):
        parts.append(
            draw(variance * shared, studies, 1, *shape) + draw(variance * (1 - shared), studies, TEXTS, *shape)
        )
    rest = np.float32(np.sqrt(of.rest)) * random.standard_normal((studies, TEXTS, SEEDS, ITEMS), dtype=np.float32)
    return np.asarray(effect)[..., None, None] + sum(parts) + rest


def adjusted(p: np.ndarray) -> np.ndarray:
    return np.array([holm(row) for row in p])


# Claims about studies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "heavy tails"])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_alone_rates_no_text_in_95_of_100_studies(kind, heavy):
    p = effects(simulated(KINDS[kind], 400, seed=1, heavy=heavy)).p
    false = (adjusted(p).min(1) < 0.05).mean()
    assert false <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)


def test_a_percentile_bootstrap_would_not_do():
    """Why `effects` is a t test: resampled seeds and items, five of them, rate noise too often."""
    random = np.random.default_rng(2)
    studies = simulated(KINDS["seeds"], 100, seed=2)
    resamples = 4000
    by_seed = random.multinomial(SEEDS, np.full(SEEDS, 1 / SEEDS), resamples) / SEEDS
    by_item = random.multinomial(ITEMS, np.full(ITEMS, 1 / ITEMS), resamples) / ITEMS
    means = np.einsum("bs,ntsb->ntb", by_seed, studies @ by_item.T)
    p = 2 * np.minimum((means <= 0).mean(-1), (means >= 0).mean(-1))
    assert (adjusted(p).min(1) < 0.05).mean() > 0.1


@pytest.mark.parametrize("kind", ["seeds and items", "items"])
def test_an_effect_of_the_announced_size_is_found(kind):
    size = detectable(KINDS[kind], SEEDS, ITEMS, TEXTS)
    planted = np.where(np.arange(TEXTS) == 3, size, 0.0)
    found = effects(simulated(KINDS[kind], 500, seed=3, effect=planted))
    shown = (adjusted(found.p)[:, 3] < 0.05) & (found.mean[:, 3] > 0)
    assert shown.mean() >= 0.8 - 2 * np.sqrt(0.8 * 0.2 / 500)
    assert shown.mean() <= 0.9  # announced too large, an effect would be missed in the design
    assert power_of(size, KINDS[kind], SEEDS, ITEMS, TEXTS) == pytest.approx(0.8, abs=1e-3)


def test_a_design_sees_smaller_effects_with_more_of_everything():
    of = Variances(0.02, 0.8, 1.0)
    sizes = [
        detectable(of, *design) for design in ((3, 200, 8), (5, 200, 8), (10, 200, 8), (10, 1000, 8), (10, 1000, 1))
    ]
    assert sizes == sorted(sizes, reverse=True)
    with pytest.raises(ValueError, match="expected 2 seeds"):
        detectable(of, 1, 200, 8)


def test_copies_come_out_as_one_group():
    study = simulated(REALISTIC, 1, seed=4, effect=np.repeat([0.0, 3.0], TEXTS // 2))[0]
    study[1] = study[0]  # the same seeds: the same runs
    found = groups(study)
    assert found[0] == found[1] == "b"
    assert pairwise(study)[0, 1] == 1
    assert found[-1] == "a"
    others = simulated(REALISTIC, 200, seed=5, shared=0.0)[:, :2]  # other seeds: two runs of one text
    assert np.mean([groups(pair) == ["a", "a"] for pair in others]) >= 0.93


def test_texts_that_differ_come_out_apart_and_the_winner_is_confirmed():
    truth = np.array([0.0, 4.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0])
    study = simulated(Variances(0.01, 0.5, 1.0), 1, seed=6, effect=truth)[0]
    assert groups(study) == ["c", "a", "c", "b", "c", "c", "c", "c"]
    assert reliability(study) > 0.5
    winner = confirmed(study)
    assert winner.text == 1
    assert winner.low < 4 < winner.high
    assert winner.p_holm < 0.01


def test_the_best_of_noise_is_not_confirmed():
    studies = simulated(REALISTIC, 300, seed=7)
    assert np.mean([confirmed(study).p_holm < 0.05 for study in studies]) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 300)


# Each against another's -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30, 199, 10_000])
def test_students_t(freedom):
    t = np.array([0.0, 0.1, 1.0, 2.5, 10.0, 1e3])
    np.testing.assert_allclose(tail_t(t, freedom), 2 * stats.t.sf(t, freedom), rtol=1e-9, atol=1e-300)
    for tail in (0.5, 0.05, 0.05 / 28, 1e-6):
        expected = stats.t.isf(tail / 2, freedom)
        np.testing.assert_allclose(quantile_t(tail, np.array([freedom, freedom])), expected, rtol=1e-9)


def test_an_effect_is_the_mixed_models():
    """The balanced data's REML estimates, found here by maximising the restricted likelihood itself."""
    from scipy.optimize import minimize

    seeds, items, of = 6, 12, Variances(0.5, 0.7, 1.0)
    random = np.random.default_rng(8)
    d = 0.3 + np.sqrt(of.seed) * random.standard_normal((seeds, 1)) + np.sqrt(of.item) * random.standard_normal(items)
    d = d + random.standard_normal((seeds, items))
    ones = np.ones((seeds * items, 1))
    of_seed, of_item = np.kron(np.eye(seeds), np.ones((items, items))), np.kron(np.ones((seeds, seeds)), np.eye(items))

    def covariance(logs: np.ndarray) -> np.ndarray:
        seed, item, rest = np.exp(logs)
        return seed * of_seed + item * of_item + rest * np.eye(seeds * items)

    def restricted(logs: np.ndarray) -> float:
        inverse = np.linalg.inv(v := covariance(logs))
        left = d.ravel() - (ones.T @ inverse @ d.ravel()) / (ones.T @ inverse @ ones).item()
        return np.linalg.slogdet(v)[1] + np.log((ones.T @ inverse @ ones).item()) + left @ inverse @ left

    best = minimize(restricted, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10}).x
    variance = 1 / (ones.T @ np.linalg.inv(covariance(best)) @ ones).item()
    found = effects(d[None])
    np.testing.assert_allclose(found.stderr[0], np.sqrt(variance), rtol=1e-5)
    estimated = variances(d[None])
    np.testing.assert_allclose([estimated.seed, estimated.item, estimated.rest], np.exp(best), rtol=1e-4)


@pytest.mark.parametrize("name", RECORDED["models"])
def test_an_effect_is_statsmodels(name):
    """Its REML fit of crossed random effects, and its analysis of variance (tests/golden/mixed_models.py)."""
    theirs = RECORDED["models"][name]
    d = np.array(theirs["differences"])
    seeds, items = d.shape
    found, estimated, squares = effects(d[None]), variances(d[None]), theirs["mean_squares"]
    assert found.mean[0] == pytest.approx(theirs["mean"], abs=1e-9)
    assert found.stderr[0] == pytest.approx(theirs["stderr"], rel=1e-4)
    for part in ("seed", "item", "rest"):
        assert getattr(estimated, part) == pytest.approx(theirs["variances"][part], rel=1e-4)
    assert estimated.rest == pytest.approx(squares["rest"], rel=1e-9)
    assert estimated.seed == pytest.approx((squares["seed"] - squares["rest"]) / items, rel=1e-9)
    assert estimated.item == pytest.approx((squares["item"] - squares["rest"]) / seeds, rel=1e-9)


def test_holm_is_statsmodels():
    np.testing.assert_allclose(holm(RECORDED["holm"]["p"]), RECORDED["holm"]["adjusted"], rtol=1e-12)


@pytest.mark.parametrize("of", [Variances(0.5, 0.7, 1.0), Variances(0.0, 0.0, 1.0), Variances(1.0, 0.0, 0.0)])
def test_intervals_and_p_are_of_one_test(of):
    """p by bisection of the interval's own formula, with scipy's quantiles."""
    random = np.random.default_rng(10)
    d = np.array([0.0, 0.5, 2.0, 9.0])[:, None, None] + np.sqrt(of.seed) * random.standard_normal((4, 5, 1))
    d = (
        d
        + np.sqrt(of.item) * random.standard_normal((4, 1, 30))
        + np.sqrt(of.rest) * random.standard_normal((4, 5, 30))
    )
    found = effects(d)
    for i, rows in enumerate(d):
        by_seed, by_item = rows.mean(1), rows.mean(0)
        rest = ((rows - by_seed[:, None] - by_item + rows.mean()) ** 2).sum() / (4 * 29)
        parts = by_seed.var(ddof=1) / 5, max(5 * by_item.var(ddof=1) - rest, 0) / 150

        def reach(tail: float, parts=parts) -> float:
            return np.sqrt(sum(stats.t.isf(tail / 2, f) ** 2 * part for f, part in zip((4, 29), parts, strict=True)))

        low, high = 1e-15, 1.0
        for _ in range(60):
            middle = np.sqrt(low * high)
            low, high = (middle, high) if reach(middle) > abs(rows.mean()) else (low, middle)
        assert found.p[i] == pytest.approx(high, rel=1e-3)
        np.testing.assert_allclose([found.mean[i] - found.low[i], found.high[i] - found.mean[i]], reach(0.05))


def test_no_difference_at_all_is_no_effect():
    found = effects(np.zeros((2, 5, 10)))
    assert found.p.tolist() == [1, 1]
    assert found.low.tolist() == found.high.tolist() == [0, 0]
    assert effects(np.ones((1, 5, 10))).p[0] < 1e-12


@pytest.mark.parametrize("bad", [np.zeros((2, 1, 10)), np.zeros((2, 5, 1)), np.full((2, 5, 5), np.nan)])
def test_differences_that_allow_no_test_are_refused(bad):
    with pytest.raises(ValueError, match="expected"):
        effects(bad)


@given(st.integers(2, 6), st.integers(0, 99))
def test_sign_flips_against_scipy(seeds, seed):
    d = np.random.default_rng(seed).standard_normal((3, seeds, 4)) + 0.3
    for p, row in zip(sign_flips(d), d.mean(-1), strict=True):
        pairs = (row, np.zeros(seeds))
        expected = stats.permutation_test(
            pairs, lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=1e9
        )
        assert p == pytest.approx(expected.pvalue)
    assert sign_flips(np.ones((1, seeds, 4)))[0] == smallest_p(seeds)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_holm_rejects_as_its_steps_do(p):
    found = holm(p)
    for alpha in (0.01, 0.05, 0.3):
        rejected = set()
        for step, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
            if p[i] * (len(p) - step) >= alpha:
                break
            rejected.add(i)
        assert {i for i, value in enumerate(found) if value < alpha} == rejected


@given(st.data())
def test_letters_tell_apart_exactly_what_is_apart(data):
    n = data.draw(st.integers(1, 7))
    means = data.draw(st.lists(st.integers(-9, 9), min_size=n, max_size=n))
    d = np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal((n, 4, 6)) + np.array(means)[:, None, None]
    found, apart = groups(d), pairwise(d) < 0.05
    for i, j in itertools.combinations(range(n), 2):
        assert (not set(found[i]) & set(found[j])) == apart[i, j]
    assert "a" in found[int(d.mean((1, 2)).argmax())]
    letters = sorted(set("".join(found)))
    assert letters == list(string.ascii_lowercase[: len(letters)])
    sets = [{i for i in range(n) if letter in found[i]} for letter in letters]
    assert not any(a < b for a in sets for b in sets)


@pytest.mark.parametrize(("texts", "seeds"), [(2, 2), (5, 4), (8, 5), (6, 6)])
def test_reliability_against_scipy(texts, seeds):
    d = np.random.default_rng(texts).standard_normal((texts, seeds, 3)) + np.arange(texts)[:, None, None]
    d[0] = d[1]  # a tie
    by_seed, found = d.mean(-1), []
    for half in itertools.combinations(range(seeds), seeds // 2):
        other = [s for s in range(seeds) if s not in half]
        if texts > 2:
            found.append(stats.spearmanr(by_seed[:, half].mean(1), by_seed[:, other].mean(1)).statistic)
    if texts == 2:
        assert np.isnan(reliability(d))
    else:
        rho = np.mean(found)
        assert reliability(d) == pytest.approx(2 * rho / (1 + rho))
    assert np.isnan(reliability(d[:1]))
    assert np.isnan(reliability(d[:, :1]))


def test_a_pilots_variances_are_found():
    found = variances(simulated(REALISTIC, 1, seed=9, shared=0)[0])
    assert found.rest == pytest.approx(1.0, rel=0.05)
    assert found.item == pytest.approx(0.8, rel=0.15)
    assert 0.005 < found.seed < 0.05


def test_halves_are_all_items_once():
    choose, confirm = halves(11, 0)
    assert sorted([*choose, *confirm]) == list(range(11))
    assert halves(11, 0)[0].tolist() == choose.tolist() != halves(11, 1)[0].tolist()


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12))
def test_pareto_by_hand(points):
    found = pareto(*zip(*points, strict=True)) if points else []
    for (more, less), best in zip(points, found, strict=True):
        beaten = any(a >= more and b <= less and (a, b) != (more, less) for a, b in points)
        assert best == (not beaten)
