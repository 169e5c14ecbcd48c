"""Whole weight matrices: those that the config names are trained (all, or Spectrum's choice, arXiv 2406.06623).

Each has an fp32 master with a gradient, which the fused blocks make where they are at it; after every step the model's
16-bit weight is the master, rounded. Those weights are the generation engine's own tensors: it sees each step at once.
An update too small for 16 bits waits in the master until it counts. What the model was before stays on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from spinfast.errors import UserError
from spinfast.policy.adapters.framed import OneForm
from spinfast.policy.adapters.lora import targets
from spinfast.store import files
from spinfast.types import Adapter
from spinfast.weights import spectrum


class FullLayer(torch.nn.Module):
    """A linear layer of the base that is trained itself."""

    def __init__(self, base_layer: torch.nn.Linear | torch.nn.Embedding):
        super().__init__()
        self.base_layer, self.on = base_layer, True
        self.lora_master = torch.nn.Parameter(base_layer.weight.detach().float().clone())

    def get_base_layer(self) -> torch.nn.Module:
        return self.base_layer

    def weight(self) -> torch.Tensor:
        """The model's, with a gradient for the master where it is not taken by a fused block."""
        return _OfMaster.apply(self.lora_master, self.base_layer.weight) if self.on else self.base_layer.weight


class FullEmbedding(FullLayer):
    """The table of token embeddings."""

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(token_ids, self.weight(), self.base_layer.padding_idx)


class _OfMaster(torch.autograd.Function):
    """The 16-bit weight as a function of its fp32 master."""

    @staticmethod
    def forward(ctx, master, weight):
        return weight.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.float(), None


def _chosen(base: PreTrainedModel, settings) -> list[str]:
    """Modules in the model's order; a name with a suffix of a list's is the file of one."""
    named = settings.target_modules
    if not isinstance(named, str) or Path(named).suffix not in spectrum.LISTS:
        return targets(base, settings)
    if settings.exclude_modules:
        raise UserError("adapter.exclude_modules goes with names or an expression; take it out of the list")
    shapes = {name: parameter.shape for name, parameter in base.named_parameters()}
    names = spectrum.matched(shapes, spectrum.read_list(files.expanded(named)), settings.embeddings)
    return [name.removesuffix(".weight") for name in names]


def _tables(base: PreTrainedModel) -> list[str]:
    """The modules of embeddings and head, one where they share their weight."""
    wanted = {id(table.weight) for table in (base.get_input_embeddings(), base.get_output_embeddings())}
    return [name.removesuffix(".weight") for name, p in base.named_parameters() if id(p) in wanted]


class Full(OneForm):
    """Implements spinfast.policy.adapters.AdapterKind."""

    LAYER, trains_weights = FullLayer, True

    def __init__(self, base: PreTrainedModel, modules: list[str], name: str, revision: str | None):
        self.model = base
        self.config = {"kind": "full", "modules": modules, "base_model_name_or_path": name, "revision": revision}
        self.layers: dict[str, FullLayer] = {}
        for module in modules:
            layer = base.get_submodule(module)
            if not layer.weight.is_floating_point():
                raise UserError("adapter.kind: full trains 16- or 32-bit weights; set model.load_in_4bit to false")
            self.layers[module] = (FullEmbedding if isinstance(layer, torch.nn.Embedding) else FullLayer)(layer)
            parent, _, child = module.rpartition(".")
            if layer is base.get_output_embeddings():  # it never runs as a module
                parent, child = "", "lora_head"
            setattr(base.get_submodule(parent), child, self.layers[module])
        self.by_weight = {id(layer.base_layer.weight): layer for layer in self.layers.values()}
        self.before = [w.detach() if w.is_meta else w.detach().to("cpu", copy=True) for w in self.weights()]

    @classmethod
    def of(cls, base: PreTrainedModel, settings, name: str, revision: str | None, seed: int, path: Path | None = None):
        """By the config's adapter section. Nothing is random."""
        chosen, tables = _chosen(base, settings), _tables(base) if settings.embeddings else []
        order = [name.removesuffix(".weight") for name, _ in base.named_parameters()]
        return cls(base, sorted({*chosen, *tables}, key=order.index), name, revision)

    # Its layers ------------------------------------------------------------------------------------------------

    @staticmethod
    def check(name: str, layer: FullLayer) -> None:
        """There is nothing but the weight."""

    @staticmethod
    def added(layer: FullLayer) -> dict:
        return {"master": layer.lora_master} if layer.on else {}

    def head(self, weight_VD: torch.Tensor) -> torch.Tensor:
        """The output projection, differentiable if it is trained."""
        layer = self.by_weight.get(id(weight_VD))
        return weight_VD if layer is None else layer.weight()

    def weights(self) -> list[torch.nn.Parameter]:
        """The model's own, in its dtype."""
        return [layer.base_layer.weight for layer in self.layers.values()]

    @contextmanager
    def off(self) -> Iterator[None]:
        if not next(iter(self.layers.values())).on:
            yield
            return
        try:
            self._switch(False, self.before)
            yield
        finally:
            self._switch(True, self.parameters().values())

    @torch.no_grad()
    def _switch(self, on: bool, values) -> None:
        for layer, value in zip(self.layers.values(), values, strict=True):
            layer.on = on
            layer.base_layer.weight.copy_(value)

    # Its values ------------------------------------------------------------------------------------------------

    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        return {f"{module}.weight": layer.lora_master for module, layer in self.layers.items()}

    @torch.no_grad()
    def updated(self) -> None:
        for layer in self.layers.values():
            layer.base_layer.weight.copy_(layer.lora_master)

    def adapter(self) -> Adapter:
        """The masters, copied to the host."""
        return Adapter(self.config, {n: p.detach().to("cpu", copy=True) for n, p in self.parameters().items()})

    @torch.no_grad()
    def load(self, adapter: Adapter) -> None:
        own = self.parameters()
        shapes = {name: tensor.shape for name, tensor in adapter.tensors.items()}
        if shapes != {name: parameter.shape for name, parameter in own.items()}:
            odd = sorted(shapes.keys() ^ own.keys()) or ["shapes"]
            raise UserError(f"adapter: its matrices are not those that this run trains ({len(odd)}, first {odd[0]})")
        for name, parameter in own.items():
            parameter.copy_(adapter.tensors[name])
        self.updated()

    def saved(self, adapter: Adapter) -> Adapter:
        """In the model's dtype, which is what answered; training goes on from that."""
        dtype = self.weights()[0].dtype
        rounded = Adapter(adapter.config, {name: tensor.to(dtype) for name, tensor in adapter.tensors.items()})
        self.load(rounded)
        return rounded

    @torch.no_grad()
    def restart(self, seed: int) -> None:
        for parameter, value in zip(self.parameters().values(), self.before, strict=True):
            parameter.copy_(value)
        self.updated()
