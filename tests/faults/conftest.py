"""What the fault tests share: the kill count, one undisturbed run to compare with."""

from __future__ import annotations

import os

import pytest
from test_preferences import pairs, prepared
from warm import Runs


@pytest.fixture(scope="session")
def kills() -> int:
    """How many kills: SPINFAST_KILLS=50 for the full figure."""
    return int(os.environ.get("SPINFAST_KILLS", "8"))


@pytest.fixture(scope="session")
def runs(tmp_path_factory, tiny_model) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), tiny_model("llama"))


@pytest.fixture(scope="session")
def preference_runs(tmp_path_factory, tiny_model) -> Runs:
    """SFT, then DPO on the same pairs; held-out losses on the way decide what is kept."""
    directory, model = tmp_path_factory.mktemp("preferences"), tiny_model("llama")
    watched = {"evaluate_every": 2, "patience": 3, "keep": "best"}
    prepared(directory, model, pairs, ["sft", "dpo"], sft=watched, dpo=watched, train={"save_every_steps": 1})
    return Runs(directory, model)
