"""Supervised fine-tuning on the data's answers: mean negative log-likelihood per answer token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spinfast.config import Config, at
from spinfast.fit import fit
from spinfast.memory.planner import Load, shapes, steps
from spinfast.methods.phases import conclude, epochs
from spinfast.methods.run import Run
from spinfast.objectives import Nll
from spinfast.store.record import Stage
from spinfast.types import Group


def sft(run: Run, last: Stage) -> Iterator[dict]:
    c, stage = run.config.sft, run.stage("sft", last, "sft")
    start = run.become(last)
    groups = [Group(example.prompt_ids, (example.real_ids,)) for example in run.examples]
    fit(run, stage, epochs(run, groups, c, 0), Nll(), c, at(c.lr, 0))
    yield conclude(run, stage, last, start)


def load(config: Config, lengths: Sequence[tuple[int, int]]) -> Load:
    """Every example once an epoch."""
    c = config.sft
    groups = [Group((0,) * prompt, ((0,) * answer,)) for prompt, answer in shapes(config, lengths, c.groups_per_step)]
    return Load("sft", groups, Nll(), c, (steps(c, len(groups)),))
