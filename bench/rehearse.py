"""`python -m bench rehearse [CONFIG]`: a T4's plan against a real GPU's allocator, phase by phase.

Runs scoring and training of the worst microbatch with the T4's memory cap, dtype and attention rules on whatever GPU
there is, on random weights of the model's shape, and prints predicted and measured bytes. Needs a CUDA GPU.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

from bench import rows
from bench.memory import model_config, run_config
from spinfast import attention
from spinfast import ops as operators
from spinfast.device import profile
from spinfast.errors import UserError
from spinfast.memory import apply_checkpointing, settled
from spinfast.objectives.spin import Spin
from spinfast.packing import pack, packed_length
from spinfast.planner import heaviest, plan, worst_batch
from spinfast.policy.transformers import load_policy
from spinfast.train import TrainPlan, batch_sequence_logps, train_step


def measured(phase, *args) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    phase(*args)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench rehearse")
    parser.add_argument("--model", default="Qwen2.5-0.5B")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("bench rehearse: needs a CUDA GPU; --dry-run plans without one")
    device, config, shape = profile("t4"), run_config(), model_config(arguments.model)
    torch.cuda.set_per_process_memory_fraction(device.memory / torch.cuda.get_device_properties(0).total_memory)
    ops, _ = operators.choose("auto", device.device)
    planned = plan(config, device, shape, ops, "vllm")
    with torch.device("cuda"):
        base = AutoModelForCausalLM.from_config(shape, dtype=device.dtype, attn_implementation=attention.NAME)
    policy = load_policy(
        None, "bench", None, lora=config.lora, ops=ops, profile=device, load_in_4bit=False, seed=0, base=base
    )
    apply_checkpointing(policy, planned.checkpoint_layers, planned.offload)
    groups = worst_batch(heaviest(config, ()), planned.microbatch_tokens)
    everyone = range(len(groups))
    tokens = sum(map(packed_length, groups))
    settings = TrainPlan(len(groups), tokens, 1, 0, device.attention, lr=0.0)
    objective = Spin(torch.zeros(len(groups), 2, device="cuda"), 0.1, "logistic", ops)
    phases = SimpleNamespace(
        score=lambda: batch_sequence_logps(policy, pack(groups, everyone, device.attention)),
        train=lambda: train_step(policy, groups, everyone, objective, settings, state, device.scaled_loss),
    )
    found = {"score": measured(phases.score)}
    state = settled(policy, "adamw")
    found["train"] = measured(phases.train)
    for phase, size in found.items():
        predicted = planned.phases[phase].peak
        row = {
            "what": phase,
            "model": arguments.model,
            "predicted_mib": predicted / 2**20,
            "measured_mib": size / 2**20,
        }
        rows.write("rehearse", row | {"error": predicted / size - 1, "plan": str(planned)}, "cuda")
    return 0
