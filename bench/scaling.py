"""What a training step takes as it grows, and how large it can get in a given memory.

    python -m bench scaling [--model SHAPE] [--only tokens,length,prompts,model] [--device cpu|cuda]
    python -m bench limits --gib 14.7 [--model SHAPE] [--checkpointing] [--only spinfast,eager]

scaling: one quantity varies, the others stay. Each point is a process of its own that scores and trains one iteration
of random pairs and reports the steady step and the peak above the model, beside the bytes that the simulation
(spinfast.memory.simulation) predicts for the same step. `python -m bench results` draws the rows.

limits: the largest batch of pairs and the longest answers. CUDA: measured, the allocator capped at the budget, one
process per trial, for every peer. CPU: simulated as a T4 would hold it, for spinfast alone. One microbatch; memory
alone counts: an answer may be longer than the model's context.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig

from bench import rows, shapes
from bench.peers import child, compare
from bench.peers import work as given
from bench.peers.spinfast_loop import steps_of
from spinfast.config import Lora
from spinfast.device import GIB, profile
from spinfast.memory.ledger import apply_checkpointing
from spinfast.memory.simulation import Simulation
from spinfast.objectives import Pairwise
from spinfast.ops import choose
from spinfast.packing import packed_length
from spinfast.types import Group

PROMPT, ANSWER, STEPS = 128, 128, 4
AXES = {  # what varies -> its values; of a point: model, pairs per step, answer tokens, pairs in all
    "tokens": [(None, pairs, ANSWER, None) for pairs in (1, 2, 4, 8, 16)],
    "length": [(None, 2048 // length, length, None) for length in (64, 128, 256, 512, 1024)],
    "prompts": [(None, 4, ANSWER, pairs) for pairs in (4, 8, 16, 32)],
    "model": [(name, 4, ANSWER, None) for name in ("tiny", "tiny-256", "tiny-512", "SmolLM2-135M")],
}
LIMIT_PROMPT, LIMIT_ANSWER, LONGEST = 256, 256, 2**16


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench scaling")
    parser.add_argument("--model", default="SmolLM2-135M", help=f"shape of the other axes: {', '.join(shapes.SHAPES)}")
    parser.add_argument("--only", default=",".join(AXES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    for axis in arguments.only.split(","):
        for name, per_step, answer, count in AXES[axis]:
            row = point(name or arguments.model, per_step, answer, count or STEPS * per_step, arguments.device)
            rows.write("scaling", {"what": axis} | row, arguments.device)
    return 0


def point(name: str, per_step: int, answer: int, count: int, device: str) -> dict:
    dtype = str(shapes.device(device).dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as scratch:
        recipe = {"device": device, "dtype": dtype, "pairs_per_step": per_step}
        work = given.prepare(Path(scratch), f"random:{name}", count, **recipe)
        given.write_groups(Path(scratch), shapes.alike(count, PROMPT, answer))
        found = child.run("spinfast", work)
        predicted = predicted_mib(work)
        tokens = per_step * packed_length(work.groups()[0])
    steps = found["steps_s"][1:] or found["steps_s"]
    return {
        "model": name, "dtype": dtype, "pairs": count, "pairs_per_step": per_step,
        "prompt_tokens": PROMPT, "answer_tokens": answer, "step_tokens": tokens,
        "steady_step_ms": round(1e3 * statistics.median(steps), 2), "iteration_s": sum(found["seconds"].values()),
        "step_tokens_per_s": round(tokens / statistics.median(steps), 1),
        "above_model_mib": round(found["above_model_mib"], 1), "predicted_tensors_mib": round(predicted, 1),
        "threads": found["threads"],
    }  # fmt: skip


def predicted_mib(work: given.Work) -> float:
    """Peak of one step above the model's weights, simulated. Every CPU tensor is counted, the interpreter's are not."""
    device = shapes.device(work.device, work.dtype)
    simulation = Simulation(AutoConfig.from_pretrained(work.model), device, Lora(), choose("auto", device.device)[0])
    usage = simulation.train(steps_of(work)[0], Pairwise(), "adamw", more_microbatches=False).usage
    return (usage.peak - usage.by_kind["weights"] - usage.by_kind["adapters"]) / 2**20


# Limits ------------------------------------------------------------------------------------------------------------


def limits(argv: list[str]) -> int:
    parser = compare.parser("limits")
    parser.add_argument("--gib", type=float, default=14.7)
    parser.set_defaults(model="Qwen2.5-0.5B")
    arguments = parser.parse_args(argv)
    name = arguments.model.removeprefix("random:")
    with tempfile.TemporaryDirectory(prefix="spinfast-limits-") as scratch:
        if arguments.device == "cpu":
            trials = {"spinfast": simulated(name, arguments.gib, arguments.checkpointing)}
        else:
            arguments.model = f"random:{name}"
            work = compare.prepare(arguments, Path(scratch))
            names = [peer for peer in compare.contestants(arguments) if peer != compare.FLOOR]
            trials = {peer: partial(measured, peer, work, arguments.gib, arguments.trl) for peer in names}
        for peer, fits in trials.items():
            row = {
                "what": "limits", "peer": peer, "model": name, "budget_gib": arguments.gib,
                "kind": "simulated" if arguments.device == "cpu" else "measured",
                "gradient_checkpointing": arguments.checkpointing,
                "prompt_tokens": LIMIT_PROMPT, "answer_tokens": LIMIT_ANSWER,
                "largest_batch": largest(lambda n, fits=fits: fits(shapes.alike(n, LIMIT_PROMPT, LIMIT_ANSWER)), 4),
                "longest_answer": largest(lambda n, fits=fits: fits(shapes.alike(1, LIMIT_PROMPT, n)), 512),
            }  # fmt: skip
            rows.write("peers", row, arguments.device)
    return 0


def largest(fits: Callable[[int], bool], start: int, most: int = LONGEST) -> int:
    """The largest size that fits, to an eighth; 0 if not even 1 does."""
    low, high = 0, start
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def simulated(name: str, budget: float, checkpointing: bool) -> Callable[[list[Group]], bool]:
    t4 = profile("t4", plan_only=True)
    simulation = Simulation(shapes.shape(name), t4, Lora(), choose("triton", "cuda")[0])
    apply_checkpointing(simulation.policy, len(simulation.policy.decoder.layers) * checkpointing, offload=False)
    return lambda groups: simulation.train(groups, Pairwise(), "adamw", False).usage.peak <= budget * GIB


def measured(peer: str, work: given.Work, budget: float, trl: Path | None, groups: list[Group]) -> bool:
    given.write_groups(Path(work.scratch), groups)
    trial = replace(work, pairs_per_step=len(groups), budget_gib=budget)
    trial.save()
    try:
        child.run(peer, trial, trl)
    except RuntimeError as error:
        if "OutOfMemoryError" in str(error):
            return False
        raise
    return True
