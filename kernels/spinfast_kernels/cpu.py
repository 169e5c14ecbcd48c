"""What the CPU kernels share: bf16 in Numba, an exponential that vectorises, and the launch on torch's threads.

Numba (LLVM) compiles them on first use, once per dtype, and keeps the result in its cache; no C++ compiler is needed.
bf16 tensors arrive as uint16 and are widened to fp32 in registers; arithmetic is fp32, and a result is rounded once.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

DTYPES = (torch.bfloat16, torch.float32)  # what the kernels take; the eager twins take the rest
FASTMATH = {"contract", "reassoc", "nsz"}  # sums may be reordered; infinities and NaN keep their meaning
compiled = numba.njit(parallel=True, nogil=True, cache=True, fastmath=FASTMATH)
inlined = numba.njit(inline="always", fastmath=FASTMATH)

_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()


@intrinsic
def widen(_, x):
    """fp32 of a bf16 (uint16) or fp32 number."""

    def codegen(_, builder, __, args):
        if x == types.float32:
            return args[0]
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16)), _F32)

    return types.float32(x), codegen


@intrinsic
def narrow(_, x, like):
    """fp32 `x` as the type of `like`, rounded to nearest even."""

    def codegen(_, builder, __, args):
        if like == types.float32:
            return args[0]
        bits, sixteen = builder.bitcast(args[0], _I32), ir.Constant(_I32, 16)
        last = builder.and_(builder.lshr(bits, sixteen), ir.Constant(_I32, 1))
        rounded = builder.lshr(builder.add(bits, builder.add(last, ir.Constant(_I32, 0x7FFF))), sixteen)
        nan = builder.fcmp_unordered("uno", args[0], args[0])  # whose low bits alone would round to an infinity
        return builder.trunc(builder.select(nan, ir.Constant(_I32, 0x7FC0), rounded), _I16)

    return like(x, like), codegen


@intrinsic
def _power_of_two(_, n):
    """2^n of a whole fp32 number -126 <= n <= 127, made of its bits."""

    def codegen(_, builder, __, args):
        exponent = builder.add(builder.fptosi(args[0], _I32), ir.Constant(_I32, 127))
        return builder.bitcast(builder.shl(exponent, ir.Constant(_I32, 23)), _F32)

    return types.float32(n), codegen


@intrinsic
def larger(_, a, b):
    """max(a, b) that a loop over it vectorises; a NaN may get lost."""

    def codegen(_, builder, __, args):
        flags = ("nnan", "nsz")
        return builder.select(builder.fcmp_ordered(">", *args, flags=flags), *args, flags=flags)

    return types.float32(a, b), codegen


@inlined
def exp(x):
    """e^x in fp32 to two units in the last place, between 2^-126 and 2^127; smaller arguments give 0.

    x = n ln 2 + r, |r| <= ln 2 / 2; e^r by Cephes' polynomial of degree 7, 2^n by its bits.
    """
    bounded = min(max(x, np.float32(-87.3)), np.float32(88.0))
    n = np.floor(bounded * np.float32(1.44269504) + np.float32(0.5))
    r = bounded - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    power = (p * r * r + r + np.float32(1.0)) * _power_of_two(n)
    return np.float32(0.0) if x < np.float32(-87.3) else power


@inlined
def sigmoid(x):
    return np.float32(1.0) / (np.float32(1.0) + exp(-x))


def launch(kernel: Callable, *args) -> None:
    """Run a compiled kernel over tensors, contiguous or not, on torch's threads. Meta tensors: nothing."""
    if any(isinstance(a, torch.Tensor) and a.is_meta for a in args):
        return
    numba.set_num_threads(min(torch.get_num_threads(), _most_threads()))
    kernel(*(_host(a) if isinstance(a, torch.Tensor) else a for a in args))


def _host(x: torch.Tensor) -> np.ndarray:
    x = x.detach()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


@cache
def _most_threads() -> int:
    """Let Numba's OpenMP layer resolve to torch's runtime, and say how many threads it has.

    Two pools of spinning threads starve each other, so where that layer does not load (it asks for the system's
    libgomp) a kernel gets one thread. As the layer starts, it sets the number of threads and allows nested teams,
    which MKL's products inside torch's loops would then open: both are taken back.
    """
    threads = torch.get_num_threads()
    runtimes = [ctypes.CDLL(str(p), ctypes.RTLD_GLOBAL) for p in (Path(torch.__file__).parent / "lib").glob("libgomp*")]
    shared = bool(runtimes) and _loads("numba.np.ufunc.omppool")
    numba.config.THREADING_LAYER = "omp" if shared else "workqueue"
    numba.set_num_threads(1)
    for runtime in runtimes:
        runtime.omp_set_max_active_levels(1)
    torch.set_num_threads(threads)
    return numba.config.NUMBA_NUM_THREADS if shared else 1


def _loads(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def or_eager(kernel: Callable, eager: Callable) -> Callable:
    """`kernel` where its first argument has one of DTYPES, else the eager twin."""
    return partial(_by_dtype, kernel, eager)


def _by_dtype(kernel, eager, x, *args, **options):
    return (kernel if x.dtype in DTYPES else eager)(x, *args, **options)
