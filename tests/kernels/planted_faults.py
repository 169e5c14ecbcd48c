"""Run by test_compile.py in a process without the interpreter: kernels with a fault, as bench/compile.py sees them."""

import json

from bench import compile as bench  # first: it switches the interpreter off

# isort: split
import torch
import triton
import triton.language as tl


@triton.jit
def product(a, b, c, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def plain_sum(a, b, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    x = tl.load(a + at)
    tl.store(b + i, tl.sum(tl.exp(x) * tl.load(a + at + 1) + tl.sin(x), 1))


found = {}
for capability in (75, 80):
    with bench.caught_launches(capability) as compiled:
        half, single = torch.empty(64, 64, dtype=torch.float16), torch.empty(64, 64)
        product[(1,)](half, half, single, N=64)
        plain_sum[(1,)](single, single, N=64, num_warps=1, maxnreg=24)
    for (name, _), binary in compiled.items():
        found[f"sm_{capability} {name.split('.')[-1]}"] = bench.problems(capability, bench.inspect(binary))
fit = {"spill_bytes": 0, "matrix_product": False, "tensor_core_instructions": 0, "fma_instructions": 9}
for capability, shared in ((75, 65_536), (75, 65_537), (80, 65_537)):
    found[f"{shared} bytes on sm_{capability}"] = bench.problems(capability, fit | {"shared_bytes": shared})
print(json.dumps(found))
