"""Rewards of a rollout -> advantages of its answers: pure, in fp64.

With r an answer's reward, the weighted sum over reward functions:

    A = r - baseline,  / (std + 1e-4) unless scale_rewards is "none"                          GRPO, arXiv 2402.03300

baseline: the mean of the answer's group, or of the others in it (leave_one_out: RLOO, 2402.14740; (n - 1) / n of it is
the former). std: of its group, or of the whole rollout ("batch": 2508.08221), with Bessel's correction. "none" is Dr.
GRPO's (2503.20783). `normalize_then_sum` (GDPO, 2601.05242) first scales each function within its group, then the
weighted sum over the rollout, whatever scale_rewards says.

None or NaN is a function that does not apply: no term of the sum, no part of a mean. An answer to which none applies
has reward NaN and advantage 0. A dead group, in which all that is compared is equal, has advantages of exactly 0.
Numbers are those of TRL 1.16's GRPOTrainer, but for the rounding of dead groups and leave_one_out.

Shapes: P groups (prompts) of G answers, F reward functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

EPSILON = 1e-4  # added to a standard deviation
EQUAL = 1e-8  # a standard deviation up to this is 0

Rewards = Mapping[str, Sequence[Sequence[float | None]]]  # by function: (P, G), as it returned them


@dataclass(frozen=True)
class Advantages:
    """rewards, advantages: (P, G) fp64; dead: (P,) whether a group has nothing to teach; zero_std: TRL's share."""

    rewards: torch.Tensor
    advantages: torch.Tensor
    dead: tuple[bool, ...]
    zero_std: float


def advantages(
    rewards: Rewards,
    weights: Mapping[str, float],
    scale_rewards: Literal["group", "batch", "none"] = "group",
    baseline: Literal["mean", "leave_one_out"] = "mean",
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize",
) -> Advantages:
    """What the answers of one rollout are worth; `weights` by the functions' names."""
    found_PGF = torch.stack([_tensor(rewards[name]) for name in weights], dim=2)
    weights_F = torch.tensor([*weights.values()], dtype=torch.float64)
    rewards_PG = _sum(found_PGF, weights_F)
    several = found_PGF.shape[1] > 1
    if aggregation == "normalize_then_sum":
        std_P1F = nanstd(found_PGF, 1) if several else torch.zeros_like(found_PGF[:, :1])
        scaled_PGF = _centred(found_PGF, baseline) / (std_P1F + EPSILON)
        compared_PG = (scaled_PGF * weights_F).nansum(2).where(~rewards_PG.isnan(), torch.nan)
        centred_PG, std = compared_PG - compared_PG.nanmean(), nanstd(compared_PG)
        dead_P = ~(std_P1F > EQUAL).any(2).any(1)
    else:
        std_P1 = nanstd(rewards_PG, 1) if several else torch.zeros_like(rewards_PG[:, :1])
        centred_PG, std = _centred(rewards_PG, baseline), nanstd(rewards_PG) if scale_rewards == "batch" else std_P1
        dead_P = ~(std_P1 > EQUAL).any(1)
    if aggregation == "normalize_then_sum" or scale_rewards != "none":
        centred_PG = centred_PG / (std + EPSILON)
    advantages_PG = centred_PG.nan_to_num(nan=0.0).masked_fill(dead_P[:, None], 0.0)
    zero_std = (std.abs() <= EQUAL).expand_as(rewards_PG).double().mean().item()
    return Advantages(rewards_PG, advantages_PG, tuple(dead_P.tolist()), zero_std)


def metrics(rewards: Rewards, found: Advantages) -> dict[str, float]:
    """A rollout's rewards under TRL's names; a function that applied to no answer has none."""
    named = {f"rewards/{name}": _tensor(values) for name, values in rewards.items()}
    means = {f"{name}/mean": values.nanmean() for name, values in named.items()}
    stds = {f"{name}/std": nanstd(values) for name, values in named.items()}
    overall = {"reward": found.rewards.nanmean(), "reward_std": nanstd(found.rewards)}
    known = {name: value.item() for name, value in (overall | means | stds).items() if not value.isnan()}
    return known | {"frac_reward_zero_std": found.zero_std, "groups/dead": sum(found.dead) / len(found.dead)}


def nanstd(x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """The standard deviation of what is not NaN, n - 1 below; NaN of fewer than two. `dim` is kept."""
    mean = x.nanmean() if dim is None else x.nanmean(dim, keepdim=True)
    squares, known = (x - mean) ** 2, ~x.isnan()
    count = known.sum() if dim is None else known.sum(dim, keepdim=True)
    total = squares.nansum() if dim is None else squares.nansum(dim, keepdim=True)
    return (total / (count - 1)).sqrt().where(count > 1, torch.nan)


def _tensor(values: Sequence[Sequence[float | None]]) -> torch.Tensor:
    return torch.tensor([[torch.nan if v is None else v for v in row] for row in values], dtype=torch.float64)


def _sum(values_PGF: torch.Tensor, weights_F: torch.Tensor) -> torch.Tensor:
    """The weighted sum over functions that apply; NaN where none does."""
    return (values_PGF * weights_F).nansum(2).where(~values_PGF.isnan().all(2), torch.nan)


def _centred(x: torch.Tensor, baseline: str) -> torch.Tensor:
    """Less the mean along the answers of a group, or that of the others: n / (n - 1) times as much."""
    centred = x - x.nanmean(1, keepdim=True)
    if baseline == "mean":
        return centred
    count = (~x.isnan()).sum(1, keepdim=True)
    return centred * count / (count - 1).clamp(min=1)
