"""`spinfast params`: what each kind of adapter trains on a model, in numbers and bytes, counted on its shape.

Nothing is loaded: the policies are made on meta tensors, so a 7B model is counted where its config.json is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from spinfast import attention
from spinfast.config import Full, Lora, LoraXs, TinyLora
from spinfast.config.adapters import AnyKind
from spinfast.device import profile
from spinfast.errors import UserError
from spinfast.memory.ledger import META
from spinfast.ops import EAGER
from spinfast.policy.transformers import load_policy
from spinfast.weights.spectrum import LISTS

SETTINGS: dict[str, tuple[AnyKind, str]] = {  # as others published them
    "tiny_lora u 13, tie all": (TinyLora(kind="tiny_lora", u=13, tie="all"), "arXiv 2602.04118"),
    "tiny_lora u 1": (TinyLora(kind="tiny_lora", u=1), "arXiv 2602.04118"),
    "tiny_lora u 64": (TinyLora(kind="tiny_lora", u=64), "PEFT's default"),
    "lora_xs r 16": (LoraXs(kind="lora_xs", r=16, alpha=16), "arXiv 2405.17604"),
    "lora r 1": (Lora(r=1, alpha=32), "LoRA w/o Regret"),
    "lora r 16": (Lora(), "the default here"),
    "lora r 32": (Lora(r=32, alpha=128), "arXiv 2504.15777"),
    "full": (Full(kind="full"), "whole matrices"),
}
MOMENTS = 2  # of AdamW, fp32 as what is trained


@dataclass(frozen=True)
class Count:
    """Bytes where nothing else is said; `held` is trained numbers, gradients and AdamW's moments together."""

    trained: int  # numbers
    share: float  # of the model's
    saved: int
    held: int


def count(model: PretrainedConfig, settings: AnyKind) -> Count:
    """Of one kind on a model of this shape. Raises UserError where the model cannot have it."""
    with META:
        base = AutoModelForCausalLM.from_config(model, dtype=torch.float16, attn_implementation=attention.NAME)
        everything = sum(p.numel() for p in base.parameters())
        options = {"ops": EAGER, "profile": profile("cpu", "float32"), "load_in_4bit": False, "seed": 0}
        policy = load_policy(None, "shape", None, lora=settings, base=base, **options)
    trained = sum(p.numel() for p in policy.trainable_parameters().values())
    each = 2 if settings.kind == "full" or getattr(settings, "payload", "") == "bfloat16" else 4
    saved = trained * each * settings.saved_per_trained
    return Count(trained, trained / everything, saved, trained * 4 * (2 + MOMENTS))


def counts(model: PretrainedConfig, own: AnyKind) -> Iterator[tuple[str, Count, str]]:
    """(name, count, published as) of the config's own adapter, then of SETTINGS."""
    yield "this config", count(model, own), own.kind
    keys = ("target_modules", "exclude_modules", "layers_to_transform")
    same = (
        {}
        if Path(str(getattr(own, "target_modules", ""))).suffix in LISTS
        else {key: getattr(own, key) for key in keys if hasattr(own, key)}
    )
    for name, (settings, published) in SETTINGS.items():
        with suppress(UserError):  # a rank that such a small matrix does not have
            yield name, count(model, settings.model_copy(update=same)), published


def main(path: Path, own: AnyKind, as_json: bool) -> None:
    """Print the table for the model whose config.json is under `path`."""
    rows = list(counts(AutoConfig.from_pretrained(path, local_files_only=True), own))
    if as_json:
        print(json.dumps([{"name": name, **asdict(found), "published": as_} for name, found, as_ in rows], indent=2))
        return
    print(f"{'':23}{'trained':>12}{'of all':>9}{'file':>9}{'held':>9}  as in")
    for name, found, published in rows:
        size, held = map(_size, (found.saved, found.held))
        print(f"{name:23}{found.trained:12,}{found.share:9.4%}{size:>9}{held:>9}  {published}")
    print("held: what is trained, its gradients and AdamW's moments, beside the model")


def _size(count: int) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
