"""Held-out losses while a stage trains: when to stop, and which adapter to keep.

A loss is the objective's own on held-out groups, unit by unit (an answer weighted by its tokens in SFT, a pair in DPO),
in GRPO minus the reward of a greedy answer.
A gain counts if it is more than two standard errors of the paired differences from the last loss that was one, so a
slow descent adds up to one, and rounding never does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from spinfast.evaluate.statistics import ratio_of_sums
from spinfast.policy import Policy
from spinfast.types import Adapter

# (U,) losses and weights, fp64; their ratio of sums is the loss. What weighs 0 does not count and may be NaN.
Losses = tuple[torch.Tensor, torch.Tensor]
Figures = dict[str, float]  # what a metrics line says of them
ROUNDING = 1e-6  # relative; losses nearer than this are equal


def ratio(losses: Losses) -> tuple[float, float]:
    """The mean of weighted units and its standard error, 0 for a single unit."""
    values, weights = losses
    with np.errstate(all="ignore"):  # losses may be infinite, and all weights 0
        found = ratio_of_sums(values.where(weights > 0, 0.0).numpy(), weights.numpy())
    return found["value"], found["stderr"] or 0.0


@dataclass
class Watched:
    """What was seen so far; a checkpoint holds it."""

    step: int = 0  # of the adapter with the least loss; 0 is the stage's start
    loss: float = math.inf  # its loss
    stale: int = 0  # losses in a row that were no gain
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)  # that adapter's; none before a finite loss
    last_gain: torch.Tensor | None = None  # (U,) the losses that were the last gain


@dataclass(frozen=True)
class Watch:
    """measure() -> the policy's held-out losses as it stands; every so many steps. patience 0: never stop."""

    measure: Callable[[], tuple[Losses, Figures]]
    every: int
    patience: int
    keeps_best: bool = False
    best: str = "its held-out loss is least"  # what is said of the adapter that is kept

    def look(self, step: int, policy: Policy, seen: Watched) -> Figures:
        """Measure, note what was seen, and return the figures."""
        (values, weights), figures = self.measure()
        loss, _ = ratio((values, weights))
        gained = seen.last_gain is None and math.isfinite(loss)
        if seen.last_gain is not None:
            gain, error = ratio((seen.last_gain - values, weights * ~seen.last_gain.isnan()))
            gained = gain > max(2 * error, ROUNDING * abs(loss))
        seen.stale = 0 if gained else seen.stale + 1
        seen.last_gain = values if gained else seen.last_gain
        if loss < seen.loss - ROUNDING * abs(loss):
            seen.step, seen.loss, seen.tensors = step, loss, policy.adapter().tensors
        return figures

    def due(self, step: int, last: int) -> bool:
        """The start is looked at where something is decided: a later look has to gain on it."""
        return bool(self.patience or self.keeps_best) if step == 0 else step % self.every == 0 or step == last

    def stops(self, seen: Watched) -> bool:
        return bool(self.patience) and seen.stale >= self.patience


def loss_figures(losses: Losses, likelihood: bool = False) -> Figures:
    """The loss with its standard error; where it is per token, its exponential, a perplexity, too."""
    loss, stderr = ratio(losses)
    figures = {"heldout/loss": loss, "heldout/loss_stderr": stderr}
    if likelihood:
        figures |= {"heldout/perplexity": math.exp(loss), "heldout/perplexity_stderr": math.exp(loss) * stderr}
    return figures


def best_adapter(policy: Policy, seen: Watched) -> Adapter:
    """The adapter with the least held-out loss."""
    return Adapter(policy.adapter().config, seen.tensors)
