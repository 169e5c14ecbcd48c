"""SwiGLU h = silu(gate) up, and a backward that writes over its three inputs.

    s = sigmoid(gate):  h = gate s up,  dup = dh gate s,  dgate = dh up s (1 + gate (1 - s))

The backward reads (dh, gate, up) and leaves (h, dgate, dup) in their place: h is needed again for down's LoRA A, and
nothing is allocated. Traffic: 3 reads and 3 writes of (T, F) where eager makes about 14 passes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _forward_kernel(gate_in, up_in, h_out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gate = tl.load(gate_in + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_in + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(h_out + at, (gate * tl.sigmoid(gate) * up).to(h_out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(dh_io, gate_io, up_io, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    dh = tl.load(dh_io + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_io + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_io + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    silu = gate * s
    dtype = dh_io.dtype.element_ty
    tl.store(dh_io + at, (silu * up).to(dtype), mask=inside)
    tl.store(gate_io + at, (dh * up * s * (1.0 + gate * (1.0 - s))).to(dtype), mask=inside)
    tl.store(up_io + at, (dh * silu).to(dtype), mask=inside)


def forward(gate_TF, up_TF):
    gate_TF, up_TF = gate_TF.contiguous(), up_TF.contiguous()
    h_TF = torch.empty_like(gate_TF)
    if h_TF.numel():
        _forward_kernel[(triton.cdiv(h_TF.numel(), BLOCK),)](gate_TF, up_TF, h_TF, h_TF.numel(), BLOCK=BLOCK)
    return h_TF


def backward(dh_TF, gate_TF, up_TF):
    """(h, dgate, dup) in the memory of (dh, gate, up), all contiguous; autograd is told, so a second backward fails."""
    if dh_TF.numel():
        _backward_kernel[(triton.cdiv(dh_TF.numel(), BLOCK),)](dh_TF, gate_TF, up_TF, dh_TF.numel(), BLOCK=BLOCK)
    torch.autograd.graph.increment_version((dh_TF, gate_TF, up_TF))
    return dh_TF, gate_TF, up_TF
