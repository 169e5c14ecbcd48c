"""The one-sweep head on a CPU: reference.py's walk over blocks of the vocabulary, with each block's row work in one
compiled pass over the logits where they lie and one over the mean.

Shapes: N tokens of a chunk, D model dim, V vocabulary, B columns of a block.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from spinfast_kernels import reference
from spinfast_kernels.cpu import compiled, exp, larger, launch, narrow, or_eager, widen

CHUNK_TOKENS, VOCAB_BLOCK = 512, 2048  # of 600 to 1,300 rows oneDNN multiplies on one thread only: bench/LOG.md


def _linear_logps(hidden_ND, weight_VD, targets_N, *, bias=None, temperature=1.0, chunk_tokens=None):
    """reference.linear_logps."""
    chunk = chunk_tokens or CHUNK_TOKENS
    return reference.swept_logps(_sweep, hidden_ND, weight_VD, targets_N, bias, temperature, chunk)


linear_logps = or_eager(_linear_logps, reference.linear_logps)


def _sweep(h_ND, weight_VD, targets_N, bias, temperature, need_unit):
    """reference._sweep with the row work compiled."""
    (N, D), V = h_ND.shape, weight_VD.shape[0]
    target_N1, sum_N1, shrink_N1 = torch.zeros(3, N, 1, device=h_ND.device)
    top_N1 = torch.full_like(sum_N1, torch.finfo(torch.float32).min)
    mean_ND = torch.zeros(N, D, device=h_ND.device) if need_unit else None
    buffer, part_ND = h_ND.new_empty(N * min(VOCAB_BLOCK, V)), torch.empty_like(h_ND) if need_unit else None
    for start in range(0, V, VOCAB_BLOCK):
        block = slice(start, min(start + VOCAB_BLOCK, V))
        w_BD = weight_VD[block]
        logits_NB = buffer[: N * len(w_BD)].view(N, -1)
        reference.logits(logits_NB, h_ND, w_BD, None if bias is None else bias[block], temperature)
        launch(_row_kernel, logits_NB, targets_N, start, target_N1, top_N1, sum_N1, shrink_N1)
        if need_unit:
            launch(_mean_kernel, torch.mm(logits_NB, w_BD, out=part_ND), shrink_N1, mean_ND)
    return reference.swept(target_N1, top_N1, sum_N1, mean_ND, weight_VD, targets_N, temperature)


@compiled
def _row_kernel(logits_NB, targets_N, start, target_N1, top_N1, sum_N1, shrink_N1):
    """Logits to exp(logit - running maximum) in place, 0 at the target; maximum and sum go on, shrink rescales what
    was added up before.
    """
    N, B = logits_NB.shape
    for n in prange(N):
        row_B, column = logits_NB[n], targets_N[n] - start
        if 0 <= column < B:
            target_N1[n, 0] = widen(row_B[column])
            row_B[column] = narrow(np.float32(-np.inf), row_B[column])
        top = top_N1[n, 0]
        for b in range(B):
            top = larger(widen(row_B[b]), top)
        total = np.float32(0.0)
        for b in range(B):
            p = exp(widen(row_B[b]) - top)
            row_B[b] = narrow(p, row_B[b])
            total += p
        shrink_N1[n, 0] = exp(top_N1[n, 0] - top)
        sum_N1[n, 0] = sum_N1[n, 0] * shrink_N1[n, 0] + total
        top_N1[n, 0] = top


@compiled
def _mean_kernel(part_ND, shrink_N1, mean_ND):
    N, D = part_ND.shape
    for n in prange(N):
        for d in range(D):
            mean_ND[n, d] = mean_ND[n, d] * shrink_N1[n, 0] + widen(part_ND[n, d])
