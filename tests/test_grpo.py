"""GRPO end to end on a tiny model: what a rollout holds, that a reward is learnt, that a run stops and goes on."""

import json
import os
import signal

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from test_run import fingerprints, train_rows, write_config

from spinfast.interrupt import EXIT_CODE
from spinfast.run import main
from spinfast.store import rollouts

REWARDS = '''
def vowels(completions, **kwargs):
    """The share of vowels: dense, and learnable by a model that knows no words."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in texts]

def nothing(completions, answer, log_extra, log_metric):
    log_extra("answer", answer)
    log_metric("seen", len(completions))
    return [None] * len(completions)
'''


def grpo_config(directory, model, grpo, method="grpo", **sections):
    path = write_config(directory, model, heldout=None, **sections)
    (directory / "rewards.py").write_text(REWARDS)
    tree = yaml.safe_load(path.read_text())
    del tree["spin"]
    tree["method"] = method
    own = {"rewards": f"{directory}/rewards.py:vowels", "prompts_per_step": 3, "samples": 4, "steps": 4, "lr": 1e-3}
    tree["grpo"] = own | grpo
    path.write_text(yaml.safe_dump(tree))
    return path


def play(directory, model, name="run", method="grpo", grpo=(), **sections):
    config = grpo_config(directory, model, dict(grpo), method, **sections)
    assert main([str(config), "--run-dir", str(directory / name)]) == 0
    return directory / name


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


def test_a_run(tmp_path, model):
    run = play(tmp_path, model)
    rows = train_rows(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    print(rows[0])
    assert 0
