"""Advantages are those of a plain loop over groups; TRL's own numbers are held against them in test_trl.py."""

from __future__ import annotations

import math
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinfast.advantages import advantages, metrics

SCALES, BASELINES = ("group", "batch", "none"), ("mean", "leave_one_out")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
WEIGHTS = {"right": 1.0, "form": 0.25}


@st.composite
def rollouts(draw):
    """Rewards of two functions for 1 to 4 groups of 1 to 5 answers; coarse, so that many are equal; some None."""
    groups, answers = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    value = st.one_of(st.none(), st.sampled_from((0.0, 0.1, 0.5, 1.0, -2.0, math.nan)))
    rows = st.lists(st.lists(value, min_size=answers, max_size=answers), min_size=groups, max_size=groups)
    return {name: draw(rows) for name in WEIGHTS}


def std(values) -> float:
    known = [v for v in values if not math.isnan(v)]
    return float(np.std(known, ddof=1)) if len(known) > 1 else math.nan


def mean(values) -> float:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def total(values) -> float:
    """The weighted sum of those that apply."""
    known = [w * v for w, v in zip(WEIGHTS.values(), values, strict=True) if not math.isnan(v)]
    return sum(known) if known else math.nan


def less_baseline(values, baseline):
    """Each less the mean of all, or of the others."""
    if baseline == "mean":
        return [v - mean(values) for v in values]
    others = [[o for j, o in enumerate(values) if j != i] for i in range(len(values))]
    return [v - (v if math.isnan(mean(rest)) else mean(rest)) for v, rest in zip(values, others, strict=True)]


def plainly(rewards, scale, baseline, aggregation):
    """(advantages, dead) by the definitions, answer by answer."""
    columns = [[[math.nan if v is None else v for v in row] for row in rows] for rows in rewards.values()]
    groups = [[*zip(*rows, strict=True)] for rows in zip(*columns, strict=True)]  # group, answer, function
    sums = [[total(values) for values in group] for group in groups]
    several = len(sums[0]) > 1
    if aggregation == "sum_then_normalize":
        dead = [not std(row) > 1e-8 for row in sums]
        over = {"group": [std(row) for row in sums], "batch": [std(chain(*sums))] * len(sums)}
        found = [
            [v if scale == "none" else v / (over[scale][i] + 1e-4) for v in less_baseline(row, baseline)]
            for i, row in enumerate(sums)
        ]
    else:
        scaled, dead = [], []
        for group, row in zip(groups, sums, strict=True):
            functions = [
                [v / ((std(values) if several else 0.0) + 1e-4) for v in less_baseline(values, baseline)]
                for values in zip(*group, strict=True)
            ]
            parts = [total(values) for values in zip(*functions, strict=True)]
            scaled.append([math.nan if math.isnan(s) else 0.0 if math.isnan(p) else p for p, s in zip(parts, row)])  # noqa: B905
            dead.append(not any(std(values) > 1e-8 for values in zip(*group, strict=True)))
        every = [*chain(*scaled)]
        found = [[(v - mean(every)) / (std(every) + 1e-4) for v in row] for row in scaled]
    alive = [[0.0 if gone or math.isnan(v) else v for v in row] for row, gone in zip(found, dead, strict=True)]
    return alive, tuple(dead)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(rollouts(), st.sampled_from(SCALES), st.sampled_from(BASELINES))
def test_advantages_are_those_of_a_plain_loop(aggregation, rewards, scale, baseline):
    found = advantages(rewards, WEIGHTS, scale, baseline, aggregation)
    expected, dead = plainly(rewards, scale, baseline, aggregation)
    assert found.dead == dead
    for row, values in zip(found.advantages.tolist(), expected, strict=True):
        assert row == pytest.approx(values, rel=1e-6, abs=1e-9)


@given(rollouts(), st.tuples(*map(st.sampled_from, (SCALES, BASELINES, AGGREGATIONS))))
def test_the_metrics_of_any_rollout_are_numbers(rewards, settings):
    told = metrics(rewards, advantages(rewards, WEIGHTS, *settings))
    assert all(map(math.isfinite, told.values()))
    assert 0 <= told["groups/dead"] <= 1


@given(rollouts(), st.sampled_from(SCALES), st.sampled_from(AGGREGATIONS))
def test_advantages_of_a_group_sum_to_zero_whatever_their_scale(rewards, scale, aggregation):
    found = advantages(rewards, WEIGHTS, scale, "mean", aggregation)
    assert found.advantages.sum(1).abs().max() < 1e-6 * max(1, found.advantages.abs().max())
    assert (found.advantages[found.rewards.isnan()] == 0).all()
    assert all((row == 0).all() for row, dead in zip(found.advantages, found.dead, strict=True) if dead)


def test_rewards_that_are_equal_but_for_rounding_are_a_dead_group():
    """0.1 + 0.2 and 0.3: nothing is made of the last bit."""
    found = advantages({"a": [[0.1, 0.3], [0, 1]], "b": [[0.2, None], [0, 0]]}, {"a": 1.0, "b": 1.0})
    assert found.dead == (True, False)
    assert found.advantages.tolist() == [[0, 0], [pytest.approx(-0.70701, abs=1e-5), pytest.approx(0.70701, abs=1e-5)]]
    told = metrics({"a": [[0.1, 0.3], [0, 1]], "b": [[0.2, None], [0, 0]]}, found)
    assert told["frac_reward_zero_std"] == told["groups/dead"] == 0.5
    assert told["rewards/a/mean"] == pytest.approx(0.35)
    assert told["rewards/b/mean"] == pytest.approx(0.2 / 3)


def test_leave_one_out_compares_with_the_others():
    found = advantages({"a": [[1.0, 0.0, 0.0, None]]}, {"a": 1.0}, "none", "leave_one_out")
    assert found.advantages.tolist() == [[1.0, -0.5, -0.5, 0.0]]
