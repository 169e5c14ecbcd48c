"""`python -m bench memory`: what a step and an iteration of SPIN or GRPO hold on a T4, simulated; runs anywhere.

Beside ours a step shaped like TRL's DPO trainer: every pair as two padded rows with the prompt in both, stock
modules and PEFT, logits of all tokens in fp32, adapter and optimizer the same. Nothing here is measured on a GPU:
`python -m bench rehearse` does that. Rows go to results/memory.jsonl, the plot to docs/memory.svg.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from bench import rows, shapes
from bench.plots import picture
from spinfast import ops as operators
from spinfast.config import Config, parse_config
from spinfast.device import GIB, profile
from spinfast.errors import UserError
from spinfast.memory import planner
from spinfast.memory.ledger import KINDS, META, Ledger, apply_checkpointing, apply_head_chunk
from spinfast.memory.simulation import Simulation, settled
from spinfast.methods.run import loads
from spinfast.objectives import Pairwise
from spinfast.policy import calm

PLOT = Path(__file__).parent.parent / "docs" / "memory.svg"
PAIRS, PROMPT, ANSWER = 16, 256, 256
ITERATIONS = [("Qwen2.5-0.5B", False, 4.5), ("Qwen2.5-1.5B", False, 7.5), ("Qwen2.5-7B", True, 14.7)]


METHODS = ("sft", "dpo", "spin", "grpo")
ADAPTERS = {
    "lora r 16": {},
    "lora r 1": {"r": 1},
    "lora_xs r 16": {"kind": "lora_xs"},
    "tiny_lora 13 numbers": {"kind": "tiny_lora", "tie": "all"},
    "full, every fourth layer": {"kind": "full", "target_modules": r".*\.layers\.(0|4|8|12|16|20|24)\..*_proj"},
    "full": {"kind": "full"},
    "qlora r 16": {},  # on a base in 4 bits, which answers by itself
}
ROLLOUTS = [("Qwen2.5-0.5B", 6.0), ("Qwen2.5-1.5B", 10.0)]
ROLLOUT = {
    "method": ["grpo"], "generation": {"max_tokens": 512, "batch_size": 64, "kv_cache_gib": 2.0},
    "grpo": {"rewards": ["gsm8k"], "prompts_per_step": 8, "samples": 8},
}  # fmt: skip


def run_config(four_bit: bool = False, **sections) -> Config:
    return parse_config(
        {
            "model": {"name": "shape only", "load_in_4bit": four_bit},
            "data": {"source": "shape only"},
            "prompt": {"max_prompt_tokens": PROMPT, "max_answer_tokens": ANSWER},
            "generation": {"max_tokens": ANSWER, "batch_size": 512, "kv_cache_gib": 2.0},
        }
        | sections
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench memory")
    parser.add_argument("--model", default="Qwen2.5-0.5B", help="shape of the steps")
    parser.add_argument("--kinds", action="store_true", help="each kind of adapter with each method, and nothing else")
    parser.add_argument("--adapter", choices=ADAPTERS, help="of --kinds this one alone")
    parser.add_argument("--calm", action="store_true", help="Qwen2.5-1.5B that reads 0.5B, and nothing else")
    arguments = parser.parse_args(argv)
    ops = operators.choose("triton", "cuda")[0]
    if arguments.calm:
        for row in compositions(ops):
            rows.write("memory", row | {"kind": "simulated"})
        return 0
    if arguments.kinds:
        for row in every_kind(arguments.model, ops, [arguments.adapter] if arguments.adapter else ADAPTERS):
            rows.write("memory", row | {"kind": "simulated"})
        return 0
    for rows_of in (steps, eager_rows, iterations, rollouts):
        for row in rows_of(arguments.model, ops):
            rows.write("memory", row | {"kind": "simulated"})
    draw(arguments.model, ops)
    return 0


def held(plan: planner.Plan) -> dict:
    return {
        "microbatch_tokens": plan.microbatch_tokens, "checkpointed_layers": plan.checkpoint_layers,
        "offload": plan.offload, "head_chunk": plan.head_chunk, **mib(next(iter(plan.phases.values())).by_kind),
    }  # fmt: skip


def mib(by_kind: dict[str, int]) -> dict[str, int]:
    return {kind.replace(" ", "_") + "_mib": round(size / 2**20) for kind, size in by_kind.items()}


def steps(name: str, ops) -> Iterator[dict]:
    """The fastest plan on a whole T4, and the smallest step there is."""
    t4, model, config = profile("t4", plan_only=True), shapes.shape(name), run_config()
    simulation, layers = Simulation(model, t4, config.adapter, ops), model.num_hidden_layers
    found = {"step, fastest plan": planner.plan(config, t4, model, ops, loads(config, ()), "vllm")}
    for offload in (False, True):
        apply_checkpointing(simulation.policy, layers, offload)
        apply_head_chunk(simulation.policy, chunk := min(planner.HEAD_CHUNKS))
        usage = simulation.train(shapes.alike(1, PROMPT, ANSWER), Pairwise(), "adamw", more_microbatches=True).usage
        tokens = PROMPT + 2 * ANSWER - 2
        plan = planner.Plan(tokens, layers, layers, offload, chunk, 0, {"spin": usage}, 0, t4.memory, 0.0)
        found["step, smallest" + ", offloaded" * offload] = plan
    for what, plan in found.items():
        peak = plan.phases["spin"].peak
        sizes = {"tensors_gib": round(peak / GIB, 3)}
        sizes["with_reserve_gib"] = round((peak + planner.reserve(t4, peak)) / GIB, 3)
        yield {"what": what, "model": name, "target": "fits 14.7 GiB" if "fastest" in what else "<= 1.8 GiB in all",
               **sizes, **held(plan)}  # fmt: skip


def iterations(name: str, ops) -> Iterator[dict]:
    """The whole iteration beside 2 GiB of vLLM's cache: the smallest budget that a plan still fits."""
    for model, four_bit, target in ITERATIONS if name == "Qwen2.5-0.5B" else [(name, False, 14.7)]:
        device, config = profile("t4", plan_only=True), run_config(four_bit)
        device = replace(device, memory=int(target * GIB))
        plan = planner.plan(config, device, shapes.shape(model), ops, loads(config, ()), "vllm")
        yield {
            "what": "iteration with 2 GiB of KV cache", "model": model + (" NF4" if four_bit else " fp16"),
            "target": f"<= {target} GiB", "peak_gib": round(plan.peak / GIB, 3),
            "kv_cache_gib": round(plan.kv_cache_bytes / GIB, 3), "reserve_gib": round(plan.reserve / GIB, 3),
            **held(plan),
        }  # fmt: skip


def rollouts(name: str, ops) -> Iterator[dict]:
    """GRPO's ROLLOUT beside vLLM's cache; the share of its prompts' tokens that are there for another answer."""
    for model, target in ROLLOUTS if name == "Qwen2.5-0.5B" else [(name, 14.7)]:
        device = replace(profile("t4", plan_only=True), memory=int(target * GIB))
        config, (work,) = run_config(**ROLLOUT), loads(run_config(**ROLLOUT), ())
        plan = planner.plan(config, device, shapes.shape(model), ops, [work], "vllm")
        said = sum(len(group.prompt_ids) * len(group.answers) for group in work.groups)
        computed = sum(len(part.prompt_ids) for part in work.objective.cut(work.groups, plan.microbatch_tokens))
        yield {
            "what": "GRPO, 8 prompts x 8 answers of 512 tokens, with vLLM's KV cache", "model": model + " fp16",
            "target": f"<= {target} GiB", "peak_gib": round(plan.peak / GIB, 3),
            "kv_cache_gib": round(plan.kv_cache_bytes / GIB, 3), "reserve_gib": round(plan.reserve / GIB, 3),
            "prompt_tokens_saved": round(1 - computed / said, 3), **held(plan),
        }  # fmt: skip


def every_kind(name: str, ops, kinds: Iterable[str]) -> Iterator[dict]:
    """The fastest plan on a whole T4 for each kind of adapter and each method, and what the kind itself holds."""
    t4, model = profile("t4", plan_only=True), shapes.shape(name)
    for method in METHODS:
        for kind in kinds:
            four_bit = kind.startswith("qlora")
            sections = ROLLOUT if method == "grpo" else {"method": [method]}
            if four_bit:
                sections = sections | {"generation": {"max_tokens": ANSWER, "batch_size": 16}}
            config = run_config(four_bit, **sections, adapter=ADAPTERS[kind])
            held_as = "NF4" if four_bit else "fp16"
            row = {"what": "each kind of adapter on a T4", "model": f"{name} {held_as}", "method": method}
            row |= {"adapter": kind}
            try:
                plan = planner.plan(config, t4, model, ops, loads(config, ()), *([] if four_bit else ["vllm"]))
            except UserError as error:
                yield row | {"refused": str(error)}
                continue
            yield row | {
                "peak_gib": round(plan.peak / GIB, 3), "kv_cache_gib": round(plan.kv_cache_bytes / GIB, 3),
                **held(plan),
            }  # fmt: skip


def compositions(ops) -> Iterator[dict]:
    """The fastest plan on a whole T4 for each method, both models in 16 and in 4 bits, answers by the policy itself."""
    t4, anchor = profile("t4", plan_only=True), shapes.shape("Qwen2.5-1.5B")
    with tempfile.TemporaryDirectory(prefix="spinfast-memory-") as scratch:
        other = shapes.hollow_model(Path(scratch), shapes.shape("Qwen2.5-0.5B"))
        adapter = {"kind": "calm", "augmenting": str(other)}
        for four_bit in (False, True):
            for method in METHODS:
                sections = ROLLOUT if method == "grpo" else {"method": [method]}
                generation = sections.get("generation", {"max_tokens": ANSWER}) | {"batch_size": 16}
                config = run_config(four_bit, **(sections | {"generation": generation}), adapter=adapter)
                plan = planner.plan(config, t4, anchor, ops, loads(config, ()))
                yield {
                    "what": "CALM on a T4", "model": "Qwen2.5-1.5B reads 0.5B, " + ("NF4" if four_bit else "fp16"),
                    "method": method, "trained": calm.parameters(6, 896, 1536), "peak_gib": round(plan.peak / GIB, 3),
                    **held(plan),
                }  # fmt: skip


# A step shaped like TRL's ------------------------------------------------------------------------------------------


def eager_rows(name: str, _) -> Iterator[dict]:
    for checkpointed in (False, True):
        usage = eager_step(name, PAIRS, checkpointed).usage
        layers = shapes.shape(name).num_hidden_layers * checkpointed
        yield {"what": "step, TRL-shaped eager, padded [2B, L]", "model": name, "checkpointed_layers": layers,
               "tensors_gib": round(usage.peak / GIB, 3), **mib(usage.by_kind)}  # fmt: skip


def eager_step(name: str, count: int, checkpointed: bool, timeline: bool = False) -> Ledger:
    """Rows [2B, prompt + answer] through the stock model, fp32 log-softmax over all logits, one backward."""
    t4 = profile("t4", plan_only=True)
    simulation = Simulation(shapes.shape(name), t4, run_config().adapter, operators.EAGER)
    policy = simulation.policy
    policy.unfuse()
    policy.causal_lm.config._attn_implementation = "sdpa"
    for layer in policy.decoder.layers:
        layer.self_attn.config._attn_implementation = "sdpa"
    policy.checkpoint_layers(len(policy.decoder.layers) * checkpointed)
    state = settled(policy, "adamw", t4.scaled_loss)
    with META:
        ids = torch.empty(2 * count, PROMPT + ANSWER, dtype=torch.int64)
        opponent = torch.empty(2 * count)
    with fused_attention(), simulation.counting(state, timeline) as ledger:
        logits = policy.causal_lm(input_ids=ids, use_cache=False).logits[:, :-1].float()
        logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        ratio = logps[:, PROMPT - 1 :].sum(1) - opponent
        loss = -torch.nn.functional.logsigmoid(0.1 * (ratio[:count] - ratio[count:])).mean()
        del logits, logps, ratio
        loss.backward()
        state.optimizer.step()
    return ledger


@contextmanager
def fused_attention() -> Iterator[None]:
    """SDPA as a GPU runs it: output and log-sum-exp, no score matrix. A meta tensor would take the slow way."""
    own = torch.nn.functional.scaled_dot_product_attention

    def flash(q, k, v, **_):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]

    torch.nn.functional.scaled_dot_product_attention = flash
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = own


def draw(name: str, ops) -> None:
    """Bytes by kind over one step on the same 16 pairs, ours in one microbatch beside the eager step."""
    t4, pairs = profile("t4", plan_only=True), shapes.alike(PAIRS, PROMPT, ANSWER)
    simulation = Simulation(shapes.shape(name), t4, run_config().adapter, ops)
    ours = simulation.train(pairs, Pairwise(), "adamw", more_microbatches=False, timeline=True)
    apply_checkpointing(simulation.policy, len(simulation.policy.decoder.layers), offload=False)
    least = simulation.train(pairs[:1], Pairwise(), "adamw", more_microbatches=True, timeline=True)
    panels = {
        "TRL-shaped eager step": eager_step(name, PAIRS, False, timeline=True),
        "spinfast, one microbatch": ours,
        "spinfast, a pair at a time\n(one of 16 microbatches)": least,
    }
    kinds = [kind for kind in KINDS if any(kind in moment for each in panels.values() for moment in each.timeline)]
    with picture(PLOT, 1, len(panels), sharey=True, figsize=(11, 4)) as (figure, (axes,)):
        for axis, (title, ledger) in zip(axes, panels.items(), strict=True):
            moments = ledger.timeline[:: max(1, len(ledger.timeline) // 120)]
            heights = [[moment.get(kind, 0) / GIB for moment in moments] for kind in kinds]
            share = [100 * i / len(moments) for i in range(len(moments))]
            axis.stackplot(share, heights, labels=kinds, linewidth=0)
            axis.axhline(14.7, color="black", linestyle=":", linewidth=1)
            axis.set_title(f"{title}\npeak {ledger.usage.peak / GIB:.1f} GiB", fontsize=10)
            axis.set_xlabel("operators of the step, %")
        axes[0].set_ylabel("GiB of live tensors")
        axes[0].text(2, 15.0, "a T4's 14.7 GiB", fontsize=8)
        axes[-1].legend(loc="upper right", fontsize=8, reverse=True)
        figure.suptitle(f"{name} fp16, LoRA r=16, 16 pairs of 256 + 256 + 256 tokens: simulated", fontsize=11)
