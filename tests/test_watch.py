"""Held-out losses on the way: what counts as a gain, what is kept, what a checkpoint carries over."""

from __future__ import annotations

import math

import pytest
import torch
from packed_cases import tiny_policy

from spinfast.store import checkpoint
from spinfast.train import start_training
from spinfast.watch import Watch, Watched, ratio

UNITS = torch.ones(64, dtype=torch.float64)
NOISE = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def policy(tiny_model):
    return tiny_policy(tiny_model("llama"))


def looked(policy, means, spread=0.0, patience=2):
    """What is seen, look by look, of losses with these means; `spread` is each look's own noise on every unit."""
    seen, found = Watched(), []
    for step, mean in enumerate(means, 1):
        losses = mean * UNITS + spread * NOISE.roll(step), UNITS
        watch = Watch(lambda losses=losses: (losses, {}), 1, patience)
        watch.look(step, policy, seen)
        found.append((seen.step, seen.stale, watch.stops(seen)))
    return found


def test_a_gain_is_one_that_the_units_agree_on(policy):
    assert looked(policy, [3, 2, 1]) == [(1, 0, False), (2, 0, False), (3, 0, False)]
    assert looked(policy, [1, 2, 3]) == [(1, 0, False), (1, 1, False), (1, 2, True)]
    within_noise = looked(policy, [1, 0.99, 0.98], spread=1.0)
    assert [stale for _, stale, _ in within_noise] == [0, 1, 2]


def test_a_slow_descent_adds_up_to_a_gain(policy):
    """No step of it stands out of the noise, the whole does: it is measured from the last gain."""
    stale = [stale for _, stale, _ in looked(policy, [1 - 0.1 * i for i in range(8)], spread=0.5, patience=9)]
    assert max(stale) > 0
    assert 0 in stale[2:]


def test_a_difference_of_rounding_neither_counts_nor_is_kept(policy):
    assert looked(policy, [1, 1 - 1e-8, 1 - 2e-8]) == [(1, 0, False), (1, 1, False), (1, 2, True)]


def test_losses_that_are_no_numbers_are_no_gain_and_end_the_stage(policy):
    assert looked(policy, [math.nan, math.inf]) == [(0, 1, False), (0, 2, True)]
    assert looked(policy, [math.nan, 1.0, 2.0]) == [(0, 1, False), (2, 0, False), (2, 1, False)]


def test_the_error_of_a_ratio_is_that_of_its_units():
    values, weights = 2 * UNITS + NOISE, UNITS
    assert ratio((values, weights)) == pytest.approx((values.mean().item(), values.std().item() / 8))
    assert ratio((torch.tensor([3.0]), torch.tensor([2.0]))) == (1.5, 0.0)


@pytest.mark.parametrize("means", [[2.0, 1.0, 1.5], [math.nan]])
def test_a_checkpoint_carries_what_was_seen(policy, tmp_path, means):
    state = start_training(policy, "adamw", 0.0, scaled=False)
    for step, mean in enumerate(means, 1):
        Watch(lambda mean=mean: ((mean * UNITS, UNITS), {}), 1, 2).look(step, policy, state.watched)
    state.step = len(means)
    checkpoint.save(tmp_path, policy, state, {"of": "x"}, [])
    again = start_training(policy, "adamw", 0.0, scaled=False)
    checkpoint.load_latest(tmp_path, policy, again, {"of": "x"})
    mine, other = again.watched, state.watched
    assert (mine.step, mine.stale, mine.loss) == (other.step, other.stale, other.loss)
    assert mine.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(mine.tensors[name], other.tensors[name]) for name in other.tensors)
    assert (mine.last_gain is None) == (other.last_gain is None)
