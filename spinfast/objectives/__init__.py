"""What is optimised: pure functions from answer log-probs to a loss that sums over its groups.

An objective says how heavy a group weighs (the step divides by the sum of weights, so a step's gradient does not
depend on how it was cut into microbatches) and turns the log-probs of a packed batch into a summed loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from spinfast.types import Group, PackedBatch


@dataclass(frozen=True)
class Loss:
    """total: the differentiable sum over groups; metrics: detached sums by name, divided by the weight later."""

    total: torch.Tensor
    metrics: dict[str, torch.Tensor]


class Objective(Protocol):
    def weight(self, group: Group) -> float:
        """The group's share in the mean that a step reports and optimises."""

    def __call__(self, batch: PackedBatch, logps_N: torch.Tensor) -> Loss: ...
