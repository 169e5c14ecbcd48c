"""What is optimised: pure functions from a packed batch and its answers' log-probs to a loss summed over its groups.

An objective is a few numbers and words, holds no tensors, and says how heavy a group weighs: a step divides by the sum
of weights, so its gradient does not depend on how it was cut into microbatches. What an answer brings along (the
log-prob that a reference gave it, an advantage) stands in `batch.given`.

Shapes: N scored tokens, S answers, P pairs.
"""

from __future__ import annotations

from dataclasses import asdict

from spinfast.objectives.answers import Nll, Pairwise, Preference, Unpaired, loss_at_zero_margin
from spinfast.objectives.contract import (
    ACTIVE,
    ADVANTAGE,
    DESIRABLE,
    OLD_LOGPS,
    REFERENCE,
    SAMPLER_LOGPS,
    Loss,
    Measure,
    Objective,
    Plain,
    with_reference,
)
from spinfast.objectives.policy_gradient import Surrogate, split

__all__ = [
    "ACTIVE",
    "ADVANTAGE",
    "DESIRABLE",
    "OLD_LOGPS",
    "REFERENCE",
    "SAMPLER_LOGPS",
    "Loss",
    "Measure",
    "Nll",
    "Objective",
    "Pairwise",
    "Plain",
    "Preference",
    "Surrogate",
    "Unpaired",
    "described",
    "loss_at_zero_margin",
    "restored",
    "split",
    "with_reference",
]

OBJECTIVES = {"nll": Nll, "pairwise": Pairwise, "preference": Preference, "unpaired": Unpaired, "surrogate": Surrogate}


def described(objective: Objective) -> dict:
    """The objective as JSON holds it."""
    name = next(name for name, kind in OBJECTIVES.items() if type(objective) is kind)
    return {"name": name, **asdict(objective)}


def restored(description: dict) -> Objective:
    """The objective that was `described`."""
    options = {key: value for key, value in description.items() if key != "name"}
    if isinstance(options.get("loss"), list):
        options["loss"] = tuple((name, weight) for name, weight in options["loss"])
    return OBJECTIVES[description["name"]](**options)
