"""Attention over the packed layout, behind one function, reached through transformers' attention interface.

Every segment is causal attention of its queries over its keys, aligned at the bottom right, so a GPU needs no
kernel of ours: xformers' BlockDiagonalCausalFromBottomRightMask, or the same cutlass kernel through aten
(cu_seqlens). On a CPU it is spinfast_kernels.cpu_attention. SDPA per segment works everywhere. Saved for the backward
are q, k, v as they came, the output and the log-sum-exp; gathered and widened keys are made again.

Models get it by `attn_implementation="spinfast"` and a `layout=` keyword in the forward, which transformers hands
down to every layer. A layout with an `attend` method of its own (a generator's cache) is asked instead.

Shape suffixes: 1 the batch of one, T packed tokens, K gathered keys, H query heads, G key/value heads, d head dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from spinfast.sums import add_rows, take_rows
from spinfast.types import PackedLayout

NAME = "spinfast"
CAUSAL_BOTTOM_RIGHT = 2  # aten's custom_mask_type
aten = torch.ops.aten


def _interface(module, query_1HTd, key_1GTd, value_1GTd, attention_mask, *, layout, scaling, **_):
    """transformers' calling convention; the mask argument is unused because the layout says it all."""
    return attend(module.layer_idx, query_1HTd, key_1GTd, value_1GTd, layout, scaling), None


AttentionInterface.register(NAME, _interface)


def attend(place: int, query_1HTd, key_1GTd, value_1GTd, layout, scaling: float) -> torch.Tensor:
    """Attention output (1, T, H, d) over a packed batch, or over a generator's cache, of which `place` is one."""
    if hasattr(layout, "attend"):
        return layout.attend(place, query_1HTd, key_1GTd, value_1GTd, scaling)
    return packed_attention(query_1HTd, key_1GTd, value_1GTd, layout, scaling)


def key_value_shape(config) -> tuple[int, int]:
    """(key/value heads, head dim) of a model's layers."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, head_dim


def packed_attention(
    query_1HTd: torch.Tensor,
    key_1GTd: torch.Tensor,
    value_1GTd: torch.Tensor,
    layout: PackedLayout,
    scaling: float,
) -> torch.Tensor:
    """Attention output (1, T, H, d), differentiable; H is a multiple of G (grouped-query attention)."""
    if layout.backend == "sdpa":
        return _sdpa(query_1HTd, key_1GTd, value_1GTd, layout, scaling)
    return _PackedAttention.apply(query_1HTd, key_1GTd, value_1GTd, layout, scaling)


class _PackedAttention(torch.autograd.Function):
    """One of KERNELS: a forward that returns (out_1THd, log-sum-exp, ...) and its backward."""

    @staticmethod
    def forward(ctx, q_1HTd, k_1GTd, v_1GTd, layout, scaling):
        out_1THd, *rest = KERNELS[layout.backend][0](q_1HTd, k_1GTd, v_1GTd, layout, scaling)
        ctx.save_for_backward(q_1HTd, k_1GTd, v_1GTd, out_1THd, *rest)
        ctx.layout, ctx.scaling = layout, scaling
        return out_1THd

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_1THd):
        backward = KERNELS[ctx.layout.backend][1]
        return *backward(grad_1THd, *ctx.saved_tensors, ctx.layout, ctx.scaling), None, None


# CPU ---------------------------------------------------------------------------------------------------------------


def _numba_forward(q_1HTd, k_1GTd, v_1GTd, layout, scaling):
    from spinfast_kernels import cpu_attention

    found = cpu_attention.forward(q_1HTd[0], k_1GTd[0], v_1GTd[0], layout.segments, scaling)
    return [x[None] for x in found]


def _numba_backward(grad_1THd, q_1HTd, k_1GTd, v_1GTd, out_1THd, lse_1HT, layout, scaling):
    from spinfast_kernels import cpu_attention

    tensors = (x[0] for x in (grad_1THd, q_1HTd, k_1GTd, v_1GTd, out_1THd, lse_1HT))
    return [x[None] for x in cpu_attention.backward(*tensors, layout.segments, scaling)]


# CUDA: the cutlass kernel, through aten or xformers ----------------------------------------------------------------


def _gathered(x_1GTd, heads, layout):
    """(1, K, heads, d): the keys of all segments in order, each repeated for the query heads it serves."""
    x_1KGd = take_rows(x_1GTd[0].transpose(0, 1), layout.kv_index_K)[None]
    return x_1KGd.repeat_interleave(heads // x_1KGd.shape[2], dim=2)


def _ungathered(grad_1KHd, like_1GTd, layout):
    """The transpose of `_gathered`, rounded once: a prompt's rows gather what each answer sends back."""
    G, T = like_1GTd.shape[1:3]
    wide = torch.promote_types(grad_1KHd.dtype, torch.float32)
    summed_KGd = grad_1KHd[0].unflatten(1, (G, -1)).sum(2, dtype=wide)
    return add_rows(summed_KGd, layout.kv_index_K, T).to(like_1GTd.dtype).transpose(0, 1)[None]


def _longest(layout):
    return [max(lengths) for lengths in zip(*layout.segments, strict=True)]


def _aten_forward(q_1HTd, k_1GTd, v_1GTd, layout, scaling):
    k_1KHd, v_1KHd = (_gathered(x, q_1HTd.shape[1], layout) for x in (k_1GTd, v_1GTd))
    out_1THd, lse, seed, offset, _, _ = aten._efficient_attention_forward(
        q_1HTd.transpose(1, 2), k_1KHd, v_1KHd, None, layout.q_starts, layout.kv_starts, *_longest(layout), 0.0,
        CAUSAL_BOTTOM_RIGHT, compute_log_sumexp=True, scale=scaling,
    )  # fmt: skip
    return out_1THd, lse, seed, offset


def _aten_backward(grad_1THd, q_1HTd, k_1GTd, v_1GTd, out_1THd, lse, seed, offset, layout, scaling):
    k_1KHd, v_1KHd = (_gathered(x, q_1HTd.shape[1], layout) for x in (k_1GTd, v_1GTd))
    dq, dk, dv, _ = aten._efficient_attention_backward(
        grad_1THd.contiguous(), q_1HTd.transpose(1, 2), k_1KHd, v_1KHd, None, out_1THd, layout.q_starts,
        layout.kv_starts, *_longest(layout), lse, 0.0, seed, offset, CAUSAL_BOTTOM_RIGHT, False, scale=scaling,
        num_splits_key=1,  # more would add up by atomics, in another order each time
    )  # fmt: skip
    return dq.transpose(1, 2), _ungathered(dk, k_1GTd, layout), _ungathered(dv, v_1GTd, layout)


def _xformers_bias(layout):
    """Kept on the layout, for every layer asks for it, forward and backward, and making it pins host memory."""
    if "xformers_bias" not in vars(layout):
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask as Mask

        lengths = zip(*layout.segments, strict=True)
        vars(layout)["xformers_bias"] = Mask.from_seqlens(*lengths, device=layout.q_starts.device)
    return vars(layout)["xformers_bias"]


def _xformers_forward(q_1HTd, k_1GTd, v_1GTd, layout, scaling):
    from xformers.ops.fmha import cutlass, memory_efficient_attention_forward_requires_grad

    k_1KHd, v_1KHd = (_gathered(x, q_1HTd.shape[1], layout) for x in (k_1GTd, v_1GTd))
    return memory_efficient_attention_forward_requires_grad(
        q_1HTd.transpose(1, 2), k_1KHd, v_1KHd, _xformers_bias(layout), scale=scaling, op=cutlass.FwOp,
    )  # fmt: skip


def _xformers_backward(grad_1THd, q_1HTd, k_1GTd, v_1GTd, out_1THd, lse, layout, scaling):
    from xformers.ops.fmha import cutlass, memory_efficient_attention_backward

    k_1KHd, v_1KHd = (_gathered(x, q_1HTd.shape[1], layout) for x in (k_1GTd, v_1GTd))
    dq, dk, dv = memory_efficient_attention_backward(
        grad_1THd.contiguous(), out_1THd, lse, q_1HTd.transpose(1, 2), k_1KHd, v_1KHd,
        _xformers_bias(layout), scale=scaling, op=cutlass.BwOp,
    )  # fmt: skip
    return dq.transpose(1, 2), _ungathered(dk, k_1GTd, layout), _ungathered(dv, v_1GTd, layout)


KERNELS = {
    "numba": (_numba_forward, _numba_backward),
    "aten_efficient": (_aten_forward, _aten_backward),
    "xformers": (_xformers_forward, _xformers_backward),
}


# On request: SDPA per segment, differentiated by torch --------------------------------------------------------------


def _sdpa(query_1HTd, key_1GTd, value_1GTd, layout, scaling):
    if query_1HTd.is_cpu and query_1HTd.dtype.itemsize == 2:  # torch's CPU kernel is coarse in 16 bit, and no faster
        wide = (x.float() for x in (query_1HTd, key_1GTd, value_1GTd))
        return _sdpa(*wide, layout, scaling).to(query_1HTd.dtype)
    q_lens, kv_lens = zip(*layout.segments, strict=True)
    queries = query_1HTd.split(q_lens, dim=2)
    gathered = (_gathered(x, query_1HTd.shape[1], layout) for x in (key_1GTd, value_1GTd))
    keys, values = (x_1KHd.transpose(1, 2).split(kv_lens, dim=2) for x_1KHd in gathered)
    outputs = []  # keys repeated: below sm_80 enable_gqa leaves only the kernel that keeps the whole matrix
    for q, k, v in zip(queries, keys, values, strict=True):
        mask = None if q.shape[2] == k.shape[2] else _bottom_right_mask(q.shape[2], k.shape[2], q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1)


@lru_cache(maxsize=64)
def _bottom_right_mask(q_len: int, kv_len: int, device: torch.device) -> torch.Tensor:
    return torch.ones(q_len, kv_len, dtype=torch.bool, device=device).tril(kv_len - q_len)
