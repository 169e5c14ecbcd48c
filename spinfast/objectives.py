"""What is optimised: pure functions from a packed batch and its answers' log-probs to a loss summed over its groups.

An objective is a few numbers and words, holds no tensors, and says how heavy a group weighs: a step divides by the sum
of weights, so its gradient does not depend on how it was cut into microbatches. What an answer brings along (the
log-prob that a reference gave it, an advantage) stands in `batch.given`.

Shapes: N scored tokens, S answers, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, combinations, pairwise
from typing import Literal, Protocol, Self

import torch
from spinfast_kernels.reference import LOSSES as WHOLE_ANSWERS
from torch.nn.functional import sigmoid

from spinfast.config import REFERENCE_FREE
from spinfast.losses import LOSSES, Pairs
from spinfast.ops import Ops
from spinfast.sums import segment_sums, take_rows
from spinfast.surrogates import SURROGATES, Correction, Form, Tokens, bounded, correction, k3, ratios
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


@dataclass(frozen=True)
class Surrogate(Plain):
    """Policy gradients from rewarded answers (surrogates.py), each answer for itself.

    Groups are given ADVANTAGE, ACTIVE and SAMPLER_LOGPS, and may be given OLD_LOGPS. Without these the old policy is
    the one being trained, as it is at an answer's first update (ratio 1), or, `old_logps` "sampler", the sampler.
    Else the sampler's difference from the old policy is corrected for: its ratio (surrogates.correction) weighs the
    policy's loss, not the KL. With `beta` they are given REFERENCE per token; the KL of a token is weighed by its ratio
    to the old policy, which makes its gradient that of KL(p || p_ref) (DeepSeek-V3.2, arXiv 2512.02556; TRL's
    default).

    An answer that is not active counts nowhere. (In TRL it adds 0 to a mean over answers and counts as one of them.)
    One whose advantage is 0 counts in the mean and is not computed, unless there is a KL; so clip ratios are of all
    tokens, entropy and the sampler's difference of those that are computed.
    """

    loss: str = "dapo"  # a name of surrogates.SURROGATES
    epsilon: float = 0.2
    epsilon_high: float | None = None  # None: epsilon; cispo: 5
    delta: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    beta: float = 0.0
    correction: Correction = "token_truncate"
    correction_max: float = 2.0
    old_logps: Literal["policy", "sampler"] = "policy"
    max_tokens: int = 1  # the longest answer that could be sampled, which dr_grpo divides by
    temperature: float = 1.0
    steps_per_rollout: int = 1  # after more than the first the policy is not the one that sampled
    counted: float = 1.0  # tokens (gspo: answers) of a step for each of its weight

    @property
    def high(self) -> float:
        if self.epsilon_high is None:
            return 5.0 if self.loss == "cispo" else self.epsilon
        return self.epsilon_high

    @property
    def form(self) -> Form:
        return SURROGATES[self.loss]

    def filled(self, groups):
        names = [SAMPLER_LOGPS, *([REFERENCE] if self.beta else [])]
        return [
            replace(
                group,
                given={ADVANTAGE: (1.0,) * len(group.answers), ACTIVE: (1.0,) * len(group.answers)}
                | {name: tuple((0.0,) * length for length in group.lengths) for name in names},
            )
            for group in groups
        ]

    def for_step(self, groups, measure):
        chosen = [
            [i for i, a in enumerate(group.given[ADVANTAGE]) if group.given[ACTIVE][i] and (a or self.beta)]
            for group in groups
        ]
        live = [group.part(answers) for group, answers in zip(groups, chosen, strict=True) if answers]
        unit = "answer" if self.form.sequence else "token"
        counted = sum(self.counts(group)[unit] for group in groups) / (sum(map(self.weight, groups)) or 1.0)
        return replace(self, counted=counted), live

    def cut(self, groups, tokens):
        return [part for group in groups for part in split(group, tokens)]

    def counts(self, group: Group) -> dict[str, int]:
        """What a mean may be over: the group's active answers, their tokens, or how many these might have been."""
        lengths = [length for length, active in zip(group.lengths, group.given[ACTIVE], strict=True) if active]
        return {"answer": len(lengths), "token": sum(lengths), "limit": len(lengths) * self.max_tokens}

    def weight(self, group: Group) -> float:
        return float(self.counts(group)[self.form.mean])

    def __call__(self, batch: PackedBatch, logps_N: torch.Tensor, ops: Ops) -> Loss:
        ids_N, lengths_S, sampler_N = batch.sequence_ids_N, batch.lengths_S, batch.given[SAMPLER_LOGPS]
        own_N = batch.given.get(OLD_LOGPS, logps_N.detach())
        old_N = torch.where(sampler_N.isnan(), own_N, sampler_N) if self.old_logps == "sampler" else own_N
        ratios_N = ratios(logps_N - old_N, ids_N, lengths_S, self.form.sequence)
        tokens = Tokens(logps_N, ratios_N, batch.given[ADVANTAGE][ids_N])
        loss_N = self.form.loss(tokens, self)
        each_N, of_answer_N = torch.ones_like(ratios_N), 1 / lengths_S[ids_N]  # what a token counts in a mean
        gap_N = (own_N - sampler_N).abs()
        unit_N = (of_answer_N if self.form.sequence else each_N) / self.counted
        metrics = {name: (clipped_N * unit_N).sum() for name, clipped_N in self.clips(tokens)}
        means = {"entropy": (-logps_N, each_N)}
        if OLD_LOGPS in batch.given or self.steps_per_rollout == 1:
            metrics["sampling/sampling_logp_difference/max"] = gap_N.nan_to_num(nan=0.0).amax()
            known = gap_N.nan_to_num(nan=0.0), gap_N.isfinite().float()
            means["sampling/sampling_logp_difference/mean"] = known
        if self.correction != "none" and self.old_logps == "policy":
            weights_N = correction(self.correction, own_N - sampler_N, ids_N, batch.sequences, self.correction_max)
            loss_N = loss_N * weights_N
            name, whole = "sampling/importance_sampling_ratio", self.correction.startswith("sequence")
            means[f"{name}/mean"] = weights_N, of_answer_N if whole else each_N
            metrics |= {f"{name}/min": weights_N.amin(), f"{name}/max": weights_N.amax()}
        if self.beta:
            kl_N = k3(batch.given[REFERENCE] - logps_N) * ratios_N
            loss_N = loss_N + self.beta * kl_N
            means["kl"] = kl_N, each_N
        total = (loss_N * of_answer_N if self.form.mean == "answer" else loss_N).sum()
        return Loss(total, metrics, {name: ((x.detach() * w).sum(), w.sum()) for name, (x, w) in means.items()})

    def clips(self, tokens: Tokens) -> Iterator[tuple[str, torch.Tensor]]:
        """Which tokens' ratios are beyond the bound, where a clipped loss has no gradient and cispo holds the ratio."""
        if self.loss == "cispo":
            yield "cispo_clip_ratio", (tokens.ratios > self.high) & (tokens.advantages > 0)
        elif self.loss != "sapo":
            low_N = (bounded(tokens, self) < 1 - self.epsilon) & (tokens.advantages < 0)
            high_N = (bounded(tokens, self) > 1 + self.high) & (tokens.advantages > 0)
            for side, clipped_N in {"low": low_N, "high": high_N, "region": low_N | high_N}.items():
                yield f"clip_ratio/{side}_mean", clipped_N


def split(group: Group, tokens: int) -> list[Group]:
    """The group in as few parts of nearly equally many answers as have at most so many packed tokens, or one each."""
    count, lengths = len(group.answers), [*accumulate((len(answer) - 1 for answer in group.answers), initial=0)]
    for parts in range(1, count + 1):
        cuts = [*pairwise(round(count * i / parts) for i in range(parts + 1))]
        if len(group.prompt_ids) + max(lengths[end] - lengths[start] for start, end in cuts) <= tokens:
            break
    return [group.part(range(*cut)) for cut in cuts]


def loss_at_zero_margin(kind: str, beta: float) -> float:
    """l(0): ln 2 for the logistic loss."""
    return 1 / (4 * beta**2) if kind == "ipo" else {"logistic": 0.6931471805599453}.get(kind, 1.0)


def _pairs(answers: int) -> list[tuple[int, int]]:
    return list(combinations(range(answers), 2))


def _flat(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.float64)


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
