"""Held-out likelihood of the data's answers, and who wins among answers that are compared: for SFT and DPO.

Log-probs are sums over an answer's scored tokens, in nats. A group of k ranked answers counts once, by the mean over
its pairs, so that its pairs are not taken for independent ones. Every function returns {metric: estimate}, see
docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from spinfast.evaluate.selfplay import Metrics, log_ratios, perplexity
from spinfast.evaluate.statistics import Estimate, auc, estimate
from spinfast.objectives import DESIRABLE, REFERENCE, Preference, Unpaired
from spinfast.types import Group
from spinfast.watch import ratio

Logps = Sequence[Sequence[float]]  # per group, per answer


def likelihood_metrics(logps: np.ndarray, lengths: Sequence[int], base_logps: np.ndarray | None = None) -> Metrics:
    """The real answers, one number each."""
    lengths = np.asarray(lengths, dtype=np.float64)
    ppl = perplexity(logps, lengths)
    nll_error = None if ppl["stderr"] is None else ppl["stderr"] / ppl["value"]
    metrics = {
        "heldout/nll": {"value": float(np.log(ppl["value"])), "stderr": nll_error, "n": ppl["n"]},
        "heldout/perplexity": ppl,
        "heldout/real_logp": estimate(logps),
        "heldout/real_logp_per_token": estimate(logps / lengths),
    }
    if base_logps is not None:
        metrics["heldout/real_logp_vs_base"] = estimate(log_ratios(logps, base_logps))
    return metrics


def ranking_metrics(groups: Sequence[Group], logps: Logps) -> Metrics:
    """Without any reference: is the better answer the likelier one per token, and is it the longer one."""
    per_token = [np.array(sums) / group.lengths for group, sums in zip(groups, logps, strict=True)]
    return {
        "heldout/chosen_likelier": estimate([_won(values) for values in per_token]),
        "heldout/chosen_longer": estimate([_won(group.lengths) for group in groups]),
    }


def preference_metrics(objective: Preference, groups: Sequence[Group], logps: Logps) -> Metrics:
    """By the reward that the loss compares (objectives.Preference.rewards), of every answer."""
    changes = [
        log_ratios(sums, group.given[REFERENCE]) if objective.reference else np.array(sums)
        for group, sums in zip(groups, logps, strict=True)
    ]
    rewards = [
        objective.rewards(values, np.array(group.lengths)) for group, values in zip(groups, changes, strict=True)
    ]
    metrics = {
        "heldout/loss": _loss(objective, groups, logps),
        "heldout/preference_accuracy": estimate([_won(values) for values in rewards]),
        "heldout/margin": estimate([_gap(values) for values in rewards]),
    }
    if objective.reference:
        metrics |= {
            "heldout/chosen_logp_change": estimate([values[0] for values in changes]),
            "heldout/rejected_logp_change": estimate([values[1:].mean() for values in changes]),
        }
    return metrics


def unpaired_metrics(objective: Unpaired, groups: Sequence[Group], logps: Logps) -> Metrics:
    """Labelled answers: the accuracy is P(a desirable one has more reward than an undesirable one), an AUC."""
    own = np.array([sums[0] for sums in logps])
    changes = log_ratios(own, [group.given[REFERENCE][0] for group in groups])
    lengths = np.array([group.lengths[0] for group in groups])
    wanted = np.array([bool(group.given[DESIRABLE][0]) for group in groups])
    sides = {"chosen": changes[wanted], "rejected": changes[~wanted]}
    metrics = {"heldout/loss": _loss(objective, groups, logps)}
    metrics |= {f"heldout/{side}_logp_change": estimate(values) for side, values in sides.items() if len(values)}
    if all(map(len, sides.values())):
        metrics["heldout/preference_accuracy"] = auc(*sides.values())
        metrics["heldout/chosen_longer"] = auc(lengths[wanted], lengths[~wanted])
    return metrics


def _loss(objective: Preference | Unpaired, groups: Sequence[Group], logps: Logps) -> Estimate:
    value, stderr = ratio(objective.units(groups, logps))
    return {"value": value, "stderr": stderr or None, "n": len(groups)}


def _won(values: Sequence[float]) -> float:
    """The share of an answer's pairs in which the better one has more, a tie counts half."""
    return float(np.mean([(np.sign(a - b) + 1) / 2 for a, b in combinations(values, 2)]))


def _gap(values: Sequence[float]) -> float:
    return float(np.mean([a - b for a, b in combinations(values, 2)]))
