"""One copy of the base: a transformers model whose parameters are views of the generation engine's tensors.

The engine keeps q, k, v stacked as rows of one qkv_proj, gate and up as rows of one gate_up_proj, and may pad the
vocabulary; every transformers parameter is therefore a contiguous slice of an engine tensor along dim 0. Saved: one
copy of the weights, 2 bytes per parameter in 16 bit (0.99 GB for Qwen2.5-0.5B). Buffers (rotary tables) are rebuilt.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from spinfast.errors import UserError

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
PARTS = {part: (stack, parts) for stack, parts in STACKED.items() for part in parts}


@dataclass(frozen=True)
class Sharing:
    """What `verify` found."""

    parameters: int
    bytes: int  # of the weights that exist once instead of twice


def shared_model(
    path: Path, engine_model: torch.nn.Module, dtype: torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    """A transformers model of the checkpoint at `path` without any weight of its own.

    Raises UserError where the engine's tensors are not the checkpoint's (quantised, packed, another architecture).
    """
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    _refuse_unsupported(config, engine_model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
    for name, view in views(model, engine_model, dtype).items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(view, requires_grad=False))
    model.tie_weights()
    decoder = model.get_decoder()
    with model.device:
        decoder.rotary_emb = type(decoder.rotary_emb)(config=config)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"tensors without a value: {left}"
    model.eval()
    verify(model, engine_model)
    return model


def views(model: torch.nn.Module, engine_model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """transformers' parameter names -> slices of the engine's tensors. `model` gives names and shapes only."""
    engine = {name.replace(".base_layer.", "."): p.detach() for name, p in engine_model.named_parameters()}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {}
    for name, shape in shapes.items():
        owner, module, leaf = _split(name)
        stack, parts = PARTS.get(module, (module, (module,)))
        start = sum(shapes[f"{owner}{part}.{leaf}"][0] for part in parts[: parts.index(module)])
        source = engine.get(f"{owner}{stack}.{leaf}")
        if source is None or source.dtype != dtype or source.shape[1:] != shape[1:] or len(source) < start + shape[0]:
            got = "nothing" if source is None else f"{tuple(source.shape)} {source.dtype}"
            raise UserError(
                f"weight sharing: expected {name} {shape} {dtype} within {owner}{stack}.{leaf}, got {got}; "
                "the engine packs or quantises its weights: use generation.backend: transformers"
            )
        found[name] = source[start : start + shape[0]]
    return found


def verify(model: PreTrainedModel, engine_model: torch.nn.Module) -> Sharing:
    """Every parameter's storage is one of the engine's. Raises RuntimeError naming those that are not."""
    engine = {p.untyped_storage().data_ptr() for p in engine_model.parameters()}
    base = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    own = [name for name, p in base.items() if p.untyped_storage().data_ptr() not in engine]
    if own:
        raise RuntimeError(f"weight sharing: {len(own)} of {len(base)} parameters are copies (first: {own[0]})")
    return Sharing(len(base), sum(p.numel() * p.element_size() for p in base.values()))


def _split(name: str) -> tuple[str, str, str]:
    """'model.layers.0.mlp.up_proj.weight' -> ('model.layers.0.mlp.', 'up_proj', 'weight')."""
    path, _, leaf = name.rpartition(".")
    owner, dot, module = path.rpartition(".")
    return owner + dot, module, leaf


def _refuse_unsupported(config, engine_model: torch.nn.Module) -> None:
    architecture = type(engine_model).__name__
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"weight sharing: expected one of {', '.join(ARCHITECTURES)}, got {architecture}; "
            "use generation.backend: transformers"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            "weight sharing: the checkpoint is quantised, the engine would hold packed weights; "
            "use 16-bit weights or generation.backend: transformers"
        )
