"""The methods there are. Each is one generator function in a file of its own, which reads as its algorithm.

play: (run, last stage) -> rows of results.json, a stage each; load: what a step asks of the memory at its fullest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from spinfast.evaluate import heldout
from spinfast.memory.planner import Load
from spinfast.methods import dpo, grpo, sft, spin
from spinfast.methods.phases import base_stage, conclude
from spinfast.methods.run import Run


@dataclass(frozen=True)
class Method:
    play: Callable[..., Iterator[dict]]
    load: Callable[..., Load]


METHODS = {
    "sft": Method(sft.sft, sft.load),
    "spin": Method(spin.spin, spin.load),
    "dpo": Method(dpo.dpo, dpo.load),
    "grpo": Method(grpo.grpo, grpo.load),
}


def play(run: Run) -> Iterator[dict]:
    """Play the config's methods in order, yielding each row of results.json: the base's, then one for every stage."""
    last = base_stage(run)
    yield conclude(run, last, last, run.policy.adapter())
    for name in run.config.method:
        yield from METHODS[name].play(run, last)
        last = run.played[-1]
    heldout.keep_best(run.directory, run.played)
