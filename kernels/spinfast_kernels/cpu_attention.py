"""Attention over packed segments on a CPU.

Short groups, up to SHORT rows, attend side by side: each is a square of its own with a mask, groups of about one
length are a batch, and a product serves them all. At this size a call costs more than what it computes.

The rest, forward: torch's flash kernel on views. A later answer attends causally to itself and to its group's prompt;
the two parts meet through their log-sum-exps (Dao et al., arXiv 2205.14135). Short later answers of a group go
together, up to RUN rows: what one masked product wastes costs less than a call each.

Backward: dense products (AMX where there is bf16) around one compiled row pass, because torch's flash kernel
multiplies in fp32 there and gains nothing from a second thread.

    P = exp(scale Q K^T - lse), dP = dO V^T, dS = scale P (dP - delta), delta = rowsum(dO O)
    dV = P^T dO, dK = dS^T Q, dQ = dS K

with the forward's output and log-sum-exp. The query heads that share a key head are stacked: a product has their
rows together, and dK, dV come out summed over them. Queries go in blocks of BLOCK rows, so that scores stay small
and end at the last key the block sees. All is fp32, but with bf16 inputs the products round their operands to bf16,
as flash attention on a GPU does.

Shapes: T tokens, H query heads, G key heads, d head dim, N groups of a batch, B rows of a block or of a group in a
batch, R = (H / G) B stacked rows, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numba import prange

from spinfast_kernels.cpu import compiled, exp, larger, launch, narrow, widen

SHORT = 192
BATCH = 1024  # rows of a batch of groups
BLOCK = 256
RUN = 128
Segments = Sequence[tuple[int, int]]  # (queries, keys): a segment sees itself, causally, and keys - queries before it


class Squares(NamedTuple):
    """Rows side by side, whole short groups or a block of a long one, and which of their keys each sees."""

    starts_N: np.ndarray  # where the rows start among all
    lengths_N: np.ndarray  # how many there are; the rest up to B is padding, and sees nothing
    seen_NB: np.ndarray  # a row sees so many keys from the first, its prompt,
    firsts_NB: np.ndarray  # and those of its own answer from this one
    lasts_NB: np.ndarray  # to before this one

    def spread(self, x_HTd: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The groups' rows (N, H, B, d), zeros below them."""
        (H, _, d), (N, B) = x_HTd.shape, self.seen_NB.shape
        y_NHBd = x_HTd.new_empty(N, H, B, d, dtype=dtype)
        launch(_spread_kernel, x_HTd, self.starts_N, self.lengths_N, y_NHBd)
        return y_NHBd

    def collect(self, y_NHBd: torch.Tensor, x_HTd: torch.Tensor) -> None:
        """The groups' rows of y into their places in x."""
        launch(_collect_kernel, y_NHBd, self.starts_N, self.lengths_N, x_HTd)


def forward(q_HTd, k_GTd, v_GTd, segments: Segments, scale: float):
    """(output (T, H, d), log-sum-exp (H, T) fp32) of bf16 or fp32 inputs, any strides."""
    H, T, d = q_HTd.shape
    out_THd = q_HTd.new_empty(T, H, d)
    lse_HT = q_HTd.new_empty(H, T, dtype=torch.float32)
    squares, runs = _plan(segments)
    with _products_in(q_HTd.dtype):
        for square in squares:
            q_NHBd, *kv = (square.spread(x, torch.float32) for x in (q_HTd, k_GTd, v_GTd))
            k_XBd, v_XBd = (x.flatten(0, 1) for x in kv)
            p_XRB = torch.bmm(q_NHBd.view(len(k_XBd), -1, d), k_XBd.transpose(1, 2))
            p_NHBB = p_XRB.view(*q_NHBd.shape[:3], -1)
            launch(_softmax_kernel, p_NHBB, lse_HT, *square, float(scale))
            square.collect(torch.bmm(p_XRB, v_XBd).view_as(q_NHBd), out_THd.transpose(0, 1))
    for rows, seen, starts in runs:
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
    grad_HTd = grad_THd.transpose(0, 1)
    dq_HTd = torch.empty_like(q_HTd)
    dk_GTd, dv_GTd = (torch.zeros_like(x, dtype=torch.float32) for x in (k_GTd, v_GTd))
    squares, runs = _plan(segments)
    with _products_in(q_HTd.dtype):
        for square in squares:
            q_NHBd, grad_NHBd, *kv = (square.spread(x, torch.float32) for x in (q_HTd, grad_HTd, k_GTd, v_GTd))
            kv_XKd = [x.flatten(0, 1) for x in kv]
            dkv_XKd = [torch.zeros_like(x) for x in kv_XKd]
            dq_NHBd = _block(q_NHBd, grad_NHBd, *kv_XKd, *dkv_XKd, out_THd, lse_HT, square, scale)
            square.collect(dq_NHBd, dq_HTd)
            for part, total, like in zip(dkv_XKd, (dk_GTd, dv_GTd), kv, strict=True):
                square.collect(part.view_as(like), total)
        for rows, seen, starts in runs:
            before, own = seen.stop - seen.start, rows.stop - rows.start
            k_GKd, v_GKd = (_padded(x[:, seen], x[:, rows]) for x in (k_GTd, v_GTd))
            dk_GKd, dv_GKd = torch.zeros_like(k_GKd), torch.zeros_like(v_GKd)
            for start in range(0, own, BLOCK):
                stop = min(start + BLOCK, own)
                block, K = slice(rows.start + start, rows.start + stop), _rounded(before + stop)
                q_HBd, grad_HBd = _padded(q_HTd[:, block]), _padded(grad_HTd[:, block])
                firsts = [before + first for first in _firsts(starts, own)[start:stop]]
                lasts = range(before + start + 1, before + stop + 1)
                square = _square(block.start, [before] * (stop - start), firsts, lasts, q_HBd.shape[1])
                upto = (x[:, :K] for x in (k_GKd, v_GKd, dk_GKd, dv_GKd))
                dq_1HBd = _block(q_HBd[None], grad_HBd[None], *upto, out_THd, lse_HT, square, scale)
                dq_HTd[:, block] = dq_1HBd[0, :, : stop - start]
            for total, part in ((dk_GTd, dk_GKd), (dv_GTd, dv_GKd)):
                total[:, seen] += part[:, :before]
                total[:, rows] += part[:, before : before + own]
    return dq_HTd, dk_GTd.to(k_GTd.dtype), dv_GTd.to(v_GTd.dtype)


def _block(q_NHBd, grad_NHBd, k_XKd, v_XKd, dk_XKd, dv_XKd, out_THd, lse_HT, rows: Squares, scale: float):
    """dq of these rows, in fp32; what they give to their keys is added to dk and dv. X = N G."""
    (N, H, B, d), (X, K, _) = q_NHBd.shape, k_XKd.shape
    q_XRd, grad_XRd = (x.view(X, -1, d) for x in (q_NHBd, grad_NHBd))
    p_XRK = torch.bmm(q_XRd, k_XKd.transpose(1, 2))
    ds_XRK = torch.bmm(grad_XRd, v_XKd.transpose(1, 2))
    p_NHBK, ds_NHBK = (x.view(N, H, B, K) for x in (p_XRK, ds_XRK))
    launch(_row_kernel, p_NHBK, ds_NHBK, grad_NHBd, out_THd, lse_HT, *rows, float(scale))
    dv_XKd.baddbmm_(p_XRK.transpose(1, 2), grad_XRd)
    dk_XKd.baddbmm_(ds_XRK.transpose(1, 2), q_XRd)
    return torch.bmm(ds_XRK, k_XKd).view_as(q_NHBd)


@compiled
def _softmax_kernel(score_NHBK, lse_HT, starts_N, lengths_N, seen_NB, firsts_NB, lasts_NB, scale):
    """Scores to P in place, 0 where a row may not look; rows of the padding stay as they are."""
    N, H, B, K = score_NHBK.shape
    for row in prange(N * H * B):
        n, h, b = row // (H * B), row // B % H, row % B
        if b < lengths_N[n]:
            score_K, seen, first, last = score_NHBK[n, h, b], seen_NB[n, b], firsts_NB[n, b], lasts_NB[n, b]
            top, total = np.float32(-np.inf), np.float32(0.0)
            for k in range(K):  # all of them here and below, so that the loops are vectors throughout
                score_K[k] *= np.float32(scale)
                top = larger(top, score_K[k] if k < seen or first <= k < last else np.float32(-np.inf))
            for k in range(K):
                p = exp(score_K[k] - top)
                score_K[k] = p if k < seen or first <= k < last else np.float32(0.0)
                total += score_K[k]
            for k in range(K):
                score_K[k] /= total
            lse_HT[h, starts_N[n] + b] = top + np.log(total)


@compiled
def _row_kernel(
    score_NHBK, dp_NHBK, grad_NHBd, out_THd, lse_HT, starts_N, lengths_N, seen_NB, firsts_NB, lasts_NB, scale
):
    """Scores to P and dP to dS in place, 0 where a row may not look and in the rows of the padding."""
    N, H, B, K = score_NHBK.shape
    for row in prange(N * H * B):
        n, h, b = row // (H * B), row // B % H, row % B
        score_K, dp_K = score_NHBK[n, h, b], dp_NHBK[n, h, b]
        if b >= lengths_N[n]:
            for k in range(K):
                score_K[k] = dp_K[k] = np.float32(0.0)
            continue
        seen, first, last, t = seen_NB[n, b], firsts_NB[n, b], lasts_NB[n, b], starts_N[n] + b
        factor, lse, delta = np.float32(scale), lse_HT[h, t], np.float32(0.0)
        grad_d, out_d = grad_NHBd[n, h, b], out_THd[t, h]
        for c in range(len(grad_d)):
            delta += grad_d[c] * widen(out_d[c])
        for k in range(K):  # all of them, see _softmax_kernel
            p = exp(score_K[k] * factor - lse)
            p = p if k < seen or first <= k < last else np.float32(0.0)
            score_K[k] = p
            dp_K[k] = p * (dp_K[k] - delta) * factor


@compiled
def _spread_kernel(x_HTd, starts_N, lengths_N, y_NHBd):
    N, H, B, d = y_NHBd.shape
    for row in prange(N * H * B):
        n, h, b = row // (H * B), row // B % H, row % B
        y_d = y_NHBd[n, h, b]
        if b < lengths_N[n]:
            x_d = x_HTd[h, starts_N[n] + b]
            for c in range(d):
                y_d[c] = narrow(widen(x_d[c]), y_d[c])
        else:
            for c in range(d):
                y_d[c] = narrow(np.float32(0.0), y_d[c])


@compiled
def _collect_kernel(y_NHBd, starts_N, lengths_N, x_HTd):
    N, H, B, d = y_NHBd.shape
    for row in prange(N * H * B):
        n, h, b = row // (H * B), row // B % H, row % B
        if b < lengths_N[n]:
            y_d, x_d = y_NHBd[n, h, b], x_HTd[h, starts_N[n] + b]
            for c in range(d):
                x_d[c] = narrow(widen(y_d[c]), x_d[c])


@lru_cache(64)
def _plan(segments: Segments) -> tuple[list[Squares], list[tuple[slice, slice, tuple[int, ...]]]]:
    """Short groups in batches of about one length, and the runs of the others."""
    short, runs, start = {}, [], 0
    for group in _groups(segments):
        rows = sum(queries for queries, _ in group)
        if rows <= SHORT:
            short.setdefault(_rounded(rows), []).append(_group_square(start, group, _rounded(rows)))
        else:
            runs += _runs(start, group)
        start += rows
    squares = [
        Squares(*map(np.concatenate, zip(*squares[i : i + BATCH // B], strict=True)))
        for B, squares in short.items()
        for i in range(0, len(squares), BATCH // B)
    ]
    return squares, runs


def _groups(segments: Segments) -> Iterator[list[tuple[int, int]]]:
    """A group begins with a segment that sees none before it."""
    group = []
    for queries, keys in segments:
        if queries == keys and group:
            yield group
            group = []
        group.append((queries, keys))
    yield group


def _group_square(start: int, group: Segments, rows: int) -> Squares:
    seen, firsts, row = [], [], 0
    for queries, keys in group:
        seen += [keys - queries] * queries
        firsts += [row] * queries
        row += queries
    return _square(start, seen, firsts, range(1, row + 1), rows)


def _square(start: int, seen: Sequence[int], firsts: Sequence[int], lasts: Sequence[int], rows: int) -> Squares:
    """One group, or one block of a run, with padding up to `rows`."""
    padded = (np.pad(np.array(x), (0, rows - len(x)))[None] for x in (seen, firsts, lasts))
    return Squares(np.array([start]), np.array([len(seen)]), *padded)


def _runs(start: int, group: Segments) -> list[tuple[slice, slice, tuple[int, ...]]]:
    """(rows, those before them that they see, where answers start among them): the first segment, and later answers,
    which see its prompt."""
    runs, row = [], start
    for queries, keys in group:
        seen, (rows, prompt, starts) = slice(start, start + keys - queries), runs[-1] if runs else (slice(0), None, ())
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
