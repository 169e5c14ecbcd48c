"""Runs of each method that processes of their own play (warm.py), as fixtures for whoever kills or spreads them."""

from __future__ import annotations

import os

import pytest
import yaml
from test_preferences import pairs, prepared
from test_run import write_config
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


REWARD = """
def even(completion_ids, **kwargs):
    return [float(ids[0] % 2 == 0) + len(ids) / 100 * (ids[0] % 4 == 0) for ids in completion_ids]
"""


@pytest.fixture(scope="session")
def grpo_runs(tmp_path_factory, tiny_model) -> Runs:
    """Two rollouts of four steps, the last one cut short; dead groups refilled; looks that decide what is kept."""
    directory, model = tmp_path_factory.mktemp("grpo"), tiny_model("llama")
    path = write_config(
        directory,
        model,
        generation={"max_tokens": 6},
        evaluate={"problems": 2, "pairs": 2, "max_tokens": 6},
        train={"save_every_steps": 1},
    )
    (directory / "rewards.py").write_text(REWARD)
    tree = yaml.safe_load(path.read_text()) | {"method": "grpo"}
    del tree["spin"]
    tree["grpo"] = {
        "rewards": f"{directory}/rewards.py:even",
        **{"prompts_per_step": 2, "samples": 2, "steps": 6, "steps_per_generation": 2, "num_iterations": 2},
        **{"refill": 1, "beta": 0.1, "lr": 1e-3, "evaluate_every": 2, "keep": "best"},
    }
    path.write_text(yaml.safe_dump(tree))
    return Runs(directory, model)
