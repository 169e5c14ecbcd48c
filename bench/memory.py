"""`python -m bench memory`: what a SPIN step and an iteration hold on a T4, simulated; runs anywhere, in CI too.

Beside ours a step shaped like TRL's DPO trainer: every pair as two padded rows with the prompt in both, stock
modules and PEFT, logits of all tokens in fp32, adapter and optimizer the same. Nothing here is measured on a GPU:
`python -m bench rehearse` does that. Rows go to results/memory.jsonl, the plot to docs/memory.svg.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Qwen2Config

from bench import rows
from spinfast import ops as operators
from spinfast.config import Config, parse_config
from spinfast.device import GIB, profile
from spinfast.memory import planner
from spinfast.memory.ledger import KINDS, META, Ledger, apply_checkpointing, apply_head_chunk
from spinfast.memory.simulation import Simulation, settled
from spinfast.types import Group

PLOT = Path(__file__).parent.parent / "docs" / "memory.svg"
SHAPES = {  # published configurations: D, F, L, H, G, V, tied
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064, False),
}
PAIRS, PROMPT, ANSWER = 16, 256, 256
ITERATIONS = [("Qwen2.5-0.5B", False, 4.5), ("Qwen2.5-1.5B", False, 7.5), ("Qwen2.5-7B", True, 14.7)]


def model_config(name: str) -> Qwen2Config:
    D, F, L, H, G, V, tied = SHAPES[name]
    return Qwen2Config(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=H,
        num_key_value_heads=G, tie_word_embeddings=tied,
    )  # fmt: skip


def run_config(four_bit: bool = False, **train) -> Config:
    return parse_config(
        {
            "model": {"name": "shape only", "load_in_4bit": four_bit},
            "data": {"source": "shape only"},
            "prompt": {"max_prompt_tokens": PROMPT, "max_answer_tokens": ANSWER},
            "generation": {"max_tokens": ANSWER, "batch_size": 512, "kv_cache_gib": 2.0},
            "train": {"pairs_per_step": PAIRS, **train},
        }
    )


def mib(by_kind: dict[str, int]) -> dict[str, int]:
    return {kind.replace(" ", "_") + "_mib": round(size / 2**20) for kind, size in by_kind.items()}


def step_row(what: str, plan: planner.Plan, target: str) -> None:
    usage = plan.phases["train"]
    rows.write(
        "memory",
        {
            "what": what, "model": "Qwen2.5-0.5B", "target": target, "kind": "simulated",
            "microbatch_tokens": plan.microbatch_tokens, "checkpointed_layers": plan.checkpoint_layers,
            "offload": plan.offload, "head_chunk": plan.head_chunk, "tensors_gib": round(usage.peak / GIB, 3),
            "with_reserve_gib": round((usage.peak + planner.reserve(T4, usage.peak)) / GIB, 3), **mib(usage.by_kind),
        },
    )  # fmt: skip


T4 = profile("t4", plan_only=True)


def steps(ops) -> None:
    """The fastest plan on a whole T4, and the smallest step there is."""
    model = model_config("Qwen2.5-0.5B")
    step_row("step, fastest plan", planner.plan(run_config(), T4, model, ops, "vllm"), "fits 14.7 GiB")
    simulation = Simulation(model, T4, run_config().lora, ops)
    for offload in (False, True):
        apply_checkpointing(simulation.policy, 24, offload)
        apply_head_chunk(simulation.policy, chunk := min(planner.HEAD_CHUNKS))
        usage = simulation.spin(pairs(1), "adamw", "logistic", more_microbatches=True).usage
        smallest = planner.Plan(768 - 2, 24, 24, offload, chunk, 0, {"train": usage}, 0, T4.memory, 0.0)
        step_row("step, smallest", smallest, "<= 1.8 GiB in all")


def pairs(count: int) -> list[Group]:
    return [Group((0,) * PROMPT, ((0,) * ANSWER,) * 2) for _ in range(count)]


def iterations(ops) -> None:
    """The whole iteration beside 2 GiB of vLLM's cache: the smallest budget that a plan still fits."""
    for name, four_bit, target in ITERATIONS:
        device = replace(T4, memory=int(target * GIB))
        plan = planner.plan(run_config(four_bit), device, model_config(name), ops, "vllm")
        rows.write(
            "memory",
            {
                "what": "iteration with 2 GiB of KV cache", "model": name + (" NF4" if four_bit else " fp16"),
                "kind": "simulated", "target": f"<= {target} GiB", "peak_gib": round(plan.peak / GIB, 3),
                "kv_cache_gib": round(plan.kv_cache_bytes / GIB, 3), "reserve_gib": round(plan.reserve / GIB, 3),
                "microbatch_tokens": plan.microbatch_tokens, "checkpointed_layers": plan.checkpoint_layers,
                "offload": plan.offload, "head_chunk": plan.head_chunk, **mib(plan.phases["train"].by_kind),
            },
        )  # fmt: skip


# A step shaped like TRL's ------------------------------------------------------------------------------------------


def eager_step(count: int, checkpointed: bool, timeline: bool = False) -> Ledger:
    """Rows [2B, prompt + answer] through the stock model, fp32 log-softmax over all logits, one backward."""
    model = model_config("Qwen2.5-0.5B")
    simulation = Simulation(model, T4, run_config().lora, operators.EAGER)
    policy = simulation.policy
    policy.unfuse()
    policy.causal_lm.config._attn_implementation = "sdpa"
    for layer in policy.decoder.layers:
        layer.self_attn.config._attn_implementation = "sdpa"
    if checkpointed:
        policy.checkpoint_layers(len(policy.decoder.layers))
    with META:
        state = settled(policy, "adamw")
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


def eager_rows() -> None:
    for checkpointed in (False, True):
        usage = eager_step(PAIRS, checkpointed).usage
        rows.write(
            "memory",
            {
                "what": "step, TRL-shaped eager, padded [2B, L]", "model": "Qwen2.5-0.5B", "kind": "simulated",
                "checkpointed_layers": 24 * checkpointed, "tensors_gib": round(usage.peak / GIB, 3),
                **mib(usage.by_kind),
            },
        )  # fmt: skip


def draw(ops) -> None:
    """Bytes by kind over one step on the same 16 pairs, ours in one microbatch beside the eager step."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    simulation = Simulation(model_config("Qwen2.5-0.5B"), T4, run_config().lora, ops)
    ours = simulation.spin(pairs(PAIRS), "adamw", "logistic", more_microbatches=False, timeline=True)
    apply_checkpointing(simulation.policy, 24, offload=False)
    least = simulation.spin(pairs(1), "adamw", "logistic", more_microbatches=True, timeline=True)
    panels = {
        "TRL-shaped eager step": eager_step(PAIRS, False, timeline=True),
        "spinfast, one microbatch": ours,
        "spinfast, a pair at a time\n(one of 16 microbatches)": least,
    }
    kinds = [kind for kind in KINDS if any(kind in moment for each in panels.values() for moment in each.timeline)]
    figure, axes = plt.subplots(1, len(panels), sharey=True, figsize=(11, 4), layout="constrained")
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
    figure.suptitle("Qwen2.5-0.5B fp16, LoRA r=16, 16 pairs of 256 + 256 + 256 tokens: simulated", fontsize=11)
    PLOT.parent.mkdir(exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "spinfast"
    figure.savefig(PLOT, metadata={"Date": None})


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench memory")
    parser.add_argument("--no-plot", action="store_true")
    arguments = parser.parse_args(argv)
    ops = operators.choose("triton", "cuda")[0]
    if not arguments.no_plot:
        draw(ops)
    eager_rows()
    steps(ops)
    iterations(ops)
    return 0
