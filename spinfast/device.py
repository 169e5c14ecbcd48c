"""What the machine is, and what follows from it: memory, dtype, attention, each with its reason in words.

A profile smaller than the real device rehearses the smaller one: its memory becomes a cap, its dtype and
attention rules apply.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from dataclasses import dataclass

import psutil
import torch

from spinfast import spread
from spinfast.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Published figures of a card: usable memory in bytes, sustained dense fp16 FLOP/s."""

    capability: tuple[int, int]
    memory: int
    flops: float


GPUS = {
    "t4": Gpu((7, 5), int(14.7 * GIB), 24e12),
    "l4": Gpu((8, 9), int(22.0 * GIB), 60e12),
    "a10": Gpu((8, 6), int(22.0 * GIB), 70e12),
    "a100": Gpu((8, 0), int(39.0 * GIB), 220e12),
    "h100": Gpu((9, 0), int(79.0 * GIB), 600e12),
    "h200": Gpu((9, 0), int(139.0 * GIB), 600e12),
}


CONTEXT = 512 * 2**20  # bytes of a GPU that the CUDA context and cuBLAS take beside the allocator


@dataclass(frozen=True)
class DeviceProfile:
    """The device as the rest of spinfast sees it, chosen once."""

    name: str  # "cpu", "t4", ... or the card's own name where it is not in the table
    device: torch.device
    capability: tuple[int, int] | None  # None on a CPU
    memory: int  # bytes spinfast may use
    dtype: torch.dtype
    attention: str
    rehearsal: bool  # a smaller card acted out on a bigger one
    reasons: dict[str, str]

    @property
    def scaled_loss(self) -> bool:
        """fp16 gradients need a loss scale."""
        return self.dtype == torch.float16


def profile(name: str = "auto", dtype: str = "auto", attention: str = "auto", plan_only: bool = False) -> DeviceProfile:
    """Look at the machine. Raises UserError where the machine cannot be what was asked for.

    With plan_only a named GPU that is not there is taken from its published figures; nothing can run on it.
    """
    reasons: dict[str, str] = {}
    wants_gpu = name in GPUS or (name == "auto" and torch.cuda.is_available())
    if name not in ("auto", "cpu", *GPUS):
        raise UserError(f"device.profile: expected auto, cpu or one of {', '.join(GPUS)}, got {name!r}")
    absent = wants_gpu and not torch.cuda.is_available()
    if absent and not plan_only:
        raise UserError(f"device.profile: {name} needs a CUDA GPU and none is visible; use cpu (or --dry-run to plan)")
    if absent:
        capability, memory, rehearsal, found = GPUS[name].capability, GPUS[name].memory, False, name
        reasons["device"] = f"{name} by its published figures: no CUDA GPU is visible, this is a plan only"
    elif not wants_gpu:
        capability, rehearsal, found = None, False, "cpu"
        memory = psutil.virtual_memory().available // spread.launched()[3]  # ranks of this machine share it
        _bound_shape_caches()
        reasons["device"] = "no CUDA GPU is visible" if name == "auto" else "asked for"
    else:
        capability, memory, rehearsal, found = _cuda(name, reasons)
    chosen = _dtype(dtype, capability, reasons)
    return DeviceProfile(
        name=found,
        device=torch.device("cuda" if wants_gpu else "cpu"),
        capability=capability,
        memory=memory,
        dtype=chosen,
        attention=_attention(attention, capability, chosen, reasons),
        rehearsal=rehearsal,
        reasons=reasons,
    )


def _bound_shape_caches() -> None:
    """Before the process's first product. oneDNN, and torch above it, keep what they compiled for the last 1,024
    shapes, about 1 MB each, and every microbatch has a token count of its own: gigabytes (pytorch issue 98688).
    With 64 a step of SmolLM2-135M takes no longer (bench/LOG.md).
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def fresh_memory() -> None:
    """Give back to the system what was freed (glibc keeps it otherwise), and let a GPU's peaks count from here."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def own_card() -> list[int]:
    """The CUDA device of this process; none on a CPU."""
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def cap_memory(memory: int) -> None:
    """Let the allocator have what a GPU of `memory` bytes would leave it, so that a rehearsal ends where that would."""
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (memory - CONTEXT) / total))


def _cuda(name: str, reasons: dict[str, str]) -> tuple[tuple[int, int], int, bool, str]:
    card = torch.cuda.get_device_name()
    real_capability = torch.cuda.get_device_capability()
    free, total = torch.cuda.mem_get_info()
    free = min(total, free + torch.cuda.memory_reserved() + CONTEXT)  # what this process holds is its to use
    available = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    words = re.findall(r"[a-z0-9]+", card.lower())
    known = next((key for key in GPUS if key in words), None)
    if name == "auto" or name == known:
        reasons["device"] = f"{card}, capability {real_capability[0]}.{real_capability[1]}, {available}"
        return real_capability, free, False, known or card
    gpu = GPUS[name]
    if gpu.memory > free or gpu.capability > real_capability:
        raise UserError(f"device.profile: a {card} ({available}) cannot rehearse a {name}")
    reasons["device"] = f"{name} rehearsed on {card}: memory capped at {gpu.memory / GIB:.1f} GiB, {available}"
    return gpu.capability, gpu.memory, True, name


def _dtype(asked: str, capability: tuple[int, int] | None, reasons: dict[str, str]) -> torch.dtype:
    if capability is None:
        if _multiplies_bf16():
            choice, why = "bfloat16", "the CPU multiplies bf16 in hardware (AMX or AVX512-BF16)"
        else:
            choice, why = "float32", "the CPU has no bf16 arithmetic"
    elif capability >= (8, 0):
        choice, why = "bfloat16", "capability >= 8.0 has bf16 tensor cores"
    else:
        # torch.cuda.is_bf16_supported() is True on a T4, by emulation
        choice, why = "float16", "capability < 8.0 has fp16 tensor cores only; the loss is scaled"
    if asked not in ("auto", choice):
        if asked == "bfloat16" and capability is not None and capability < (8, 0):
            raise UserError("device.dtype: bfloat16 needs capability >= 8.0; use float16 (auto chooses it)")
        choice, why = asked, "asked for"
    reasons["dtype"] = f"{choice}: {why}"
    return getattr(torch, choice)


def _multiplies_bf16() -> bool:
    """Has this CPU AMX or AVX512-BF16?"""
    if hasattr(torch.cpu, "get_capabilities"):  # from torch 2.11 on
        found = torch.cpu.get_capabilities()
        return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _attention(asked: str, capability: tuple[int, int] | None, dtype: torch.dtype, reasons: dict[str, str]) -> str:
    if capability is None:
        best, why = "numba", "torch's flash kernel forward, a compiled pass between products backward"
        obstacle = None if dtype in (torch.bfloat16, torch.float32) else f"has no kernels for {dtype}"
        next_best, same, why_not_best = "sdpa", "torch's own", "one call per segment, because numba"
    else:
        best, why = "xformers", "installed, its kernels load"
        obstacle = _xformers_obstacle()
        next_best, same, why_not_best = (
            "aten_efficient",
            "the same kernel",
            "the same cutlass kernel as xformers, which",
        )
    if asked not in ("auto", "sdpa", best, next_best):
        needs = "CPU" if asked == "numba" else "CUDA GPU"
        raise UserError(f"device.attention: {asked} needs a {needs}; use {next_best} (auto chooses)")
    if asked == best and obstacle:
        raise UserError(f"device.attention: {best} {obstacle}; use {next_best}, {same}")
    choice, why = (next_best, f"{why_not_best} {obstacle}") if obstacle else (best, why)
    if asked not in ("auto", choice):
        choice, why = asked, "asked for"
    reasons["attention"] = f"{choice}: {why}"
    return choice


def _xformers_obstacle() -> str | None:
    """Why xformers' cutlass kernel cannot be used, or None; its C++ part may be built for another torch or CUDA."""
    if importlib.util.find_spec("xformers") is None:
        return "is not installed"
    try:
        from xformers import _cpp_lib
        from xformers.ops import fmha
    except (ImportError, OSError) as error:
        return f"cannot be imported ({str(error).splitlines()[0]})"
    # its cutlass operator is aten's and always there; without its own C++ part it refuses every tensor of a GPU
    loads = _cpp_lib._built_with_cuda and fmha.cutlass.FwOp.is_available()
    return None if loads else "has no cutlass kernel that loads beside this torch"
