"""What is trained beside the frozen base: one file per kind. Adapters outside a model are in files.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from spinfast.policy.adapters.calm import Calm
from spinfast.policy.adapters.full import Full
from spinfast.policy.adapters.lora import Lora
from spinfast.policy.adapters.lora_xs import LoraXs
from spinfast.policy.adapters.pissa import Pissa
from spinfast.policy.adapters.tiny_lora import TinyLora
from spinfast.types import Adapter


class AdapterKind(Protocol):
    """An adapter on a base. To the fused blocks it is factors, or a master of the weight itself; outside it is an
    Adapter, in its kind's own form."""

    LAYER: type[torch.nn.Module]  # what it puts around a linear layer of the base
    trains_weights: bool  # the base's own, so that there is no LoRA to tell of
    model: torch.nn.Module  # the base with its layers
    others: Sequence[torch.nn.Module]  # frozen models that run beside it
    attentions: Sequence[tuple[int, int]]  # (key/value heads, head dim) of those that come after the base's layers

    @staticmethod
    def check(name: str, layer: torch.nn.Module) -> None:
        """Raises UserError where `added` is not all that the layer does."""

    @staticmethod
    def added(layer: torch.nn.Module) -> dict:
        """Fields of spinfast_kernels.blocks.Lora, as they are now: lora_A, lora_B and scaling, or master, all of them
        differentiable; none while the adapter is off."""

    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """What is trained, in fp32, by name, in a fixed order."""

    def adapter(self) -> Adapter:
        """A copy on the host, in the kind's own form."""

    def saved(self, adapter: Adapter) -> Adapter:
        """As it is written at the end of a stage."""

    def lora(self, adapter: Adapter) -> Adapter:
        """The same update as plain LoRA, for whoever knows no other kind; unless it trains weights."""

    def updated(self) -> None:
        """Bring up to date what follows from the parameters, which have changed."""

    def weights(self) -> list[torch.Tensor]:
        """The base's weights that it adds to, or trains."""

    def load(self, adapter: Adapter) -> None:
        """Become `adapter`. Raises UserError if it does not fit."""

    def fitted(self, adapter: Adapter) -> Adapter:
        """An adapter of a lower rank, or another scaling, as one that `load` takes and that adds the same."""

    def grown(self, start: Adapter, own: Adapter) -> Adapter:
        """A foreign adapter in the place of `own`, one of this kind that adds nothing."""

    def parts(self, adapter: Adapter) -> list[Adapter]:
        """A stack of adapters of this kind as the single ones, oldest first."""

    def restart(self, seed: int) -> None:
        """The values that a new adapter of this seed has."""

    def renew(self, seed: int) -> None:
        """Values that change nothing yet, for the round after a merge. This and `deltas`: kinds that merge."""

    def off(self) -> AbstractContextManager:
        """Without it for the duration of the block."""

    def deltas(self) -> Iterator[torch.Tensor]:
        """What it adds to each of them."""

    def leave(self) -> None:
        """Take its layers off the base again, which is as it was before them."""


KINDS: dict[str, type[AdapterKind]] = {
    "lora": Lora,
    "pissa": Pissa,
    "lora_xs": LoraXs,
    "tiny_lora": TinyLora,
    "full": Full,
    "calm": Calm,
}
