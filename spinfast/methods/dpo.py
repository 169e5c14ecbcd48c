"""Direct preference optimisation and its family (arXiv 2305.18290; objectives/losses.py has them all).

    log p_ref of every answer                                        with_reference
    theta = argmin E loss(log p_theta, log p_ref, lengths)           fit
    held-out preference accuracy                                     conclude

Pairs share their prompt, and so do k ranked answers, which are compared pair by pair. Without a reference (cpo, simpo,
orpo) nothing is scored. Answers that are labelled one by one go by kto or apo_zero_unpaired.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from spinfast.config import Config, Dpo, at
from spinfast.errors import UserError
from spinfast.fit import fit
from spinfast.memory.planner import Load, limits, steps
from spinfast.methods.phases import check_unmerged, conclude, epochs, watching, with_reference
from spinfast.methods.run import Run
from spinfast.objectives import DESIRABLE, Preference, Unpaired
from spinfast.steps import Epochs
from spinfast.store import files
from spinfast.store.record import Stage
from spinfast.types import Example, Group

log = logging.getLogger("spinfast")


def dpo(run: Run, last: Stage) -> Iterator[dict]:
    c, stage, loss = run.config.dpo, run.stage("dpo", last, "dpo"), objective(run.config.dpo)
    start, cut = run.become(last), None
    training = epochs(run, groups(c, run.examples), c, 0)
    judges = groups(c, run.heldout)[: run.config.evaluate.pairs]
    if run.heldout and run.config.evaluate.pairs and not judges:
        log.warning("dpo: no held-out rows are as the loss takes them, so preferences are not held out")
    heldout = Epochs(judges, c.groups_per_step, 1, run.config.seed)
    if loss.reference:
        training, cut = with_reference(run, stage, training, loss, c.reference)
        if heldout.groups:
            heldout, _ = with_reference(run, stage, heldout, loss, c.reference, heldout=True)
    fit(run, stage, training, loss, c, at(c.lr, 0), cut, watching(run, loss, c, heldout.groups))
    yield conclude(run, stage, last, start, judged=(loss, heldout.groups))


def objective(c: Dpo) -> Preference | Unpaired:
    if c.unpaired:
        return Unpaired(*c.loss, c.beta, c.desirable_weight, c.undesirable_weight)
    return Preference(tuple(c.loss.items()), c.beta, c.label_smoothing, c.discopop_tau, c.simpo_gamma, c.cpo_alpha)


def groups(c: Dpo, examples: Sequence[Example]) -> list[Group]:
    """Ranked answers; or labelled ones, for kto each beside an answer that was given to another prompt."""
    if not c.unpaired:
        return [example.ranked for example in examples if example.others]
    found = [(e.prompt_ids, answer, label) for e in examples for answer, label in _labels(e)]
    if "kto" not in c.loss:
        return [Group(prompt, (answer,), {DESIRABLE: (label,)}) for prompt, answer, label in found]
    prompts = [prompt for prompt, *_ in found]
    if len({*prompts}) < 2:  # there are no strangers
        return []
    return [
        Group(prompt, (answer, found[_stranger(prompts, i)][1]), {DESIRABLE: (label, 0.0)})
        for i, (prompt, answer, label) in enumerate(found)
    ]


def _labels(example: Example) -> list[tuple[tuple[int, ...], float]]:
    """An example's answers with their labels; of ranked ones the best is desirable and the others are not."""
    if example.desirable is not None:
        return [(example.real_ids, float(example.desirable))]
    return [(example.real_ids, 1.0), *((answer, 0.0) for answer in example.others)] if example.others else []


def _stranger(prompts: Sequence[tuple[int, ...]], i: int) -> int:
    """The nearest position before i, the last ones before the first, that has another prompt."""
    return next(j for j in range(i - 1, i - len(prompts), -1) if prompts[j] != prompts[i])


def load(config: Config, examples: Sequence[Example]) -> Load:
    """Every group once an epoch."""
    c = config.dpo
    if examples:
        everything = groups(c, examples)
        check(config, everything, examples)
    else:
        labels = {DESIRABLE: (1.0, 0.0)} if c.unpaired else {}
        everything = [replace(group, given=labels) for group in limits(config, 2, c.groups_per_step)]
    loss, rounds = objective(c), (steps(c, len(everything)),)
    return Load("dpo", everything, loss, c, c.groups_per_step, rounds, scoring=loss.reference / c.epochs)


def check(config: Config, found: Sequence[Group], examples: Sequence[Example]) -> None:
    """Raises UserError where the data is not what the loss compares, or the reference cannot be had."""
    c = config.dpo
    if c.reference != "start" and not c.reference.endswith(".parquet"):
        check_unmerged(config, "dpo", "a reference.parquet")
    if not found:
        expected = "prompt, completion and label" if c.unpaired else "prompt, chosen and rejected"
        if "kto" in c.loss:
            expected += ", of two prompts or more"
        hint = "" if all(e.desirable is None for e in examples) else "; dpo.loss kto takes labelled answers"
        raise UserError(f"method dpo, loss {', '.join(c.loss)}: the data has no such rows; expected {expected}{hint}")
    if c.reference not in ("start", "base") and not files.expanded(c.reference).exists():
        raise UserError(
            f"dpo.reference {c.reference}: no such file; expected start, base, an adapter's directory or a "
            "reference.parquet"
        )
