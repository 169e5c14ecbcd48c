"""Operators, blocks and the whole step: time and memory against their floor and against their rivals.

    operators    each of operators.py by pytest-benchmark (test_operators.py), some laps of the whole table
    layer        bytes that a decoder layer keeps for the backward, per token, beside stock transformers + PEFT's
    step         tokens/s of the whole train step, beside stock PEFT + log_softmax; contestants in turn
    memory       the head's peak bytes at a T4's shapes, on tensors without data

The gate first: tests/kernels must be green, or nothing is measured. Ratios are of p20 within one run. Rows carry the
load average of a shared machine. With a GPU the Triton table is measured beside the twins.

    python -m bench kernels [--rounds 5] [--laps 3] [--only operators,layer,step,memory] [--operators "rope or swiglu"]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from spinfast_kernels import reference
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from bench import rows
from bench.operators import DEVICE, DTYPE, QWEN, RANK, TABLES, Peak, plain_logps, randn
from spinfast import attention, ops
from spinfast.packing import pack
from spinfast.policy.fuse import fuse
from spinfast.types import Group


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m bench kernels", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--laps", type=int, default=3, help="times that the whole table of operators is run")
    parser.add_argument("--only", default="operators,layer,step,memory")
    parser.add_argument("--operators", default="test_operator", help="pytest's -k over the operators' cases")
    arguments = parser.parse_args(argv)
    gate = [sys.executable, "-m", "pytest", "-q", "-x", "tests/kernels", "-k", "not every_kernel_fits"]
    if subprocess.run(gate, stdout=sys.stderr).returncode:
        raise SystemExit("bench kernels: tests/kernels is red; no number without a green gate")
    parts = {"operators": operators, "layer": layer, "step": step, "memory": head_memory}
    for name in arguments.only.split(","):
        for row in parts[name](arguments):
            rows.write("kernels", row | {"dtype": str(DTYPE), "load_average": os.getloadavg()[0]}, DEVICE)


def race(contestants: dict, rounds: int) -> dict[str, dict]:
    """{name: percentiles in ms} of functions run in turn, after one warm-up each."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for lap in range(rounds + 1):
        for name, function in contestants.items():
            _synchronize()
            start = time.perf_counter()
            function()
            _synchronize()
            if lap:
                samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: rows.percentiles(times, "ms") for name, times in samples.items()}


def _synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


# Operators ---------------------------------------------------------------------------------------------------------


def operators(arguments):
    """A row per contestant of test_operators.py, with its ratio to the floor; the laps' samples together."""
    times, facts = {}, {}
    for _ in range(arguments.laps):
        for measured in operator_lap(arguments):
            info = measured["extra_info"]
            key = (info["op"], info["pass"], info["what"])
            facts[key] = info
            times.setdefault(key, []).extend(1e3 * seconds for seconds in measured["stats"]["data"])
    for (op, passes, what), samples in times.items():
        percentiles = rows.percentiles(samples, "ms")
        floor = rows.percentiles(times[op, passes, "floor"], "ms")
        ratio = percentiles["p20_ms"] / floor["p20_ms"]
        yield (
            facts[op, passes, what] | percentiles | {"times_floor": round(ratio, 3), "of_roofline": round(1 / ratio, 3)}
        )


def operator_lap(arguments) -> list[dict]:
    """One run of test_operators.py by pytest-benchmark, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lap.json"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "bench/test_operators.py", "-k", arguments.operators]
        command += [f"--benchmark-json={path}", f"--benchmark-min-rounds={arguments.rounds}", "--benchmark-quiet"]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise SystemExit("bench kernels: bench/test_operators.py failed")
        return json.loads(path.read_text())["benchmarks"]


# Memory ---------------------------------------------------------------------------------------------------------


def head_memory(arguments):
    """Peak extra bytes at 8,192 tokens, forward + backward, on fake tensors; Triton's launches do nothing there."""
    N, D, V = 8192, QWEN["D"], QWEN["V"]
    from spinfast_kernels import linear_logps as triton_head
    from triton.runtime.jit import KernelInterface

    class Nothing(KernelInterface):
        def run(self, *args, **kwargs):
            return None

    quiet = {name: Nothing() for name in ("_row_kernel", "_unit_kernel")}
    forms = {"plain eager": plain_logps, "eager twin": reference.linear_logps, "triton": triton_head.linear_logps}
    for name, form in forms.items():
        with FakeTensorMode(), mock.patch.multiple(triton_head, **quiet), Peak() as peak:
            hidden = torch.empty(N, D, dtype=torch.float16, requires_grad=True)
            weight, targets = torch.empty(V, D, dtype=torch.float16), torch.empty(N, dtype=torch.int64)
            given = peak.live
            form(hidden, weight, targets).sum().backward()
        facts = {"op": "linear_logps", "pass": "forward+backward", "N": N, "D": D, "V": V, "simulated": "fp16"}
        yield facts | {"what": name, "peak_extra_mib": round((peak.peak - given) / 2**20, 1)}


# A layer and a step ------------------------------------------------------------------------------------------------


def peft(config):
    with torch.device(DEVICE):
        base = AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation=attention.NAME)
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=32, target_modules="all-linear")
    return get_peft_model(base.requires_grad_(False), config).train()


def batch(groups, vocabulary):
    """Pairs as long as gsm8k's: 115 prompt tokens, answers of 140."""
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return tuple(torch.randint(vocabulary, (n,), generator=generator).tolist())

    made = [Group(ids(115), (ids(140), ids(140))) for _ in range(groups)]
    return pack(made, list(range(groups)), "aten_efficient" if DEVICE == "cuda" else "numba").to(DEVICE)


def layer(arguments):
    """Bytes that the backward of one Qwen2.5-0.5B layer keeps, per token: its parameters left out."""
    config = Qwen2Config(
        vocab_size=512, hidden_size=896, intermediate_size=4864, num_hidden_layers=2, num_attention_heads=14,
        num_key_value_heads=2,
    )  # fmt: skip
    model, packed = peft(config), batch(4, 512)
    kept = {"PEFT eager": _kept_bytes(model, packed)}
    for name, table in TABLES.items():
        unfuse = fuse(model, table)
        kept[name] = _kept_bytes(model, packed)
        unfuse()
    for name, size in kept.items():
        facts = {"op": "decoder layer", "what": name, "T": packed.tokens, "model": "Qwen2.5-0.5B"}
        yield facts | {"bytes_kept_per_token": round(size), "of_peft_eager": round(size / kept["PEFT eager"], 3)}


def _kept_bytes(model, packed):
    decoder = model.get_base_model().get_decoder()
    second, kept = decoder.layers[1], {}
    own = {p.untyped_storage().data_ptr() for p in decoder.parameters()}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
        return t

    x = randn(1, packed.tokens, 896, grad=True)
    angles = decoder.rotary_emb(x, packed.position_ids_T[None])
    with saved_tensors_hooks(note, lambda t: t):
        second(x, position_embeddings=angles, layout=packed.layout).sum().backward()
    return sum(size for pointer, (size, _) in kept.items() if pointer not in own) / packed.tokens


def step(arguments):
    """Forward, loss and backward of SPIN on packed pairs, SmolLM2-135M's shape with random weights."""
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model, packed = peft(config), batch(6, 49_152)
    weight = model.get_base_model().get_output_embeddings().weight
    opponent = torch.zeros(packed.sequences, device=DEVICE)

    def train(logps, table):
        unfuse = fuse(model, table) if table else lambda: None
        decoder = model.get_base_model().get_decoder()
        output = decoder(
            input_ids=packed.token_ids_T[None],
            position_ids=packed.position_ids_T[None],
            use_cache=False,
            layout=packed.layout,
        )
        values = logps(output.last_hidden_state[0].index_select(0, packed.scored_N), weight, packed.targets_N)
        ops.EAGER.pairwise_loss(values, packed.sequence_ids_N, opponent, beta=0.1).loss.backward()
        model.zero_grad()
        unfuse()

    contestants = {"PEFT eager + log_softmax": lambda: train(plain_logps, None)}
    contestants["PEFT eager + one-sweep head"] = lambda: train(ops.EAGER.linear_logps, None)
    contestants |= {name: lambda table=table: train(table.linear_logps, table) for name, table in TABLES.items()}
    times = race(contestants, arguments.rounds)
    base = times["PEFT eager + log_softmax"]["p20_ms"]
    for name, percentiles in times.items():
        facts = {
            "op": "train step",
            "what": name,
            "T": packed.tokens,
            "N": len(packed.targets_N),
            "model": "SmolLM2-135M",
        }
        rate = {"tokens_per_s": round(1e3 * packed.tokens / percentiles["p50_ms"], 1)}
        yield facts | percentiles | rate | {"speed_up": round(base / percentiles["p20_ms"], 3)}
