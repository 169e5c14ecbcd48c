"""LoRA (arXiv 2106.09685): y = x W' + s (x A') B', A (r, in) and B (out, r) in fp32, s = alpha / r. PEFT's layers.

An adapter kind is a class like this one: it puts its layers on a base, owns what is trained, and yields factors A, B of
any layer, which is all that the fused blocks, the engine and merging see.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import PreTrainedModel

from spinfast.errors import UserError
from spinfast.policy.adapters import files
from spinfast.types import Adapter


class Lora:
    """Implements spinfast.policy.adapters.AdapterKind."""

    LAYER, trains_weights = LoraLayer, False

    def __init__(self, base: PreTrainedModel, config: LoraConfig, seed: int):
        self.config = config
        with _seeded(seed):
            try:
                self.model = get_peft_model(base, config, autocast_adapter_dtype=True)
            except (ValueError, re.error) as error:
                raise UserError(f"adapter.target_modules: {' '.join(str(error).split())[:300]}") from error
        if isinstance(self.model.get_output_embeddings(), LoraLayer):
            raise UserError(
                "adapter.target_modules: lm_head stays as it is, its log-probs never pass LoRA; leave it out"
            )

    @classmethod
    def of(cls, base: PreTrainedModel, settings, name: str, revision: str | None, seed: int, path=None) -> Lora:
        """By the config's adapter section; name and revision are the base's."""
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=0.0,
            target_modules=_listed(settings.target_modules),
            base_model_name_or_path=name,
            revision=revision,
        )
        return cls(base, config, seed)

    # Its layers ------------------------------------------------------------------------------------------------

    @staticmethod
    def check(name: str, layer: LoraLayer) -> None:
        """Raises UserError where `added` is not all that the layer does."""
        active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        if len(active) > 1:
            raise UserError(f"fused layers: expected one active adapter, {name} has {active}; activate one")
        for adapter in active:
            if adapter in layer.lora_variant or layer.lora_bias[adapter]:
                raise UserError(
                    f"fused layers: expected plain LoRA, {name} is a variant (DoRA, lora_bias ...); use plain"
                )
            if getattr(layer.lora_dropout[adapter], "p", 0.0):
                raise UserError(f"fused layers: expected lora_dropout 0, {name} has a dropout; set lora_dropout to 0")

    @staticmethod
    def added(layer: LoraLayer) -> dict:
        """What the layer adds to its linear map right now; nothing while the adapter is off."""
        active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        if layer.disable_adapters or layer.merged or not active:
            return {}
        (adapter,) = active
        factors = {"lora_A": layer.lora_A[adapter].weight, "lora_B": layer.lora_B[adapter].weight}
        return factors | {"scaling": layer.scaling[adapter]}

    def layers(self) -> list[LoraLayer]:
        return [module for module in self.model.modules() if isinstance(module, LoraLayer)]

    # Its values ------------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def updated(self) -> None:
        """The factors are the parameters."""

    def adapter(self) -> Adapter:
        tensors = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        config = plain_json(self.model.peft_config["default"]) | {"inference_mode": True}
        return Adapter(config, {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()})

    def load(self, adapter: Adapter) -> None:
        own = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        misfits = [
            name for name in own if name not in adapter.tensors or adapter.tensors[name].shape != own[name].shape
        ]
        strangers = [name for name in adapter.tensors if name not in own]
        if misfits or strangers:
            raise UserError(
                f"adapter does not fit the model: {len(misfits)} tensors missing or of another shape, "
                f"{len(strangers)} unknown (first: {(misfits + strangers)[0]}); check model.name, adapter.r, "
                "adapter.target_modules"
            )
        set_peft_model_state_dict(self.model, adapter.tensors)

    def fitted(self, adapter: Adapter) -> Adapter:
        return files.fitted(adapter, self.config.r, self.config.lora_alpha)

    def grown(self, start: Adapter, own: Adapter) -> Adapter:
        return files.grown(start, own)

    def lora(self, adapter: Adapter) -> Adapter:
        return adapter

    def saved(self, adapter: Adapter) -> Adapter:
        return adapter

    def parts(self, adapter: Adapter) -> list[Adapter]:
        return files.unstack(adapter, self.config.r)

    @torch.no_grad()
    def restart(self, seed: int) -> None:
        with _seeded(seed):
            for layer in self.layers():
                base = layer.get_base_layer().weight
                for parameter, value in _as_made(layer):
                    parameter.copy_(value.to(base.dtype if base.is_floating_point() else value.dtype))

    def renew(self, seed: int) -> None:
        with _seeded(seed):
            for layer in self.layers():
                layer.reset_lora_parameters("default", init_lora_weights=True)

    @contextmanager
    def off(self) -> Iterator[None]:
        with self.model.disable_adapter():
            yield

    # What merging needs ----------------------------------------------------------------------------------------

    def weights(self) -> list[torch.Tensor]:
        """The base's weights that the adapter adds to, (out, in) each."""
        return [layer.get_base_layer().weight for layer in self.layers()]

    def deltas(self) -> Iterator[torch.Tensor]:
        """What it adds to each of them."""
        return (layer.get_delta_weight("default") for layer in self.layers())


def _as_made(layer: LoraLayer) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """A layer's parameters with the values that PEFT draws as it makes the layer, on the CPU, from the same stream."""
    if "default" in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        zeros, drawn = torch.randn(a.shape), torch.randn(b.shape)
        return [(a, zeros.zero_()), (b, drawn.normal_())]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    drawn, zeros = (torch.nn.Linear(w.shape[1], w.shape[0], bias=False).weight for w in (a, b))
    torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
    return [(a, drawn), (b, zeros.zero_())]


def targets(base: PreTrainedModel, settings) -> list[str]:
    """The linear layers that adapter.target_modules means, in the model's order, as PEFT matches them."""
    everything = settings.target_modules == "all-linear"
    config = LoraConfig(target_modules=_listed(settings.target_modules))
    head = base.get_output_embeddings()
    try:
        found = [
            name
            for name, module in base.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
            if everything or check_target_module_exists(config, name)
        ]
    except re.error as error:
        raise UserError(f"adapter.target_modules: {error}") from None
    if not found:
        raise UserError(f"adapter.target_modules: {settings.target_modules!r} matches no linear layer of the decoder")
    return found


def _listed(names: str | tuple[str, ...]) -> str | list[str]:
    return names if isinstance(names, str) else list(names)


def plain_json(config: LoraConfig) -> dict:
    """The content of adapter_config.json."""
    return json.loads(json.dumps(config.to_dict(), default=_plain, sort_keys=True))


def _plain(value):
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
