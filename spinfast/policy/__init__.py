"""The model being trained, behind one small interface (transformers + PEFT, or Unsloth-patched)."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch

from spinfast.errors import UserError
from spinfast.models import default_cache
from spinfast.types import Adapter, PackedBatch
from spinfast.vllm_environment import SETTINGS


class Policy(Protocol):
    """A frozen base with a trainable LoRA adapter. D is the model dimension, V the vocabulary."""

    model: torch.nn.Module  # the PEFT model; `policy.decoder` is the stack below the head
    decoder: torch.nn.Module
    device: torch.device
    dtype: torch.dtype

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Final normed hidden states (T, D) of the packed tokens, in the compute dtype."""

    @property
    def head_VD(self) -> torch.Tensor:
        """The output projection (V, D); the embedding's tensor itself where the head is tied."""

    @property
    def head_bias_V(self) -> torch.Tensor | None: ...

    def trainable_parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """The adapter's fp32 parameters by PEFT name, in a fixed order."""

    def adapter(self) -> Adapter:
        """A copy of the adapter on the host; later training does not change it."""

    def load_adapter(self, adapter: Adapter) -> None: ...

    def save_adapter(self, path: Path) -> None:
        """Plain PEFT layout: adapter_model.safetensors and adapter_config.json."""


def unsloth_environment() -> dict[str, str]:
    """What must stand before Unsloth is imported, which imports vLLM as well: no telemetry, no folder where we are."""
    return {
        **SETTINGS,
        "UNSLOTH_COMPILE_LOCATION": str(default_cache() / "unsloth"),
        "UNSLOTH_DISABLE_STATISTICS": "1",
    }


def import_unsloth() -> ModuleType:
    """policy/unsloth.py, imported on use: Unsloth changes transformers when it is imported."""
    if find_spec("unsloth") is None:
        raise UserError(
            "model.backend: unsloth is not installed; pip install the set of requirements/, or use transformers"
        )
    os.environ |= unsloth_environment()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Unsloth should be imported before")
            return importlib.import_module("spinfast.policy.unsloth")
    except (ImportError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.backend: unsloth cannot run here ({reason}); use transformers") from error
