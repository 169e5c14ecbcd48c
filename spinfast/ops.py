"""Ops: the table of functions a policy and its training step are built from, chosen once, with the reason."""

from __future__ import annotations

import importlib
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
MODULES = {"triton": "spinfast_kernels.triton_ops", "numba": "spinfast_kernels.cpu_ops"}
COMPILED = {"cuda": "triton", "cpu": "numba"}  # device type -> the table made for it


def choose(name: Literal["auto", "eager", "triton", "numba"], device: torch.device | str) -> tuple[Ops, str]:
    """(table, reason). "auto" takes the device's compiled table; asking for what cannot run is an error."""
    if name not in ("auto", "eager", *MODULES):
        raise UserError(f"ops: expected auto, eager, {' or '.join(MODULES)}, got {name!r}")
    kind = torch.device(device).type
    wanted = COMPILED.get(kind, "eager") if name == "auto" else name
    obstacle = _obstacle(wanted, kind)
    if name == "auto" and obstacle:
        return EAGER, f"eager: {obstacle}"
    if obstacle:
        raise UserError(f"device.kernels: {name} was asked for but {obstacle}; use device.kernels=eager or auto")
    table = EAGER if wanted == "eager" else compiled(wanted)
    return table, f"{wanted}: {f'the compiled kernels of {kind}' if name == 'auto' else 'asked for'}"


def _obstacle(name: str, kind: str) -> str | None:
    """Why this table cannot run on a device of this kind, or None."""
    if name == "eager":
        return None
    if COMPILED.get(kind) != name:
        needed = next(kind for kind, table in COMPILED.items() if table == name)
        return f"the device is {kind} and its kernels need a {needed.upper()} device"
    return None if find_spec(name) else f"the {name} package is not installed"


def compiled(name: str) -> Ops:
    """The table "triton" or "numba"; importing it imports that package."""
    return _table(name, importlib.import_module(MODULES[name]))
