"""The eager twins: every kernel of this package in plain torch, same names and signatures.

They are the kernels' test oracle, what runs where nothing is compiled, and the benchmark's baseline. The GEMMs of a
decoder layer are in blocks.py; here are its element-wise parts.

Shapes: N scored tokens, D model dim, V vocabulary, S = 2P sequences (even: real, odd: generated), P pairs;
in the layer: T tokens, F hidden features of the MLP, H heads of d.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import logsigmoid, silu

from spinfast_kernels.blocks import Elementwise, LayerOps

Kind = Literal["logistic", "hinge", "exponential", "ipo"]
CHUNK_TOKENS, VOCAB_BLOCK = 1024, 1024  # measured best for bf16 on AMX with 2 MB of L2 per core: bench/LOG.md


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
    return swept_logps(_sweep, hidden_ND, weight_VD, targets_N, bias, temperature, chunk_tokens or CHUNK_TOKENS)


def swept_logps(sweep, hidden_ND, weight_VD, targets_N, bias, temperature, chunk_tokens):
    """linear_logps by a given `sweep` over a chunk of tokens, see _sweep; the kernels bring their own."""
    differentiable = torch.is_grad_enabled()
    needs = tuple(differentiable and t is not None and t.requires_grad for t in (hidden_ND, weight_VD, bias))
    return _LinearLogps.apply(
        hidden_ND, weight_VD, targets_N, bias, sweep, float(temperature), int(chunk_tokens), needs
    )


def logits(out, h_ND, w_BD, bias_B, temperature):
    """Logits of one vocabulary block, written into `out`; scaled inside the GEMM, before rounding."""
    scale = 1.0 / temperature
    if bias_B is not None:
        return torch.addmm(bias_B.to(h_ND.dtype), h_ND, w_BD.t(), beta=scale, alpha=scale, out=out)
    if scale == 1.0:
        return torch.mm(h_ND, w_BD.t(), out=out)
    return torch.addmm(out, h_ND, w_BD.t(), beta=0.0, alpha=scale, out=out)


def _blocks(h_ND, weight_VD, targets_N, bias, temperature):
    """Yields (block slice, W block, logits block, same in fp32, target columns, whether the target is inside).

    All blocks share two buffers, small enough that a block's passes stay in cache.
    """
    N, V = h_ND.shape[0], weight_VD.shape[0]
    wide_dtype = torch.promote_types(h_ND.dtype, torch.float32)
    buffer = h_ND.new_empty(N * min(VOCAB_BLOCK, V))
    wide = buffer if wide_dtype == h_ND.dtype else torch.empty_like(buffer, dtype=wide_dtype)
    for start in range(0, V, VOCAB_BLOCK):
        block = slice(start, min(start + VOCAB_BLOCK, V))
        w_BD = weight_VD[block]
        shape = N, w_BD.shape[0]
        logits_NB = buffer[: N * shape[1]].view(shape)
        logits(logits_NB, h_ND, w_BD, None if bias is None else bias[block], temperature)
        wide_NB = wide[: N * shape[1]].view(shape)
        if wide is not buffer:
            wide_NB.copy_(logits_NB)
        column_N1 = targets_N[:, None] - start
        clamped_N1 = column_N1.clamp(0, shape[1] - 1)
        yield block, w_BD, logits_NB, wide_NB, clamped_N1, clamped_N1 == column_N1


def _sweep(h_ND, weight_VD, targets_N, bias, temperature, need_unit):
    """(target logit z, z - L with L the log-sum-exp of the others, unit gradient u or None) of one chunk."""
    wide = torch.promote_types(h_ND.dtype, torch.float32)
    N, D = h_ND.shape
    target_N1 = torch.zeros(N, 1, dtype=wide, device=h_ND.device)
    top_N1 = torch.full_like(target_N1, torch.finfo(wide).min)
    sum_N1 = torch.zeros_like(target_N1)
    mean_ND = target_N1.new_zeros(N, D) if need_unit else None
    for _, w_BD, logits_NB, wide_NB, column_N1, inside_N1 in _blocks(h_ND, weight_VD, targets_N, bias, temperature):
        found_N1 = wide_NB.gather(1, column_N1)
        target_N1 = torch.where(inside_N1, found_N1, target_N1)
        wide_NB.scatter_(1, column_N1, found_N1.masked_fill_(inside_N1, float("-inf")))
        new_N1 = torch.maximum(top_N1, wide_NB.amax(1, keepdim=True))
        shrink_N1 = top_N1.sub_(new_N1).exp_()
        top_N1 = new_N1
        p_NB = wide_NB.sub_(top_N1).exp_()
        torch.addcmul(p_NB.sum(1, keepdim=True), sum_N1, shrink_N1, out=sum_N1)
        if need_unit:
            part_ND = torch.mm(logits_NB.copy_(p_NB), w_BD).to(wide)
            torch.addcmul(part_ND, mean_ND, shrink_N1, out=mean_ND)
    return swept(target_N1, top_N1, sum_N1, mean_ND, weight_VD, targets_N, temperature)


def swept(target_N1, top_N1, sum_N1, mean_ND, weight_VD, targets_N, temperature):
    """What a sweep returns, of the target's logit and the others' maximum, sum of exp(x - maximum) and, or None,
    mean of W under those numbers; mean_ND is used up."""
    gap_N1 = (target_N1 - top_N1).sub_(sum_N1.log())
    if mean_ND is None:
        return target_N1.squeeze(1), gap_N1.squeeze(1), None
    mean_ND.div_(sum_N1.clamp_min(torch.finfo(sum_N1.dtype).tiny))
    odds_N1 = torch.sigmoid(-gap_N1) / temperature
    unit_ND = torch.sub(weight_VD[targets_N].to(mean_ND.dtype), mean_ND).mul_(odds_N1).to(weight_VD.dtype)
    return target_N1.squeeze(1), gap_N1.squeeze(1), unit_ND


def _chunks(targets_N, chunk_tokens):
    """Indices of the rows to compute, chunk by chunk: slices where every row is, else index tensors.

    A fake tensor (a simulation of the step's memory) has no values and counts in full.
    """
    keep_N = targets_N >= 0
    if isinstance(targets_N, FakeTensor) or bool(keep_N.all()):
        return [slice(i, i + chunk_tokens) for i in range(0, len(targets_N), chunk_tokens)]
    rows = keep_N.nonzero().squeeze(1)
    return [rows[i : i + chunk_tokens] for i in range(0, len(rows), chunk_tokens)]


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, targets_N, bias, sweep, temperature, chunk_tokens, needs):
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        logps_N = torch.zeros(len(targets_N), dtype=wide, device=hidden_ND.device)
        lse_N = torch.zeros_like(logps_N)
        unit_ND = torch.zeros_like(hidden_ND) if needs[0] else None
        for rows in _chunks(targets_N, chunk_tokens):
            z_C, gap_C, unit_CD = sweep(hidden_ND[rows], weight_VD, targets_N[rows], bias, temperature, needs[0])
            logps_N[rows] = logsigmoid(gap_C)
            lse_N[rows] = z_C - logps_N[rows]
            if needs[0]:
                unit_ND[rows] = unit_CD
        ctx.settings = (temperature, chunk_tokens, needs)
        head = (hidden_ND, weight_VD, bias, targets_N, lse_N) if needs[1] or needs[2] else ()
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
        grad_weight, grad_bias = grad_weight if needs[1] else None, grad_bias if needs[2] else None
        return grad_hidden, grad_weight, None, grad_bias, None, None, None, None


def _head_gradients(hidden_ND, weight_VD, bias, targets_N, lse_N, grad_N, temperature, chunk_tokens):
    """(dW, db) in the parameters' dtypes, accumulated in fp32: sum_n c_n (onehot_n - p_n) (h_n, 1)."""
    grad_VD = torch.zeros(weight_VD.shape, dtype=grad_N.dtype, device=grad_N.device)
    grad_V = grad_N.new_zeros(weight_VD.shape[0])
    for rows in _chunks(targets_N, chunk_tokens):
        h_CD, lse_C1, c_C1 = hidden_ND[rows], lse_N[rows, None], grad_N[rows, None]
        blocks = _blocks(h_CD, weight_VD, targets_N[rows], bias, temperature)
        for block, _, logits_CB, p_CB, column_C1, inside_C1 in blocks:
            p_CB.sub_(lse_C1).exp_().neg_().scatter_add_(1, column_C1, inside_C1.to(p_CB.dtype))
            grad_V[block] += p_CB.mul_(c_C1).sum(0)
            grad_VD[block] += torch.mm(logits_CB.copy_(p_CB).t(), h_CD)
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
    contiguous segments in a fixed order and in fp64, so they are deterministic and exact to fp32.
    """
    sequences = torch.arange(len(opponent_logps_S) + 1, device=sequence_ids_N.device)
    offsets = torch.searchsorted(sequence_ids_N, sequences)
    sums_S = torch.segment_reduce(logps_N.double(), "sum", offsets=offsets, unsafe=True)
    real_P, generated_P = (sums_S - opponent_logps_S).view(-1, 2).unbind(1)
    margins_P = beta * (real_P - generated_P)
    loss = LOSSES[kind](margins_P, beta).sum().to(logps_N.dtype)
    return PairwiseLoss(loss, *(t.detach().to(logps_N.dtype) for t in (margins_P, real_P, generated_P)))


def _wide(x):
    """An fp32 copy (fp64 stays fp64): a buffer of our own."""
    return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)


def _rms_forward(x_TD, weight_D, eps):
    wide_TD = _wide(x_TD)
    norm_T = torch.linalg.vector_norm(wide_TD, dim=1)
    rstd_T = norm_T.square_().div_(x_TD.shape[1]).add_(eps).rsqrt_()
    return wide_TD.mul_(rstd_T[:, None]).mul_(_wide(weight_D)).to(x_TD.dtype), rstd_T


def _rms_apply(x_TD, weight_D, rstd_T):
    return _wide(x_TD).mul_(rstd_T[:, None]).mul_(_wide(weight_D)).to(x_TD.dtype)


def _rms_backward(dy_TD, x_TD, weight_D, rstd_T, residual_TD):
    """dx = rstd (g - xhat mean(g xhat)) with g = dy w, xhat = x rstd."""
    g_TD = _wide(dy_TD).mul_(_wide(weight_D))
    xhat_TD = _wide(x_TD).mul_(rstd_T[:, None])
    mean_T1 = torch.linalg.vecdot(g_TD, xhat_TD)[:, None].div_(x_TD.shape[1])
    dx_TD = g_TD.addcmul_(xhat_TD, mean_T1, value=-1).mul_(rstd_T[:, None])
    return (dx_TD if residual_TD is None else dx_TD.add_(residual_TD)).to(x_TD.dtype)


def _swiglu_forward(gate_TF, up_TF):
    return silu(gate_TF).mul_(up_TF)


def _swiglu_backward(dh_TF, gate_TF, up_TF):
    silu_TF = silu(gate_TF)
    h_TF = silu_TF * up_TF
    dup_TF = silu_TF.mul_(dh_TF)
    dgate_TF = torch.ops.aten.silu_backward(dh_TF.mul_(up_TF), gate_TF)
    return h_TF, dgate_TF, dup_TF


def _rope(x_THd, cos_Td, sin_Td, sign):
    """(a, b) -> (a cos - b sin, b cos + a sin) on the halves of the head, in place; sign -1 rotates back."""
    a_THc, b_THc = x_THd.chunk(2, dim=-1)
    cos_T1c, sin_T1c = (t.chunk(2, dim=-1)[0][:, None] for t in (cos_Td, sin_Td))
    a_sin = a_THc * sin_T1c
    a_THc.mul_(cos_T1c).addcmul_(b_THc, sin_T1c, value=-sign)
    b_THc.mul_(cos_T1c).add_(a_sin, alpha=sign)


TABLE = Elementwise(_rms_forward, _rms_backward, _rms_apply, _swiglu_forward, _swiglu_backward, _rope)
_layer = LayerOps(TABLE)
lora_linear, lora_qkv, lora_mlp = _layer.lora_linear, _layer.lora_qkv, _layer.lora_mlp
rms_norm, swiglu, rope = _layer.rms_norm, _layer.swiglu, _layer.rope
