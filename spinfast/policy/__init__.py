"""The model being trained, behind one small interface (transformers + PEFT, or Unsloth-patched)."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Protocol, runtime_checkable

import torch

from spinfast.errors import UserError
from spinfast.models import default_cache
from spinfast.ops import Ops
from spinfast.types import Adapter, PackedBatch
from spinfast.vllm_environment import SETTINGS


@runtime_checkable
class Policy(Protocol):
    """A frozen base with a trainable adapter: all that its callers use. D is the model dimension, V the vocabulary."""

    model: torch.nn.Module  # its parameters, buffers, mode and shape (.config); the adapter's switches are below
    causal_lm: torch.nn.Module  # the base
    decoder: torch.nn.Module  # the stack below the head; `.layers` are what activations are kept of
    device: torch.device
    dtype: torch.dtype
    ops: Ops  # who counts memory or caps the head's rows puts its own table here
    folded: list[Adapter]  # adapters merged into the base, oldest first

    # The forward -----------------------------------------------------------------------------------------------

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Final normed hidden states (T, D) of the packed tokens, in the compute dtype."""

    @property
    def attentions(self) -> list[tuple[int, int]]:
        """(key/value heads, head dim) of each attention that a generator caches, by its layer_idx."""

    @property
    def head_VD(self) -> torch.Tensor:
        """The output projection (V, D); the embedding's tensor itself where the head is tied."""

    @property
    def head_bias_V(self) -> torch.Tensor | None: ...

    def checkpoint_layers(self, layers: int) -> None:
        """Recompute the activations of the first `layers` decoder layers in the backward."""

    # The frozen weights ----------------------------------------------------------------------------------------

    def base_checksum(self) -> str:
        """Changes with any bit of the frozen weights, which an engine may hold."""

    def without_adapter(self) -> AbstractContextManager[None]:
        """The frozen weights alone, with what earlier rounds merged into them."""

    def base_only(self) -> AbstractContextManager[None]:
        """The base that the run began with. Raises UserError once rounds were merged into it."""

    def restart(self, seed: int) -> None:
        """The base as it was loaded, and the adapter that a new policy of this seed has."""

    def merge_and_restart(self, seed: int) -> None:
        """Fold the adapter into the base and start a fresh one by `seed`, which changes nothing yet."""

    def leave(self) -> torch.nn.Module:
        """Give the base back as it was loaded, for another policy; this one is of no use any more."""

    # The adapter -----------------------------------------------------------------------------------------------

    def trainable_parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """The adapter's fp32 parameters by PEFT name, in a fixed order."""

    def adapter(self) -> Adapter:
        """A copy on the host, relative to the base with everything folded so far; later training does not change it."""

    def updated(self) -> None:
        """Call it when the trainable parameters were changed."""

    def serving(self, adapter: Adapter | None) -> tuple[AbstractContextManager[None], Adapter | None]:
        """What an engine on these weights needs to answer as base + adapter, None the base: a state of the weights
        for as long as it does, and plain LoRA to add."""

    def grown(self, start: Adapter, own: Adapter) -> Adapter:
        """A foreign adapter in the place of `own`, an idle one of this policy. Raises UserError if it can't."""

    def load_adapter(self, adapter: Adapter) -> None:
        """Train on from an adapter() of this policy. Raises UserError if it does not fit."""

    def playing(self, adapter: Adapter) -> AbstractContextManager[None]:
        """Another adapter in place of the trained one, of its rank or lower, for the duration of the block."""

    def save_adapter(self, path: Path, exact: bool = False) -> None:
        """In the kind's own form (LoRA: PEFT's), relative to the original base: what is folded and what is trained.

        A kind may round to what it is shipped as, and then trains on from that; `exact` leaves everything as it is."""

    def restore(self, adapter: Adapter) -> None:
        """Become the original base + `adapter` again, which an earlier process saved."""


def unsloth_environment() -> dict[str, str]:
    """What must stand before Unsloth is imported, which imports vLLM as well: no telemetry, no folder where we are."""
    old = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
    return {
        **SETTINGS,
        "UNSLOTH_COMPILE_LOCATION": str(default_cache() / "unsloth"),
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_VLLM_NO_FLASHINFER": str(int(old)),  # it would choose FlashInfer wherever nvcc is there
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
