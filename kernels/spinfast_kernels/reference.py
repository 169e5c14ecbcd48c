"""The eager twins: every kernel of this package in plain torch, same names and signatures.

They are the kernels' test oracle, the CPU backend and the benchmark's baseline. This file holds the scored head
and the pairwise loss; `reference_layer` holds the decoder layer's parts and is re-exported here.

Shapes: N scored tokens, D model dim, V vocabulary, S = 2P sequences (even: real, odd: generated), P pairs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch.nn.functional import logsigmoid

Kind = Literal["logistic", "hinge", "exponential", "ipo"]
CHUNK_TOKENS = 768  # with VOCAB_BLOCK, measured best for bf16 on AMX: the logits block (6 MB) stays in cache
VOCAB_BLOCK = 4096


def linear_logps(hidden_ND, weight_VD, targets_N, *, bias=None, temperature=1.0, chunk_tokens=None):
    """log_softmax((hidden_ND @ weight_VD.T + bias) / temperature)[n, targets_N[n]], in fp32, one sweep over V.

    With z the target's logit and L the log-sum-exp of all the others, logp = log sigmoid(z - L) and
    d logp / d hidden = u = sigmoid(L - z) * (W_target - mean of the other rows of W under softmax) / temperature.
    Taking the target out of the sums keeps both exact to relative precision when its probability nears 1.
    V is walked in blocks with a running maximum, as in online softmax, so no (N, V) tensor exists; u is
    stored in the input dtype and the backward is one product with the incoming fp32 coefficient. Without a
    gradient for `hidden_ND` the second GEMM is skipped. A trainable head recomputes its logits in the backward.
    Rows with a negative target are not computed: their logp and gradient are 0.

    hidden_ND (N, D) and weight_VD (V, D) of one dtype, targets_N (N,) int64, bias (V,) or None;
    chunk_tokens: rows swept at once. Returns (N,) fp32 (fp64 for fp64 inputs).
    """
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden_ND, weight_VD, bias))
    chunk = chunk_tokens or CHUNK_TOKENS
    return _LinearLogps.apply(hidden_ND, weight_VD, targets_N, bias, float(temperature), chunk, needs)


def _logits(out, h_ND, w_BD, bias_B, temperature):
    """Logits of one vocabulary block, written into `out`; scaled inside the GEMM, before rounding."""
    scale = 1.0 / temperature
    if bias_B is not None:
        return torch.addmm(bias_B.to(h_ND.dtype), h_ND, w_BD.t(), beta=scale, alpha=scale, out=out)
    if scale == 1.0:
        return torch.mm(h_ND, w_BD.t(), out=out)
    return torch.addmm(out, h_ND, w_BD.t(), beta=0.0, alpha=scale, out=out)


def _blocks(h_ND, weight_VD, bias, temperature):
    """Yields (first row, W block, logits block), all logits in one buffer of N x VOCAB_BLOCK."""
    N, V = h_ND.shape[0], weight_VD.shape[0]
    buffer = h_ND.new_empty(N * min(VOCAB_BLOCK, V))
    for start in range(0, V, VOCAB_BLOCK):
        w_BD = weight_VD[start : start + VOCAB_BLOCK]
        bias_B = None if bias is None else bias[start : start + VOCAB_BLOCK]
        out = buffer[: N * w_BD.shape[0]].view(N, w_BD.shape[0])
        yield start, w_BD, _logits(out, h_ND, w_BD, bias_B, temperature)


def _sweep(h_ND, weight_VD, targets_N, bias, temperature, need_unit):
    """(target logit z, log-sum-exp of the others L, unit gradient u or None) of one chunk of tokens."""
    wide = torch.promote_types(h_ND.dtype, torch.float32)
    N, D = h_ND.shape
    lowest = torch.finfo(h_ND.dtype).min
    top_N1 = torch.full((N, 1), lowest, dtype=wide, device=h_ND.device)
    target_N1, sum_N1 = torch.zeros_like(top_N1), torch.zeros_like(top_N1)
    mean_ND = torch.zeros(N, D, dtype=wide, device=h_ND.device) if need_unit else None
    for start, w_BD, logits_NB in _blocks(h_ND, weight_VD, bias, temperature):
        column_N1 = targets_N[:, None] - start
        inside_N1 = (column_N1 >= 0) & (column_N1 < w_BD.shape[0])
        column_N1 = column_N1.clamp(0, w_BD.shape[0] - 1)
        found_N1 = logits_NB.gather(1, column_N1)
        target_N1 = torch.where(inside_N1, found_N1.to(wide), target_N1)
        logits_NB.scatter_(1, column_N1, found_N1.masked_fill(inside_N1, float("-inf")))
        new_N1 = torch.maximum(top_N1, logits_NB.amax(1, keepdim=True).to(wide))
        shrink_N1 = torch.exp(top_N1 - new_N1)
        top_N1 = new_N1
        p_NB = logits_NB.sub_(top_N1.to(logits_NB.dtype)).exp_()
        sum_N1 = sum_N1 * shrink_N1 + p_NB.sum(1, keepdim=True, dtype=wide)
        if need_unit:
            mean_ND.mul_(shrink_N1).add_(torch.mm(p_NB, w_BD))
    others_N = (top_N1 + sum_N1.log()).squeeze(1)
    target_N = target_N1.squeeze(1)
    if not need_unit:
        return target_N, others_N, None
    mean_ND.div_(sum_N1.clamp_min(torch.finfo(wide).tiny))
    odds_N1 = torch.sigmoid(others_N - target_N)[:, None] / temperature
    unit_ND = torch.sub(weight_VD[targets_N].to(wide), mean_ND).mul_(odds_N1).to(h_ND.dtype)
    return target_N, others_N, unit_ND


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, bias, temperature, chunk_tokens, needs):
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        rows_M = (targets_N >= 0).nonzero().squeeze(1)
        logps_N = torch.zeros(len(targets_N), dtype=wide, device=hidden_ND.device)
        lse_N = torch.zeros_like(logps_N)
        unit_ND = torch.zeros_like(hidden_ND) if needs[0] else None
        for rows_C in rows_M.split(chunk_tokens) if len(rows_M) else ():
            h_CD, targets_C = hidden_ND[rows_C], targets_N[rows_C]
            z_C, others_C, unit_CD = _sweep(h_CD, weight_VD, targets_C, bias, temperature, needs[0])
            logps_N[rows_C] = logsigmoid(z_C - others_C)
            lse_N[rows_C] = torch.logaddexp(z_C, others_C)
            if needs[0]:
                unit_ND[rows_C] = unit_CD
        ctx.settings = (temperature, chunk_tokens, needs)
        head = (hidden_ND, weight_VD, bias, targets_N, rows_M, lse_N) if needs[1] or needs[2] else ()
        ctx.save_for_backward(unit_ND, *head)
        return logps_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N):
        unit_ND, *head = ctx.saved_tensors
        temperature, chunk_tokens, needs = ctx.settings
        grad_hidden = (unit_ND * grad_N[:, None]).to(unit_ND.dtype) if needs[0] else None
        grad_weight = grad_bias = None
        if head:
            grad_weight, grad_bias = _head_gradients(*head, grad_N / temperature, temperature, chunk_tokens)
        return (
            grad_hidden,
            grad_weight if needs[1] else None,
            None,
            grad_bias if needs[2] else None,
            None,
            None,
            None,
        )


def _head_gradients(hidden_ND, weight_VD, bias, targets_N, rows_M, lse_N, grad_N, temperature, chunk_tokens):
    """(dW, db) in the parameters' dtypes, accumulated in fp32: sum_n c_n (onehot_n - p_n) (h_n, 1)."""
    grad_VD = torch.zeros(weight_VD.shape, dtype=grad_N.dtype, device=grad_N.device)
    grad_V = grad_N.new_zeros(weight_VD.shape[0])
    for rows_C in rows_M.split(chunk_tokens) if len(rows_M) else ():
        h_CD, c_C1, targets_C1 = hidden_ND[rows_C], grad_N[rows_C, None], targets_N[rows_C, None]
        for start, w_BD, logits_CB in _blocks(h_CD, weight_VD, bias, temperature):
            block = slice(start, start + w_BD.shape[0])
            p_CB = (logits_CB.to(grad_N.dtype) - lse_N[rows_C, None]).exp_().neg_()
            column_C1 = targets_C1 - start
            inside_C1 = (column_C1 >= 0) & (column_C1 < w_BD.shape[0])
            p_CB.scatter_add_(1, column_C1.clamp(0, w_BD.shape[0] - 1), inside_C1.to(p_CB.dtype))
            p_CB.mul_(c_C1)
            grad_V[block] += p_CB.sum(0)
            grad_VD[block] += torch.mm(p_CB.to(h_CD.dtype).t(), h_CD)
    return grad_VD.to(weight_VD.dtype), None if bias is None else grad_V.to(bias.dtype)


class PairwiseLoss(NamedTuple):
    """What one microbatch of pairs gives. Only `loss` carries a gradient."""

    loss: torch.Tensor  # the SUM over pairs: divide by the pairs of the optimizer step, so microbatches add up
    margins_P: torch.Tensor  # beta * (real_logratio - generated_logratio)
    real_logratio_P: torch.Tensor  # log p(real) / p_opponent(real)
    generated_logratio_P: torch.Tensor


LOSSES = {  # l(z) of a margin z = beta * d
    "logistic": lambda z, beta: -logsigmoid(z),
    "hinge": lambda z, beta: (1 - z).clamp_min(0),
    "exponential": lambda z, beta: torch.exp(-z),
    "ipo": lambda z, beta: (z / beta - 1 / (2 * beta)) ** 2,
}


def pairwise_loss(logps_N, sequence_ids_N, opponent_logps_S, *, beta: float, kind: Kind = "logistic") -> PairwiseLoss:
    """sum_P l(beta * [(sum logps of real - opponent's) - (sum logps of generated - opponent's)]).

    SPIN, arXiv 2401.01335 Eq. 4.7, with l one of LOSSES. Sequences 2p and 2p + 1 are the real and the generated
    answer of pair p; sequence_ids_N is ascending and every sequence has at least one token. The sums are over
    contiguous segments in a fixed order, so they are deterministic.
    """
    sequences = torch.arange(len(opponent_logps_S) + 1, device=sequence_ids_N.device)
    offsets = torch.searchsorted(sequence_ids_N, sequences)
    sums_S = torch.segment_reduce(logps_N, "sum", offsets=offsets, unsafe=True)
    real_P, generated_P = (sums_S - opponent_logps_S).view(-1, 2).unbind(1)
    margins_P = beta * (real_P - generated_P)
    loss = LOSSES[kind](margins_P, beta).sum()
    return PairwiseLoss(loss, margins_P.detach(), real_P.detach(), generated_P.detach())
