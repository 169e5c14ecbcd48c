"""The DPO family: a loss for each pair of answers, from their log-probs, their lengths and a reference's log-probs.

Names and formulas are those of TRL 1.16 (DPOTrainer; CPOTrainer for cpo and simpo, ORPOTrainer for orpo), and tests
hold TRL's own losses and gradients against them. Two things differ and are meant to: orpo's likelihood term is that of
the answer given its prompt, as in the paper (Eq. 2; TRL takes the prompt's tokens in), and `ipo` here averages over
tokens, as the authors do, while SPIN's ipo (answers.py) is of sums.

With c and r the log-ratios log p - log p_ref of the chosen and the rejected answer, s the logistic function:

    sigmoid       -log s(beta (c - r))                                  DPO, arXiv 2305.18290, Eq. 7
    sigmoid_norm  the same, c and r per token
    hinge         max(0, 1 - beta (c - r))                              SLiC, 2305.10425
    ipo           (c/|y+| - r/|y-| - 1/(2 beta))^2                      2310.12036, Eq. 17
    robust        [-(1-e) log s(beta (c-r)) + e log s(-beta (c-r))] / (1-2e)        2403.00409
    exo_pair      KL([s, 1-s] of beta (c - r) || [1-e, e])              2402.00856, Eq. 16
    nca_pair      -log s(beta c) - [log s(-beta c) + log s(-beta r)]/2  2402.05369
    bco_pair      -log s(beta c) - log s(-beta r)                       2404.04656
    sppo_hard     (c - 1/(2 beta))^2 + (r + 1/(2 beta))^2               2405.00675, Eq. 4.7
    apo_zero      1 - s(beta c) + s(beta r)                             2408.06266, Eq. 7
    apo_down      s(beta c) + 1 - s(beta (c - r))                       2408.06266, Eq. 8
    discopop      logistic and exponential loss, blended by s(beta (c - r) / tau)   2406.08414, Eq. 5
    sft           mean negative log-likelihood per token of the chosen answers
    cpo           -log s(beta (log p+ - log p-)) + cpo_alpha sft        2401.08417
    simpo         -log s(beta (log p+/|y+| - log p-/|y-|) - gamma)      2405.14734, Eq. 6
    orpo          sft - beta log s(log odds+ - log odds-), per token    2403.07691, Eq. 6 and 7
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import logsigmoid, relu


@dataclass(frozen=True)
class Pairs:
    """P pairs, all (P,): log-probs in nats are sums over an answer's scored tokens, lengths count these."""

    chosen_logps: torch.Tensor
    rejected_logps: torch.Tensor
    chosen_reference: torch.Tensor
    rejected_reference: torch.Tensor
    chosen_lengths: torch.Tensor
    rejected_lengths: torch.Tensor
    mean_length: float  # scored tokens of a chosen answer, over all pairs of the step

    @property
    def c(self) -> torch.Tensor:
        return self.chosen_logps - self.chosen_reference

    @property
    def r(self) -> torch.Tensor:
        return self.rejected_logps - self.rejected_reference


class Options(Protocol):
    beta: float
    label_smoothing: float
    discopop_tau: float
    simpo_gamma: float
    cpo_alpha: float


PairLoss = Callable[[Pairs, Options], torch.Tensor]


def sigmoid(p: Pairs, o: Options) -> torch.Tensor:
    return -logsigmoid(o.beta * (p.c - p.r))


def sigmoid_norm(p: Pairs, o: Options) -> torch.Tensor:
    return -logsigmoid(o.beta * (p.c / p.chosen_lengths - p.r / p.rejected_lengths))


def hinge(p: Pairs, o: Options) -> torch.Tensor:
    return relu(1 - o.beta * (p.c - p.r))


def ipo(p: Pairs, o: Options) -> torch.Tensor:
    return (p.c / p.chosen_lengths - p.r / p.rejected_lengths - 1 / (2 * o.beta)) ** 2


def robust(p: Pairs, o: Options) -> torch.Tensor:
    margin, e = o.beta * (p.c - p.r), o.label_smoothing
    return (e * logsigmoid(-margin) - (1 - e) * logsigmoid(margin)) / (1 - 2 * e)


def exo_pair(p: Pairs, o: Options) -> torch.Tensor:
    margin = o.beta * (p.c - p.r)
    right, wrong = torch.tensor([1 - o.label_smoothing, o.label_smoothing]).log().tolist()
    return margin.sigmoid() * (logsigmoid(margin) - right) + (-margin).sigmoid() * (logsigmoid(-margin) - wrong)


def nca_pair(p: Pairs, o: Options) -> torch.Tensor:
    c, r = o.beta * p.c, o.beta * p.r
    return -logsigmoid(c) - 0.5 * logsigmoid(-c) - 0.5 * logsigmoid(-r)


def bco_pair(p: Pairs, o: Options) -> torch.Tensor:
    return -logsigmoid(o.beta * p.c) - logsigmoid(-o.beta * p.r)


def sppo_hard(p: Pairs, o: Options) -> torch.Tensor:
    return (p.c - 0.5 / o.beta) ** 2 + (p.r + 0.5 / o.beta) ** 2


def apo_zero(p: Pairs, o: Options) -> torch.Tensor:
    return 1 - (o.beta * p.c).sigmoid() + (o.beta * p.r).sigmoid()


def apo_down(p: Pairs, o: Options) -> torch.Tensor:
    return (o.beta * p.c).sigmoid() + 1 - (o.beta * (p.c - p.r)).sigmoid()


def discopop(p: Pairs, o: Options) -> torch.Tensor:
    margin = o.beta * (p.c - p.r)
    blend = (margin / o.discopop_tau).sigmoid()
    return (1 - blend) * -logsigmoid(margin) + blend * (-margin).exp()


def sft(p: Pairs, o: Options) -> torch.Tensor:
    """Its mean over a step's pairs is the mean over their chosen tokens."""
    return -p.chosen_logps / p.mean_length


def cpo(p: Pairs, o: Options) -> torch.Tensor:
    return _smoothed(o.beta * (p.chosen_logps - p.rejected_logps), o) + o.cpo_alpha * sft(p, o)


def simpo(p: Pairs, o: Options) -> torch.Tensor:
    gap = p.chosen_logps / p.chosen_lengths - p.rejected_logps / p.rejected_lengths
    return _smoothed(o.beta * gap - o.simpo_gamma, o)


def orpo(p: Pairs, o: Options) -> torch.Tensor:
    a, b = p.chosen_logps / p.chosen_lengths, p.rejected_logps / p.rejected_lengths
    return sft(p, o) - o.beta * logsigmoid((a - b) - (_log1mexp(a) - _log1mexp(b)))


def _smoothed(margin: torch.Tensor, o: Options) -> torch.Tensor:
    return -(1 - o.label_smoothing) * logsigmoid(margin) - o.label_smoothing * logsigmoid(-margin)


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - e^x) for x < 0, without cancellation on either side of -ln 2."""
    far, near = x.clamp(max=-0.6931471805599453), x.clamp(min=-0.6931471805599453, max=-1e-12)
    return torch.where(x < -0.6931471805599453, torch.log1p(-far.exp()), (-torch.expm1(near)).log())


LOSSES: dict[str, PairLoss] = {
    loss.__name__: loss
    for loss in (
        *(sigmoid, sigmoid_norm, hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero, apo_down),
        *(discopop, sft, cpo, simpo, orpo),
    )
}
