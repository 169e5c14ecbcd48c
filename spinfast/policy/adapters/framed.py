"""What LoRA-XS and TinyLoRA share: a linear layer with a fixed frame B A around a small matrix R, y += s x A' R' B'.

To the fused blocks such a layer is LoRA with B R in the place of B; autograd takes the gradient on to R and what it is
made of, which is all that is trained, saved and compared. Whoever needs plain LoRA (the engine, merging, PEFT) gets it
expanded. A kind says which tensors there are and how R of a module is made of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from spinfast.errors import UserError
from spinfast.policy.adapters import frames
from spinfast.policy.adapters.compact import VERSION
from spinfast.policy.adapters.frames import Frame, Frames
from spinfast.policy.adapters.lora import bare, plain_config, targets
from spinfast.types import Adapter

Tensors = Mapping[str, torch.Tensor]
SAME_UPDATE = 1e-3  # of two machines' frames, relative; fp32 frames of one weight are at 1e-6
NOT_COMPARED = {"base_model_name_or_path", "revision", "payload", "probe"}


class FramedLayer(torch.nn.Module):
    """A linear layer of the base in its frame; `small` gives R, (r, r) in fp32, as it is now."""

    def __init__(self, base_layer: torch.nn.Linear, frame: Frame, small: Callable[[], torch.Tensor], scaling: float):
        super().__init__()
        self.base_layer, self.small, self.scaling, self.on = base_layer, small, scaling, True
        self.register_buffer("A", frame[0], persistent=False)
        self.register_buffer("B", frame[1], persistent=False)

    def get_base_layer(self) -> torch.nn.Linear:
        return self.base_layer


class OneForm:
    """Of kinds that nothing but their own adapters fits, and that are never merged between rounds."""

    others, attentions = (), ()

    @torch.no_grad()
    def leave(self) -> None:
        self.restart(0)
        bare(self.model, self.LAYER)

    def fitted(self, adapter: Adapter) -> Adapter:
        return adapter

    def grown(self, start: Adapter, own: Adapter) -> Adapter:
        return start

    def parts(self, adapter: Adapter) -> list[Adapter]:
        return [adapter]


class Framed(OneForm):
    """Implements spinfast.policy.adapters.AdapterKind. A kind gives `describe`, `tensors` and `recipes`."""

    LAYER, trains_weights = FramedLayer, False

    # What a kind gives -----------------------------------------------------------------------------------------

    @staticmethod
    def describe(settings) -> dict:
        """What of the config's adapter section the update depends on, `kind`, `r` and `scaling` among it."""
        raise NotImplementedError

    @staticmethod
    def tensors(description: dict) -> dict[str, torch.Tensor]:
        """What is trained, as it starts: nothing is changed yet."""
        raise NotImplementedError

    @staticmethod
    def recipes(description: dict, device="cpu") -> list[Callable[[Tensors], torch.Tensor]]:
        """R (r, r) of each module, as functions of what is trained, which is on `device`."""
        raise NotImplementedError

    @classmethod
    def smalls(cls, description: dict, tensors: Tensors) -> dict[str, torch.Tensor]:
        """R of each module, of tensors on the host."""
        made = zip(description["modules"], cls.recipes(description), strict=True)
        return {module: recipe(tensors) for module, recipe in made}

    # Its layers ------------------------------------------------------------------------------------------------

    def __init__(self, base: PreTrainedModel, settings, name: str, revision: str | None, path: Path | None):
        """The weights are read from the files under `path`; without one there are shapes alone."""
        layers, found = framed(base, settings, settings.r, revision, path)
        self.model, self.settings, self.frames = base, settings, found
        self.description = self.describe(settings) | {"modules": [*layers]}
        named = {"base_model_name_or_path": name, "revision": revision, "base_sha256": found.base}
        self.config = self.description | named | {"version": VERSION}
        device = base.device
        self.values = {n: torch.nn.Parameter(t.to(device)) for n, t in self.tensors(self.description).items()}
        base.lora_values = torch.nn.ParameterList(self.values.values())
        self.layers: list[FramedLayer] = []
        recipes = self.recipes(self.description, device)
        for (module, layer), recipe in zip(layers.items(), recipes, strict=True):
            frame = tuple(factor.to(device) for factor in found.by_module[module])
            made = FramedLayer(layer, frame, partial(recipe, self.values), self.description["scaling"])
            base.set_submodule(module, made)
            self.layers.append(made)

    @classmethod
    def of(cls, base: PreTrainedModel, settings, name: str, revision: str | None, seed: int, path: Path | None):
        """By the config's adapter section. Nothing is random but what the section seeds; training starts at zero."""
        return cls(base, settings, name, revision, path)

    @staticmethod
    def check(name: str, layer: FramedLayer) -> None:
        """The factors are all that a framed layer adds."""

    @staticmethod
    def added(layer: FramedLayer) -> dict:
        return {"lora_A": layer.A, "lora_B": layer.B @ layer.small(), "scaling": layer.scaling} if layer.on else {}

    @contextmanager
    def off(self) -> Iterator[None]:
        before = [layer.on for layer in self.layers]
        try:
            for layer in self.layers:
                layer.on = False
            yield
        finally:
            for layer, on in zip(self.layers, before, strict=True):
                layer.on = on

    # Its values ------------------------------------------------------------------------------------------------

    def weights(self) -> list[torch.Tensor]:
        return [layer.base_layer.weight for layer in self.layers]

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return self.values

    def updated(self) -> None:
        """R is made of the values at every use."""

    def adapter(self) -> Adapter:
        """A copy on the host, in this kind's own form."""
        return Adapter(self.config, {name: p.detach().to("cpu", copy=True) for name, p in self.values.items()})

    @torch.no_grad()
    def load(self, adapter: Adapter) -> None:
        own = self.adapter()
        for key in self.config.keys() - NOT_COMPARED:
            if adapter.config.get(key) != self.config[key]:
                got, expected = (" ".join(str(c.get(key)).split())[:80] for c in (adapter.config, self.config))
                raise UserError(f"adapter: its {key} is {got}, this run's {self.config['kind']} has {expected}")
        if {n: t.shape for n, t in adapter.tensors.items()} != {n: t.shape for n, t in own.tensors.items()}:
            raise UserError(f"adapter: its tensors are not those of a {self.config['kind']} of these settings")
        if told := adapter.config.get("probe"):
            check_probe(told, self.probe(adapter.tensors))
        for name, parameter in self.values.items():
            parameter.copy_(adapter.tensors[name])

    def probe(self, tensors: Tensors) -> list[float]:
        smalls = self.smalls(self.description, tensors)
        return frames.probe(self.frames.by_module, smalls, self.description["scaling"])

    def saved(self, adapter: Adapter) -> Adapter:
        """As it is written at the end of a stage: with what shows another machine that it rebuilt the same update."""
        return Adapter(adapter.config | {"probe": self.probe(adapter.tensors)}, adapter.tensors)

    def lora(self, adapter: Adapter) -> Adapter:
        return expanded(adapter.config, self.smalls(adapter.config, adapter.tensors), self.frames)

    @torch.no_grad()
    def restart(self, seed: int) -> None:
        for parameter in self.values.values():
            parameter.zero_()


def framed(
    base: PreTrainedModel, settings, r: int, revision: str | None, path: Path | None
) -> tuple[dict[str, torch.nn.Linear], Frames]:
    """The layers that the config's adapter section means, by name, and their frames of rank r.

    The weights are read from the files under `path`; without one there are shapes alone. Raises UserError.
    """
    layers = {module: base.get_submodule(module) for module in targets(base, settings)}
    for module, layer in layers.items():
        if r > (most := min(layer.in_features, layer.out_features)):
            raise UserError(f"adapter.r: {r} is more than {module} has, {most}; lower it")
    return layers, frames.of_model(path, revision, [*layers], r) if path else _shapes(layers, r)


def expanded(config: dict, smalls: Tensors, found: Frames) -> Adapter:
    """The update of these R, (r, r) by module, as plain LoRA of PEFT."""
    tensors = {}
    for module, R_rr in smalls.items():
        A_rD, B_Or = found.by_module[module]
        tensors[f"base_model.model.{module}.lora_A.weight"] = A_rD.clone()
        tensors[f"base_model.model.{module}.lora_B.weight"] = B_Or @ R_rr.to(B_Or)
    r, base = config["r"], (config["base_model_name_or_path"], config["revision"])
    return Adapter(plain_config(r, config["scaling"] * r, config["modules"], *base), tensors)


def check_probe(told: Sequence[float], found: Sequence[float]) -> None:
    """Raises UserError where what was rebuilt is not the update that was saved."""
    told, found = (torch.tensor(x, dtype=torch.float64) for x in (told, found))
    if not (told - found).norm() <= SAME_UPDATE * told.norm():
        raise UserError(
            "adapter: what this machine rebuilds is not the update that was saved (its probe gives "
            f"{json.dumps(found.tolist()[:2])}..., expected {json.dumps(told.tolist()[:2])}...); please report it"
        )


def _shapes(layers: Mapping[str, torch.nn.Linear], r: int) -> Frames:
    found = {}
    for module, layer in layers.items():
        found[module] = (
            torch.empty(r, layer.in_features, device=layer.weight.device),
            torch.empty(layer.out_features, r, device=layer.weight.device),
        )
    return Frames(found, "unknown")
