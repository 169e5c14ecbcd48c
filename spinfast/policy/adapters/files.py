"""LoRA adapters outside a model: PEFT's directory layout, fingerprints, and stacking.

Stacking writes the sum of several adapters as one: A's rows and B's columns are concatenated, the rank is the sum
and alpha grows with it, so that scaling = alpha / r stays. Merged rounds (adapter.init: merge) are saved that way,
which keeps every saved adapter relative to the original base.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from spinfast.errors import UserError
from spinfast.types import Adapter

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"


def save(adapter: Adapter, directory: Path) -> None:
    """Write PEFT's two files; the directory is created."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in adapter.tensors.items()},
        directory / TENSOR_FILE,
        metadata={"format": "pt"},
    )
    (directory / CONFIG_FILE).write_text(json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")


def load(directory: Path, base: str | None = None, finite: bool = True) -> Adapter:
    """Read PEFT's two files. Raises UserError if they are missing, torn, not LoRA, not finite, or of another base.

    `base` is the revision of the model it is meant for: a hub commit or a sha256, as its config records it.
    """
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(directory / TENSOR_FILE)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(
            f"adapter {directory}: cannot be read ({' '.join(str(error).split())[:200]}); expected {CONFIG_FILE} and "
            f"{TENSOR_FILE}; pickled adapters (.bin) are never loaded"
        ) from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"adapter {directory}: expected peft_type LORA in {CONFIG_FILE}")
    for name, (holds, expected) in FIELDS.items():
        if not holds(config.get(name)):
            raise UserError(
                f"adapter {directory}: {name} in {CONFIG_FILE} is {config.get(name)!r}, expected {expected}"
            )
    if wrong := misshapen(tensors, config["r"]):
        raise UserError(f"adapter {directory}: {wrong}; expected LoRA matrices of rank r in {CONFIG_FILE}")
    if finite and (wrong := not_finite(tensors)):
        raise UserError(f"adapter {directory}: {wrong} is not finite; its training diverged, use an earlier one")
    made_on = config.get("revision")
    if base and isinstance(made_on, str) and len(made_on) == len(base) and made_on != base:
        raise UserError(
            f"adapter {directory}: made on base {config.get('base_model_name_or_path')} of revision {made_on[:12]}, "
            f"this base has {base[:12]}; use the base that it was trained on"
        )
    return Adapter(config, tensors)


def misshapen(tensors: dict[str, torch.Tensor], r: int) -> str | None:
    """What of the tensors is no LoRA matrix of rank r, in words."""
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and tensor.ndim == 2 and tensor.shape[1 if ".lora_B." in name else 0] == r):
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}, r is {r}"
    return None


def not_finite(tensors: dict[str, torch.Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or inf."""
    return next((name for name, tensor in tensors.items() if not tensor.float().isfinite().all()), None)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e6


FIELDS = {  # of adapter_config.json -> (what it must be, in words)
    "r": (lambda v: isinstance(v, int) and _is_number(v), "a positive integer below a million"),
    "lora_alpha": (_is_number, "a positive number below a million"),
    "target_modules": (
        lambda v: isinstance(v, str) or (isinstance(v, list) and v and all(isinstance(m, str) for m in v)),
        "module names",
    ),
    "use_dora": (lambda v: not v, "false; DoRA is not supported"),
    "use_rslora": (lambda v: not v, "false; rank-stabilised scaling is not supported"),
    "modules_to_save": (lambda v: not v, "none; only LoRA tensors are supported"),
    "rank_pattern": (lambda v: not v, "none; one rank for all modules is supported"),
    "alpha_pattern": (lambda v: not v, "none; one alpha for all modules is supported"),
}


def fingerprint(adapter: Adapter) -> str:
    """sha256 over scaling, names and bytes: equal adapters, equal hex."""
    digest = hashlib.sha256(f"{adapter.config['r']}/{adapter.config['lora_alpha']}".encode())
    for name in sorted(adapter.tensors):
        tensor = adapter.tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def stack(adapters: list[Adapter]) -> Adapter:
    """One adapter that equals the sum of `adapters`, which share r and alpha."""
    first, count = adapters[0], len(adapters)
    if count == 1:
        return first
    tensors = {
        name: torch.cat([a.tensors[name] for a in adapters], dim=0 if ".lora_A." in name else 1)
        for name in first.tensors
    }
    grown = {"r": first.config["r"] * count, "lora_alpha": first.config["lora_alpha"] * count}
    return Adapter(first.config | grown, tensors)


def fitted(adapter: Adapter, r: int, alpha: float) -> Adapter:
    """An adapter of rank r and scaling alpha / r that adds the same to the weights: zeros beside A and B, B scaled."""
    missing, factor = r - adapter.config["r"], adapter.config["lora_alpha"] / adapter.config["r"] / (alpha / r)
    if missing < 0:
        raise UserError(f"adapter: rank {adapter.config['r']} exceeds the policy's {r}")
    if missing == 0 and factor == 1:
        return adapter

    def fit(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if ".lora_A." in name:
            return F.pad(tensor, (0, 0, 0, missing))
        return F.pad(tensor * factor, (0, missing))

    tensors = {name: fit(name, tensor) for name, tensor in adapter.tensors.items()}
    return Adapter(adapter.config | {"r": r, "lora_alpha": alpha}, tensors)


def unstack(adapter: Adapter, r: int) -> list[Adapter]:
    """The parts of rank r that `stack` joined, oldest first."""
    count = adapter.config["r"] // r
    if count * r != adapter.config["r"]:
        raise UserError(f"adapter of rank {adapter.config['r']}: expected a multiple of adapter.r = {r}")
    shrunk = {"r": r, "lora_alpha": adapter.config["lora_alpha"] / count}
    parts = {name: tensor.split(r, dim=0 if ".lora_A." in name else 1) for name, tensor in adapter.tensors.items()}
    return [
        Adapter(adapter.config | shrunk, {name: split[i].contiguous() for name, split in parts.items()})
        for i in range(count)
    ]
