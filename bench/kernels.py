"""Operators, blocks and the whole step: time and memory against their floor and against their rivals.

    operators    each of operators.py at Qwen2.5-0.5B's sizes, contestants in turn
    layer        bytes that a decoder layer keeps for the backward, per token, beside stock transformers + PEFT's
    step         tokens/s of the whole train step, beside stock PEFT + log_softmax; contestants in turn
    memory       the head's peak bytes at a T4's shapes, on tensors without data

The gate first: tests/kernels must be green, or nothing is measured. Ratios are of p20 within one run. Rows carry the
load average of a shared machine. With a GPU the Triton table is measured beside the twins.

    python -m bench kernels [--rounds 15] [--only operators,layer,step,memory] [--operators rope,swiglu]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from functools import partial

import torch
from spinfast_kernels import reference

from bench import rows, shapes
from bench.operators import DEVICE, DTYPE, PASSES, TABLES, kept, memory, operators, peak, plain_logps, randn, run
from spinfast import ops
from spinfast.memory.ledger import META
from spinfast.memory.simulation import _without_launches
from spinfast.packing import pack
from spinfast.policy.fuse import fuse

MODEL, TOKENS, HEAD_TOKENS, LONG_TOKENS = "Qwen2.5-0.5B", 2048, 1024, 8192


def main(argv: list[str]) -> int:
    parts = {"operators": time_operators, "layer": layer, "step": step, "memory": head_memory}
    parser = argparse.ArgumentParser("python -m bench kernels")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default=",".join(parts))
    parser.add_argument("--operators", help="names, all if not given")
    parser.add_argument("--model", default="SmolLM2-135M", help="shape of the step")
    arguments = parser.parse_args(argv)
    gate()
    for name in arguments.only.split(","):
        for row in parts[name](arguments):
            rows.write("kernels", row | {"dtype": str(DTYPE), "load_average": os.getloadavg()[0]}, DEVICE)
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


def time_operators(arguments):
    """A row per operator, pass and contestant, with its ratio to the floor."""
    made = operators(shapes.shape(MODEL), TOKENS, HEAD_TOKENS)
    for op in arguments.operators.split(",") if arguments.operators else made:
        operator = made[op]
        torch.manual_seed(0)
        data = operator.data()
        for passes in PASSES:
            contestants = {"floor": partial(operator.floor, data, passes)}
            contestants |= {name: partial(run, form, data, passes) for name, form in operator.forms.items()}
            times = race(contestants, arguments.rounds)
            for name, measured in times.items():
                ratio = measured["p20_ms"] / times["floor"]["p20_ms"]
                row = {"op": op, "what": name, "pass": passes, **operator.facts, **measured}
                row |= {"times_floor": round(ratio, 3), "of_roofline": round(1 / ratio, 3)}
                if name not in ("floor", "torch.compile") and passes != "forward":  # a compiled graph hides its tensors
                    row |= memory(operator.forms[name], data)
                yield row


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
        with _without_launches():
            extra = peak(lambda form=form, data=data: form(*data).sum().backward(), data, simulated=True)
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
    own = {p.untyped_storage().data_ptr() for p in policy.decoder.parameters()}
    x = randn(1, packed.tokens, policy.causal_lm.config.hidden_size, grad=True)
    angles = policy.decoder.rotary_emb(x, packed.position_ids_T[None])
    second = policy.decoder.layers[1]
    found = kept(lambda: second(x, position_embeddings=angles, layout=packed.layout).sum().backward())
    return sum(size for pointer, size in found.items() if pointer not in own) / packed.tokens


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
