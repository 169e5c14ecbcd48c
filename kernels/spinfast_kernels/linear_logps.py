"""The one-sweep head on a GPU: two cuBLAS GEMMs per chunk of tokens around one Triton row kernel.

    logits = h W^T -> (z, z - L) and p in place -> mean = p W -> u = sigmoid(L - z) (W_target - mean) / temperature

with z the target's logit, L the log-sum-exp of the others, p their softmax (0 at the target). See reference.py for
the maths. Memory: one (chunk, V) buffer in the input dtype, overwritten in place, and u (N, D). fp16: p is stored
times 2^10, so that probabilities down to 6e-11 survive, and the GEMM's alpha takes it out again; the loss
coefficient meets u in fp32 and only then is rounded, so a loss scale of 2^16 and coefficients of 1e-8 are safe.

Shapes: C tokens of a chunk, N tokens, D model dim, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spinfast_kernels import reference

CHUNK_TOKENS = 256  # 78 MB of fp16 logits at V = 151,936
P_SCALE = 1024.0


@triton.jit
def _row_kernel(
    logits, targets, z_out, gap_out, V, stride, P_SCALE: tl.constexpr, WRITE_P: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per row: z, z - L, and exp(logits - L) * P_SCALE in place with 0 at the target."""
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * stride
    target = tl.load(targets + row).to(tl.int32)
    z = tl.load(base + target).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        column = start + columns
        x = tl.load(base + column, mask=column < V, other=float("-inf")).to(tl.float32)
        x = tl.where(column == target, float("-inf"), x)  # not in the mask, which would load element by element
        higher = tl.maximum(top, x)
        total = total * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
    highest = tl.max(top, 0)
    rest = tl.sum(total * tl.exp(top - highest), 0)
    tl.store(z_out + row, z)
    tl.store(gap_out + row, (z - highest) - tl.log(rest))
    if WRITE_P:
        scale = tl.where(rest > 0.0, P_SCALE / rest, 0.0)  # V = 1 has no others
        for start in range(0, V, BLOCK):
            column = start + columns
            x = tl.load(base + column, mask=column < V, other=float("-inf")).to(tl.float32)
            x = tl.where(column == target, float("-inf"), x)
            tl.store(base + column, (tl.exp(x - highest) * scale).to(logits.dtype.element_ty), mask=column < V)


@triton.jit
def _unit_kernel(mean, weight, targets, gap_in, unit, D, weight_stride, inverse_temperature, BLOCK: tl.constexpr):
    """One program per row: u = sigmoid(L - z) (W_target - mean) / temperature."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    target = tl.load(targets + row)
    odds = tl.sigmoid(-tl.load(gap_in + row)) * inverse_temperature
    w = tl.load(weight + target * weight_stride + column, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(mean + row * D + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(unit + row * D + column, (odds * (w - m)).to(unit.dtype.element_ty), mask=inside)


def _sweep(h_CD, weight_VD, targets_C, bias, temperature, need_unit):
    """reference._sweep with the row work in Triton."""
    (C, D), V = h_CD.shape, weight_VD.shape[0]
    logits_CV = reference.logits(h_CD.new_empty(C, V), h_CD, weight_VD, bias, temperature)
    z_C, gap_C = torch.empty(2, C, dtype=torch.float32, device=h_CD.device).unbind()
    _row_kernel[(C,)](
        logits_CV, targets_C, z_C, gap_C, V, V, P_SCALE, WRITE_P=need_unit, BLOCK=row_block(V), num_warps=8
    )
    if not need_unit:
        return z_C, gap_C, None
    mean_CD = h_CD.new_empty(C, D)
    torch.addmm(mean_CD, logits_CV, weight_VD, beta=0.0, alpha=1.0 / P_SCALE, out=mean_CD)
    unit_CD = torch.empty_like(mean_CD)
    _unit_kernel[(C,)](
        mean_CD, weight_VD, targets_C, gap_C, unit_CD, D, weight_VD.stride(0), 1.0 / temperature,
        BLOCK=triton.next_power_of_2(D),
    )  # fmt: skip
    return z_C, gap_C, unit_CD


def row_block(V: int) -> int:
    return min(4096, triton.next_power_of_2(V))


def linear_logps(hidden_ND, weight_VD, targets_N, *, bias=None, temperature=1.0, chunk_tokens=None):
    """reference.linear_logps; weight_VD with unit stride along D."""
    chunk = chunk_tokens or CHUNK_TOKENS
    return reference.swept_logps(_sweep, hidden_ND, weight_VD, targets_N, bias, temperature, chunk)
