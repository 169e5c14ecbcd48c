"""What the fault tests share: the kill count, one undisturbed run to compare with."""

from __future__ import annotations

import os
import subprocess

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


@pytest.fixture
def small_disk(tmp_path):
    """mount(size) -> an empty file system of that size"""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size):
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        return place

    yield mount
    subprocess.run(["umount", "-l", str(place)], capture_output=True)
