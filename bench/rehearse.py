"""`python -m bench rehearse [--model SHAPE]`: a T4's plan against a real GPU's allocator, phase by phase.

Runs scoring, the SFT step, the SPIN step and generation at their fullest, with the T4's memory cap, dtype and attention
rules, on whatever GPU there is and random weights of the model's shape; predicted and measured bytes stand side by
side. Needs a CUDA GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from bench import rows, shapes
from bench.memory import run_config
from spinfast import ops as operators
from spinfast.config import Config
from spinfast.device import DeviceProfile, cap_memory, profile
from spinfast.errors import UserError
from spinfast.memory.ledger import Ledger, apply_checkpointing, apply_head_chunk
from spinfast.memory.planner import other_phases, plan, training
from spinfast.memory.simulation import Phases
from spinfast.methods.run import loads


class Allocated(Phases):
    """The phases as the allocator saw them."""

    @contextmanager
    def counting(self, state=None, timeline=False) -> Iterator[Ledger]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with super().counting(state, timeline) as ledger:
            yield ledger
        torch.cuda.synchronize()
        ledger.usage = replace(ledger.usage, peak=torch.cuda.max_memory_allocated())


def rehearse(config: Config, device: DeviceProfile, shape, measure: type[Phases] = Allocated) -> list[dict]:
    """A row per phase of the plan for `device`, predicted beside measured."""
    ops, work = operators.choose("auto", device.device)[0], loads(config, ())
    planned = plan(config, device, shape, ops, work)
    policy = shapes.policy(device, shape, config.adapter)
    apply_checkpointing(policy, planned.checkpoint_layers, planned.offload)
    apply_head_chunk(policy, planned.head_chunk)
    phases = measure(policy, device)
    heaviest = next(load for load in work if load.method == next(iter(planned.phases)))  # the plan's first phase
    others = [load for load in work if load is not heaviest]
    found = other_phases(config, phases, heaviest, others, planned.microbatch_tokens, "transformers")
    found[heaviest.method] = training(heaviest, phases, planned.microbatch_tokens)
    return [
        {
            "what": name,
            "predicted_mib": round(planned.phases[name].peak / 2**20, 1),
            "measured_mib": round(usage.peak / 2**20, 1),
            "error": round(planned.phases[name].peak / usage.peak - 1, 4),
            "plan": str(planned),
        }
        for name, usage in found.items()
    ]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench rehearse")
    parser.add_argument("--model", default="Qwen2.5-0.5B", choices=shapes.SHAPES)
    parser.add_argument("--batch-size", type=int, default=64, help="answers that are generated at once")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("needs a CUDA GPU; --dry-run plans without one")
    device, config = profile("t4"), run_config(method=["sft", "spin"])
    generation = config.generation.model_copy(update={"batch_size": arguments.batch_size})
    cap_memory(device.memory)
    for row in rehearse(config.model_copy(update={"generation": generation}), device, shapes.shape(arguments.model)):
        rows.write("rehearse", row | {"model": arguments.model, "rehearsed": "t4"}, "cuda")
    return 0
