"""Tokens/s of spinfast's generators against bare vLLM and `model.generate`.

Same prompts, adapter (r=16 on all linear layers) and seeds, temperature 1; each side in a process of its own, one pass
to warm up. Every answer is written to max_tokens, or with --stop until it ends. Bare vLLM is `LLM(...).generate`
with the adapter read from a PEFT directory, otherwise the same engine arguments; with --no-adapter all write with the
base. The gates first: spinfast's engine must pass the canary (log-probs equal to the training policy's), its own
generator must write in fp32 the greedy tokens that `model.generate` writes. The ceiling of a generator without vLLM is
a batch of answers per pass through the bare GEMMs of base and head: no adapter, attention, sampling or prompt.

    python -m bench generation [--model MODEL|random:SHAPE] [--only spinfast-vllm bare-vllm ...] [--stop]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn import functional

from bench import rows, shapes
from bench.peers import child
from bench.roofline import seconds
from spinfast.generation import prompt_seed
from spinfast.policy.adapters import files as adapters
from spinfast.types import Adapter, Request, Sampling

MAX_LEN, RANK, BATCH, CACHE = 1024, 16, 64, 1 << 30
Write = Callable[[Sequence[Request], Sampling], list[tuple[int, ...]]]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench generation")
    parser.add_argument("--model", default=shapes.SMOLLM2, help="as in a config, or random:SHAPE")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--stop", action="store_true", help="an answer ends with its end-of-turn token")
    parser.add_argument("--no-adapter", action="store_true")
    parser.add_argument("--only", nargs="*", choices=SIDES, default=list(SIDES), help="sides to measure")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](Given(arguments))))
        return 0
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        path = shapes.resolve(arguments.model, Path(scratch))
        (Path(scratch) / "model.txt").write_text(str(path))
        shapes.policy(shapes.device(dtype=arguments.dtype), path, noise=1e-3).save_adapter(Path(scratch) / "adapter")
        for side in arguments.only:
            command = [sys.executable, "-m", "bench", "generation", *argv, "--side", side, "--scratch", scratch]
            found[side] = json.loads(child.finished(command, {}).splitlines()[-1])
            print(f"{side:22s} {found[side]}", flush=True)
    names = ("prompts", "max_tokens", "dtype", "stop")
    rates = {side: rows.percentiles(result.pop("tokens_per_s"), "tokens_per_s") for side, result in found.items()}
    for side, result in found.items():
        row = {
            "side": side, "model": arguments.model, "adapter": not arguments.no_adapter,
            "config": {name: vars(arguments)[name] for name in names} | {"lora_r": RANK},
            **result, **rates[side],
        }  # fmt: skip
        if "spinfast-vllm" in found and side != "spinfast-vllm":
            ours, theirs = rates["spinfast-vllm"]["p50_tokens_per_s"], rates[side]["p50_tokens_per_s"]
            row["spinfast_vllm_ratio"] = ours / theirs
        rows.write("generation", row, shapes.device().device.type)
    return 0


class Given:
    """What every side has: model, adapter, prompts, limits."""

    def __init__(self, arguments):
        self.arguments, self.device = arguments, shapes.device(dtype=arguments.dtype)
        self.path = Path((arguments.scratch / "model.txt").read_text())
        self.adapter_path = None if arguments.no_adapter else arguments.scratch / "adapter"
        if arguments.model.startswith("random:"):
            prompts, stop_ids = [group.prompt_ids for group in shapes.draw(arguments.prompts)], (2,)
        else:
            examples, renderer = shapes.problems(self.path, arguments.prompts)
            prompts, stop_ids = [example.prompt_ids for example in examples], renderer.stop_ids
        self.requests = [Request(i, tuple(ids), prompt_seed(0, 0, i)) for i, ids in enumerate(prompts)]
        self.stop_ids = stop_ids if arguments.stop else ()

    @property
    def adapter(self) -> Adapter | None:
        return adapters.load(self.adapter_path) if self.adapter_path else None

    def policy(self, base=None, dtype: str | None = None):
        made = shapes.policy(shapes.device(dtype=dtype or self.arguments.dtype), self.path if base is None else base)
        made.load_adapter(adapters.load(self.arguments.scratch / "adapter"))
        return made

    def rates(self, write: Write) -> list[float]:
        """Tokens/s of each round, after two tokens each to warm up."""
        found, most = [], self.arguments.max_tokens
        write(self.requests, Sampling(1.0, 1.0, 2, ()))
        for _ in range(self.arguments.rounds):
            start = time.perf_counter()
            tokens = sum(map(len, write(self.requests, Sampling(1.0, 1.0, most, self.stop_ids))))
            found.append(tokens / (time.perf_counter() - start))
            assert self.stop_ids or tokens == len(self.requests) * most, f"expected full answers, got {tokens} tokens"
        return found


# The sides, each in its own process ----------------------------------------------------------------------------


def spinfast_vllm(given: Given) -> dict:
    from spinfast.generation.canary import check_adapter, policy_logps
    from spinfast.generation.vllm import VLLMGenerator

    device = given.device
    with VLLMGenerator(
        given.path, device=device.device, capability=device.capability, dtype=device.dtype, max_model_len=MAX_LEN,
        max_lora_rank=RANK, batch_size=BATCH, kv_cache_bytes=CACHE,
    ) as generator:  # fmt: skip
        policy = given.policy(generator.shared_model())
        adapter, measure = policy.adapter(), policy_logps(policy, device.attention)
        canary = check_adapter(generator, measure, given.requests[0].prompt_ids, adapter, dtype=device.dtype)
        rates = given.rates(answers_of(generator, given.adapter))
    return {"tokens_per_s": rates, "canary_error": canary.adapter_error, "canary_moved": canary.moved}


def bare_vllm(given: Given) -> dict:
    from spinfast.generation.vllm_compat import SETTINGS
    from spinfast.generation.vllm_compat import arguments as engine_arguments

    os.environ |= SETTINGS
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(given.path), tokenizer=str(given.path), skip_tokenizer_init=True, max_model_len=MAX_LEN,
        dtype=str(given.device.dtype).removeprefix("torch."), enable_lora=given.adapter_path is not None, max_loras=1,
        max_lora_rank=RANK, max_num_seqs=BATCH, kv_cache_memory_bytes=CACHE,
        **engine_arguments(given.device.device, given.device.capability, MAX_LEN, CACHE, sleep_mode=False),
    )  # fmt: skip
    lora = LoRARequest("adapter", 1, str(given.adapter_path)) if given.adapter_path else None

    def write(requests, sampling):
        params = [
            SamplingParams(
                temperature=sampling.temperature, seed=r.seed, max_tokens=sampling.max_tokens, ignore_eos=True,
                stop_token_ids=list(sampling.stop_ids), detokenize=False,
            )
            for r in requests
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": list(r.prompt_ids)} for r in requests]
        outputs = llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
        return [tuple(output.outputs[0].token_ids) for output in outputs]

    return {"tokens_per_s": given.rates(write)}


def spinfast_transformers(given: Given) -> dict:
    from spinfast.generation.transformers import TransformersGenerator

    exact = given.policy(dtype="float32")
    greedy, few = Sampling(0.0, 1.0, 16, given.stop_ids), given.requests[:4]
    with TransformersGenerator(exact, batch_size=3, max_model_len=MAX_LEN) as generator:
        ours = answers_of(generator, given.adapter)(few, greedy)
    theirs = library(given, torch.float32)(few, greedy)
    if sorted(ours) != sorted(theirs):
        raise SystemExit(f"bench generation: greedy answers differ in fp32: {ours} and {theirs}")
    policy = given.policy()
    with TransformersGenerator(policy, batch_size=BATCH, max_model_len=MAX_LEN) as generator:
        rates = given.rates(answers_of(generator, given.adapter))
    size = min(BATCH, len(given.requests))
    return {"tokens_per_s": rates, "ceiling_tokens_per_s": size / gemm_seconds(policy, size)}


def model_generate(given: Given) -> dict:
    return {"tokens_per_s": given.rates(library(given, given.device.dtype))}


SIDES = {
    "spinfast-vllm": spinfast_vllm,
    "bare-vllm": bare_vllm,
    "spinfast-transformers": spinfast_transformers,
    "model.generate": model_generate,
}


def answers_of(generator, adapter: Adapter | None) -> Write:
    return lambda requests, sampling: [c.token_ids for c in generator.generate(requests, sampling, adapter)]


def library(given: Given, dtype: torch.dtype) -> Write:
    """`model.generate` as its documentation has it: one left-padded batch, SDPA, dynamic cache, PEFT's LoRA."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    device = given.device.device
    model = AutoModelForCausalLM.from_pretrained(given.path, dtype=dtype).to(device)
    if given.adapter_path:
        model = PeftModel.from_pretrained(model, given.adapter_path).eval()

    @torch.inference_mode()
    def write(requests, sampling):
        width = max(len(r.prompt_ids) for r in requests)
        ids = torch.tensor([[0] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in requests])
        mask = torch.tensor([[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in requests])
        most, ends = sampling.max_tokens, list(sampling.stop_ids)
        drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sampling.temperature else {"do_sample": False}
        out = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), min_new_tokens=None if ends else most,
            max_new_tokens=most, eos_token_id=ends or None, pad_token_id=0, **drawn,
        )  # fmt: skip
        return [until(row, ends) for row in out[:, width:].tolist()]

    return write


def until(ids: list[int], stop_ids: list[int]) -> tuple[int, ...]:
    ends = [place for place, token in enumerate(ids) if token in stop_ids]
    return tuple(ids[: ends[0] + 1] if ends else ids)


@torch.inference_mode()
def gemm_seconds(policy, batch_size: int) -> float:
    """One pass of `batch_size` rows through every frozen projection and the head, nothing else."""
    named = policy.decoder.named_parameters()
    weights = [p for n, p in named if p.ndim == 2 and "lora_" not in n and "embed" not in n] + [policy.head_VD]
    inputs = [torch.randn(batch_size, w.shape[1], dtype=w.dtype, device=w.device) for w in weights]

    return seconds(
        lambda: [functional.linear(x, w) for x, w in zip(inputs, weights, strict=True)], inputs[0].device.type
    )
