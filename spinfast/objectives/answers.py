"""Losses of whole answers' log-probs: likelihood, SPIN's pairs, the DPO family's pairs and labelled answers.

Shapes: N scored tokens, S answers, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations

import torch
from spinfast_kernels.reference import LOSSES as WHOLE_ANSWERS
from torch.nn.functional import sigmoid

from spinfast.config import REFERENCE_FREE
from spinfast.objectives.contract import DESIRABLE, REFERENCE, Loss, Plain
from spinfast.objectives.losses import LOSSES, Pairs
from spinfast.ops import Ops
from spinfast.sums import segment_sums, take_rows
from spinfast.types import Group, PackedBatch


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
        found_P2 = torch.tensor(found).view(-1, 2).to(logps_S.device, non_blocking=True)  # else the host would wait
        better_P, worse_P = found_P2.unbind(1)
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
        return [[group.part([answer]) for group in groups] for answer in range(len(groups[0].answers))]

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


def _flat(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.float64)
