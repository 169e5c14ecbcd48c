"""Loss, adapter gradient and metrics of a step are TRL's, as tests/trl/record.py recorded them, for every loss."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import get_args

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from test_packing import current

from spinfast.advantages import advantages
from spinfast.advantages import metrics as advantage_metrics
from spinfast.config import PAIRED, UNPAIRED, Dpo
from spinfast.methods import dpo
from spinfast.objectives import (
    ACTIVE,
    ADVANTAGE,
    DESIRABLE,
    OLD_LOGPS,
    REFERENCE,
    SAMPLER_LOGPS,
    Nll,
    Surrogate,
    with_reference,
)
from spinfast.objectives.surrogates import SURROGATES, Correction
from spinfast.ops import choose
from spinfast.policy.adapters import Lora
from spinfast.policy.adapters import files as adapters
from spinfast.policy.transformers import TransformersPolicy, load_base
from spinfast.scoring import Budget, sequence_logps, token_logps
from spinfast.train import start_training, train_step
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


# GRPO: one rollout, recorded by trl/record_grpo.py -------------------------------------------------------------------

GRPO, GRPO_GRADIENTS = json.loads((VALUES / "grpo.json").read_text()), load_file(VALUES / "grpo_gradients.safetensors")
ROLLOUT, SAMPLES = GRPO["rollout"], GRPO["samples"]
OF_ADVANTAGES = ("scale_rewards", "multi_objective_aggregation")
EOS = 2


def in_groups(values: list) -> list[list]:
    return [values[i : i + SAMPLES] for i in range(0, len(values), SAMPLES)]


def scored(case: dict):
    """(rewards by function, their advantages), as the case's arguments have them scaled."""
    rewards = {name: in_groups([row["rewards"][name] for row in ROLLOUT]) for name in GRPO["weights"]}
    scale, aggregation = (case["arguments"].get(name) for name in OF_ADVANTAGES)
    return rewards, advantages(
        rewards, GRPO["weights"], scale or "group", aggregation=aggregation or "sum_then_normalize"
    )


def surrogate(case: dict) -> Surrogate:
    """TRL's arguments as spinfast has them."""
    options = {name: value for name, value in case["arguments"].items() if name not in OF_ADVANTAGES}
    options.pop("mask_truncated_completions", None)
    loss = options.pop("loss_type")
    loss = "gspo" if options.pop("importance_sampling_level", None) else loss
    mode = options.pop("vllm_importance_sampling_mode", "none")
    maximum = options.pop("vllm_importance_sampling_clip_max", 2.0)
    return Surrogate(loss, correction=mode, correction_max=maximum, max_tokens=GRPO["max_tokens"], **options)


def rewarded(policy, case: dict) -> list[Group]:
    """The rollout with all that its objective is given, log-probs by this engine."""
    cut = case["arguments"].get("mask_truncated_completions", False)
    active = [float(not cut or row["answer"][-1] == EOS) for row in ROLLOUT]
    sampler = [tuple(nan if logp is None else logp for logp in row["sampler_logps"]) for row in ROLLOUT]
    worth = scored(case)[1].advantages.flatten().tolist()
    given = {ADVANTAGE: worth, ACTIVE: active, SAMPLER_LOGPS: sampler}
    answers = [tuple(row["answer"]) for row in ROLLOUT]
    groups = [
        Group(tuple(ROLLOUT[i]["prompt"]), tuple(answers[i : i + SAMPLES])) for i in range(0, len(answers), SAMPLES)
    ]
    temperature = case["arguments"].get("temperature", 1.0)
    policy.load_adapter(adapters.load(VALUES / "reference"))
    start = token_logps(policy, groups, BUDGET, temperature)
    if case["updated"]:
        given[OLD_LOGPS] = [logps for group in start for logps in group]
    if case["arguments"].get("beta"):
        with policy.base_only() if case["base"] else nullcontext():
            reference = token_logps(policy, groups, BUDGET, temperature)
        given[REFERENCE] = [logps for group in reference for logps in group]
    rows = {name: in_groups(values) for name, values in given.items()}
    return [replace(g, given={name: tuple(rows[name][i]) for name in rows}) for i, g in enumerate(groups)]


@pytest.mark.parametrize("name", GRPO["cases"])
def test_a_step_of_rewarded_answers_is_trls(policy, name):
    """All of it: advantages from rewards, old and reference's log-probs, correction, loss, gradient, metrics."""
    case = GRPO["cases"][name]
    groups, objective = rewarded(policy, case), surrogate(case)
    policy.load_adapter(adapters.load(VALUES / "policy"))
    state, gradients = start_training(policy, "adamw", 0.0, scaled=False), {}
    state.optimizer.register_step_pre_hook(lambda *_: gradients.update(current(policy)))
    metrics, _ = train_step(policy, groups, objective, 1e9, BUDGET, state)
    gradient = torch.cat([gradients[name].flatten() for name in sorted(gradients)])
    counted = 1.0
    if objective.loss in ("grpo", "dr_grpo"):  # TRL counts a masked answer in a mean over answers, as 0
        counted = sum(value for group in groups for value in group.given[ACTIVE]) / len(ROLLOUT)
    assert metrics["train/loss"] * counted == pytest.approx(case["loss"], abs=1e-5, rel=2e-6)
    assert torch.nn.functional.cosine_similarity(gradient, GRPO_GRADIENTS[name], dim=0) >= 0.99999
    assert counted * gradient.norm().item() == pytest.approx(GRPO_GRADIENTS[name].norm().item(), rel=1e-4)
    worth = [value for group in groups for value in group.given[ADVANTAGE]]
    assert worth == pytest.approx(case["advantages"], abs=1e-4)
    told = metrics | advantage_metrics(*scored(case))
    compared = ["kl", "clip_ratio/", "cispo", "reward", "frac_"]
    compared += ["sampling/"] * bool(objective.beta)  # of what is computed: of all tokens only with a KL
    for metric, value in case["metrics"].items():
        if metric.startswith(tuple(compared)) and not metric.endswith(("low_min", "high_max")):
            assert told[metric] == pytest.approx(value, abs=1e-5, rel=1e-5), metric


def test_every_policy_gradient_is_held_against_trls():
    objectives = [*map(surrogate, GRPO["cases"].values())]
    assert {objective.loss for objective in objectives} == {*SURROGATES}
    assert {objective.correction for objective in objectives} == {*get_args(Correction)}
