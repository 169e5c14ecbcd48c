"""The policy on an Unsloth-patched model: Unsloth loads it and runs its layers, spinfast fills their seams.

An Unsloth layer leaves its projections to three attributes, self_attn.apply_qkv, self_attn.apply_o and mlp.forward.
Here they are the fused LoRA functions of the `Ops` table (with biases too, where Unsloth falls back to PEFT for Qwen2),
and self_attn.forward is the packed attention between them. The head never runs as a module: linear_logps has its place.
Norms, residuals and rotary tables stay Unsloth's on CUDA; on a CPU, where Unsloth keeps transformers' layers, theirs.

With fast_inference (CUDA) Unsloth starts vLLM and makes the model of views of its weights, in 16 bit and in NF4.
Unsloth rewrites parts of transformers when it is imported: import this module only where it was chosen. The CPU path
is tested; the CUDA path has not been run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from unsloth import FastLanguageModel

from spinfast import attention as packed
from spinfast.device import GIB, DeviceProfile
from spinfast.errors import UserError
from spinfast.ops import Ops
from spinfast.policy.fuse import check, norm, projection


def load_base(
    path: Path,
    profile: DeviceProfile,
    *,
    load_in_4bit: bool,
    max_seq_length: int,
    engine_cache: int | None = None,
    max_lora_rank: int = 16,
    prepare: Callable[[torch.device, tuple[int, int] | None], None] | None = None,
) -> PreTrainedModel:
    """The base as Unsloth loads it. With `engine_cache` bytes of K/V, `base.vllm_engine` holds its weights, and
    `prepare` makes vLLM ready for what the generator will do with it."""
    on_cuda = profile.device.type == "cuda"
    if load_in_4bit and not on_cuda:
        raise UserError("model.load_in_4bit: needs a CUDA GPU (bitsandbytes NF4); set it to false")
    if engine_cache is not None and not on_cuda:
        raise UserError("model.backend: unsloth shares weights with vLLM on CUDA only; use generation.backend auto")
    sharing = {}
    if engine_cache is not None:
        prepare(profile.device, profile.capability)
        weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        share = (weights + engine_cache + GIB) / torch.cuda.get_device_properties(0).total_memory
        sharing = {"fast_inference": True, "gpu_memory_utilization": share, "max_lora_rank": max_lora_rank}
    base, _ = FastLanguageModel.from_pretrained(
        str(path),
        max_seq_length=max_seq_length,
        dtype=profile.dtype,
        load_in_4bit=load_in_4bit,
        use_gradient_checkpointing=False,  # TransformersPolicy.checkpoint_layers decides
        local_files_only=True,
        **sharing,
    )
    if base.dtype != profile.dtype:
        raise UserError(f"model.backend: unsloth loaded {base.dtype}, expected {profile.dtype}; set device.dtype")
    base.config._attn_implementation = packed.NAME
    return base


def fuse(base: PreTrainedModel, ops: Ops) -> Callable[[], None]:
    """Put `ops` into the seams of every layer; the returned function takes them out again."""
    decoder = check(base)
    decoder._unsloth_allow_packed_overlength = True  # a packed row is no single sequence: nothing may be cut off
    undo = []
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        returned = 3 if type(layer).forward.__module__.startswith("unsloth") else 2
        seams = {
            attention: {
                "apply_qkv": partial(_apply_qkv, ops),
                "apply_o": partial(_apply_o, ops),
                "forward": partial(_attention_forward, ops, returned, attention),
            },
            mlp: {"forward": partial(_mlp_forward, ops, mlp)},
        }
        for module, functions in seams.items():
            undo.append((module, {name: vars(module).get(name) for name in functions}))
            vars(module).update(functions)

    def unfuse() -> None:
        for module, before in undo:
            for name, function in before.items():
                vars(module).pop(name) if function is None else vars(module).update({name: function})

    return unfuse


def _apply_qkv(ops: Ops, attention: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return ops.lora_qkv(x, *map(projection, (attention.q_proj, attention.k_proj, attention.v_proj)))


def _apply_o(ops: Ops, attention: torch.nn.Module, mixed: torch.Tensor) -> torch.Tensor:
    return ops.lora_linear(mixed, *projection(attention.o_proj))


def _mlp_forward(ops: Ops, mlp: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return ops.lora_mlp(x, *map(projection, (mlp.gate_proj, mlp.up_proj, mlp.down_proj)))


def _attention_forward(
    ops: Ops,
    returned: int,
    attention: torch.nn.Module,
    hidden_states: torch.Tensor,
    *,
    position_ids: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    layout,
    **_,
) -> tuple:
    """Attention over the packed layout between the seams; (output, None, None) as the caller unpacks it."""
    lead = hidden_states.shape[:-1]
    heads = (*lead, -1, attention.head_dim)
    query, key, value = attention.apply_qkv(attention, hidden_states)
    if hasattr(attention, "q_norm"):
        query = ops.rms_norm(query.view(heads), *norm(attention.q_norm))
        key = ops.rms_norm(key.view(heads), *norm(attention.k_norm))
    tables = [t if t.ndim == 3 else t[position_ids] for t in position_embeddings]  # Unsloth's: a row per position
    query, key = ops.rope(query, key, *(t.to(query.dtype).expand(*lead, -1) for t in tables))
    query, key, value = (t.view(heads).transpose(1, 2) for t in (query, key, value))
    interface = ALL_ATTENTION_FUNCTIONS[packed.NAME]
    mixed, _ = interface(attention, query, key, value, None, layout=layout, scaling=attention.scaling)
    return (attention.apply_o(attention, mixed.reshape(*lead, -1)), None, None)[:returned]
