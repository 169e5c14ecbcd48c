"""The bound of every kernel test: err(kernel, fp64) <= 2 err(eager in the same dtype, fp64) + tiny.

Errors are 2-norms over the output, or over one gradient, by name. tiny is one rounding step of the dtype relative to
the truth's norm: at sizes like N = 1 eager's error can be 0 by luck. Only the fuzzed MLP, a chain of eight roundings
that shrinks to a chain of single numbers at T = F = 1, counts them all.
"""

from __future__ import annotations

import torch
from spinfast_kernels import cpu_ops, reference, triton_ops

TABLES = {"reference": reference, "triton": triton_ops}
if not torch.cuda.is_available():
    TABLES["numba"] = cpu_ops
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def check(
    kernel, plain, inputs: dict[str, torch.Tensor], dtype: torch.dtype, device: str, fixed=(), roundings=1, ill=False
):
    """Run plain in fp64 (the truth), plain in `dtype` (eager) and kernel in `dtype`; compare outputs and gradients.

    `inputs` are fp64 CPU tensors; those named in `fixed` get no gradient, those named "lora_*" stay fp32 in the
    kernel's and eager's runs. Both functions take the inputs as keywords and return a tensor or a tuple of tensors.
    With `ill`, tiny also has what one rounding of every input does to the truth.
    """
    rounded = {name: t.to(_dtype(name, dtype)).double() if t.is_floating_point() else t for name, t in inputs.items()}
    truth = _run(plain, rounded, torch.float64, "cpu", fixed)
    eager = _run(plain, rounded, dtype, device, fixed)
    found = _run(kernel, rounded, dtype, device, fixed)
    moved = _run(plain, _moved(rounded, dtype), torch.float64, "cpu", fixed) if ill else truth
    assert found.keys() == truth.keys()
    for name, exact in truth.items():
        result = found[name].double().cpu()
        assert result.shape == exact.shape, name
        assert torch.isfinite(result).all(), f"{name} is not finite"
        tiny = torch.finfo(dtype).eps * exact.norm() + (moved[name] - exact).norm()
        bound = 2 * (eager[name].double().cpu() - exact).norm() + roundings * tiny
        error = (result - exact).norm()
        assert error <= bound, f"{name}: error {error:.3g} > bound {bound:.3g}"


def _moved(inputs, dtype):
    """The inputs, each number off by one rounding step up or down."""
    generator, step = torch.Generator().manual_seed(11), torch.finfo(dtype).eps
    signs = {name: 2 * torch.randint(2, t.shape, generator=generator) - 1 for name, t in inputs.items()}
    return {name: t * (1 + step * signs[name]) if t.is_floating_point() else t for name, t in inputs.items()}


def _dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if name.startswith("lora_") else dtype


def _run(function, inputs, dtype, device, fixed):
    leaves = {}
    for name, t in inputs.items():
        leaves[name] = t.to(device, _dtype(name, dtype) if t.is_floating_point() else t.dtype, copy=True)
        leaves[name].requires_grad_(t.is_floating_point() and name not in fixed)
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(7)
    total = 0.0
    for y in outputs:
        coefficient = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype).to(device, y.dtype)
        total = total + (y * coefficient).sum()
    total.backward()
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return results | {f"grad {name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """fp64 normal numbers, the same on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
