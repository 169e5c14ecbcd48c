"""LoRA (arXiv 2106.09685): y = x W' + s (x A') B', A (r, in) and B (out, r) in fp32, s = alpha / r. PEFT's layers.

An adapter kind is a class like this one: it puts its layers on a base, owns what is trained, and yields factors A, B of
any layer, which is all that the fused blocks, the engine and merging see.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Embedding, Linear, LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel

from spinfast.device import own_card
from spinfast.errors import UserError
from spinfast.policy.adapters import files
from spinfast.types import Adapter

ALL = "all-linear"


class PlainForm:
    """Of kinds whose adapters are plain LoRA, of what `config` says, the content of adapter_config.json."""

    config: dict

    def fitted(self, adapter: Adapter) -> Adapter:
        return files.fitted(adapter, self.config)

    def lora(self, adapter: Adapter) -> Adapter:
        return files.uniform(adapter)

    def saved(self, adapter: Adapter) -> Adapter:
        return adapter

    def parts(self, adapter: Adapter) -> list[Adapter]:
        return files.unstack(adapter, self.config)


class Lora(PlainForm):
    """Implements spinfast.policy.adapters.AdapterKind."""

    LAYER, trains_weights = LoraLayer, False
    others, attentions = (), ()

    def __init__(self, base: PreTrainedModel, config: LoraConfig, seed: int):
        with _seeded(seed):
            try:
                self.model = get_peft_model(base, config, autocast_adapter_dtype=True)
            except (ValueError, re.error) as error:
                raise UserError(f"adapter: {' '.join(str(error).split())[:300]}") from error
        self._peft = self.model.peft_config["default"]
        self.config = plain_json(self._peft) | {"inference_mode": True}

    @classmethod
    def of(cls, base: PreTrainedModel, settings, name: str, revision: str | None, seed: int, path=None) -> Lora:
        """By the config's adapter section; name and revision are the base's."""
        modules, head = targets(base, settings, (torch.nn.Linear, torch.nn.Embedding)), base.get_output_embeddings()
        tied = [module for module in modules if base.get_submodule(module).weight is head.weight]
        if tied and settings.init == "merge":
            raise UserError(
                f"adapter.init: {tied[0]} is the head's weight too, which merging would change with it and the saved "
                "adapter would not; leave it out of adapter.target_modules, or use continue"
            )
        if settings.init == "merge":
            check_mergeable(base.get_submodule(module).weight for module in modules)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.r,
            lora_alpha=settings.alpha,
            use_rslora=settings.use_rslora,
            rank_pattern=dict(settings.rank_pattern),
            alpha_pattern=dict(settings.alpha_pattern),
            init_lora_weights={"kaiming": True}.get(settings.init_lora_weights, settings.init_lora_weights),
            lora_dropout=0.0,
            **_selection(base, settings),
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

    def leave(self) -> None:
        self.model.unload()

    def layers(self) -> list[LoraLayer]:
        return [module for module in self.model.modules() if isinstance(module, LoraLayer)]

    # Its values ------------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def updated(self) -> None:
        """The factors are the parameters."""

    def adapter(self) -> Adapter:
        tensors = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return Adapter(self.config, {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()})

    def load(self, adapter: Adapter) -> None:
        check_fits(adapter.tensors, get_peft_model_state_dict(self.model, save_embedding_layers=False))
        set_peft_model_state_dict(self.model, adapter.tensors)

    def grown(self, start: Adapter, own: Adapter) -> Adapter:
        return files.grown(start, own)

    def restart(self, seed: int) -> None:
        self._draw(seed, self._peft)

    def renew(self, seed: int) -> None:
        nothing_yet = copy(self._peft)
        nothing_yet.init_lora_weights = self._peft.init_lora_weights or True  # False draws B too
        self._draw(seed, nothing_yet)

    @torch.no_grad()
    def _draw(self, seed: int, config: LoraConfig) -> None:
        with _seeded(seed):
            for layer in self.layers():
                for parameter, value in zip(_factors(layer), _factors(_as_made(layer, config)), strict=True):
                    parameter.copy_(value)

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


def check_fits(tensors: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
    """Raises UserError where a LoRA's tensors have other names or shapes than the policy's own."""
    misfits = [name for name in own if name not in tensors or tensors[name].shape != own[name].shape]
    strangers = [name for name in tensors if name not in own]
    if misfits or strangers:
        raise UserError(
            f"adapter does not fit the model: {len(misfits)} tensors missing or of another shape, "
            f"{len(strangers)} unknown (first: {(misfits + strangers)[0]}); check model.name, adapter.r, "
            "adapter.target_modules"
        )


def check_mergeable(weights: Iterable[torch.Tensor]) -> None:
    """Raises UserError where one of the base's weights is quantised."""
    if not all(weight.is_floating_point() for weight in weights):
        raise UserError("adapter.init: merge needs 16- or 32-bit base weights; use continue with load_in_4bit")


def bare(model: torch.nn.Module, kind: type[torch.nn.Module]) -> None:
    """Take the layers of an adapter off the base, also where it was put on some of them only."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, child.get_base_layer())
    for name in ("lora_values", "lora_head", "augmenting"):  # what no layer has
        model._modules.pop(name, None)


def _factors(layer: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in layer.named_parameters() if "lora_" in name]


def _as_made(layer: LoraLayer, config: LoraConfig) -> LoraLayer:
    """Another as PEFT makes it: drawn on the CPU, from the same stream, and in the dtype of the base's weight."""
    base, rank, alpha = layer.get_base_layer(), layer.r["default"], layer.lora_alpha["default"]
    dtype = base.weight.dtype if base.weight.is_floating_point() else torch.float32
    if isinstance(base, torch.nn.Embedding):
        kind, hollow = Embedding, torch.nn.Embedding(base.num_embeddings, base.embedding_dim, device="meta")
    else:
        kind, hollow = Linear, torch.nn.Linear(base.in_features, base.out_features, device="meta")
    hollow.weight = torch.nn.Parameter(torch.empty(0, dtype=dtype))
    return kind(hollow, "default", config=config, r=rank, lora_alpha=alpha)


# Which modules --------------------------------------------------------------------------------------------------


def targets(base: PreTrainedModel, settings, kinds=torch.nn.Linear) -> list[str]:
    """The layers that the config's adapter section means, in the model's order, as PEFT matches them.

    Raises UserError for the head, and by name for what the section names and no such layer is, which PEFT passes over.
    """
    selection, head = _selection(base, settings), base.get_output_embeddings()
    if selection["target_modules"] == ALL:
        selection["target_modules"] = _linear_layers(base)
    config, layers = LoraConfig(**selection), {n: m for n, m in base.named_modules() if isinstance(m, kinds)}
    try:
        found = [name for name in layers if check_target_module_exists(config, name)]
        _check_named(settings, found, layers)
    except re.error as error:
        raise UserError(f"adapter: {error} in a regular expression") from None
    if not found:
        raise UserError("adapter.exclude_modules: no layer is left that an adapter could be put on")
    if any(layers[name] is head for name in found):
        hint = "adapter.embeddings: true trains it" if settings.kind == "full" else "its log-probs never pass LoRA"
        raise UserError(f"adapter.target_modules: lm_head stays as it is, {hint}; leave it out")
    return found


def _linear_layers(base: PreTrainedModel) -> list[str]:
    head = base.get_output_embeddings()
    return [n for n, module in base.named_modules() if isinstance(module, torch.nn.Linear) and module is not head]


def _selection(base: PreTrainedModel, settings) -> dict:
    """As PEFT's LoraConfig has it, which takes numbers of layers only beside names."""
    names = settings.target_modules
    if names == ALL and settings.layers_to_transform:
        names = sorted({name.rpartition(".")[2] for name in _linear_layers(base)})  # PEFT asks no full name for a layer
    keys = {"exclude_modules": settings.exclude_modules, "layers_to_transform": settings.layers_to_transform}
    return {"target_modules": _listed(names)} | {key: value and _listed(value) for key, value in keys.items()}


def _check_named(settings, found: Sequence[str], layers: Iterable[str]) -> None:
    for key, among in (("target_modules", found), ("exclude_modules", layers)):
        names = getattr(settings, key)
        alone = [[name] for name in names] if isinstance(names, tuple) else [names] * (names not in (None, ALL))
        for part in alone:
            config = LoraConfig(target_modules=part)
            if not any(check_target_module_exists(config, name) for name in among):
                _matches_nothing(key, part if isinstance(part, str) else part[0])
    for number in settings.layers_to_transform or ():
        if not any(f".{number}." in name for name in found):
            _matches_nothing("layers_to_transform", number)
    for key in ("rank_pattern", "alpha_pattern"):
        value_of = {}
        for expression, value in getattr(settings, key, {}).items():
            matched = [name for name in found if get_pattern_key([expression], name) == expression]
            if not matched:
                _matches_nothing(key, expression)
            for name in matched:
                first, other = value_of.setdefault(name, (expression, value))
                if value != other:
                    raise UserError(
                        f"adapter.{key}: {first!r} and {expression!r} both match {name}, and PEFT's file keeps no "
                        "order of them; let one alone match it"
                    )


def _matches_nothing(key: str, what: str | int) -> None:
    raise UserError(f"adapter.{key}: {what!r} matches no layer that an adapter is put on; correct it or leave it out")


def _listed(names: str | tuple) -> str | list:
    return names if isinstance(names, str) else list(names)


def plain_config(r: int, alpha: float, modules: list[str], base: str, revision: str | None) -> dict:
    """adapter_config.json of a plain LoRA on `modules`, by their full names."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=modules,
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
    )
    return plain_json(config)


def plain_json(config: LoraConfig) -> dict:
    """The content of adapter_config.json."""
    return json.loads(json.dumps(config.to_dict(), default=_plain, sort_keys=True))


def _plain(value):
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(own_card()):
        torch.manual_seed(seed)
        yield
