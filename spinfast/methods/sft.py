"""Supervised fine-tuning on the data's answers: mean negative log-likelihood per scored token.

A row is one answer, all answers of a conversation (data.turns: all), or plain text; of answers that are compared the
best one is learnt, of labelled ones those that are desirable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spinfast.config import Config, at
from spinfast.errors import UserError
from spinfast.fit import fit
from spinfast.memory.planner import Load, limits, steps
from spinfast.methods.phases import conclude, epochs, watching
from spinfast.methods.run import Run
from spinfast.objectives import Nll
from spinfast.store.record import Stage
from spinfast.types import Example, Group


def sft(run: Run, last: Stage) -> Iterator[dict]:
    c, stage = run.config.sft, run.stage("sft", last, "sft")
    start = run.become(last)
    watch = watching(run, Nll(), c, learnt(run.heldout)[: run.config.evaluate.pairs])
    fit(run, stage, epochs(run, learnt(run.examples), c, 0), Nll(), c, at(c.lr, 0), watch=watch)
    yield conclude(run, stage, last, start)


def learnt(examples: Sequence[Example]) -> list[Group]:
    """What there is to learn from."""
    return [example.group for example in examples if example.wanted]


def answered(config: Config, method: str, examples: Sequence[Example]) -> list[Group]:
    """What there is to learn from, which must be something; without examples the config's limits count."""
    groups = learnt(examples) if examples else limits(config, 1, getattr(config, method).groups_per_step)
    if not groups:
        raise UserError(
            f"method {method}: the data has no answer to learn from, all are missing or labelled undesirable; "
            "use other data, or a method that learns from prompts alone (grpo) or from labels (dpo with loss kto)"
        )
    return groups


def load(config: Config, examples: Sequence[Example]) -> Load:
    """Every example once an epoch."""
    c, groups = config.sft, answered(config, "sft", examples)
    return Load("sft", groups, Nll(), c, c.groups_per_step, (steps(c, len(groups)),))
