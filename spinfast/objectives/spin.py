"""SPIN (arXiv 2401.01335, Eq. 4.7): tell the real answer from the opponent's.

    margin = beta * [ (log p(y|x) - log p_t(y|x)) - (log p(y'|x) - log p_t(y'|x)) ],   L = mean over pairs of l(margin)

p is the policy, p_t the opponent (the policy as it was at the start of the iteration), y real, y' generated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spinfast.objectives import Loss
from spinfast.ops import Ops
from spinfast.types import Group, PackedBatch

LOSS_AT_ZERO_MARGIN = {"logistic": 0.6931471805599453, "hinge": 1.0, "exponential": 1.0}


@dataclass(frozen=True)
class Spin:
    """opponent_logps: (pairs, 2) fp32 on the policy's device; columns real, generated; rows as packed.

    scored_tokens: the microbatches that they were scored in; others round differently.
    """

    opponent_logps: torch.Tensor
    beta: float
    kind: str
    ops: Ops
    scored_tokens: int | None = None

    def weight(self, group: Group) -> float:
        return 1.0

    def __call__(self, batch: PackedBatch, logps_N: torch.Tensor) -> Loss:
        opponent_S = self.opponent_logps[list(batch.rows)].flatten()
        result = self.ops.pairwise_loss(logps_N, batch.sequence_ids_N, opponent_S, beta=self.beta, kind=self.kind)
        margins_P = result.margins_P.detach()
        return Loss(
            result.loss,
            {
                "train/margin": margins_P.sum(),
                "train/pair_accuracy": 0.5 * (1 + margins_P.sign()).sum(),  # a tie is half a win
                "train/real_logp_change": result.real_logratio_P.detach().sum(),
                "train/generated_logp_change": result.generated_logratio_P.detach().sum(),
            },
        )


def loss_at_zero_margin(kind: str, beta: float) -> float:
    """The loss before the first step, where policy and opponent are the same model: ln 2 for the logistic one."""
    return LOSS_AT_ZERO_MARGIN[kind] if kind != "ipo" else 1 / (4 * beta**2)
