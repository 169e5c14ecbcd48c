"""What every objective offers, and the names of what groups are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import torch

from spinfast.ops import Ops
from spinfast.types import Group, PackedBatch

REFERENCE = "reference_logps"  # given per answer: its log-prob under the reference
DESIRABLE = "desirable"  # given per answer: 1 or 0; of an answer that belongs to another prompt, 0
ADVANTAGE = "advantage"  # given per answer
ACTIVE = "active"  # given per answer: 1, or 0 of an answer that is in no loss and no mean
SAMPLER_LOGPS = "sampler_logps"  # given per token, as REFERENCE too may be: by who sampled it; NaN where not known
OLD_LOGPS = "old_logps"  # given per token: under the policy before the first update that the answer is used for
Measure = Callable[[Sequence[Group]], list[list[float]]]  # log-prob sums per answer under the policy as it stands


def with_reference(group: Group, logps: Sequence[float]) -> Group:
    """The group, given a reference's log-prob of each answer."""
    return replace(group, given={**group.given, REFERENCE: tuple(logps)})


@dataclass(frozen=True)
class Loss:
    """total: the differentiable sum over groups. The rest is detached, by name.

    metrics: sums, divided by the weight later, but for names that end in /max or /min: what they say.
    means: (sum, count), a mean of its own, over what is computed of a step.
    """

    total: torch.Tensor
    metrics: dict[str, torch.Tensor]
    means: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


class Objective(Protocol):
    reference: bool  # whether groups must be given the log-probs of the reference that the policy starts as
    temperature: float  # the policy is softmax(logits / temperature)

    def filled(self, groups: Sequence[Group]) -> Sequence[Group]:
        """The groups, given constants that stand for those they will have: for a plan."""

    def for_step(self, groups: Sequence[Group], measure: Measure) -> tuple[Self, Sequence[Group]]:
        """The objective with what it must know of the whole step, and what of the groups is trained on."""

    def cut(self, groups: Sequence[Group], tokens: int) -> Sequence[Group]:
        """The groups, in parts of at most so many packed tokens where its loss can be taken apart; 0: the smallest."""

    def apart(self, groups: Sequence[Group]) -> list[Sequence[Group]]:
        """The groups as they are computed, by which a reference is scored too: parts that share no batch."""

    def at_start(self, groups: Sequence[Group]) -> float:
        """The loss of a step where the policy is the reference; asked only where there is one."""

    def rounding(self, groups: Sequence[Group]) -> float:
        """How far from at_start rounding may move it."""

    def weight(self, group: Group) -> float:
        """The group's share in the mean that a step reports and optimises."""

    def units(self, groups: Sequence[Group], logps: Sequence[Sequence[float]]) -> tuple[torch.Tensor, torch.Tensor]:
        """(losses, weights) of the units that its mean is over, from log-prob sums: for held-out losses."""

    def __call__(self, batch: PackedBatch, logps_N: torch.Tensor, ops: Ops) -> Loss: ...


class Plain:
    """What most objectives need not say."""

    reference = False
    temperature = 1.0

    def filled(self, groups: Sequence[Group]) -> Sequence[Group]:
        zeros = [(0.0,) * len(group.answers) for group in groups]
        return [*map(with_reference, groups, zeros)] if self.reference else groups

    def cut(self, groups: Sequence[Group], tokens: int) -> Sequence[Group]:
        return groups

    def for_step(self, groups: Sequence[Group], measure: Measure) -> tuple[Self, Sequence[Group]]:
        return self, groups

    def apart(self, groups: Sequence[Group]) -> list[Sequence[Group]]:
        return [groups]

    def at_start(self, groups: Sequence[Group]) -> float:
        """By the loss itself, of the reference's own log-probs."""
        objective, groups = self.for_step(groups, lambda parts: [group.given[REFERENCE] for group in parts])
        losses, weights = objective.units(groups, [group.given[REFERENCE] for group in groups])
        return (losses.sum() / weights.sum()).item()

    def rounding(self, groups: Sequence[Group]) -> float:
        """Log-probs are sums in fp32: what the loss moves by if all are off by a few units in the last place."""
        exact = [group.given[REFERENCE] for group in groups]
        error = 4 * torch.finfo(torch.float32).eps * max(abs(logp) for logps in exact for logp in logps)
        moved = [[logp + (-1) ** side * error for side, logp in enumerate(logps)] for logps in exact]
        objective, groups = self.for_step(groups, lambda parts: [group.given[REFERENCE] for group in parts])
        (here, weights), (there, _) = objective.units(groups, exact), objective.units(groups, moved)
        return ((there - here).abs().sum() / weights.sum()).item()

    def weight(self, group: Group) -> float:
        return 1.0
