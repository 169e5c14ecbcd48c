"""Ops: the table of functions a policy and its training step are built from, chosen once, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

import torch
from spinfast_kernels import reference

from spinfast.errors import UserError


@dataclass(frozen=True)
class Ops:
    """One implementation of every function of `spinfast_kernels`; see its docstrings."""

    name: str
    linear_logps: Callable
    pairwise_loss: Callable
    lora_linear: Callable
    lora_qkv: Callable
    lora_mlp: Callable
    rms_norm: Callable
    swiglu: Callable
    rope: Callable


def _table(name: str, module: ModuleType) -> Ops:
    return Ops(name, *(getattr(module, field.name) for field in fields(Ops)[1:]))


EAGER = _table("eager", reference)


def choose(name: Literal["auto", "eager", "triton"], device: torch.device | str) -> tuple[Ops, str]:
    """(table, reason). "auto" takes triton on a CUDA device that has it; asking for what cannot run is an error."""
    if name not in ("auto", "eager", "triton"):
        raise UserError(f"ops: expected auto, eager or triton, got {name!r}")
    obstacle = _obstacle(torch.device(device))
    if name == "eager":
        return EAGER, "eager: asked for"
    if name == "auto" and obstacle:
        return EAGER, f"eager: {obstacle}"
    if obstacle:
        raise UserError(f"ops: triton was asked for but {obstacle}; use ops=eager or ops=auto")
    return triton_ops(), f"triton: {'asked for' if name == 'triton' else 'a CUDA device with triton installed'}"


def _obstacle(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on `device`, or None."""
    if device.type != "cuda":
        return f"the device is {device.type} and the kernels need a CUDA device"
    if find_spec("triton") is None:
        return "the triton package is not installed"
    return None


def triton_ops() -> Ops:
    """The Triton table; importing it imports triton."""
    from spinfast_kernels import triton_ops as kernels

    return _table("triton", kernels)
