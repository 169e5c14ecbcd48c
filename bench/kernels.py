"""Operators, blocks and the whole step: time and memory against their floor and against their rivals.

    operators    each of operators.py by pytest-benchmark (test_operators.py), some laps of the whole table
    layer        bytes that a decoder layer keeps for the backward, per token, beside stock transformers + PEFT's
    step         tokens/s of the whole train step, beside stock PEFT + log_softmax; contestants in turn
    memory       the head's peak bytes at a T4's shapes, on tensors without data

The gate first: tests/kernels must be green, or nothing is measured. Ratios are of p20 within one run. With a
GPU the Triton table is measured beside the twins.

    python -m bench kernels [--rounds 5] [--laps 3] [--only operators,layer,step,memory] [--operators "rope or swiglu"]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from spinfast_kernels import reference
from torch.autograd.graph import saved_tensors_hooks

from bench import rows, shapes
from bench.operators import DEVICE, DTYPE, TABLES, plain_logps, randn
from bench.peers.watch import now
from spinfast import ops
from spinfast.memory.ledger import META, Ledger
from spinfast.memory.simulation import _without_launches
from spinfast.packing import pack
from spinfast.policy.fuse import fuse

MODEL, LONG_TOKENS = "Qwen2.5-0.5B", 8192


def main(argv: list[str]) -> int:
    parts = {"operators": time_operators, "layer": layer, "step": step, "memory": head_memory}
    parser = argparse.ArgumentParser("python -m bench kernels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--laps", type=int, default=3, help="times that the whole table of operators is run")
    parser.add_argument("--only", default=",".join(parts))
    parser.add_argument("--operators", default="test_operator", help="pytest's -k over the operators' cases")
    parser.add_argument("--model", default="SmolLM2-135M", help="shape of the step")
    arguments = parser.parse_args(argv)
    gate()
    for name in arguments.only.split(","):
        for row in parts[name](arguments):
            rows.write("kernels", row | {"dtype": str(DTYPE)}, DEVICE)
    return 0


def gate() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/kernels", "-k", "not every_kernel_fits"]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise SystemExit("bench kernels: tests/kernels is red; no number without a green gate")


def race(contestants: dict, rounds: int) -> dict[str, dict]:
    """{name: percentiles in ms} of functions run in turn, after one warm-up each."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for lap in range(rounds + 1):
        for name, function in contestants.items():
            start = now(DEVICE)
            function()
            if lap:
                samples[name].append(1e3 * (now(DEVICE) - start))
    return {name: rows.percentiles(times, "ms") for name, times in samples.items()}


def time_operators(arguments):
    """A row per contestant of test_operators.py, with its ratio to the floor; the laps' samples together."""
    times, facts = {}, {}
    for measured in (each for _ in range(arguments.laps) for each in lap(arguments)):
        info = measured["extra_info"]
        key = (info["op"], info["pass"], info["what"])
        facts[key] = info
        times.setdefault(key, []).extend(1e3 * seconds for seconds in measured["stats"]["data"])
    for (op, passes, what), samples in times.items():
        measured = rows.percentiles(samples, "ms")
        ratio = measured["p20_ms"] / rows.percentiles(times[op, passes, "floor"], "ms")["p20_ms"]
        yield facts[op, passes, what] | measured | {"times_floor": round(ratio, 3), "of_roofline": round(1 / ratio, 3)}


def lap(arguments) -> list[dict]:
    """One run of test_operators.py by pytest-benchmark, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lap.json"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "bench/test_operators.py", "-k", arguments.operators]
        command += [f"--benchmark-json={path}", f"--benchmark-min-rounds={arguments.rounds}", "--benchmark-quiet"]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise SystemExit("bench kernels: bench/test_operators.py failed")
        return json.loads(path.read_text())["benchmarks"]


def head_memory(arguments):
    """Peak extra bytes in fp16, forward + backward, on tensors without data."""
    from spinfast_kernels import linear_logps as triton_head

    model, N = shapes.shape(MODEL), LONG_TOKENS
    D, V = model.hidden_size, model.vocab_size
    forms = {"plain eager": plain_logps, "eager twin": reference.linear_logps, "triton": triton_head.linear_logps}
    for name, form in forms.items():
        with META:
            hidden = torch.empty(N, D, dtype=torch.float16, requires_grad=True)
            data = hidden, torch.empty(V, D, dtype=torch.float16), torch.empty(N, dtype=torch.int64)
        ledger = Ledger(simulated=True)
        for tensor in data:
            ledger.tag(tensor, "data")
        with _without_launches(), ledger:
            form(*data).sum().backward()
        extra = ledger.usage.peak - ledger.usage.by_kind["data"]
        facts = {"op": "linear_logps", "pass": "forward+backward", "N": N, "D": D, "V": V, "simulated": "fp16"}
        yield facts | {"what": name, "peak_extra_mib": round(extra / 2**20, 1)}


# A layer and a step ------------------------------------------------------------------------------------------------


def policy_and_batch(name: str, pairs: int, **changes):
    """Pairs as long as gsm8k's: 115 prompt tokens, answers of 140."""
    policy = shapes.policy(shapes.device(dtype=str(DTYPE).removeprefix("torch.")), shapes.shape(name, **changes))
    policy.unfuse()
    backend = "aten_efficient" if DEVICE == "cuda" else "numba"
    return policy, pack(shapes.alike(pairs, 115, 140), range(pairs), backend).to(DEVICE)


def layer(arguments):
    """Bytes that the backward of one layer keeps, per token: its parameters left out."""
    policy, packed = policy_and_batch(MODEL, 4, num_hidden_layers=2, vocab_size=1024)
    found = {"PEFT eager": _kept_bytes(policy, packed)}
    for name, table in TABLES.items():
        unfuse = fuse(policy.model, table)
        found[name] = _kept_bytes(policy, packed)
        unfuse()
    for name, size in found.items():
        facts = {"op": "decoder layer", "what": name, "T": packed.tokens, "model": MODEL}
        yield facts | {"bytes_kept_per_token": round(size), "of_peft_eager": round(size / found["PEFT eager"], 3)}


def _kept_bytes(policy, packed) -> float:
    found = {p.untyped_storage().data_ptr(): (0, p) for p in policy.decoder.parameters()}

    def note(tensor):  # holds the tensor, so that no address is given twice
        storage = tensor.untyped_storage()
        found.setdefault(storage.data_ptr(), (storage.nbytes(), tensor))
        return tensor

    x = randn(1, packed.tokens, policy.causal_lm.config.hidden_size, grad=True)
    angles = policy.decoder.rotary_emb(x, packed.position_ids_T[None])
    with saved_tensors_hooks(note, lambda tensor: tensor):
        policy.decoder.layers[1](x, position_embeddings=angles, layout=packed.layout).sum().backward()
    return sum(size for size, _ in found.values()) / packed.tokens


def step(arguments):
    """Forward, loss and backward of SPIN on packed pairs."""
    policy, packed = policy_and_batch(arguments.model, 6)
    opponent = torch.zeros(packed.sequences, device=DEVICE)

    def train(logps, table):
        unfuse = fuse(policy.model, table) if table else lambda: None
        scored = policy.hidden(packed).index_select(0, packed.scored_N)
        values = logps(scored, policy.head_VD, packed.targets_N)
        ops.EAGER.pairwise_loss(values, packed.sequence_ids_N, opponent, beta=0.1).loss.backward()
        policy.model.zero_grad()
        unfuse()

    contestants = {"PEFT eager + log_softmax": lambda: train(plain_logps, None)}
    contestants["PEFT eager + one-sweep head"] = lambda: train(ops.EAGER.linear_logps, None)
    contestants |= {name: lambda table=table: train(table.linear_logps, table) for name, table in TABLES.items()}
    times = race(contestants, arguments.rounds)
    base = times["PEFT eager + log_softmax"]["p20_ms"]
    for name, measured in times.items():
        facts = {"op": "train step", "what": name, "T": packed.tokens, "N": len(packed.targets_N)}
        rate = {"tokens_per_s": round(1e3 * packed.tokens / measured["p50_ms"], 1)}
        yield {**facts, "model": arguments.model, **measured, **rate, "speed_up": round(base / measured["p20_ms"], 3)}
