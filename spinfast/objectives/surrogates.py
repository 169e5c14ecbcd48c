"""Policy-gradient losses per token, from log-probs under the policy being trained and the one before its update.

With l and o a token's log-prob under the policy and under the old policy, r = exp(l - o), A the answer's advantage:

    grpo, bnpo, dapo, dr_grpo    -min(r A, clip(r, 1 - e, 1 + e_high) A)
    gspo     the same with one r = exp(mean_t (l - o)) for an answer    GSPO, arXiv 2507.18071, Eq. 5 and 7
    cispo    -stop_gradient(min(r, e_high)) A l                         MiniMax-M1, 2506.13585, Eq. 4 and 5
    sapo     -A s(tau (r - 1)) 4 / tau, tau by the sign of A            SAPO, 2511.20347

`delta` bounds the first r from above: for A < 0 the loss is at most -delta A (dual clip, 1912.09729; INTELLECT-2,
2505.07291). What these are
averaged over sets the first four apart:

    answer   the mean over answers of the mean over an answer's tokens  GRPO, 2402.03300, Eq. 3 (gspo, sapo too)
    token    the mean over all tokens of a step                         DAPO, 2503.14476, Eq. 8 (bnpo, cispo too)
    limit    the sum over tokens / (answers x longest answer allowed)   Dr. GRPO, 2503.20783

Names and formulas are those of TRL 1.16's GRPOTrainer, but for two: gspo is its importance_sampling_level "sequence",
and bnpo is averaged over a step, not over each of its microbatches, so that it is dapo.

Shapes: N scored tokens, S answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch

from spinfast.sums import segment_sums, take_rows

LARGEST = 20.0  # of a log-ratio: beyond 88 its exponential is infinite in fp32, and a clipped term's gradient NaN
Correction = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "none"]


@dataclass(frozen=True)
class Tokens:
    """N tokens, all (N,): log-probs in nats, ratios to the old policy, advantages of the tokens' answers."""

    logps: torch.Tensor
    ratios: torch.Tensor
    advantages: torch.Tensor


class Options(Protocol):
    epsilon: float
    high: float
    delta: float | None
    sapo_temperature_pos: float
    sapo_temperature_neg: float


def clipped(t: Tokens, o: Options) -> torch.Tensor:
    near = t.ratios.clamp(1 - o.epsilon, 1 + o.high)
    return -torch.minimum(bounded(t, o) * t.advantages, near * t.advantages)


def cispo(t: Tokens, o: Options) -> torch.Tensor:
    return -t.ratios.clamp(max=o.high).detach() * t.advantages * t.logps


def sapo(t: Tokens, o: Options) -> torch.Tensor:
    tau = torch.where(t.advantages > 0, o.sapo_temperature_pos, o.sapo_temperature_neg)
    return -t.advantages * torch.sigmoid(tau * (t.ratios - 1)) * 4 / tau


def bounded(t: Tokens, o: Options) -> torch.Tensor:
    """The ratios with the upper bound `delta`."""
    return t.ratios if o.delta is None else t.ratios.clamp(max=o.delta)


class Form(NamedTuple):
    """loss: of each token; mean: what they are averaged over; sequence: whether an answer has one ratio."""

    loss: Callable[[Tokens, Options], torch.Tensor]
    mean: Literal["answer", "token", "limit"]
    sequence: bool = False


SURROGATES: dict[str, Form] = {
    "grpo": Form(clipped, "answer"),
    "bnpo": Form(clipped, "token"),
    "dapo": Form(clipped, "token"),
    "dr_grpo": Form(clipped, "limit"),
    "gspo": Form(clipped, "answer", sequence=True),
    "cispo": Form(cispo, "token"),
    "sapo": Form(sapo, "answer"),
}


def ratios(log_ratios_N: torch.Tensor, ids_N: torch.Tensor, lengths_S: torch.Tensor, sequence: bool) -> torch.Tensor:
    """(N,) the ratio of each token, or that of its answer: the geometric mean."""
    if sequence:
        means_S = segment_sums(log_ratios_N, ids_N, len(lengths_S)) / lengths_S
        log_ratios_N = take_rows(means_S, ids_N)
    return log_ratios_N.clamp(max=LARGEST).exp()


def correction(
    mode: Correction, log_ratios_N: torch.Tensor, ids_N: torch.Tensor, sequences: int, maximum: float
) -> torch.Tensor:
    """(N,) the weight of a token that a sampler drew whose log-probs are not the policy's: their ratio.

    Of a token alone, or the product over its answer; one above `maximum` becomes it (truncate) or 0 (mask), as in TRL's
    vLLM correction. A NaN, a log-prob that the sampler did not tell, is a ratio of 1.
    """
    level, _, bound = mode.partition("_")
    known_N = log_ratios_N.nan_to_num(nan=0.0)
    if level == "sequence":
        known_N = segment_sums(known_N, ids_N, sequences)[ids_N]
    weights_N = known_N.exp()
    return weights_N.clamp(max=maximum) if bound == "truncate" else weights_N.masked_fill(weights_N > maximum, 0.0)


def k3(log_ratios_N: torch.Tensor) -> torch.Tensor:
    """(N,) exp(d) - d - 1, d = log p_ref - log p: an estimate of KL(p || p_ref), never below 0.

    Schulman, "Approximating KL divergence" (2020).
    """
    return log_ratios_N.exp() - log_ratios_N - 1
