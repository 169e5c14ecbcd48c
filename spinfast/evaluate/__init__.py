"""Did it help? Verdicts, statistics and the game's diagnostics, all pure; heldout.py and benchmark.py use a model."""

from spinfast.evaluate.advice import warnings
from spinfast.evaluate.answers import INVALID, SCORERS, gsm8k_flexible, gsm8k_strict, same_number
from spinfast.evaluate.selfplay import (
    fresh_opponent_metrics,
    generation_metrics,
    kl_metrics,
    perplexity,
    selfplay_metrics,
)
from spinfast.evaluate.statistics import auc, bootstrap, compare, estimate, interval, mcnemar, over_seeds, wilson
from spinfast.evaluate.stopping import best, stop_reason

__all__ = [
    "INVALID",
    "SCORERS",
    "auc",
    "best",
    "bootstrap",
    "compare",
    "estimate",
    "fresh_opponent_metrics",
    "generation_metrics",
    "gsm8k_flexible",
    "gsm8k_strict",
    "interval",
    "kl_metrics",
    "mcnemar",
    "over_seeds",
    "perplexity",
    "same_number",
    "selfplay_metrics",
    "stop_reason",
    "warnings",
    "wilson",
]
