"""`python -m bench packing`: a training step packed with the prompt shared, against the same pairs padded to [2B, L].

Both run the same policy, kernels and objective; the padded layout is one group per answer, each brought to the
longest sequence of its microbatch, prompts repeated. Lengths are drawn to look like gsm8k and ultrachat.
Padding stands in groups of its own, so its attention costs less than in a dense mask: the padded side is flattered.
The check comes first: both steps must give the same gradient.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bench import rows
from spinfast import attention
from spinfast import ops as operators
from spinfast.config import Lora
from spinfast.device import profile
from spinfast.packing import bins, pack, packed_length
from spinfast.policy.transformers import load_policy
from spinfast.train import answer_logps
from spinfast.types import Group

LENGTHS = {"gsm8k-like": ((110, 25), (130, 50), (190, 70)), "ultrachat-like": ((170, 120), (280, 110), (270, 100))}
PAD, ATTENTION = 0, "numba"


def draw(kind: str, pairs: int, seed: int = 0) -> list[Group]:
    """Pairs with normally distributed lengths (mean, deviation) of prompt, real and generated, 8 to 512 tokens."""
    source = random.Random(seed)

    def tokens(mean, deviation):
        length = min(512, max(8, round(source.gauss(mean, deviation))))
        return tuple(source.randrange(1, 1000) for _ in range(length))

    return [Group(tokens(*p), (tokens(*r), tokens(*g))) for p, r, g in [LENGTHS[kind]] * pairs]


def packed_step(policy, groups, coefficients, budget) -> int:
    computed = 0
    for positions in bins(groups, budget):
        batch = pack(groups, positions, ATTENTION)
        weight_S = torch.tensor([c for i in positions for c in coefficients[i]])
        computed += run(policy, batch, weight_S)
    return computed


def padded_step(policy, groups, coefficients, rows_at_once) -> int:
    """TRL's layout: real and generated as rows of their own, all rows of a microbatch as long as its longest."""
    computed = 0
    for start in range(0, len(groups), rows_at_once):
        chosen = range(start, min(start + rows_at_once, len(groups)))
        singles = [(Group(groups[i].prompt_ids, (answer,)), c) for i in chosen
                   for answer, c in zip(groups[i].answers, coefficients[i], strict=True)]  # fmt: skip
        longest = max(packed_length(group) for group, _ in singles)
        padded, weight_S = [], []
        for group, c in singles:
            padding = longest - packed_length(group)
            padded += [group, *([Group((PAD,), ((PAD,) * padding,))] if padding else [])]
            weight_S += [c, *([0.0] if padding else [])]
        computed += run(policy, pack(padded, range(len(padded)), ATTENTION), torch.tensor(weight_S))
    return computed


def run(policy, batch, weight_S) -> int:
    batch = batch.to(policy.device)
    answers = weight_S.to(policy.device)[batch.sequence_ids_N]
    scored = answers != 0  # the head skips padding in both layouts
    batch = replace(batch, targets_N=batch.targets_N.masked_fill(~scored, -1))
    logps_N = answer_logps(policy, batch)
    (logps_N * answers).sum().backward()
    return batch.tokens


def small_policy(device):
    """A SmolLM2-135M of half the depth and random weights: time does not depend on them."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=15, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=device.dtype, attn_implementation=attention.NAME)
    lora = Lora(r=16, alpha=32)
    ops, _ = operators.choose("auto", device.device)
    policy = load_policy(None, "bench", None, lora=lora, ops=ops, profile=device, load_in_4bit=False, seed=0, base=base)
    for parameter in policy.trainable_parameters().values():
        parameter.data.normal_(std=0.02)
    return policy


def gradients(policy, step, *args) -> torch.Tensor:
    policy.model.zero_grad()
    step(policy, *args)
    return torch.cat([p.grad.flatten() for p in policy.trainable_parameters().values()])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench packing")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(argv)
    device = profile("cpu")
    policy = small_policy(device)
    for kind in LENGTHS:
        groups = draw(kind, arguments.pairs)
        coefficients = [(0.5, -0.5)] * len(groups)
        steps = {
            "packed": (packed_step, (groups, coefficients, 4096)),
            "padded": (padded_step, (groups, coefficients, 4)),
        }
        ours, theirs = (gradients(policy, step, *args).double() for step, args in steps.values())
        difference = ((ours - theirs).norm() / theirs.norm()).item()
        if difference > 0.05:
            raise SystemExit(f"the layouts disagree: gradients differ by {difference:.3f} of their norm")
        samples, computed = {name: [] for name in steps}, {}
        for _ in range(arguments.repeats):
            for name, (step, args) in steps.items():
                started = time.perf_counter()
                computed[name] = step(policy, *args)
                samples[name].append(1e3 * (time.perf_counter() - started))
        ratios = sorted(b / a for a, b in zip(samples["packed"], samples["padded"], strict=True))
        content = sum(map(packed_length, groups))
        rows.write(
            "packing",
            {
                "what": kind, "pairs": len(groups), "dtype": str(device.dtype), "gradient_difference": difference,
                "tokens_per_content": computed["packed"] / content,
                "padded_tokens_per_content": round(computed["padded"] / content, 3),
                "step_ratio_p50": round(statistics.median(ratios), 3), "target": 1.4 if "gsm8k" in kind else 1.5,
                **{f"{name}_{key}": value for name, times in samples.items()
                   for key, value in rows.percentiles(times, "ms").items()},
            },
        )  # fmt: skip
    return 0
