"""Time and memory of a training step against what makes it bigger: tokens per batch, answer length, prompts, model.

    python -m bench scaling [--model SHAPE] [--only tokens,length,prompts,model]

One quantity varies, the others stay. Each point is a process of its own that scores and trains one iteration of
random pairs (time and memory do not depend on the weights' values) and reports the steady step and the peak above
the model. Beside it the bytes that the simulation (spinfast.memory.simulation) predicts for the same step. Rows go to
results/scaling.jsonl; `python -m bench results` draws them.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig

from bench import rows
from bench.peers import work as given
from bench.peers.compare import child
from bench.peers.spinfast_loop import train_plan, unshuffled
from spinfast.config import Lora
from spinfast.device import profile
from spinfast.memory.simulation import Simulation
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


def pairs(count: int, answer: int) -> list[Group]:
    """All alike, so that a point is one size."""
    source = random.Random(0)
    ids = lambda length: tuple(source.randrange(2, 1000) for _ in range(length))  # noqa: E731
    return [Group(ids(PROMPT), (ids(answer), ids(answer))) for _ in range(count)]


def predicted_mib(work: given.Work) -> float:
    """Peak of one step above the model's weights, simulated. Every CPU tensor is counted, the interpreter's are not."""
    device = replace(profile("cpu" if work.device == "cpu" else "auto"), dtype=work.torch_dtype)
    ops, _ = choose("auto", device.device)
    simulation = Simulation(AutoConfig.from_pretrained(work.model), device, Lora(), ops)
    plan = train_plan(work)
    step = unshuffled(work.groups(), plan)[: work.pairs_per_step]
    usage = simulation.spin(step, "adamw", "logistic", more_microbatches=False).usage
    return (usage.peak - usage.by_kind["weights"] - usage.by_kind["adapters"]) / 2**20


def point(axis: str, shape: str, per_step: int, answer: int, count: int, device: str, dtype: str) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        recipe = {"device": device, "dtype": dtype, "pairs_per_step": per_step, "rows_at_once": per_step}
        work = given.prepare(Path(scratch), f"random:{shape}", None, count, **recipe)
        given.write_groups(Path(scratch), pairs(count, answer))
        found = child("spinfast", work, None)
        predicted = predicted_mib(work)
    steps = found["steps_s"][1:] or found["steps_s"]
    tokens = per_step * packed_length(pairs(1, answer)[0])
    return {
        "what": axis, "model": shape, "dtype": dtype, "pairs": count, "pairs_per_step": per_step,
        "prompt_tokens": PROMPT, "answer_tokens": answer, "step_tokens": tokens,
        "steady_step_ms": round(1e3 * statistics.median(steps), 2), "iteration_s": sum(found["seconds"].values()),
        "step_tokens_per_s": round(tokens / statistics.median(steps), 1),
        "above_model_mib": round(found["above_model_mib"], 1), "predicted_tensors_mib": round(predicted, 1),
        "threads": found["threads"], "load_1m": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench scaling", description=__doc__)
    parser.add_argument("--model", default="SmolLM2-135M", help=f"shape of the other axes: {', '.join(given.RANDOM)}")
    parser.add_argument("--only", default=",".join(AXES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    dtype = str(profile("cpu" if arguments.device == "cpu" else "auto").dtype).removeprefix("torch.")
    for axis in arguments.only.split(","):
        for shape, per_step, answer, count in AXES[axis]:
            shape, count = shape or arguments.model, count or STEPS * per_step
            row = point(axis, shape, per_step, answer, count, arguments.device, dtype)
            rows.write("scaling", row, arguments.device)
    return 0
