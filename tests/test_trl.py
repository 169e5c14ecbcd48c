"""Loss, adapter gradient and metrics of a step are TRL's, as tests/trl/record.py recorded them, for every loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from test_packing import current

from spinfast.config import PAIRED, UNPAIRED, Dpo
from spinfast.methods import dpo
from spinfast.objectives import DESIRABLE, Nll, with_reference
from spinfast.ops import choose
from spinfast.policy.adapters import Lora
from spinfast.policy.adapters import files as adapters
from spinfast.policy.transformers import TransformersPolicy, load_base
from spinfast.train import Budget, sequence_logps, start_training, train_step
from spinfast.types import Group

VALUES = Path(__file__).parent / "trl" / "values"
RECORDED = json.loads((VALUES / "values.json").read_text())
CASES, GRADIENTS = RECORDED["cases"], load_file(VALUES / "gradients.safetensors")
BUDGET = Budget(microbatch_tokens=60, attention="numba")  # several microbatches
LOSS = {"KTOTrainer": "kto", "ORPOTrainer": "orpo", "CPOTrainer": "cpo"}  # where a case names none


@pytest.fixture(scope="module")
def policy(tiny_model):
    base = load_base(tiny_model(layers=1, hidden=32), torch.float32, torch.device("cpu"))
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules="all-linear")
    return TransformersPolicy(base, lambda base: Lora(base, lora, 0), choose("auto", base.device)[0])


def settings(case: dict) -> Dpo:
    """TRL's arguments as spinfast's config has them."""
    options = dict(case["arguments"])
    names = options.pop("loss_type", LOSS.get(case["trainer"]))
    names = [names] if isinstance(names, str) else names
    loss = dict(zip(names, options.pop("loss_weights", [1.0] * len(names)), strict=True))
    if "simpo" in loss and (weight := options.pop("cpo_alpha")):
        loss["sft"] = weight
    return Dpo(loss=loss, **options)


def group(row: dict) -> Group:
    answers, scored = (tuple(map(tuple, row.get(name, ()))) for name in ("answers", "scored"))
    given = {DESIRABLE: (float(row["label"]), 0.0)[: len(answers)]} if "label" in row else {}
    return Group(tuple(row["prompt"]), answers, given, scored)


def step(policy, case: dict):
    """The objective, its groups, and what a step that moves nothing makes of them: metrics, gradient."""
    groups = [*map(group, RECORDED["rows"][case["rows"]])]
    objective = Nll() if case["trainer"] == "SFTTrainer" else dpo.objective(settings(case))
    if objective.reference:
        policy.load_adapter(adapters.load(VALUES / case["start"]))
        groups = [*map(with_reference, groups, sequence_logps(policy, groups, BUDGET))]
    policy.load_adapter(adapters.load(VALUES / case["end"]))
    state, gradients = start_training(policy, "adamw", 0.0, scaled=False), {}
    state.optimizer.register_step_pre_hook(lambda *_: gradients.update(current(policy)))
    metrics, _ = train_step(policy, groups, objective, 1e9, BUDGET, state)
    return objective, groups, metrics, torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def compared(case: dict) -> list[str]:
    """Metrics of TRL's name have its value; but sft needs no reference here, and TRL's logps of orpo are means."""
    if case["trainer"] == "SFTTrainer":
        return []
    names = {*settings(case).loss}
    left_out = "rewards/" if names == {"sft"} else "logps/" if names & {"simpo", "orpo"} else "-"
    ours = ("rewards/", "logps/", "kl")
    return [metric for metric in case["metrics"] if metric.startswith(ours) and not metric.startswith(left_out)]


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_trls(policy, name):
    case = CASES[name]
    objective, groups, metrics, gradient = step(policy, case)
    assert metrics["train/loss"] == pytest.approx(case["loss"], abs=1e-5, rel=2e-6)
    assert torch.nn.functional.cosine_similarity(gradient, GRADIENTS[name], dim=0) >= 0.99999
    assert gradient.norm().item() == pytest.approx(GRADIENTS[name].norm().item(), rel=1e-4)
    if objective.reference and case["start"] == case["end"]:
        assert objective.at_start(groups) == pytest.approx(case["loss"], abs=1e-5)
    for metric in compared(case):
        assert metrics[metric] == pytest.approx(case["metrics"][metric], abs=1e-5, rel=1e-5), metric


def test_every_loss_is_held_against_trls():
    of_dpo = (settings(case) for case in CASES.values() if case["trainer"] != "SFTTrainer")
    assert {name for each in of_dpo for name in each.loss} == {*PAIRED, *UNPAIRED}
