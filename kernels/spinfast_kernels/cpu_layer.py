"""The decoder layer's element-wise parts on a CPU, each one pass over its rows; see rms_norm.py, swiglu.py, rope.py
for the same on a GPU, and blocks.py for what lies between.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from spinfast_kernels import reference
from spinfast_kernels.blocks import Elementwise, LayerOps
from spinfast_kernels.cpu import compiled, launch, narrow, or_eager, sigmoid, widen


@compiled
def _rms_kernel(x_TD, weight_D, eps, known, rstd_T, y_TD):
    T, D = x_TD.shape
    for t in prange(T):
        if not known:
            total = np.float32(0.0)
            for d in range(D):
                x = widen(x_TD[t, d])
                total += x * x
            rstd_T[t] = np.float32(1.0) / np.sqrt(total / np.float32(D) + np.float32(eps))
        for d in range(D):
            y_TD[t, d] = narrow(widen(x_TD[t, d]) * rstd_T[t] * widen(weight_D[d]), x_TD[t, d])


@compiled
def _rms_backward_kernel(dy_TD, x_TD, weight_D, rstd_T, residual_TD, dx_TD):
    """dx = rstd (g - xhat mean(g xhat)) + residual with g = dy w, xhat = x rstd; residual (0, D) is none."""
    T, D = x_TD.shape
    for t in prange(T):
        rstd, total = rstd_T[t], np.float32(0.0)
        for d in range(D):
            total += widen(dy_TD[t, d]) * widen(weight_D[d]) * widen(x_TD[t, d])
        share = total * rstd * rstd / np.float32(D)
        if len(residual_TD):
            for d in range(D):
                g, x = widen(dy_TD[t, d]) * widen(weight_D[d]), widen(x_TD[t, d])
                dx_TD[t, d] = narrow(rstd * (g - x * share) + widen(residual_TD[t, d]), x_TD[t, d])
        else:
            for d in range(D):
                g, x = widen(dy_TD[t, d]) * widen(weight_D[d]), widen(x_TD[t, d])
                dx_TD[t, d] = narrow(rstd * (g - x * share), x_TD[t, d])


@compiled
def _swiglu_kernel(gate_TF, up_TF, h_TF):
    T, F = gate_TF.shape
    for t in prange(T):
        for f in range(F):
            gate = widen(gate_TF[t, f])
            h_TF[t, f] = narrow(gate * sigmoid(gate) * widen(up_TF[t, f]), gate_TF[t, f])


@compiled
def _swiglu_backward_kernel(dh_TF, gate_TF, up_TF):
    """(h, dgate, dup) in the place of (dh, gate, up)."""
    T, F = gate_TF.shape
    for t in prange(T):
        for f in range(F):
            dh, gate, up = widen(dh_TF[t, f]), widen(gate_TF[t, f]), widen(up_TF[t, f])
            s = sigmoid(gate)
            silu, like = gate * s, gate_TF[t, f]
            dh_TF[t, f] = narrow(silu * up, like)
            gate_TF[t, f] = narrow(dh * up * s * (np.float32(1.0) + gate * (np.float32(1.0) - s)), like)
            up_TF[t, f] = narrow(dh * silu, like)


@compiled
def _rope_kernel(x_THd, cos_Td, sin_Td, sign):
    T, H, d = x_THd.shape
    half = d // 2
    for t in prange(T):
        for h in range(H):
            for c in range(half):
                cos, sin = widen(cos_Td[t, c]), widen(sin_Td[t, c]) * np.float32(sign)
                a, b, like = widen(x_THd[t, h, c]), widen(x_THd[t, h, half + c]), x_THd[t, h, c]
                x_THd[t, h, c] = narrow(a * cos - b * sin, like)
                x_THd[t, h, half + c] = narrow(b * cos + a * sin, like)


def _rms_forward(x_TD, weight_D, eps):
    y_TD, rstd_T = torch.empty_like(x_TD), torch.empty(len(x_TD), dtype=torch.float32, device=x_TD.device)
    launch(_rms_kernel, x_TD, weight_D, float(eps), False, rstd_T, y_TD)
    return y_TD, rstd_T


def _rms_apply(x_TD, weight_D, rstd_T):
    y_TD = torch.empty_like(x_TD)
    launch(_rms_kernel, x_TD, weight_D, 0.0, True, rstd_T, y_TD)
    return y_TD


def _rms_backward(dy_TD, x_TD, weight_D, rstd_T, residual_TD):
    dx_TD = torch.empty_like(x_TD)
    launch(
        _rms_backward_kernel, dy_TD.contiguous(), x_TD, weight_D, rstd_T,
        x_TD[:0] if residual_TD is None else residual_TD.contiguous(), dx_TD,
    )  # fmt: skip
    return dx_TD


def _swiglu_forward(gate_TF, up_TF):
    h_TF = torch.empty_like(gate_TF)
    launch(_swiglu_kernel, gate_TF, up_TF, h_TF)
    return h_TF


def _swiglu_backward(dh_TF, gate_TF, up_TF):
    launch(_swiglu_backward_kernel, dh_TF, gate_TF, up_TF)
    torch.autograd.graph.increment_version((dh_TF, gate_TF, up_TF))
    return dh_TF, gate_TF, up_TF


def _rope(x_THd, cos_Td, sin_Td, sign):
    launch(_rope_kernel, x_THd, cos_Td.contiguous(), sin_Td.contiguous(), float(sign))


_kernels = Elementwise(_rms_forward, _rms_backward, _rms_apply, _swiglu_forward, _swiglu_backward, _rope)
_layer = LayerOps(Elementwise(*map(or_eager, _kernels, reference.TABLE)))
lora_linear, lora_qkv, lora_mlp = _layer.lora_linear, _layer.lora_qkv, _layer.lora_mlp
rms_norm, swiglu, rope = _layer.rms_norm, _layer.swiglu, _layer.rope
