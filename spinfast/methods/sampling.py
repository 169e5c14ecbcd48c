"""How a rollout is made: prompts drawn, answered by the engine, rewarded, compared, and kept (store/rollouts.py)."""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from spinfast.advantages import compared, reward_figures
from spinfast.evaluate.rewarded import rated
from spinfast.generation import prompt_seed
from spinfast.interrupt import stop_if_asked
from spinfast.methods.run import Run
from spinfast.objectives import ACTIVE, ADVANTAGE, OLD_LOGPS, REFERENCE, SAMPLER_LOGPS
from spinfast.policy.adapters import files as adapters
from spinfast.rewards import ConstantWatch, TrainerState
from spinfast.store import rollouts
from spinfast.store.record import Stage
from spinfast.store.rollouts import Rollout
from spinfast.train import token_logps
from spinfast.types import Adapter, Example, Group, Request

log = logging.getLogger("spinfast")


class Rollouts:
    """Implements train.Steps: a step's groups are sampled when its rollout's turn comes, or read from its file."""

    def __init__(self, run: Run, stage: Stage, start: Adapter):
        self.run, self.stage, self.start, self.c = run, stage, start, run.config.grpo
        self.longest = run.longest
        self.number, self.rollout = -1, None  # the one at hand
        self.constant = ConstantWatch(run.rewards)

    def __len__(self) -> int:
        return self.c.steps

    @property
    def files(self) -> list[str]:
        count = math.ceil(self.c.steps / self.c.steps_per_rollout)
        return [f"{rollouts.FOLDER}/{rollouts.name(number)}" for number in range(count)]

    def __getitem__(self, step: int) -> list[Group]:
        return [_group(rows) for rows in self.rows(step)]

    def figures(self, step: int) -> dict[str, float]:
        return step_figures(self.run, self.rows(step)) | self.rollout.figures

    def rows(self, step: int) -> list[list[dict]]:
        """The step's own part of its rollout, by group."""
        number, place = divmod(step, self.c.steps_per_rollout)
        if number != self.number:
            self.rollout = self.kept(number, first=place == 0) or self.made(number, step)
            self.number = number
            self.tell(step)
        part, size = place % self.c.steps_per_generation, self.c.prompts_per_step
        return rollouts.by_group(self.rollout.rows)[part * size : (part + 1) * size]

    def kept(self, number: int, first: bool) -> Rollout | None:
        """The rollout of an earlier process; at its first step the policy must be who wrote it."""
        found = rollouts.read(self.stage.directory, number, self.owner(number))
        if found and first and found.adapter != adapters.fingerprint(self.run.policy.adapter()):
            return None
        return found

    def owner(self, number: int) -> str:
        return f"{self.run.config.hash()} {self.stage.name} {self.stage.basis('train')} {number}"

    def made(self, number: int, step: int) -> Rollout:
        run, c, started = self.run, self.c, time.monotonic()
        adapter = run.policy.adapter()
        state = TrainerState(step, c.steps, number * self.size / len(self.prompts))

        def answer(asked: Sequence[Example], purpose: str) -> list[list[dict]]:
            return answered(run, asked, f"{self.stage.name} {purpose}", adapter, state)
