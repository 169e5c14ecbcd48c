"""What is wrong with a config, in one line: which key, what was expected, which key was meant."""

from __future__ import annotations

import difflib
import reprlib
from typing import Any

from pydantic import ValidationError

from spinfast.config.adapters import KINDS
from spinfast.config.sections import Section, section_of
from spinfast.config.tree import Config

MOVED = {  # keys of the first edition
    "lora": "adapter",
    "sft.examples_per_step": "sft.groups_per_step",
    "train.pairs_per_step": "spin.groups_per_step",
    **{
        f"train.{key}": f"spin.{key}"
        for key in ("optimizer", "lr", "weight_decay", "schedule", "warmup_ratio", "epochs", "max_grad_norm")
    },
}

ELSEWHERE = {  # keys of other tools' files, where likeness alone leads to another key or to none -> ours
    "model_name_or_path": "model: {name: ...}",
    "base_model": "model: {name: ...}",
    "model_name": "model: {name: ...}",
    "dataset_name": "data: {source: ...}",
    "dataset": "data: {source: ...}",
    "datasets": "data: {source: ...}",
    "output_dir": "--run-dir",
    "lora_alpha": "adapter.alpha",
    "num_generations": "grpo.samples",
    "reward_funcs": "grpo.rewards",
    "reward_weights": "grpo.rewards, {name: weight}",
    "max_completion_length": "generation.max_tokens",
    "max_prompt_length": "prompt.max_prompt_tokens",
    "loss_type": "loss",
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule",
    "max_steps": "grpo.steps",
    "num_train_epochs": "epochs, of grpo grpo.steps",
    "warmup_steps": "warmup_ratio",
    "per_device_train_batch_size": "groups_per_step, of grpo prompts_per_step; memory is planned",
    "gradient_accumulation_steps": "groups_per_step, of grpo prompts_per_step; memory is planned",
    "generation_batch_size": "grpo.prompts_per_step * grpo.samples * grpo.steps_per_generation",
    "importance_sampling_level": "grpo.loss: gspo where it is sequence",
    "mask_truncated_completions": "grpo.mask_truncated",
    "multi_objective_aggregation": "grpo.aggregation",
    "use_vllm": "generation.backend: vllm",
    "vllm_importance_sampling_correction": "grpo.correction",
    "vllm_importance_sampling_mode": "grpo.correction",
    "vllm_importance_sampling_clip_max": "grpo.correction_max",
    "vllm_importance_sampling_cap": "grpo.correction_max",
}
REFUSED = {  # keys of PEFT's LoraConfig that nothing here does
    "lora_dropout": "adapters are trained without dropout",
    "use_dora": "DoRA is not supported, plain LoRA is",
}


def one_line(error: ValidationError, kind: type[Section]) -> str:
    errors = error.errors()  # what is there and unknown says more of a foreign file than what is not there
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    dotted = ".".join(str(part) for part in first["loc"] if not _is_tag(part))
    if first["type"] == "extra_forbidden":
        key, siblings = str(first["loc"][-1]), _siblings(first["loc"], kind)
        if issubclass(kind, Config) and (known := _known_otherwise(key, dotted, first["loc"])):
            return known
        near = _elsewhere(key, kind) or difflib.get_close_matches(key, siblings, n=1, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"valid keys: {', '.join(siblings)}"
        return f"unknown key {dotted!r}; {hint}"
    if first["type"] == "union_tag_invalid":
        expected = ", ".join(tag[1:-1] for tag in KINDS)
        return f"{dotted}.kind: expected {expected}, got {first['input'].get('kind')!r}"
    if first["type"] == "missing":
        return f"{dotted}: this key is required"
    said = first["msg"].removeprefix("Value error, ")
    if not dotted:  # of several sections: it names them itself
        return said
    if ", got " in said:
        return f"{dotted}: {said}"
    return f"{dotted}: {said[0].lower()}{said[1:]}, got {reprlib.repr(first['input'])}"


def _known_otherwise(key: str, dotted: str, location: tuple) -> str | None:
    """What a config's unknown key is where likeness would not tell: one that moved, another tool's, another kind's."""
    if dotted in MOVED:
        return f"{dotted}: is now {MOVED[dotted]}" + ("" if "." in dotted else f", its keys {MOVED[dotted]}.r ...")
    if key in ELSEWHERE:
        return f"unknown key {dotted!r}; it is {ELSEWHERE[key]} here"
    if key in REFUSED:
        return f"unknown key {dotted!r}; {REFUSED[key]}"
    if kinds := [tag[1:-1] for tag, each in KINDS.items() if key in each.model_fields and tag not in location]:
        return f"unknown key {dotted!r}; it is one of adapter.kind {' or '.join(kinds)}"
    return None


def _is_tag(part: str | int) -> bool:
    """Which member of a union is meant, no key."""
    return not str(part).replace("_", "").isalnum()


def _siblings(location: tuple, kind: type[Section]) -> list[str]:
    section: Any = kind
    for part in location[:-1]:
        if part in KINDS:
            section = KINDS[part]
        elif part in section.model_fields:
            section = section_of(section.model_fields[part].annotation) or section
    return list(section.model_fields)


def _elsewhere(key: str, kind: type[Section]) -> list[str]:
    """The sections' keys of exactly this name."""
    sections = {name: section_of(field.annotation) for name, field in kind.model_fields.items()}
    return [f"{name}.{key}" for name, section in sections.items() if section and key in section.model_fields]
