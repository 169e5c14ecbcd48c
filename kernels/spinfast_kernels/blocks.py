"""LoRA projections and the gated MLP, forward and backward by hand, around plain GEMMs.

    y_i = norm(x) W_i^T + b_i + s_i (norm(x) A_i^T) B_i^T (+ residual)
    out = residual + down(silu(gate(norm(x))) * up(norm(x)))

Every product is torch.mm or addmm (cuBLAS, oneDNN): on sm_75 Triton's tl.dot has no tensor cores. The element-wise
rest comes as an `Elementwise` table, eager or Triton, so this choreography exists once. The A matrices that read
one input share a GEMM; the low-rank part is added by addmm_ where the output lies. Saved for the backward: the
block's input, one fp32 number per row for the norm, the rank-r projections, and gate and up. norm(x) and the
SwiGLU product are recomputed. The base gets no gradient; A and B get fp32 ones (on a CPU in bf16 the product
itself is rounded to bf16: oneDNN has no bf16 GEMM with fp32 output).

Shapes: T tokens, D inputs, O outputs, R rank, K the ranks of all projections that share the input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable


class Lora(NamedTuple):
    """A frozen projection with its adapter, or one that is trained itself; lora_A None is the weight alone."""

    weight: torch.Tensor | Callable[[], torch.Tensor]  # (O, D), or a function that de-quantises it on each use
    bias: torch.Tensor | None = None  # (O,)
    lora_A: torch.Tensor | None = None  # (R, D) fp32
    lora_B: torch.Tensor | None = None  # (O, R) fp32
    scaling: float = 1.0
    master: torch.Tensor | None = None  # (O, D) fp32, of which the weight is a copy: it takes the weight's gradient

    @property
    def rank(self) -> int:
        return 0 if self.lora_A is None else self.lora_A.shape[0]

    def dense(self) -> torch.Tensor:
        return self.weight() if callable(self.weight) else self.weight


class Norm(NamedTuple):
    """An RMSNorm in front of a block; its weight is frozen."""

    weight: torch.Tensor  # (D,)
    eps: float


class Elementwise(NamedTuple):
    """The memory-bound parts. Buffers named as outputs may be reused inputs."""

    rms_forward: Callable  # (x_TD, weight_D, eps) -> y_TD, rstd_T fp32
    rms_backward: Callable  # (dy_TD, x_TD, weight_D, rstd_T, residual_TD or None) -> dx_TD + residual_TD
    rms_apply: Callable  # (x_TD, weight_D, rstd_T) -> y_TD
    swiglu_forward: Callable  # (gate_TF, up_TF) -> h_TF
    swiglu_backward: Callable  # (dh_TF, gate_TF, up_TF) -> h_TF, dgate_TF, dup_TF; may overwrite its inputs
    rope: Callable  # (x_THd, cos_Td, sin_Td, sign) rotates x in place


def mm_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, accumulated and returned in fp32 where the backend has that GEMM."""
    if a.is_cuda and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    if a.dtype == torch.float16:
        return torch.mm(a.float(), b.float())
    return torch.mm(a, b).to(torch.promote_types(a.dtype, torch.float32))


def _stacked_A(projections, dtype):
    """The A matrices of the projections that have one, under each other: (K, D)."""
    parts = [p.lora_A for p in projections if p.rank]
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).to(dtype)


def _down(x_TD, projections):
    """x A^T of all projections side by side (T, K), or None."""
    if not any(p.rank for p in projections):
        return None
    return torch.mm(x_TD, _stacked_A(projections, x_TD.dtype).t())


def _split(xa_TK, projections):
    """What `_down` returned, per projection; None for one without an adapter."""
    if xa_TK is None:
        return [None] * len(projections)
    parts = iter(xa_TK.split([p.rank for p in projections if p.rank], dim=1))
    return [next(parts) if p.rank else None for p in projections]


def _scaled_B(p, dtype):
    return (p.lora_B * p.scaling).to(dtype)


def _up(x_TD, p, xa_TR, residual_TO=None):
    """x W^T + bias + xa B^T (+ residual): each after the first accumulates into the output's memory."""
    weight_DO = p.dense().t()
    if residual_TO is not None:
        y_TO = torch.addmm(residual_TO, x_TD, weight_DO)
        if p.bias is not None:
            y_TO.add_(p.bias)
    else:
        y_TO = torch.mm(x_TD, weight_DO) if p.bias is None else torch.addmm(p.bias, x_TD, weight_DO)
    return y_TO if xa_TR is None else y_TO.addmm_(xa_TR, _scaled_B(p, y_TO.dtype).t())


def _input_gradient(grads_TO, projections, need_dx):
    """(dx or None, s dy B of all projections side by side (T, K) or None) of projections that share the input."""
    parts = [torch.mm(dy, _scaled_B(p, dy.dtype)) for dy, p in zip(grads_TO, projections, strict=True) if p.rank]
    dxa_TK = None if not parts else torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    dx_TD = None
    if need_dx:
        for dy, p in zip(grads_TO, projections, strict=True):
            dx_TD = torch.mm(dy, p.dense()) if dx_TD is None else dx_TD.addmm_(dy, p.dense())
        if dxa_TK is not None:
            dx_TD.addmm_(dxa_TK, _stacked_A(projections, dx_TD.dtype))
    return dx_TD, dxa_TK


def _adapter_gradients(grads_TO, projections, x_TD, xa_TK, dxa_TK):
    """[(dA, dB, dW)] in fp32: dA = (s dy B)^T x, dB = s dy^T (x A^T), dW = dy^T x. None for what is not trained."""
    ranks = [p.rank for p in projections if p.rank]
    trained = any(p.rank and p.lora_A.requires_grad for p in projections)
    dA = iter(mm_fp32(dxa_TK.t(), x_TD).split(ranks) if trained else [None] * len(ranks))
    return [
        (
            next(dA) if p.rank else None,
            mm_fp32(xa_TR.t(), dy).mul_(p.scaling).t() if p.rank else None,
            None if p.master is None else mm_fp32(dy.t(), x_TD),
        )
        for dy, p, xa_TR in zip(grads_TO, projections, _split(xa_TK, projections), strict=True)
    ]


def _backward(grads_TO, projections, x_TD, xa_TK, need_dx):
    dx_TD, dxa_TK = _input_gradient(grads_TO, projections, need_dx)
    return dx_TD, _adapter_gradients(grads_TO, projections, x_TD, xa_TK, dxa_TK)


def _flat(projections):
    return [t for p in projections for t in (p.lora_A, p.lora_B, p.master)]


def _frozen(projections):
    return [p._replace(lora_A=None, lora_B=None, master=None) for p in projections]


def _thawed(frozen, adapters):
    parts = zip(frozen, adapters[::3], adapters[1::3], adapters[2::3], strict=True)
    return [p._replace(lora_A=a, lora_B=b, master=master) for p, a, b, master in parts]


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _shaped(y_TD, x):
    """y with the leading dims of x, and no view of anything for autograd, so that rope may write into it."""
    return torch.ops.aten._unsafe_view(y_TD, (*x.shape[:-1], y_TD.shape[-1]))


class _Projections(torch.autograd.Function):
    """Projections that share one input, which may pass a norm first; a single one may add a residual."""

    @staticmethod
    def forward(ctx, table, norm, frozen, residual, x, *adapters):
        projections = _thawed(frozen, adapters)
        x_TD = _rows(x)
        y_TD, rstd_T = (x_TD, None) if norm is None else table.rms_forward(x_TD, norm.weight, norm.eps)
        ya_TK = _down(y_TD, projections)
        residual_TO = None if residual is None else _rows(residual)
        parts = zip(projections, _split(ya_TK, projections), strict=True)
        outputs = tuple(_shaped(_up(y_TD, p, ya, residual_TO), x) for p, ya in parts)
        ctx.settings = table, norm, frozen
        ctx.save_for_backward(x, rstd_T, ya_TK, *adapters)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        table, norm, frozen = ctx.settings
        x, rstd_T, ya_TK, *adapters = ctx.saved_tensors
        x_TD, projections = _rows(x), _thawed(frozen, adapters)
        y_TD = x_TD if norm is None else table.rms_apply(x_TD, norm.weight, rstd_T)
        need_residual, need_dx = ctx.needs_input_grad[3:5]
        dx_TD, own_grads = _backward([_rows(g) for g in grads], projections, y_TD, ya_TK, need_dx)
        if need_dx and norm is not None:
            dx_TD = table.rms_backward(dx_TD, x_TD, norm.weight, rstd_T, None)
        dx = dx_TD.view_as(x) if need_dx else None
        return None, None, None, grads[0] if need_residual else None, dx, *(g for own in own_grads for g in own)


class _Mlp(torch.autograd.Function):
    """[x +] down(silu(gate(y)) * up(y)) with y = norm(x) or x."""

    @staticmethod
    def forward(ctx, table, norm, frozen, add_residual, x, *adapters):
        gate, up, down = _thawed(frozen, adapters)
        x_TD = _rows(x)
        y_TD, rstd_T = (x_TD, None) if norm is None else table.rms_forward(x_TD, norm.weight, norm.eps)
        ya_TK = _down(y_TD, (gate, up))
        gate_TF, up_TF = (_up(y_TD, p, ya) for p, ya in zip((gate, up), _split(ya_TK, (gate, up)), strict=True))
        h_TF = table.swiglu_forward(gate_TF, up_TF)
        ha_TR = _down(h_TF, (down,))
        out_TD = _up(h_TF, down, ha_TR, x_TD if add_residual else None)
        ctx.settings = table, norm, frozen, add_residual
        ctx.save_for_backward(x, rstd_T, ya_TK, gate_TF, up_TF, ha_TR, *adapters)
        return _shaped(out_TD, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        table, norm, frozen, add_residual = ctx.settings
        x, rstd_T, ya_TK, gate_TF, up_TF, ha_TR, *adapters = ctx.saved_tensors
        gate, up, down = _thawed(frozen, adapters)
        x_TD, dout_TD = _rows(x), _rows(dout)
        dh_TF, dha_TR = _input_gradient([dout_TD], (down,), True)
        h_TF, dgate_TF, dup_TF = table.swiglu_backward(dh_TF, gate_TF, up_TF)
        down_grads = _adapter_gradients([dout_TD], (down,), h_TF, ha_TR, dha_TR)
        del h_TF
        y_TD = x_TD if norm is None else table.rms_apply(x_TD, norm.weight, rstd_T)
        need_dx = ctx.needs_input_grad[4]
        dx_TD, own_grads = _backward([dgate_TF, dup_TF], (gate, up), y_TD, ya_TK, need_dx)
        residual_TD = dout_TD if add_residual else None
        if need_dx and norm is not None:
            dx_TD = table.rms_backward(dx_TD, x_TD, norm.weight, rstd_T, residual_TD)
        elif need_dx and add_residual:
            dx_TD.add_(residual_TD)
        dx = dx_TD.view_as(x) if need_dx else None
        return None, None, None, None, dx, *(g for own in (*own_grads, *down_grads) for g in own)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, x, weight_D, eps):
        y_TD, rstd_T = table.rms_forward(_rows(x), weight_D, eps)
        ctx.table = table
        ctx.save_for_backward(x, weight_D, rstd_T)
        return _shaped(y_TD, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight_D, rstd_T = ctx.saved_tensors
        x_TD, dy_TD = _rows(x), _rows(dy)
        dweight = None
        if ctx.needs_input_grad[2]:
            dweight = (dy_TD.to(rstd_T.dtype) * x_TD * rstd_T[:, None]).sum(0).to(weight_D.dtype)
        dx_TD = ctx.table.rms_backward(dy_TD, x_TD, weight_D, rstd_T, None)
        return None, dx_TD.view_as(x), dweight, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, gate, up):
        ctx.table = table
        ctx.save_for_backward(gate, up)
        return _shaped(table.swiglu_forward(_rows(gate), _rows(up)), gate)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        gate, up = ctx.saved_tensors
        copies = [t.clone(memory_format=torch.contiguous_format) for t in (dh, gate, up)]
        _, dgate, dup = ctx.table.swiglu_backward(*map(_rows, copies))
        return None, dgate.view_as(gate), dup.view_as(up)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, q, k, cos, sin):
        ctx.table = table
        cos_Td, sin_Td = _rows(cos), _rows(sin)
        ctx.save_for_backward(cos_Td, sin_Td)
        ctx.mark_dirty(q, k)
        for x in (q, k):
            table.rope(x.view(len(cos_Td), -1, cos.shape[-1]), cos_Td, sin_Td, 1.0)
        return q, k

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        cos_Td, sin_Td = ctx.saved_tensors
        grads = tuple(g.clone(memory_format=torch.contiguous_format) for g in grads)
        for g in grads:
            ctx.table.rope(g.view(len(cos_Td), -1, cos_Td.shape[-1]), cos_Td, sin_Td, -1.0)
        return None, *grads, None, None


class LayerOps(NamedTuple):
    """The differentiable functions of a decoder layer over one `Elementwise` table. Leading dims are free."""

    table: Elementwise

    def lora_linear(self, x, weight, bias, lora_A, lora_B, scaling, master=None, *, residual=None):
        """x W^T + bias + scaling (x A^T) B^T (+ residual), in x's dtype; gradients for x, A, B, master and residual."""
        return self._project(x, None, (Lora(weight, bias, lora_A, lora_B, scaling, master),), residual)[0]

    def lora_qkv(self, x, q: Lora, k: Lora, v: Lora, *, norm: Norm | None = None):
        """(q, k, v) projections of x, or of its RMSNorm."""
        return self._project(x, norm, (q, k, v), None)

    def lora_mlp(self, x, gate: Lora, up: Lora, down: Lora, *, norm: Norm | None = None, residual: bool = False):
        """down(silu(gate(y)) * up(y)) with y = x or its RMSNorm, plus x if `residual`."""
        projections = (gate, up, down)
        return _Mlp.apply(self.table, norm, _frozen(projections), residual, x, *_flat(projections))

    def rms_norm(self, x, weight, eps):
        """weight * x / sqrt(mean(x^2) + eps), in fp32 inside."""
        return _RmsNorm.apply(self.table, x, weight, eps)

    def swiglu(self, gate, up):
        """silu(gate) * up."""
        return _SwiGlu.apply(self.table, gate, up)

    def rope(self, q, k, cos, sin):
        """Rotate q and k IN PLACE by cos, sin (..., d), halves convention; returns (q, k).

        q (..., H*d) or (..., H, d) and k likewise, contiguous and no views.
        The rows of cos and sin belong to the packed position ids. The backward rotates back: nothing is saved.
        """
        return _Rope.apply(self.table, q, k, cos, sin)

    def _project(self, x, norm, projections, residual):
        return _Projections.apply(self.table, norm, _frozen(projections), residual, x, *_flat(projections))
