"""The largest batch and the longest answers within a budget of device memory, weights included.

CUDA: measured, the allocator capped at the budget, one process per trial, for every peer. Without a GPU: simulated
(memory/simulation.py, as a T4 would hold it), for spinfast alone. One microbatch, no checkpointing unless asked for.
Memory alone counts: an answer may be longer than the model's context.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench import rows
from bench.peers import compare
from bench.peers import work as given
from spinfast.config import Lora
from spinfast.device import GIB, profile
from spinfast.memory.ledger import apply_checkpointing
from spinfast.memory.simulation import Simulation
from spinfast.ops import choose
from spinfast.types import Group

PROMPT, ANSWER, LONGEST = 256, 256, 2**16


def largest(fits: Callable[[int], bool], start: int, most: int = LONGEST) -> int:
    """The largest size that fits, to an eighth; 0 if not even 1 does."""
    low, high = 0, start
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def pairs(count: int, answer: int) -> list[Group]:
    return [Group((5,) * PROMPT, ((6,) * answer, (7,) * answer)) for _ in range(count)]


def simulated(shape: str, budget: float, checkpointing: bool) -> Callable[[list[Group]], bool]:
    simulation = Simulation(given.RANDOM[shape](), profile("t4", plan_only=True), Lora(), choose("triton", "cuda")[0])
    layers = len(simulation.policy.decoder.layers)
    apply_checkpointing(simulation.policy, layers if checkpointing else 0, offload=False)
    return lambda groups: simulation.spin(groups, "adamw", "logistic", False).usage.peak <= budget * GIB


def measured(name: str, work: given.Work, budget: float, trl: Path | None) -> Callable[[list[Group]], bool]:
    def fits(groups: list[Group]) -> bool:
        given.write_groups(Path(work.scratch), groups)
        size = len(groups)
        trial = replace(work, pairs_per_step=size, rows_at_once=size, budget_gib=budget)
        trial.save()
        try:
            compare.child(name, trial, trl)
        except RuntimeError as error:
            if "OutOfMemoryError" in str(error):
                return False
            raise
        return True

    return fits


def limits(arguments) -> int:
    shape = arguments.model.removeprefix("random:") if arguments.model.startswith("random:") else "Qwen2.5-0.5B"
    budget = arguments.limits
    facts = {
        "what": "limits", "model": shape, "budget_gib": budget, "prompt_tokens": PROMPT,
        "gradient_checkpointing": arguments.checkpointing,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="spinfast-limits-") as scratch:
        if arguments.device == "cpu":
            trials = {"spinfast": simulated(shape, budget, arguments.checkpointing)}
        else:
            arguments.model = f"random:{shape}"
            work = compare.prepare(arguments, Path(scratch))
            names = [name for name in compare.contestants(arguments) if name != compare.FLOOR]
            trials = {name: measured(name, work, budget, arguments.trl) for name in names}
        for name, fits in trials.items():
            batch = largest(lambda count, fits=fits: fits(pairs(count, ANSWER)), 4)
            longest = largest(lambda length, fits=fits: fits(pairs(1, length)), 512)
            found = {"peer": name, "largest_batch": batch, "answer_tokens": ANSWER, "longest_answer": longest}
            how = "simulated" if arguments.device == "cpu" else "measured"
            rows.write("peers", {**facts, **found, "kind": how}, arguments.device)
    return 0
