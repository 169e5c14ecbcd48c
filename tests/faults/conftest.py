"""What the fault tests share: the kill count, one undisturbed run to compare with."""

from __future__ import annotations

import os

import pytest
from warm import Runs


@pytest.fixture(scope="session")
def kills() -> int:
    """How many kills: SPINFAST_KILLS=50 for the full figure."""
    return int(os.environ.get("SPINFAST_KILLS", "8"))


@pytest.fixture(scope="session")
def runs(tmp_path_factory, tiny_model) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), tiny_model("llama"))
