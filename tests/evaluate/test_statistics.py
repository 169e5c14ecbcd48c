"""Each statistic against an independent implementation (scipy, sklearn) or a simulation with a known answer."""

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from spinfast.evaluate import statistics

floats = st.floats(-1e3, 1e3)


@given(st.lists(floats, min_size=2, max_size=50))
def test_estimate_is_scipys_sem(values):
    got = statistics.estimate(values)
    assert got["value"] == pytest.approx(np.mean(values), abs=1e-9)
    assert got["stderr"] == pytest.approx(scipy.stats.sem(values), abs=1e-9)
    assert got["n"] == len(values)


def test_estimate_of_one_value_has_no_error():
    assert statistics.estimate([3.0]) == {"value": 3.0, "stderr": None, "n": 1}
    assert statistics.interval(statistics.estimate([3.0])) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="at least one value"):
        statistics.estimate([])


def test_interval_is_scipys_normal():
    low, high = statistics.interval({"value": 1.0, "stderr": 0.5, "n": 9}, confidence=0.9)
    assert (low, high) == pytest.approx(scipy.stats.norm(1.0, 0.5).interval(0.9))


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(case):
    k, n = case
    theirs = scipy.stats.binomtest(k, n).proportion_ci(method="wilson")
    assert statistics.wilson(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40), st.floats(-5, 5), st.floats(0.1, 9))
def test_an_interval_of_values_that_are_bounded_stays_within_their_bounds(shares, low, size):
    of = statistics.estimate([low + size * share for share in shares])
    first, last = statistics.bounded(of, low, low + size)
    if not math.isnan(first):
        assert low - 1e-9 <= first <= of["value"] + 1e-9
        assert of["value"] - 1e-9 <= last <= low + size + 1e-9


def test_of_0_and_1_it_is_wilsons_interval():
    found = statistics.bounded(statistics.estimate([1.0] * 30 + [0.0] * 70), 0.0, 1.0)
    assert found == pytest.approx(statistics.wilson(0.3 * 99, 99), abs=1e-12)
    sure = {"value": 1.0, "stderr": 0.0, "n": 32}  # an AUC of all pairs told apart
    assert statistics.bounded(sure, 0.0, 1.0) == statistics.wilson(32, 32)
    assert all(map(math.isnan, statistics.bounded(sure | {"value": 0.5}, 0.0, 1.0)))


def test_bootstrap_agrees_with_scipy_on_a_mean():
    values = np.random.default_rng(1).exponential(size=80)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=2)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    ours = statistics.bootstrap(values, seed=3)
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=0.06 * width)


def test_bootstrap_covers_the_mean_in_95_of_100():
    random = np.random.default_rng(0)
    samples = random.normal(size=(300, 60))
    inside = [low < 0 < high for low, high in (statistics.bootstrap(s, resamples=400) for s in samples)]
    assert 0.90 < np.mean(inside) < 0.99


def test_bootstrap_in_pieces_is_seeded():
    values = np.random.default_rng(0).normal(size=3000)  # 1398 resamples at once: three pieces
    assert statistics.bootstrap(values, seed=1) == statistics.bootstrap(values, seed=1)
    assert statistics.bootstrap(values, seed=1) != statistics.bootstrap(values, seed=2)
    low, high = statistics.bootstrap(values, np.median)
    assert low < np.median(values) < high


bools = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=400)


@given(bools)
def test_mcnemar_is_the_binomial_test_of_discordant_pairs(pairs):
    before, after = zip(*pairs, strict=True)
    gained, lost = sum(a > b for b, a in pairs), sum(a < b for b, a in pairs)
    expected = scipy.stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert statistics.mcnemar(before, after) == pytest.approx(expected)


def test_mcnemar_of_many_items_does_not_underflow():
    after = np.arange(6000) % 3 > 0
    assert statistics.mcnemar(np.zeros(6000), after) == 0.0  # 2^-3999 is below the smallest double
    assert statistics.mcnemar(~after, after) == pytest.approx(scipy.stats.binomtest(4000, 6000).pvalue)


values = st.lists(st.integers(-5, 5), min_size=1, max_size=40)


@given(values, values)
def test_auc_is_sklearns_with_ties(positive, negative):
    labels = [1] * len(positive) + [0] * len(negative)
    expected = sklearn.metrics.roc_auc_score(labels, positive + negative)
    assert statistics.auc(positive, negative)["value"] == pytest.approx(expected)
    u = scipy.stats.mannwhitneyu(positive, negative).statistic
    assert statistics.auc(positive, negative)["value"] == pytest.approx(u / len(positive) / len(negative))


@pytest.mark.parametrize("correlation", [0.0, 0.8, -0.8])
def test_auc_error_is_the_spread_over_repeats(correlation):
    random = np.random.default_rng(0)
    covariance = [[1.0, correlation], [correlation, 1.0]]
    draws = random.multivariate_normal([0.5, 0.0], covariance, size=(1500, 80))
    areas = [statistics.auc(d[:, 0], d[:, 1], paired=True) for d in draws]
    spread = np.std([a["value"] for a in areas])
    assert np.mean([a["stderr"] for a in areas]) == pytest.approx(spread, rel=0.08)
    independent = np.mean([statistics.auc(d[:, 0], d[:, 1])["stderr"] for d in draws[:200]])
    assert (independent > spread) == (correlation > 0) or correlation == 0


def test_auc_paired_needs_pairs():
    with pytest.raises(ValueError, match="as many positives as negatives, got 2 and 1"):
        statistics.auc([1, 2], [1], paired=True)


@pytest.mark.parametrize("shift", [0.1, 0.7])
def test_kl_estimators_meet_the_closed_form(shift):
    samples = np.random.default_rng(0).normal(shift, 1.0, size=200_000)
    p, q = scipy.stats.norm(shift, 1).logpdf(samples), scipy.stats.norm(0, 1).logpdf(samples)
    exact = shift**2 / 2
    k1, k3 = statistics.kl_k1(p, q), statistics.kl_k3(p, q)
    assert abs(k1.mean() - exact) < 4 * k1.std() / len(k1) ** 0.5
    assert abs(k3.mean() - exact) < 4 * k3.std() / len(k3) ** 0.5
    assert (k3 >= 0).all()
    assert (k1 < 0).any()


def test_ngrams():
    assert statistics.distinct_n([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4
    assert statistics.distinct_n([[1]], 2) == 0.0
    assert statistics.repeated_ngrams([7] * 13, 4) == 9 / 10
    assert statistics.repeated_ngrams(range(20), 4) == 0.0
    assert statistics.repeated_ngrams([1, 2], 4) == 0.0


def test_compare_calls_a_better_model_better_and_an_equal_one_within_noise():
    random = np.random.default_rng(0)
    base = random.random(400) < 0.4
    better = base | (random.random(400) < 0.15)
    assert statistics.compare(base, better)["verdict"] == "better"
    assert statistics.compare(better, base)["verdict"] == "worse"
    assert statistics.compare(base, base) == {
        **{"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0, "n": 400, "verdict": "within noise"}
    }
    false_alarms = 0
    for _ in range(200):
        first, second = random.random((2, 100)) < 0.4
        false_alarms += statistics.compare(first, second)["verdict"] != "within noise"
    assert false_alarms <= 18  # 5 % nominal; the exact test stays below it, 18 is three deviations above


def test_compare_of_real_numbers_uses_the_paired_difference():
    random = np.random.default_rng(0)
    difficulty = random.normal(0, 10, 100)
    after = difficulty + random.normal(0.3, 1, 100)
    change = statistics.compare(difficulty, after)
    assert change["p"] == pytest.approx(scipy.stats.ttest_rel(after, difficulty).pvalue, rel=0.3)  # z beside t
    assert change["verdict"] == "better"
    assert change["low"] < change["difference"] < change["high"]
    with pytest.raises(ValueError, match="same items, got 2 and 3"):
        statistics.compare([1, 2], [1, 2, 3])
