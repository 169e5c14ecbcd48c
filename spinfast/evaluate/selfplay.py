"""SPIN's game on held-out prompts: who wins it, and by what.

theta_t is the opponent, theta_{t+1} the policy, y the real answer, y' the generated one (arXiv 2401.01335):
    margin = beta * [ log p_policy(y)/p_opponent(y) - log p_policy(y')/p_opponent(y') ],   pair accuracy = P(margin > 0)
Two faults hide behind a good margin. Both log-probs may fall (log p(real) too), and the game may be won by a
feature that says nothing about quality: the answer's length or its end token. So the change of each side is
reported beside the margin, and in the fresh-opponent test (real answers against new samples of the *policy*)
the AUC of length alone and of the end token alone stand beside the AUC of the log-ratio per token.

Log-probs are sums over an answer's tokens, in nats, one numpy value per sequence; lengths count tokens, the
end token included. Every function returns {metric: estimate}, see docs/metrics.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from spinfast_kernels.reference import LOSSES

from spinfast.evaluate.statistics import (
    Estimate,
    auc,
    distinct_n,
    estimate,
    kl_k1,
    kl_k3,
    ratio_of_sums,
    repeated_ngrams,
)

Metrics = dict[str, Estimate]
Values = Sequence[float] | np.ndarray
ROUNDING = 8 * np.finfo(np.float32).eps  # of a log-prob that is an fp32 sum over an answer's tokens, relative


def selfplay_metrics(
    real_logps: Values,
    generated_logps: Values,
    opponent_real_logps: Values,
    opponent_generated_logps: Values,
    real_lengths: Sequence[int],
    generated_lengths: Sequence[int],
    beta: float,
    kind: str = "logistic",
    base_real_logps: Values | None = None,
    base_generated_logps: Values | None = None,
) -> Metrics:
    """The pairs (real, the opponent's answer), as scored by policy, opponent and, where given, the base.

    kind: the loss that was trained, one of spinfast_kernels.reference.LOSSES.
    """
    arrays = _arrays(
        real_logps, generated_logps, opponent_real_logps, opponent_generated_logps, real_lengths, generated_lengths
    )
    real, generated, opponent_real, opponent_generated, real_length, generated_length = arrays
    real_change, generated_change = log_ratios(real, opponent_real), log_ratios(generated, opponent_generated)
    margin = beta * (real_change - generated_change)
    metrics = {
        "heldout/pair_accuracy": estimate(np.where(margin == 0, 0.5, margin > 0)),
        "heldout/margin": estimate(margin),
        "heldout/loss": estimate(LOSSES[kind](torch.from_numpy(margin), beta).numpy()),
        "heldout/real_logp": estimate(real),
        "heldout/generated_logp": estimate(generated),
        "heldout/real_logp_per_token": estimate(real / real_length),
        "heldout/generated_logp_per_token": estimate(generated / generated_length),
        "heldout/real_logp_change": estimate(real_change),
        "heldout/generated_logp_change": estimate(generated_change),
        "heldout/perplexity": perplexity(real, real_length),
    }
    if base_real_logps is not None:
        metrics["heldout/real_logp_vs_base"] = estimate(log_ratios(real, base_real_logps))
    if base_generated_logps is not None:
        metrics["heldout/generated_logp_vs_base"] = estimate(log_ratios(generated, base_generated_logps))
    return metrics


def log_ratios(logps: Values, other_logps: Values) -> np.ndarray:
    """log p/q of each sequence, 0 where it is within the rounding of two fp32 sums: its sign would decide a pair."""
    logps, others = _arrays(logps, other_logps)
    ratios = logps - others
    return np.where(np.abs(ratios) <= ROUNDING * np.maximum(np.abs(logps), np.abs(others)), 0.0, ratios)


def perplexity(logps: Values, lengths: Sequence[int]) -> Estimate:
    """exp(-sum log p / sum tokens); its error by the delta method for a ratio of sums over sequences."""
    logps, lengths = _arrays(logps, lengths)
    nats = ratio_of_sums(-logps, lengths)
    value = math.exp(nats["value"])
    return {**nats, "value": value, "stderr": None if nats["stderr"] is None else value * nats["stderr"]}


def fresh_opponent_metrics(
    real_log_ratios: Values,
    fresh_log_ratios: Values,
    real_lengths: Sequence[int],
    fresh_lengths: Sequence[int],
    real_ended: Sequence[bool],
    fresh_ended: Sequence[bool],
) -> Metrics:
    """Can the policy's own log-ratio still tell real answers from fresh ones of its own, and is it length?

    log ratio = log p_policy - log p_opponent of a whole answer (log_ratios); ended: its last token is an end token.
    Real and fresh answers come in the order of their prompts. 0.5: the game is over. Length and end token
    are scored in the direction in which they tell more, so that these two AUCs are never below 0.5.
    """
    real, fresh, real_length, fresh_length = _arrays(real_log_ratios, fresh_log_ratios, real_lengths, fresh_lengths)
    return {
        "fresh/auc_log_ratio": auc(real / real_length, fresh / fresh_length, paired=True),
        "fresh/auc_length": _either_way(auc(real_length, fresh_length, paired=True)),
        "fresh/auc_eos": _either_way(auc(np.asarray(real_ended, float), np.asarray(fresh_ended, float), paired=True)),
    }


def _either_way(area: Estimate) -> Estimate:
    return {**area, "value": max(area["value"], 1 - area["value"])}


def generation_metrics(
    generated_ids: Sequence[Sequence[int]], real_lengths: Sequence[int], ended: Sequence[bool]
) -> Metrics:
    """Shape of the sampled answers: length against the real ones, end tokens, variety, loops."""
    lengths = [len(ids) for ids in generated_ids]
    length, real_length = _arrays(lengths, real_lengths)
    return {
        "heldout/length": estimate(length),
        "heldout/length_ratio": ratio_of_sums(length, real_length),
        "heldout/eos_rate": estimate(np.asarray(ended, float)),
        "heldout/distinct_1": {"value": distinct_n(generated_ids, 1), "stderr": None, "n": len(lengths)},
        "heldout/distinct_2": {"value": distinct_n(generated_ids, 2), "stderr": None, "n": len(lengths)},
        "heldout/repeated_4grams": estimate([repeated_ngrams(ids, 4) for ids in generated_ids]),
    }


def kl_metrics(policy_logps: Values, base_logps: Values, lengths: Sequence[int]) -> Metrics:
    """KL(policy || base) in nats per answer, from samples of the policy scored under both.

    k3 of whole answers has a heavy tail (it exponentiates a sum): it is a check on k1, not a replacement.
    """
    policy, base, length = _arrays(policy_logps, base_logps, lengths)
    k1 = kl_k1(policy, base)
    return {
        "heldout/kl_k1": estimate(k1),
        "heldout/kl_k3": estimate(kl_k3(policy, base)),
        "heldout/kl_k1_per_token": estimate(k1 / length),
    }


def _arrays(*columns: Values) -> tuple[np.ndarray, ...]:
    arrays = tuple(np.asarray(column, dtype=np.float64) for column in columns)
    if len({array.shape for array in arrays}) != 1 or arrays[0].ndim != 1 or not arrays[0].size:
        raise ValueError(f"expected one value per sequence everywhere, got shapes {[a.shape for a in arrays]}")
    return arrays
