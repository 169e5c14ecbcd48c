"""Reward functions: TRL's contract for them, ready ones by name, a user's own from FILE.py:function.

A function is called once per batch, with keywords only: prompts, completions, completion_ids, every other column of
the data, trainer_state, log_extra, log_metric; of these, those that its signature takes. It gives one number or None
(does not apply) per completion. The contract is that of TRL 1.16, GRPOTrainer._calculate_rewards.
"""

from __future__ import annotations

from spinfast.rewards.constant import ConstantWatch
from spinfast.rewards.contract import Batch, Reward, Rewards, Scores, TrainerState, text_of
from spinfast.rewards.files import load
from spinfast.rewards.samples import per_sample

__all__ = [
    "Batch",
    "ConstantWatch",
    "Reward",
    "Rewards",
    "Scores",
    "TrainerState",
    "load",
    "per_sample",
    "text_of",
]
