"""CALM's connections (policy/calm.py) as an adapter of the anchor; the augmenting model comes and goes with them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from spinfast.attention import key_value_shape
from spinfast.errors import UserError
from spinfast.policy import calm
from spinfast.policy.adapters.framed import OneForm
from spinfast.policy.adapters.lora import bare
from spinfast.policy.base import load_base
from spinfast.types import Adapter

log = logging.getLogger("spinfast")
REVISIONS, FORM = ("revision", "augmenting_revision"), ("norm", "rope", "connections")


class Calm(OneForm):
    """Implements spinfast.policy.adapters.AdapterKind."""

    LAYER, trains_weights = calm.Connection, False

    def __init__(self, base: PreTrainedModel, augmenting: PreTrainedModel, settings, names: dict, seed: int):
        """`names`: both models' names and revisions, as the file has them."""
        decoder, layers = base.get_decoder(), base.config.num_hidden_layers
        pairs = calm.pairs(settings.connections, augmenting.config.num_hidden_layers, layers)
        augmenting.layers = augmenting.layers[: 1 + max(reads for reads, _ in pairs)]  # nothing reads what is above
        self.model, self.others, self.on = base, (augmenting.eval(),), True
        self.config = {"kind": "calm", "connections": [list(pair) for pair in pairs], **names}
        self.config |= {"norm": settings.norm, "rope": settings.rope}
        self.rows = augmenting.get_input_embeddings().num_embeddings  # the anchor's table may have more, of no tokens
        self.connections: dict[str, calm.Connection] = {}
        for place, (reads, layer) in enumerate(pairs, layers + len(augmenting.layers)):
            made = calm.Connection(augmenting.config, base.config, settings, reads, place, base.device)
            decoder.layers[layer].connection = self.connections[f"{reads}-{layer}"] = made
        base.augmenting = augmenting
        for place, layer in enumerate(augmenting.layers, layers):
            layer.self_attn.layer_idx = place
        self.attentions = [key_value_shape(augmenting.config)] * len(augmenting.layers)
        self.attentions += [(made.heads, made.head_dim) for made in self.connections.values()]
        self.states: dict[int, torch.Tensor] = {}  # of the forward in progress
        self.hooks = [decoder.register_forward_pre_hook(self._augment, with_kwargs=True)]
        for reads in {reads for reads, _ in pairs}:
            self.hooks.append(augmenting.layers[reads].register_forward_hook(partial(self._keep, reads)))
        self.restart(seed)

    @classmethod
    def of(cls, base: PreTrainedModel, settings, name: str, revision: str | None, seed: int, path: Path | None = None):
        """By the config's adapter section; the augmenting model is loaded, or on the meta device made."""
        found, shape = calm.augmenting_of(dict(settings))
        names = {"base_model_name_or_path": name, "revision": revision}
        names |= {"augmenting": found.name, "augmenting_revision": found.revision}
        made = cls(base, calm.decoder(found, shape, load_base, base), settings, names, seed)
        if path:
            n, widths = len(made.connections), (shape.hidden_size, base.config.hidden_size)
            log.info(
                "calm: %d connections, layers [augmenting, anchor] %s; %s numbers are trained: n (D_A D_B + 4 D_B^2) = "
                "%d (%d * %d + 4 * %d^2)",
                *(n, made.config["connections"], f"{calm.parameters(n, *widths):,}", n, *widths, widths[1]),
            )
        return made

    # The forward -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _augment(self, decoder: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The augmenting model goes first, over the same tokens in the same layout."""
        if not self.on:
            return None
        inputs = {key: kwargs[key] for key in ("input_ids", "position_ids", "use_cache", "layout")}
        inputs["input_ids"] = inputs["input_ids"].clamp(max=self.rows - 1)
        try:
            self.others[0](**inputs)
        finally:  # also where memory ran out, so that it is there for another try
            augmented, self.states = self.states, {}
        return args, kwargs | {"augmented": augmented}

    def _keep(self, reads: int, layer: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        self.states[reads] = output

    @staticmethod
    def check(name: str, layer: calm.Connection) -> None:
        """It runs after the layer, which adds it."""

    @contextmanager
    def off(self) -> Iterator[None]:
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def leave(self) -> None:
        for hook in self.hooks:
            hook.remove()
        bare(self.model, self.LAYER)
        self.others = ()  # another may be loaded in its place

    # Its values ------------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {f"{name}.{part}": p for name, made in self.connections.items() for part, p in made.named_parameters()}

    def updated(self) -> None:
        """They are read at every use."""

    def weights(self) -> list[torch.Tensor]:
        """The anchor's stay as they are."""
        return []

    def adapter(self) -> Adapter:
        return Adapter(self.config, {n: p.detach().to("cpu", copy=True) for n, p in self.parameters().items()})

    def saved(self, adapter: Adapter) -> Adapter:
        return adapter

    @torch.no_grad()
    def load(self, adapter: Adapter) -> None:
        for key in (*REVISIONS, *FORM):
            told, own = adapter.config.get(key), self.config[key]
            known = key in FORM or len(told or "") == len(own or "")  # a commit and a sha256 are not to be compared
            if known and told != own:
                raise UserError(
                    f"adapter: its {key} is {told}, this composition's is {own}; give it its own two models"
                )
        own = self.parameters()
        if {n: t.shape for n, t in adapter.tensors.items()} != {n: p.shape for n, p in own.items()}:
            raise UserError("adapter: its connections have other widths than these two models")
        for name, parameter in own.items():
            parameter.copy_(adapter.tensors[name])

    def restart(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for made in self.connections.values():
            made.draw(generator)
