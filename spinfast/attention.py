"""Attention over the packed layout, behind one function, reached through transformers' attention interface.

Every segment is causal attention of its queries over its keys, aligned at the bottom right, so no custom kernel
is needed: xformers' BlockDiagonalCausalFromBottomRightMask, the same cutlass kernel through aten (cu_seqlens),
or one SDPA call per segment. Models get it by `attn_implementation="spinfast"` and a `layout=` keyword in the
forward, which transformers hands down to every layer. A layout with an `attend` method of its own (a generator's
cache) is asked instead.

Shape suffixes: 1 the batch of one, T packed tokens, K gathered keys, H query heads, G key/value heads, d head dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from spinfast.types import PackedLayout

NAME = "spinfast"
CAUSAL_BOTTOM_RIGHT = 2  # aten's custom_mask_type


def _interface(module, query_1HTd, key_1GTd, value_1GTd, attention_mask, *, layout, scaling, **_):
    """transformers' calling convention; the mask argument is unused because the layout says it all."""
    if hasattr(layout, "attend"):
        return layout.attend(module.layer_idx, query_1HTd, key_1GTd, value_1GTd, scaling), None
    return packed_attention(query_1HTd, key_1GTd, value_1GTd, layout, scaling), None


AttentionInterface.register(NAME, _interface)


def packed_attention(
    query_1HTd: torch.Tensor,
    key_1GTd: torch.Tensor,
    value_1GTd: torch.Tensor,
    layout: PackedLayout,
    scaling: float,
) -> torch.Tensor:
    """Attention output (1, T, H, d), differentiable; H is a multiple of G (grouped-query attention)."""
    key_1GKd = key_1GTd.index_select(2, layout.kv_index_K)
    value_1GKd = value_1GTd.index_select(2, layout.kv_index_K)
    return BACKENDS[layout.backend](query_1HTd, key_1GKd, value_1GKd, layout, scaling)


def _sdpa(query_1HTd, key_1GKd, value_1GKd, layout, scaling):
    queries = query_1HTd.split([q for q, _ in layout.segments], dim=2)
    keys = key_1GKd.split([kv for _, kv in layout.segments], dim=2)
    values = value_1GKd.split([kv for _, kv in layout.segments], dim=2)
    outputs = []
    for (q_len, kv_len), q, k, v in zip(layout.segments, queries, keys, values, strict=True):
        mask = None if q_len == kv_len else _bottom_right_mask(q_len, kv_len, q.device)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1)


@lru_cache(maxsize=64)
def _bottom_right_mask(q_len: int, kv_len: int, device: torch.device) -> torch.Tensor:
    return torch.ones(q_len, kv_len, dtype=torch.bool, device=device).tril(kv_len - q_len)


def _aten_efficient(query_1HTd, key_1GKd, value_1GKd, layout, scaling):
    q, k, v = _bmhk(query_1HTd, key_1GKd, value_1GKd)
    return _AtenEfficient.apply(q, k, v, layout, scaling)


class _AtenEfficient(torch.autograd.Function):
    """aten's cutlass kernels with cu_seqlens; (1, T, H, d) in and out. No autograd formula exists upstream."""

    @staticmethod
    def forward(ctx, q, k, v, layout, scaling):
        max_q, max_kv = (max(lengths) for lengths in zip(*layout.segments, strict=True))
        wants_grad = any(t.requires_grad for t in (q, k, v))
        out, lse, seed, offset, max_q, max_kv = torch.ops.aten._efficient_attention_forward(
            q, k, v, None, layout.q_starts, layout.kv_starts, max_q, max_kv, 0.0, CAUSAL_BOTTOM_RIGHT,
            compute_log_sumexp=wants_grad, scale=scaling,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, seed, offset)
        ctx.layout, ctx.scaling, ctx.longest = layout, scaling, (max_q, max_kv)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse, seed, offset = ctx.saved_tensors
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
            grad_out.contiguous(), q, k, v, None, out, ctx.layout.q_starts, ctx.layout.kv_starts, *ctx.longest,
            lse, 0.0, seed, offset, CAUSAL_BOTTOM_RIGHT, False, scale=ctx.scaling,
        )  # fmt: skip
        return dq, dk, dv, None, None


def _xformers(query_1HTd, key_1GKd, value_1GKd, layout, scaling):
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask

    q_lens, kv_lens = zip(*layout.segments, strict=True)
    bias = BlockDiagonalCausalFromBottomRightMask.from_seqlens(q_lens, kv_lens, device=query_1HTd.device)
    q, k, v = _bmhk(query_1HTd, key_1GKd, value_1GKd)
    return memory_efficient_attention(q, k, v, attn_bias=bias, scale=scaling)


def _bmhk(query_1HTd, key_1GKd, value_1GKd):
    """(1, tokens, H, d) for all three; a key head is expanded, not copied, over the query heads it serves."""
    heads = query_1HTd.shape[1]

    def widened(x_1GKd):
        groups, tokens, dim = x_1GKd.shape[1:]
        shared = x_1GKd.transpose(1, 2).unsqueeze(3).expand(1, tokens, groups, heads // groups, dim)
        return shared.reshape(1, tokens, heads, dim)

    return query_1HTd.transpose(1, 2), widened(key_1GKd), widened(value_1GKd)


BACKENDS = {"sdpa": _sdpa, "aten_efficient": _aten_efficient, "xformers": _xformers}
