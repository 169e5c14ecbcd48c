"""The contract is TRL's: the same functions on the same batch, called by a GRPOTrainer and by spinfast."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from datasets import Dataset
from reward_cases import HERE, STATE, batch
from transformers import TrainerState

from spinfast.rewards import load

TEXTS = (
    "2",
    " 12 def f(): ",
    r"so \boxed{2}",
    "",
    "<think>a</think><answer>2</answer>",
    "<think>a\nb</think><answer>2</answer>",
)
COLUMNS = {"ground_truth": ["2"] * 6, "task": ["math", "coding", "math", "none", "coding", "none"], "answer": ["2"] * 6}
STRINGS = (
    *("reward_len", "longer_in_tokens", "boxed_is_ground_truth", "math_reward_func", "coding_reward_func"),
    *("async_reward_func", "logging_reward_func", "scheduled"),
)
MESSAGES = ("reward_num_unique_letters", "format_reward_func")
WILD = (
    "correctness_reward_func",
    "int_reward_func",
    "strict_format_reward_func",
    "soft_format_reward_func",
    "xmlcount_reward_func",
)


@pytest.fixture(scope="module")
def trainer(tiny_model, tmp_path_factory):
    """A GRPOTrainer with all the functions."""
    from trl import GRPOConfig, GRPOTrainer

    sys.path.insert(0, str(HERE))
    try:
        trl, gsm8k = (importlib.import_module(name) for name in ("trl_functions", "gsm8k_functions"))
    finally:
        sys.path.remove(str(HERE))
    functions = [getattr(trl, name) for name in STRINGS + MESSAGES] + [getattr(gsm8k, name) for name in WILD]
    config = GRPOConfig(str(tmp_path_factory.mktemp("trl")), report_to=[], use_cpu=True, bf16=False)
    rows = Dataset.from_list([{"prompt": "a"}] * 8)
    made = GRPOTrainer(str(tiny_model()), reward_funcs=functions, args=config, train_dataset=rows)
    made.state = TrainerState(global_step=STATE.global_step, max_steps=STATE.max_steps, epoch=STATE.epoch)
    return made


@pytest.mark.parametrize(
    ("file", "names", "messages"),
    [("trl_functions", STRINGS, False), ("trl_functions", MESSAGES, True), ("gsm8k_functions", WILD, True)],
    ids=["strings", "messages", "wild"],
)
def test_documented_functions_give_what_trl_makes_of_them(trainer, monkeypatch, caplog, file, names, messages):
    made = batch(*TEXTS, messages=messages, **COLUMNS)
    chosen = [trainer.reward_func_names.index(name) for name in names]
    for part in ("reward_funcs", "reward_processing_classes", "reward_func_names"):
        monkeypatch.setattr(trainer, part, [getattr(trainer, part)[i] for i in chosen])
    trainer._pending_extra_logs.clear()
    trainer._pending_metrics.clear()
    rows = [
        {"prompt": made.prompts[i], "completion": "never seen", **{name: each[i] for name, each in COLUMNS.items()}}
        for i in range(len(TEXTS))
    ]
    theirs = trainer._calculate_rewards(rows, made.prompts, made.completions, made.completion_ids)

    rewards = load({f"{HERE / file}.py:{name}": 1.0 for name in names}, timeout=60, max_tokens=10)
    rewards.check(COLUMNS)
    scores = rewards(made)
    assert rewards.names == names
    ours = [[float("nan") if value is None else value for value in scores.values[name]] for name in names]
    torch.testing.assert_close(torch.tensor(ours).T, theirs, equal_nan=True, rtol=1e-6, atol=0)
    assert scores.extra == dict(trainer._pending_extra_logs)
    assert scores.metrics == {name: sum(each) / len(each) for name, each in trainer._pending_metrics.items()}


def test_columns_of_the_prompt_and_the_real_answer_are_nobodys():
    """As in TRL: prompt, completion and completion_ids of the data are not passed on."""
    made = batch("a", prompt=["p"], completion=["c"], completion_ids=[[1]], task=["t"])
    rewards = load({f"{HERE / 'keywords.py'}:keywords": 1.0}, timeout=20, max_tokens=10)
    assert rewards(made).extra == {
        "given": [["completion_ids", "completions", "log_extra", "log_metric", "prompts", "task", "trainer_state"]],
        "ids": [[97]],
    }
