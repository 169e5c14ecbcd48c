"""RMSNorm: y = x rstd w with rstd = 1 / sqrt(mean(x^2) + eps), in fp32 inside, one read and one write.

Backward, with g = dy w and xhat = x rstd: dx = rstd (g - xhat mean(g xhat)) (+ the residual stream's gradient, so
that the sum needs no pass of its own). Saved: rstd, 4 bytes per row. Rows of less than 1,024 numbers (Qwen3's head
norms) share a program. Emitting x A^T in the same pass would be a tl.dot, scalar on sm_75: it stays with cuBLAS.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _tile(rows, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    return row, column, row[:, None] * D + column[None, :], (row < rows)[:, None] & (column < D)[None, :]


@triton.jit
def _forward_kernel(
    x_in, weight, rstd_io, y_out, rows, D, eps, KNOWN_RSTD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row, column, at, inside = _tile(rows, D, ROWS, BLOCK)
    x = tl.load(x_in + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    if KNOWN_RSTD:
        rstd = tl.load(rstd_io + row, mask=row < rows, other=0.0)
    else:
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
        tl.store(rstd_io + row, rstd, mask=row < rows)
    tl.store(y_out + at, (x * rstd[:, None] * w[None, :]).to(y_out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dy_in, x_in, weight, rstd_in, residual_in, dx_out, rows, D, RESIDUAL: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, at, inside = _tile(rows, D, ROWS, BLOCK)
    rstd = tl.load(rstd_in + row, mask=row < rows, other=0.0)[:, None]
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    g = tl.load(dy_in + at, mask=inside, other=0.0).to(tl.float32) * w[None, :]
    xhat = tl.load(x_in + at, mask=inside, other=0.0).to(tl.float32) * rstd
    dx = (g - xhat * (tl.sum(g * xhat, 1) / D)[:, None]) * rstd
    if RESIDUAL:
        dx += tl.load(residual_in + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_out + at, dx.to(dx_out.dtype.element_ty), mask=inside)


def tiling(D: int) -> dict:
    """Rows per program, padded row length and warps."""
    block = triton.next_power_of_2(D)
    return {"ROWS": max(1, 1024 // block), "BLOCK": block, "num_warps": 4 if block <= 2048 else 8}


def _launch(kernel, rows, tile, *args, **constants):
    if rows:
        kernel[(triton.cdiv(rows, tile["ROWS"]),)](*args, **constants, **tile)


def forward(x_TD, weight_D, eps):
    x_TD = x_TD.contiguous()
    rows, D = x_TD.shape
    y_TD, rstd_T = torch.empty_like(x_TD), torch.empty(rows, dtype=torch.float32, device=x_TD.device)
    _launch(_forward_kernel, rows, tiling(D), x_TD, weight_D, rstd_T, y_TD, rows, D, eps, KNOWN_RSTD=False)
    return y_TD, rstd_T


def apply(x_TD, weight_D, rstd_T):
    x_TD = x_TD.contiguous()
    rows, D = x_TD.shape
    y_TD = torch.empty_like(x_TD)
    _launch(_forward_kernel, rows, tiling(D), x_TD, weight_D, rstd_T, y_TD, rows, D, 0.0, KNOWN_RSTD=True)
    return y_TD


def backward(dy_TD, x_TD, weight_D, rstd_T, residual_TD):
    dy_TD, x_TD = dy_TD.contiguous(), x_TD.contiguous()
    rows, D = x_TD.shape
    dx_TD = torch.empty_like(x_TD)
    residual = dx_TD if residual_TD is None else residual_TD.contiguous()
    args = (dy_TD, x_TD, weight_D, rstd_T, residual, dx_TD, rows, D)
    _launch(_backward_kernel, rows, tiling(D), *args, RESIDUAL=residual_TD is not None)
    return dx_TD
