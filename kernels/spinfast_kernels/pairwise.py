"""The pairwise log-ratio loss and its per-token coefficients in one launch, one program per pair.

    z = beta [(sum logps of real - opponent's) - (sum logps of generated - opponent's)],  loss = sum_P l(z)
    d loss / d logp = + beta l'(z) on the real answer's tokens, - beta l'(z) on the generated one's

(SPIN, arXiv 2401.01335 Eq. 4.7.) Each sum runs over one contiguous segment in a fixed order: no atomics, so the
loss and its gradient are the same bits on every run. Memory: the coefficients, N fp32 numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spinfast_kernels.reference import Kind, PairwiseLoss

KINDS = {"logistic": 0, "hinge": 1, "exponential": 2, "ipo": 3}
BLOCK = 256


@triton.jit
def _segment_sum(logps, start, end, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        total += tl.load(logps + token, mask=token < end, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _segment_fill(out, start, end, value, BLOCK: tl.constexpr):
    for first in range(start, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        tl.store(out + token, tl.zeros([BLOCK], tl.float32) + value, mask=token < end)


@triton.jit
def _pair_kernel(
    logps, offsets, opponent, losses, margins, real_out, generated_out, coefficients, beta, KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    start = tl.load(offsets + 2 * pair)
    middle = tl.load(offsets + 2 * pair + 1)
    end = tl.load(offsets + 2 * pair + 2)
    real = _segment_sum(logps, start, middle, BLOCK) - tl.load(opponent + 2 * pair)
    generated = _segment_sum(logps, middle, end, BLOCK) - tl.load(opponent + 2 * pair + 1)
    z = beta * (real - generated)
    if KIND == 0:  # log(1 + e^-z) without overflow
        small = tl.exp(-tl.abs(z))
        loss = tl.maximum(-z, 0.0) + tl.where(small < 1e-4, small, tl.log(1.0 + small))
        slope = -tl.sigmoid(-z)
    elif KIND == 1:
        loss = tl.maximum(1.0 - z, 0.0)
        slope = tl.where(z < 1.0, -1.0, 0.0)
    elif KIND == 2:
        loss = tl.exp(-z)
        slope = -loss
    else:
        distance = z / beta - 0.5 / beta
        loss = distance * distance
        slope = 2.0 * distance / beta
    tl.store(losses + pair, loss)
    tl.store(margins + pair, z)
    tl.store(real_out + pair, real)
    tl.store(generated_out + pair, generated)
    _segment_fill(coefficients, start, middle, beta * slope, BLOCK)
    _segment_fill(coefficients, middle, end, -beta * slope, BLOCK)


class _PairwiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logps_N, sequence_ids_N, opponent_logps_S, beta, kind):
        S = len(opponent_logps_S)
        offsets = torch.searchsorted(sequence_ids_N, torch.arange(S + 1, device=sequence_ids_N.device))
        losses_P, margins_P, real_P, generated_P = torch.empty(4, S // 2, device=logps_N.device).unbind()
        coefficients_N = torch.empty_like(logps_N)
        if S:
            _pair_kernel[(S // 2,)](
                logps_N, offsets, opponent_logps_S, losses_P, margins_P, real_P, generated_P, coefficients_N,
                float(beta), KIND=KINDS[kind], BLOCK=BLOCK,
            )  # fmt: skip
        ctx.save_for_backward(coefficients_N)
        ctx.mark_non_differentiable(margins_P, real_P, generated_P)
        return losses_P.sum(), margins_P, real_P, generated_P

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        (coefficients_N,) = ctx.saved_tensors
        return coefficients_N * grad, None, None, None, None


def pairwise_loss(logps_N, sequence_ids_N, opponent_logps_S, *, beta: float, kind: Kind = "logistic") -> PairwiseLoss:
    """reference.pairwise_loss, fp32."""
    return PairwiseLoss(*_PairwiseLoss.apply(logps_N.contiguous(), sequence_ids_N, opponent_logps_S, beta, kind))
