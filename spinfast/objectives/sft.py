"""Supervised fine-tuning on the real answers: mean negative log-likelihood per answer token."""

from __future__ import annotations

import torch

from spinfast.objectives import Loss
from spinfast.types import Group, PackedBatch


class Sft:
    """Weighs a group by its answer tokens, so a step's loss is the mean over its tokens."""

    def weight(self, group: Group) -> float:
        return float(sum(len(answer) for answer in group.answers))

    def __call__(self, batch: PackedBatch, logps_N: torch.Tensor) -> Loss:
        return Loss(-logps_N.sum(), {})
