"""What is optimised: pure functions from a packed batch and its answers' log-probs to a loss summed over its groups.

An objective is a few numbers and words, holds no tensors, and says how heavy a group weighs: a step divides by the sum
of weights, so its gradient does not depend on how it was cut into microbatches. What an answer brings along (the
log-prob that a reference gave it, an advantage) stands in `batch.given`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import torch

from spinfast.ops import Ops
from spinfast.types import Group, PackedBatch

REFERENCE = "reference_logps"  # given per answer: its log-prob under the policy that the stage started from


def with_reference(group: Group, logps: Sequence[float]) -> Group:
    """The group, given a reference's log-prob of each answer."""
    return replace(group, given={**group.given, REFERENCE: tuple(logps)})


@dataclass(frozen=True)
class Loss:
    """total: the differentiable sum over groups; metrics: detached sums by name, divided by the weight later."""

    total: torch.Tensor
    metrics: dict[str, torch.Tensor]


class Objective(Protocol):
    @property
    def at_start(self) -> float | None:
        """The loss where policy and reference are one model, as before the first step; None if there is no such."""

    def rounding(self, groups: Sequence[Group]) -> float:
        """How far from at_start rounding may move the loss of a step; not asked where there is none."""

    def weight(self, group: Group) -> float:
        """The group's share in the mean that a step reports and optimises."""

    def __call__(self, batch: PackedBatch, logps_N: torch.Tensor, ops: Ops) -> Loss: ...


@dataclass(frozen=True)
class Nll:
    """Supervised fine-tuning: the mean negative log-likelihood per answer token of a step."""

    at_start = None

    def weight(self, group: Group) -> float:
        return float(sum(len(answer) for answer in group.answers))

    def __call__(self, batch: PackedBatch, logps_N: torch.Tensor, ops: Ops) -> Loss:
        return Loss(-logps_N.sum(), {})


@dataclass(frozen=True)
class Pairwise:
    """The mean over pairs of l(margin), for groups of two answers y+ and y- with the reference's log-probs given.

        margin = beta * [ (log p(y+|x) - log p_ref(y+|x)) - (log p(y-|x) - log p_ref(y-|x)) ]

    SPIN (arXiv 2401.01335, Eq. 4.7): y+ is the real answer, y- the opponent's, the opponent is the reference.
    """

    kind: str = "logistic"  # l, a name of spinfast_kernels.pairwise.KINDS
    beta: float = 0.1

    @property
    def at_start(self) -> float:
        return loss_at_zero_margin(self.kind, self.beta)

    def rounding(self, groups: Sequence[Group]) -> float:
        """How far the loss may lie from at_start because log-probs are sums in fp32."""
        largest = max((abs(logp) for group in groups for logp in group.given[REFERENCE]), default=0.0)
        slope = 1 / self.beta if self.kind == "ipo" else self.beta  # per nat
        return 4 * slope * largest * torch.finfo(torch.float32).eps

    def weight(self, group: Group) -> float:
        return 1.0

    def __call__(self, batch: PackedBatch, logps_N: torch.Tensor, ops: Ops) -> Loss:
        reference_S = batch.given[REFERENCE]
        result = ops.pairwise_loss(logps_N, batch.sequence_ids_N, reference_S, beta=self.beta, kind=self.kind)
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
    """l(0): ln 2 for the logistic loss."""
    return 1 / (4 * beta**2) if kind == "ipo" else {"logistic": 0.6931471805599453}.get(kind, 1.0)


OBJECTIVES = {"nll": Nll, "pairwise": Pairwise}


def described(objective: Objective) -> dict:
    """The objective as JSON holds it."""
    name = next(name for name, kind in OBJECTIVES.items() if type(objective) is kind)
    return {"name": name, **asdict(objective)}


def restored(description: dict) -> Objective:
    """The objective that was `described`."""
    return OBJECTIVES[description["name"]](**{key: value for key, value in description.items() if key != "name"})
