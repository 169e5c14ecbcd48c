"""Policy gradients from rewarded answers, token by token.

Shapes: N scored tokens, S answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal

import torch

from spinfast.objectives.contract import ACTIVE, ADVANTAGE, OLD_LOGPS, REFERENCE, SAMPLER_LOGPS, Loss, Plain
from spinfast.objectives.surrogates import SURROGATES, Correction, Form, Tokens, bounded, correction, k3, ratios
from spinfast.ops import Ops
from spinfast.types import Group, PackedBatch


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
