"""Attention over packed segments on a CPU.

Forward: torch's flash kernel on views. A later answer attends causally to itself and to its group's prompt; the two
parts meet through their log-sum-exps (Dao et al., arXiv 2205.14135). Short later answers of a group go together, up
to RUN rows: what one masked product wastes costs less than a call each (GRPO's answers of a few tokens).

Backward: dense products (AMX where there is bf16) around one compiled row pass, because torch's flash kernel
multiplies in fp32 there and gains nothing from a second thread.

    P = exp(scale Q K^T - lse), dP = dO V^T, dS = scale P (dP - delta), delta = rowsum(dO O)
    dV = P^T dO, dK = dS^T Q, dQ = dS K

with the forward's output and log-sum-exp. The query heads that share a key head are stacked: a product has their
rows together, and dK, dV come out summed over them. Queries go in blocks of BLOCK rows, so that scores stay small
and end at the last key the block sees. All is fp32, but with bf16 inputs the products round their operands to bf16,
as flash attention on a GPU does.

Shapes: T tokens, H query heads, G key heads, d head dim, B rows of a block, R = (H / G) B stacked rows, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from numba import prange

from spinfast_kernels.cpu import compiled, exp, launch, narrow, widen

BLOCK = 256
RUN = 128
Segments = Sequence[tuple[int, int]]  # (queries, keys): a segment sees itself, causally, and keys - queries before it


def forward(q_HTd, k_GTd, v_GTd, segments: Segments, scale: float):
    """(output (T, H, d), log-sum-exp (H, T) fp32) of bf16 or fp32 inputs, any strides."""
    H, T, d = q_HTd.shape
    out_THd = q_HTd.new_empty(T, H, d)
    lse_HT = q_HTd.new_empty(H, T, dtype=torch.float32)
    for rows, seen, starts in _runs(segments):
        out_THd[rows], lse_HT[:, rows] = _flash(q_HTd, k_GTd, v_GTd, rows, rows, scale, starts)
        if seen.stop > seen.start:
            launch(_merge_kernel, out_THd[rows], lse_HT[:, rows], *_flash(q_HTd, k_GTd, v_GTd, rows, seen, scale))
    return out_THd, lse_HT


def _flash(q_HTd, k_GTd, v_GTd, rows: slice, keys: slice, scale: float, starts: Sequence[int] = ()):
    """(output (B, H, d), log-sum-exp (H, B)) of these rows over these keys: all of them, or where answers start at
    `starts` of the rows, which are the keys then, each over its own, causally."""
    mask = torch.from_numpy(_own(starts, rows.stop - rows.start)).to(q_HTd, copy=True) if len(starts) > 1 else None
    out_1HBd, lse_1HB = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_HTd[None, :, rows], k_GTd[None, :, keys], v_GTd[None, :, keys], 0.0, len(starts) == 1,
        attn_mask=mask, scale=scale,
    )  # fmt: skip
    return out_1HBd[0].transpose(0, 1), lse_1HB[0]


@lru_cache(64)
def _own(starts: tuple[int, ...], rows: int) -> np.ndarray:
    """(B, B): 0 where a row sees another, which is of its answer and not after it; else -inf."""
    answer_B = np.array(_firsts(starts, rows))
    return np.where(np.tril(answer_B[:, None] == answer_B), np.float32(0.0), np.float32(-np.inf))


@compiled
def _merge_kernel(out_BHd, lse_HB, more_BHd, more_lse_HB):
    """Attention over two sets of keys of the attention over each, into the first's place."""
    B, H, d = out_BHd.shape
    for b in prange(B):
        for h in range(H):
            one, other = lse_HB[h, b], more_lse_HB[h, b]
            top = max(one, other)
            both = top + np.log(exp(one - top) + exp(other - top))
            share, more_share = exp(one - both), exp(other - both)
            for c in range(d):
                mixed = share * widen(out_BHd[b, h, c]) + more_share * widen(more_BHd[b, h, c])
                out_BHd[b, h, c] = narrow(mixed, out_BHd[b, h, c])
            lse_HB[h, b] = both


def backward(grad_THd, q_HTd, k_GTd, v_GTd, out_THd, lse_HT, segments: Segments, scale: float):
    """(dq, dk, dv) in the shapes and dtype of q, k, v: bf16 or fp32, any strides; lse_HT fp32."""
    H, G = len(q_HTd), len(k_GTd)
    dq_HTd = torch.empty_like(q_HTd)
    dk_GTd, dv_GTd = (torch.zeros_like(x, dtype=torch.float32) for x in (k_GTd, v_GTd))
    with _products_in(q_HTd.dtype):
        for rows, seen, starts in _runs(segments):
            firsts_B = np.array(_firsts(starts, rows.stop - rows.start))
            before, own = seen.stop - seen.start, rows.stop - rows.start
            k_GKd, v_GKd = (_padded(x[:, seen], x[:, rows]) for x in (k_GTd, v_GTd))
            dk_GKd, dv_GKd = torch.zeros_like(k_GKd), torch.zeros_like(v_GKd)
            for start in range(0, own, BLOCK):
                stop = min(start + BLOCK, own)
                block, K = slice(rows.start + start, rows.start + stop), _rounded(before + stop)
                q_HBd, grad_HBd = _padded(q_HTd[:, block]), _padded(grad_THd[block].transpose(0, 1))
                q_GRd, grad_GRd = (x.view(G, -1, x.shape[2]) for x in (q_HBd, grad_HBd))
                p_GRK = torch.bmm(q_GRd, k_GKd[:, :K].transpose(1, 2))
                ds_GRK = torch.bmm(grad_GRd, v_GKd[:, :K].transpose(1, 2))
                p_HBK, ds_HBK = (x.view(H, -1, K) for x in (p_GRK, ds_GRK))
                launch(
                    _row_kernel, p_HBK, ds_HBK, grad_HBd, out_THd[block], lse_HT[:, block],
                    firsts_B[start:stop], before, start, float(scale),
                )  # fmt: skip
                dv_GKd[:, :K].baddbmm_(p_GRK.transpose(1, 2), grad_GRd)
                dk_GKd[:, :K].baddbmm_(ds_GRK.transpose(1, 2), q_GRd)
                dq_HBd = torch.bmm(ds_GRK, k_GKd[:, :K]).view_as(q_HBd)
                dq_HTd[:, block] = dq_HBd[:, : stop - start]
            for total, part in ((dk_GTd, dk_GKd), (dv_GTd, dv_GKd)):
                total[:, seen] += part[:, :before]
                total[:, rows] += part[:, before : before + own]
    return dq_HTd, dk_GTd.to(k_GTd.dtype), dv_GTd.to(v_GTd.dtype)


@compiled
def _row_kernel(score_HBK, dp_HBK, grad_HBd, out_BHd, lse_HB, firsts_B, before, start, scale):
    """Scores to P and dP to dS in place, 0 where a row may not look and in the rows of the padding.

    Row b, the run's row start + b, sees the `before` keys of the prompt and of its run's those from firsts_B[b] on
    up to its own.
    """
    H, B, K = score_HBK.shape
    for row in prange(H * B):
        h, b = row // B, row % B
        score_K, dp_K = score_HBK[h, b], dp_HBK[h, b]
        prompt = first = last = 0
        if b < len(out_BHd):
            prompt, first, last = before, before + firsts_B[b], before + start + b + 1
            factor, lse, delta = np.float32(scale), lse_HB[h, b], np.float32(0.0)
            grad_d, out_d = grad_HBd[h, b], out_BHd[b, h]
            for c in range(len(grad_d)):
                delta += grad_d[c] * widen(out_d[c])
            for low, high in ((0, prompt), (first, last)):
                for k in range(low, high):
                    p = exp(score_K[k] * factor - lse)
                    score_K[k] = p
                    dp_K[k] = p * (dp_K[k] - delta) * factor
        for low, high in ((prompt, first), (last, K)):
            for k in range(low, high):
                score_K[k] = np.float32(0.0)
                dp_K[k] = np.float32(0.0)


def _runs(segments: Segments) -> list[tuple[slice, slice, tuple[int, ...]]]:
    """(rows, those before them that they see, where answers start among them): a segment that sees none before, or
    later answers of a group, which see its prompt."""
    runs, row = [], 0
    group = 0
    for queries, keys in segments:
        group = row if queries == keys else group
        seen, (rows, prompt, starts) = slice(group, group + keys - queries), runs[-1] if runs else (slice(0), None, ())
        if queries < keys and seen == prompt and row + queries - rows.start <= RUN:
            runs[-1] = slice(rows.start, row + queries), seen, (*starts, row - rows.start)
        else:
            runs.append((slice(row, row + queries), seen, (0,)))
        row += queries
    return runs


def _firsts(starts: Sequence[int], rows: int) -> list[int]:
    """Per row where its answer starts."""
    return [start for start, stop in zip(starts, (*starts[1:], rows), strict=True) for _ in range(start, stop)]


def _rounded(rows: int) -> int:
    """To a multiple of 32: oneDNN compiles a product anew for every shape."""
    return rows + -rows % 32


def _padded(*parts_HRd):
    """The parts under each other in fp32, zeros below them up to a round number of rows."""
    heads, _, d = parts_HRd[0].shape
    rows = sum(x.shape[1] for x in parts_HRd)
    whole_HRd = parts_HRd[0].new_zeros(heads, _rounded(rows), d, dtype=torch.float32)
    for part, into in zip(parts_HRd, whole_HRd[:, :rows].split([x.shape[1] for x in parts_HRd], dim=1), strict=True):
        into.copy_(part)
    return whole_HRd


@contextmanager
def _products_in(dtype: torch.dtype) -> Iterator[None]:
    """fp32 products multiply in bf16, and add in fp32, where the inputs were bf16."""
    products = torch.backends.mkldnn.matmul
    before = products.fp32_precision
    products.fp32_precision = "bf16" if dtype == torch.bfloat16 else before
    try:
        yield
    finally:
        products.fp32_precision = before
