"""The policy on stock transformers + PEFT: a frozen base, fp32 LoRA, packed attention.

PEFT owns the adapter (names, saving, loading); the operators of `ops` are installed on the layers by fuse.py.
The forward goes through the decoder stack alone: the head is applied to the scored rows by linear_logps.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from spinfast import attention
from spinfast.errors import UserError
from spinfast.ops import Ops
from spinfast.policy.adapters import files as adapters
from spinfast.policy.checksum import checksum
from spinfast.policy.fuse import fuse
from spinfast.types import Adapter, PackedBatch


def load_base(path: Path, dtype: torch.dtype, device: torch.device, load_in_4bit: bool = False) -> PreTrainedModel:
    """The frozen base with spinfast's attention, weights in `dtype` on `device`."""
    if load_in_4bit:
        if device.type != "cuda":
            raise UserError("model.load_in_4bit: needs a CUDA GPU (bitsandbytes NF4); set it to false")
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
        )
    else:
        quantization = None
    return AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation=attention.NAME,
        device_map={"": device},
        local_files_only=True,
        quantization_config=quantization,
    )


class TransformersPolicy:
    """Implements spinfast.policy.Policy. Parameters of `base` may be views of a generation engine's tensors.

    `fuse` installs the operators on the layers: those of fuse.py, or of unsloth.py where Unsloth made the model.
    """

    def __init__(self, base: PreTrainedModel, lora: LoraConfig, ops: Ops, seed: int, fuse: Callable = fuse):
        self.ops = ops
        self.lora = lora
        self.folded: list[Adapter] = []  # adapters merged into the base, oldest first
        self._before: list[torch.Tensor] = []  # the weights that the first merge changed, on the host
        base.requires_grad_(False)
        base.config.use_cache = False
        with _seeded(seed):
            try:
                self.model = get_peft_model(base, lora, autocast_adapter_dtype=True)
            except (ValueError, re.error) as error:
                raise UserError(f"adapter.target_modules: {' '.join(str(error).split())[:300]}") from error
        if isinstance(self.model.get_output_embeddings(), LoraLayer):
            raise UserError(
                "adapter.target_modules: lm_head stays as it is, its log-probs never pass LoRA; leave it out"
            )
        self.model.train()
        self.unfuse = fuse(self.model, ops)
        self.causal_lm = base
        self.decoder = base.get_decoder()
        self.device = base.device
        self.dtype = base.dtype

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        return self.decoder(
            input_ids=batch.token_ids_T[None],
            position_ids=batch.position_ids_T[None],
            use_cache=False,
            layout=batch.layout,
        ).last_hidden_state[0]

    @property
    def head_VD(self) -> torch.Tensor:
        return self.causal_lm.get_output_embeddings().weight

    @property
    def head_bias_V(self) -> torch.Tensor | None:
        return self.causal_lm.get_output_embeddings().bias

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def base_checksum(self) -> str:
        """Changes with any bit of the frozen weights, which an engine may hold."""
        return checksum({name: p for name, p in self.model.named_parameters() if not p.requires_grad})

    def checkpoint_layers(self, layers: int) -> None:
        """Recompute the activations of the first `layers` decoder layers in the backward."""
        for number, layer in enumerate(self.decoder.layers):
            layer.gradient_checkpointing = number < layers
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The frozen weights alone, with what earlier rounds merged into them."""
        with self.model.disable_adapter():
            yield

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """The base that the run began with. Raises UserError once rounds were merged into it."""
        if self.folded:
            raise UserError("the base alone is gone once adapters were merged; use adapter.init: continue")
        with self.without_adapter():
            yield

    @contextmanager
    def playing(self, adapter: Adapter) -> Iterator[None]:
        """Another adapter in place of the trained one, of its rank or lower, for the duration of the block."""
        own = self.adapter()
        self.load_adapter(adapters.fitted(adapter, self.lora.r, self.lora.lora_alpha))
        try:
            yield
        finally:
            self.load_adapter(own)

    # The adapter -----------------------------------------------------------------------------------------------

    def adapter(self) -> Adapter:
        """A host copy of the trainable adapter, relative to the base with everything folded so far."""
        tensors = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return Adapter(self._config(), {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()})

    def load_adapter(self, adapter: Adapter) -> None:
        """Copy tensors into the trainable adapter. Raises UserError if they do not fit this base."""
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

    def full_adapter(self) -> Adapter:
        """The adapter relative to the original base: what is folded and what is trained, stacked."""
        return adapters.stack([*self.folded, self.adapter()])

    def save_adapter(self, path: Path) -> None:
        adapters.save(self.full_adapter(), path)

    def restore(self, adapter: Adapter) -> None:
        """Become base + `adapter`, a full_adapter() of this or an earlier process: fold all parts but the last."""
        *merged, last = adapters.unstack(adapter, self.lora.r)
        if not _starts_with(merged, self.folded):
            self._unfold()
        for part in merged[len(self.folded) :]:
            self.load_adapter(part)
            self._fold()
        self.load_adapter(last)

    @torch.no_grad()
    def restart(self, seed: int) -> None:
        """The base as it was loaded, and the adapter that a new policy of this seed has."""
        self._unfold()
        with _seeded(seed):
            for module in self._lora_layers():
                base = module.get_base_layer().weight
                for parameter, value in _as_made(module):
                    parameter.copy_(value.to(base.dtype if base.is_floating_point() else value.dtype))

    def merge_and_restart(self, seed: int) -> None:
        """Fold the adapter into the base and start a fresh one (A random by `seed`, B zero)."""
        self._fold()
        with _seeded(seed):
            for module in self._lora_layers():
                module.reset_lora_parameters("default", init_lora_weights=True)

    @torch.no_grad()
    def _fold(self) -> None:
        weights = [module.get_base_layer().weight for module in self._lora_layers()]
        if any(not weight.is_floating_point() for weight in weights):
            raise UserError("adapter.init: merge needs 16- or 32-bit base weights; use continue with load_in_4bit")
        if not self.folded:
            self._before = [weight.to("cpu", copy=True) for weight in weights]
        self.folded.append(self.adapter())
        for module, weight in zip(self._lora_layers(), weights, strict=True):
            weight.copy_(weight.float() + module.get_delta_weight("default").float())

    @torch.no_grad()
    def _unfold(self) -> None:
        """Put back the weights that merging changed; subtracting would leave its roundings."""
        if self.folded:
            for module, weight in zip(self._lora_layers(), self._before, strict=True):
                module.get_base_layer().weight.copy_(weight)
        self.folded, self._before = [], []

    def _lora_layers(self) -> list[LoraLayer]:
        return [module for module in self.model.modules() if isinstance(module, LoraLayer)]

    def _config(self) -> dict:
        config = self.model.peft_config["default"].to_dict() | {"inference_mode": True}
        return json.loads(json.dumps(config, default=_plain, sort_keys=True))


def _plain(value):
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))


def _as_made(module: LoraLayer) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """A layer's parameters with the values that PEFT draws as it makes the layer, on the CPU, from the same stream."""
    if "default" in module.lora_embedding_A:
        a, b = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
        zeros, drawn = torch.randn(a.shape), torch.randn(b.shape)
        return [(a, zeros.zero_()), (b, drawn.normal_())]
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    drawn, zeros = (torch.nn.Linear(w.shape[1], w.shape[0], bias=False).weight for w in (a, b))
    torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
    return [(a, drawn), (b, zeros.zero_())]


def _starts_with(parts: list[Adapter], first: list[Adapter]) -> bool:
    """Are the `first` adapters the first of these?"""
    return len(parts) >= len(first) and all(
        torch.equal(part.tensors[name], tensor)
        for part, other in zip(parts, first, strict=False)
        for name, tensor in other.tensors.items()
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def load_policy(
    path: Path,
    name: str,
    revision: str,
    *,
    lora,
    ops: Ops,
    profile,
    load_in_4bit: bool,
    seed: int,
    base=None,
    fuse=fuse,
) -> TransformersPolicy:
    """Build the policy from local files, or around `base`, a model that Unsloth or a generation engine has made."""
    base = base if base is not None else load_base(path, profile.dtype, profile.device, load_in_4bit)
    base.name_or_path = name  # what PEFT writes into the adapter's config
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules),
        base_model_name_or_path=name,
        revision=revision,
    )
    return TransformersPolicy(base, config, ops, seed, fuse)
