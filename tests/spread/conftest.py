"""Ranks without their cold start: forked from the warm server, with the environment that torchrun gives."""

from __future__ import annotations

import pytest
from ranks import Ranks
from started import grpo_runs, kills, preference_runs, runs  # noqa: F401


@pytest.fixture(scope="session")
def games(runs):  # noqa: F811
    """SFT and two rounds of self-play."""
    return Ranks(runs)


@pytest.fixture(scope="session")
def preferences(preference_runs):  # noqa: F811
    """SFT, then DPO."""
    return Ranks(preference_runs)


@pytest.fixture(scope="session")
def rollouts(grpo_runs):  # noqa: F811
    """GRPO with a reference, refilled groups and looks on the way."""
    return Ranks(grpo_runs)
