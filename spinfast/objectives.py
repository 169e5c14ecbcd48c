"""What is optimised: pure functions from a packed batch and its answers' log-probs to a loss summed over its groups.

An objective is a few numbers and words, holds no tensors, and says how heavy a group weighs: a step divides by the sum
of weights, so its gradient does not depend on how it was cut into microbatches. What an answer brings along (the
log-prob that a reference gave it, an advantage) stands in `batch.given`.

Shapes: N scored tokens, S answers, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, combinations
from typing import Protocol, Self

import torch
from spinfast_kernels.reference import LOSSES as WHOLE_ANSWERS
from torch.nn.functional import sigmoid

from spinfast.config import REFERENCE_FREE
from spinfast.losses import LOSSES, Pairs
from spinfast.ops import Ops
from spinfast.sums import segment_sums, take_rows
from spinfast.types import Group, PackedBatch

REFERENCE = "reference_logps"  # given per answer: its log-prob under the reference
DESIRABLE = "desirable"  # given per answer: 1 or 0; of an answer that belongs to another prompt, 0
Measure = Callable[[Sequence[Group]], list[list[float]]]  # log-prob sums per answer under the policy as it stands


def with_reference(group: Group, logps: Sequence[float]) -> Group:
    """The group, given a reference's log-prob of each answer."""
    return replace(group, given={**group.given, REFERENCE: tuple(logps)})


@dataclass(frozen=True)
class Loss:
    """total: the differentiable sum over groups; metrics: detached sums by name, divided by the weight later."""

    total: torch.Tensor
    metrics: dict[str, torch.Tensor]


class Objective(Protocol):
    reference: bool  # whether groups must be given a reference's log-probs

    def for_step(self, groups: Sequence[Group], measure: Measure) -> tuple[Self, Sequence[Group]]:
        """The objective with what it must know of the whole step, and the groups that are trained on."""

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


@dataclass(frozen=True)
class Nll(Plain):
    """Supervised fine-tuning: the mean negative log-likelihood per scored token of a step."""

    def weight(self, group: Group) -> float:
        return float(sum(group.lengths))

    def units(self, groups, logps):
        lengths = [length for group in groups for length in group.lengths]
        return -_flat(logps), torch.tensor(lengths, dtype=torch.float64)

    def __call__(self, batch: PackedBatch, logps_N: torch.Tensor, ops: Ops) -> Loss:
        return Loss(-logps_N.sum(), {})


@dataclass(frozen=True)
class Pairwise(Plain):
    """The mean over pairs of l(margin), for groups of two answers y+ and y- with the reference's log-probs given.

        margin = beta * [ (log p(y+|x) - log p_ref(y+|x)) - (log p(y-|x) - log p_ref(y-|x)) ]

    SPIN (arXiv 2401.01335, Eq. 4.7): y+ is the real answer, y- the opponent's, the opponent is the reference.
    """

    kind: str = "logistic"  # l, a name of spinfast_kernels.pairwise.KINDS
    beta: float = 0.1
    reference = True

    def units(self, groups, logps):
        given = [group.given[REFERENCE] for group in groups]
        real_P, generated_P = (_flat(logps) - _flat(given)).view(-1, 2).unbind(1)
        losses = WHOLE_ANSWERS[self.kind](self.beta * (real_P - generated_P), self.beta)
        return losses, torch.ones_like(losses)

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


@dataclass(frozen=True)
class Preference(Plain):
    """The DPO family (losses.py): the mean over all pairs of a step, a better and a worse answer of one group.

    A group's answers stand best first; k of them make k (k-1) / 2 pairs, its prompt is computed once.
    """

    loss: tuple[tuple[str, float], ...] = (("sigmoid", 1.0),)  # names of losses.LOSSES and their weights (MPO)
    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    cpo_alpha: float = 1.0
    mean_length: float = 1.0  # of a step's chosen answers, see losses.Pairs

    @property
    def reference(self) -> bool:
        return not {name for name, _ in self.loss} <= REFERENCE_FREE

    def for_step(self, groups, measure):
        lengths = [group.lengths[better] for group in groups for better, _ in _pairs(len(group.answers))]
        return replace(self, mean_length=sum(lengths) / len(lengths)), groups

    def weight(self, group: Group) -> float:
        return float(len(_pairs(len(group.answers))))

    def units(self, groups, logps):
        lengths = _flat([group.lengths for group in groups])
        given = [group.given.get(REFERENCE, (0.0,) * len(group.answers)) for group in groups]
        pairs = self.pairs([len(group.answers) for group in groups], _flat(logps), _flat(given), lengths)
        counts = torch.tensor([len(_pairs(len(group.answers))) for group in groups])
        ids = torch.arange(len(groups)).repeat_interleave(counts)  # a unit is a group: its pairs share their answers
        return segment_sums(self.losses(pairs), ids, len(groups)), counts.double()

    def pairs(self, answers: Sequence[int], logps_S, reference_S, lengths_S) -> Pairs:
        """Every better answer of a group beside every worse one, `answers` of them in each group."""
        starts = accumulate(answers, initial=0)
        found = [(start + i, start + j) for start, k in zip(starts, answers, strict=False) for i, j in _pairs(k)]
        better_P, worse_P = torch.tensor(found, device=logps_S.device).view(-1, 2).unbind(1)
        columns = (logps_S, reference_S, lengths_S)
        sides = [take_rows(column, side_P) for column in columns for side_P in (better_P, worse_P)]
        return Pairs(*sides, mean_length=self.mean_length)

    def losses(self, pairs: Pairs) -> torch.Tensor:
        """(P,) the weighted sum of the named losses."""
        return sum(weight * LOSSES[name](pairs, self) for name, weight in self.loss)

    def __call__(self, batch: PackedBatch, logps_N: torch.Tensor, ops: Ops) -> Loss:
        logps_S = segment_sums(logps_N, batch.sequence_ids_N, batch.sequences)
        reference_S = batch.given.get(REFERENCE, torch.zeros_like(logps_S))
        pairs = self.pairs(batch.answers, logps_S, reference_S, batch.lengths_S)
        return Loss(self.losses(pairs).sum(), {name: value.sum() for name, value in self.metrics(pairs).items()})

    def rewards(self, changes, lengths):
        """beta times the log-ratios to the reference; without one the log-probs, simpo's and orpo's per token."""
        per_token = not self.reference and {name for name, _ in self.loss} & {"simpo", "orpo"}
        return self.beta * changes / (lengths if per_token else 1)

    @torch.no_grad()
    def metrics(self, pairs: Pairs) -> dict[str, torch.Tensor]:
        """(P,) each: TRL's names, and the fused loss's own."""
        c, r = self.rewards(pairs.c, pairs.chosen_lengths), self.rewards(pairs.r, pairs.rejected_lengths)
        margin = c - r
        found = {
            "rewards/chosen": c,
            "rewards/rejected": r,
            "rewards/margins": margin,
            "rewards/accuracies": (margin > 0).float(),
            "logps/chosen": pairs.chosen_logps,
            "logps/rejected": pairs.rejected_logps,
            "train/margin": margin,
            "train/pair_accuracy": 0.5 * (1 + margin.sign()),  # a tie is half a win
        }
        if self.reference:
            found |= {"train/chosen_logp_change": pairs.c, "train/rejected_logp_change": pairs.r}
        return found


@dataclass(frozen=True)
class Unpaired(Plain):
    """Answers that are desirable or not, each for itself: the mean over the answers of a step.

    kto (arXiv 2402.01306, Eq. 7), with c the log-ratio log p - log p_ref of an answer:
        desirable: 1 - s(beta (c - z)),    undesirable: 1 - s(beta (z - c)),    each times its weight,
    where z = max(0, mean c of answers that belong to other prompts), over the whole step and without a gradient.
    Such an answer is the second of every group. apo_zero_unpaired (2408.06266, Eq. 7): the same with z = 0.
    """

    kind: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    kl: float = 0.0  # z
    desirable_share: float = 0.5  # of the step's answers
    reference = True

    def for_step(self, groups, measure):
        share = sum(group.given[DESIRABLE][0] for group in groups) / len(groups)
        kl, (own, *strangers) = 0.0, self.apart(groups)
        if self.kind == "kto":
            ratios = _flat(measure(strangers[0])) - _flat([group.given[REFERENCE] for group in strangers[0]])
            kl = max(0.0, ratios.mean().item())
        return replace(self, kl=kl, desirable_share=share), own

    def apart(self, groups):
        return [[_only(group, answer) for group in groups] for answer in range(len(groups[0].answers))]

    def units(self, groups, logps):
        reference, desirable = ([group.given[name][0] for group in groups] for name in (REFERENCE, DESIRABLE))
        ratios = _flat([logps_of[:1] for logps_of in logps]) - torch.tensor(reference, dtype=torch.float64)
        losses = self.losses(ratios, torch.tensor(desirable, dtype=torch.float64))
        return losses, torch.ones_like(losses)

    def losses(self, ratios_S: torch.Tensor, desirable_S: torch.Tensor) -> torch.Tensor:
        sign_S = 2 * desirable_S - 1
        weight_S = desirable_S * self.desirable_weight + (1 - desirable_S) * self.undesirable_weight
        return weight_S * sigmoid(-sign_S * self.beta * (ratios_S - self.kl))

    def __call__(self, batch: PackedBatch, logps_N: torch.Tensor, ops: Ops) -> Loss:
        logps_S = segment_sums(logps_N, batch.sequence_ids_N, batch.sequences)
        ratios_S, desirable_S = logps_S - batch.given[REFERENCE], batch.given[DESIRABLE]
        metrics = {"kl": torch.full_like(ratios_S, self.kl)}
        sides = {"chosen": (desirable_S, self.desirable_share), "rejected": (1 - desirable_S, 1 - self.desirable_share)}
        for side, (belongs_S, share) in sides.items():
            if share:
                metrics[f"rewards/{side}"] = self.beta * ratios_S.detach() * belongs_S / share
                metrics[f"logps/{side}"] = logps_S.detach() * belongs_S / share
                metrics[f"train/{side}_logp_change"] = ratios_S.detach() * belongs_S / share
        if 0 < self.desirable_share < 1:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        total = self.losses(ratios_S, desirable_S).sum()
        return Loss(total, {name: value.sum() for name, value in metrics.items()})


def loss_at_zero_margin(kind: str, beta: float) -> float:
    """l(0): ln 2 for the logistic loss."""
    return 1 / (4 * beta**2) if kind == "ipo" else {"logistic": 0.6931471805599453}.get(kind, 1.0)


def _pairs(answers: int) -> list[tuple[int, int]]:
    return list(combinations(range(answers), 2))


def _only(group: Group, answer: int) -> Group:
    """The group with one of its answers."""
    given = {name: values[answer : answer + 1] for name, values in group.given.items()}
    return replace(group, answers=group.answers[answer : answer + 1], given=given)


def _flat(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.float64)


OBJECTIVES = {"nll": Nll, "pairwise": Pairwise, "preference": Preference, "unpaired": Unpaired}


def described(objective: Objective) -> dict:
    """The objective as JSON holds it."""
    name = next(name for name, kind in OBJECTIVES.items() if type(objective) is kind)
    return {"name": name, **asdict(objective)}


def restored(description: dict) -> Objective:
    """The objective that was `described`."""
    options = {key: value for key, value in description.items() if key != "name"}
    if "loss" in options:
        options["loss"] = tuple((name, weight) for name, weight in options["loss"])
    return OBJECTIVES[description["name"]](**options)
