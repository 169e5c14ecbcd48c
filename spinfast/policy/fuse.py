"""Installs the fused blocks of an `Ops` table on the decoder layers of a model, and takes them off again.

Per layer three calls replace some forty: q, k, v behind their norm; o onto the residual; the gated MLP behind its
norm onto the residual. The seams are objects: each layer gets a forward of its own, attention is reached through
transformers' interface registry, keywords such as `layout=` travel through. PEFT keeps the adapter's parameters,
names, saving and switches: they are read at every call, so disabling, loading or merging an adapter just works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from spinfast_kernels.blocks import Lora, Norm
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from spinfast.errors import UserError
from spinfast.ops import Ops
from spinfast.policy.adapters import KINDS, AdapterKind
from spinfast.policy.quantised import weight

MODEL_TYPES = ("qwen2", "llama", "qwen3")
KNOWN = (
    "Linear",
    "Linear4bit",
    "Embedding",
    "FramedLayer",
    "PissaLayer",
    "FullLayer",
    "FullEmbedding",
    "Connection",
)  # of torch, bitsandbytes, PEFT's LoRA, ours


def fuse(base: PreTrainedModel, ops: Ops) -> Callable[[], None]:
    """Make the decoder of `base`, with its adapter, run on `ops`; the returned function undoes it."""
    decoder = check(base)
    changed = [decoder.norm, *decoder.layers]
    decoder.norm.forward = partial(_norm_forward, ops, decoder.norm)
    for layer in decoder.layers:
        layer.forward = partial(_layer_forward, ops, layer)

    def unfuse() -> None:
        for module in changed:
            del module.forward

    return unfuse


def check(base: PreTrainedModel) -> torch.nn.Module:
    """The decoder of `base`, if the fused functions compute what its layers do; else UserError."""
    config = base.config
    if config.model_type not in MODEL_TYPES:
        raise UserError(f"fused layers: expected a model of type {', '.join(MODEL_TYPES)}, got {config.model_type}")
    if config.hidden_act != "silu":
        raise UserError(f"fused layers: expected hidden_act silu, got {config.hidden_act}; use another model")
    decoder = base.get_decoder()
    for name, module in decoder.named_modules():
        kind = _kind(module)
        foreign = kind is None and isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        linear = kind or name.endswith(("_proj", ".base_layer"))
        if foreign or (linear and type(module).__name__ not in KNOWN):
            raise UserError(
                f"fused layers: expected plain LoRA on dense or bitsandbytes 4-bit linear layers, {name} is a "
                f"{type(module).__module__}.{type(module).__qualname__}; use those"
            )
        if kind:
            kind.check(name, module)
    return decoder


def projection(module: torch.nn.Module) -> Lora:
    """What PEFT would compute for this linear layer right now."""
    kind = _kind(module)
    if kind is None:
        return Lora(weight(module), module.bias)
    base = module.get_base_layer()
    return Lora(weight(base), base.bias, **kind.added(module))


def _kind(module: torch.nn.Module) -> type[AdapterKind] | None:
    return next((kind for kind in KINDS.values() if isinstance(module, kind.LAYER)), None)


def norm(module: torch.nn.Module) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def _norm_forward(ops: Ops, module: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    return ops.rms_norm(hidden_states, *norm(module))


def _layer_forward(
    ops: Ops,
    layer: torch.nn.Module,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values=None,
    use_cache: bool | None = False,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    augmented: Mapping[int, torch.Tensor] | None = None,
    **kwargs,
) -> torch.Tensor:
    """The forward of all MODEL_TYPES: x += o(attention(norm(x))), x += mlp(norm(x)); then what CALM's connection adds.

    augmented: hidden states of another model by its layers (policy/calm.py).
    """
    attention, mlp = layer.self_attn, layer.mlp
    query, key, value = ops.lora_qkv(
        hidden_states,
        *map(projection, (attention.q_proj, attention.k_proj, attention.v_proj)),
        norm=norm(layer.input_layernorm),
    )
    heads = (*hidden_states.shape[:-1], -1, attention.head_dim)
    if hasattr(attention, "q_norm"):
        query = ops.rms_norm(query.view(heads), *norm(attention.q_norm))
        key = ops.rms_norm(key.view(heads), *norm(attention.k_norm))
    cos, sin = (t.expand(*hidden_states.shape[:-1], -1) for t in position_embeddings)
    query, key = ops.rope(query, key, cos, sin)
    query, key, value = (t.view(heads).transpose(1, 2) for t in (query, key, value))
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attention.layer_idx)
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
    mixed, _ = interface(
        attention,
        query,
        key,
        value,
        attention_mask,
        dropout=attention.attention_dropout if layer.training else 0.0,
        scaling=attention.scaling,
        sliding_window=getattr(attention, "sliding_window", None),
        position_ids=position_ids,
        use_cache=use_cache,
        **kwargs,
    )
    mixed = mixed.reshape(*hidden_states.shape[:-1], -1)
    hidden_states = ops.lora_linear(mixed, *projection(attention.o_proj), residual=hidden_states)
    hidden_states = ops.lora_mlp(
        hidden_states,
        *map(projection, (mlp.gate_proj, mlp.up_proj, mlp.down_proj)),
        norm=norm(layer.post_attention_layernorm),
        residual=True,
    )
    connection = getattr(layer, "connection", None)
    if connection is None or augmented is None:
        return hidden_states
    return connection(ops, hidden_states, augmented[connection.reads], position_ids, kwargs["layout"])
