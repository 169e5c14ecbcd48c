"""Sums of rows in a fixed order, so that a run repeats to the bit: on a GPU torch adds by index with atomics."""

from __future__ import annotations

import torch


def segment_sums(x: torch.Tensor, ids: torch.Tensor, segments: int) -> torch.Tensor:
    """(segments, ...) the sum of all x[i] with ids[i] = 0, 1 ...; `ids` ascend."""
    starts = torch.searchsorted(ids, torch.arange(segments + 1, device=ids.device))
    return torch.segment_reduce(x, "sum", offsets=starts, axis=0, unsafe=True)  # "safe" would wait for the GPU


def add_rows(x: torch.Tensor, index: torch.Tensor, rows: int) -> torch.Tensor:
    """(rows, ...) the sum of all x[i] with index[i] = 0, 1 ..., in fp32 at least."""
    ids, order = index.sort(stable=True)
    return segment_sums(x.index_select(0, order).to(torch.promote_types(x.dtype, torch.float32)), ids, rows)


def take_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[index]; the gradients of a row's copies are added up in fp32, then rounded once."""
    return _TakeRows.apply(x, index)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return add_rows(gradient, *ctx.saved_tensors, ctx.rows).to(gradient.dtype), None
