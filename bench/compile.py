"""The gate of the kernels that no GPU is needed for, with its table: `python -m bench compile [SHAPE ...]`.

Every Triton kernel at every shape the T4 configs use, compiled for sm_75, sm_80 and sm_90 without a GPU.

The real functions run forward and backward on fake tensors; each launch is caught before it starts and compiled
for the target instead, so the constants and alignments are those of a real run. `cuobjdump` from Triton's wheel
tells registers, stack (spills) and shared memory. A spill, more than 64 KB of shared memory on sm_75, or a tl.dot
that did not become tensor-core instructions is a problem, and the exit code says so (tests/kernels/test_compile.py).
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # before triton is imported

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, MockTensor

from bench.shapes import shape

TARGETS = {75: (torch.float16,), 80: (torch.bfloat16,), 90: (torch.bfloat16,)}  # capability: what it trains in
SHARED_LIMIT = {75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


SHAPES = ("SmolLM2-135M", "Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen3-0.6B")  # those of the T4 configs, and their kin
TOKENS, SCORED, RANK = 8192, 4096, 16


def training_step(model: PretrainedConfig, dtype: torch.dtype) -> None:
    """What a training step calls, once: a decoder layer, the head with and without a gradient, every loss."""
    from spinfast_kernels import triton_ops as ops
    from spinfast_kernels.blocks import Lora, Norm
    from spinfast_kernels.pairwise import KINDS

    def tensor(*shape, grad=False, dtype=dtype):
        return torch.empty(shape, dtype=dtype, requires_grad=grad)

    def lora(D, O, bias=False):
        a, b = tensor(RANK, D, grad=True, dtype=torch.float32), tensor(O, RANK, grad=True, dtype=torch.float32)
        return Lora(tensor(O, D), tensor(O) if bias else None, a, b, 2.0)

    D, F, V, d = model.hidden_size, model.intermediate_size, model.vocab_size, model.head_dim
    heads, kv, bias = model.num_attention_heads * d, model.num_key_value_heads * d, model.model_type == "qwen2"
    norm = Norm(tensor(D), 1e-6)
    x = tensor(TOKENS, D, grad=True)
    q, k, v = ops.lora_qkv(x, *(lora(D, O, bias) for O in (heads, kv, kv)), norm=norm)
    if model.model_type == "qwen3":
        q, k = (ops.rms_norm(t.view(TOKENS, -1, d), tensor(d), 1e-6) for t in (q, k))
    q, k = ops.rope(q, k, tensor(TOKENS, d), tensor(TOKENS, d))
    x = ops.lora_linear(q.view(TOKENS, -1), *lora(heads, D), residual=x)
    x = ops.lora_mlp(x, lora(D, F), lora(D, F), lora(F, D), norm=norm, residual=True)
    x = ops.rms_norm(x, tensor(D), 1e-6)[:SCORED]
    targets = torch.empty(SCORED, dtype=torch.int64)
    ids = torch.empty(SCORED, dtype=torch.int64)
    logps = ops.linear_logps(x, tensor(V, D), targets)
    with torch.no_grad():
        ops.linear_logps(x, tensor(V, D), targets)
    opponent = tensor(64, dtype=torch.float32)
    losses = [ops.pairwise_loss(logps, ids, opponent, beta=0.1, kind=kind).loss for kind in KINDS]
    (sum(losses) + k.sum() + v.sum()).backward()
    gate = tensor(TOKENS, F, grad=True)
    ops.swiglu(gate, gate).sum().backward()


@contextmanager
def caught_launches(capability: int):
    """Within, launching a kernel compiles it for sm_<capability>; yields {(name, constants): compiled kernel}."""
    launch, compiled = JITFunction.run, {}

    def compile_only(kernel, *args, grid, warmup, **constants):
        described = [MockTensor(a.dtype) if isinstance(a, torch.Tensor) else a for a in args]
        binary = launch(kernel, *described, grid=grid, warmup=True, **constants)
        dtypes = [str(a.dtype).removeprefix("torch.") for a in args if isinstance(a, torch.Tensor)]
        named = ", ".join(f"{key}={value}" for key, value in constants.items())
        compiled[f"{kernel.fn.__module__.split('.')[-1]}.{kernel.__name__}", f"{dtypes[0]}, {named}"] = binary
        return binary

    fake = SimpleNamespace(
        get_current_device=lambda: capability,  # JITFunction caches by device: one target, one device
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )
    real = driver._active
    driver.set_active(fake)
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield compiled
    finally:
        driver._active = real


def inspect(binary) -> dict:
    """Registers, spilled bytes, shared memory and instruction counts of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("cuobjdump", "-sass", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": numbers["REG"],
        "spill_bytes": numbers["STACK"] + numbers["LOCAL"],
        "shared_bytes": binary.metadata.shared,
        "matrix_product": "tt.dot" in binary.asm["ttir"],
        "tensor_core_instructions": len(re.findall(r"\b[HIQ]G?MMA\b", sass)),
        "fma_instructions": len(re.findall(r"\b[FH]FMA2?\b", sass)),
    }


def _tool(name: str, *args: str) -> str:
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def problems(capability: int, found: dict) -> list[str]:
    """What makes a kernel unfit for its target, in words."""
    named = []
    if found["spill_bytes"]:
        named.append(f"spills {found['spill_bytes']} bytes per thread")
    if found["shared_bytes"] > SHARED_LIMIT[capability]:
        named.append(f"needs {found['shared_bytes']} bytes of shared memory, {SHARED_LIMIT[capability]} fit")
    if found["matrix_product"] and not found["tensor_core_instructions"]:
        named.append(f"does a matrix product with {found['fma_instructions']} scalar FMA instructions")
    return named


def report(names: list[str]) -> Iterator[dict]:
    """One dict per (target, kernel, constants)."""
    for capability, dtypes in TARGETS.items():
        with caught_launches(capability) as compiled, FakeTensorMode():
            for name in names:
                for dtype in dtypes:
                    training_step(shape(name), dtype)
        for (kernel, constants), binary in compiled.items():
            found = inspect(binary)
            row = {"target": f"sm_{capability}", "kernel": kernel, "constants": constants, **found}
            yield row | {"problems": problems(capability, found)}


def main(argv: list[str]) -> int:
    columns = ("target", "kernel", "constants", "registers", "spill_bytes", "shared_bytes")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    bad = []
    for row in report(argv or [*SHAPES]):
        print("| " + " | ".join(str(row[column]) for column in columns) + " |", flush=True)
        bad += [f"{row['target']} {row['kernel']} ({row['constants']}) {problem}" for problem in row["problems"]]
    print("\n".join(bad), file=sys.stderr)
    return 1 if bad else 0
