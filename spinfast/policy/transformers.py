"""The policy on stock transformers + PEFT: a frozen base, fp32 LoRA, packed attention.

PEFT owns the adapter (names, saving, loading); the operators of `ops` are installed on the layers by fuse.py.
The forward goes through the decoder stack alone: the head is applied to the scored rows by linear_logps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from spinfast.attention import key_value_shape
from spinfast.errors import UserError
from spinfast.ops import Ops
from spinfast.policy.adapters import KINDS, AdapterKind
from spinfast.policy.adapters import files as adapters
from spinfast.policy.adapters.lora import bare, check_mergeable
from spinfast.policy.base import load_base
from spinfast.policy.checksum import checksum
from spinfast.policy.fuse import fuse
from spinfast.policy.quantised import states
from spinfast.types import Adapter, PackedBatch


class TransformersPolicy:
    """Implements spinfast.policy.Policy. Parameters of `base` may be views of a generation engine's tensors.

    `adapt` puts the adapter on the base; `fuse` installs the operators on the layers: those of fuse.py, or of
    unsloth.py where Unsloth made the model.
    """

    def __init__(
        self, base: PreTrainedModel, adapt: Callable[[PreTrainedModel], AdapterKind], ops: Ops, fuse: Callable = fuse
    ):
        self.ops = ops
        self.folded: list[Adapter] = []  # adapters merged into the base, oldest first
        self._before: list[torch.Tensor] = []  # the weights that the first merge changed, on the host
        base.requires_grad_(False)
        base.config.use_cache = False
        self.device, self.dtype = base.device, base.dtype  # the adapter's fp32 may come to stand first
        self.kind = adapt(base)
        self.model = self.kind.model
        self.model.train()
        self._unfuse = [fuse(model, ops) for model in (base, *self.kind.others)]
        self.causal_lm = base
        self.decoder = base.get_decoder()

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        return self.decoder(
            input_ids=batch.token_ids_T[None],
            position_ids=batch.position_ids_T[None],
            use_cache=False,
            layout=batch.layout,
        ).last_hidden_state[0]

    @property
    def attentions(self) -> list[tuple[int, int]]:
        config = self.causal_lm.config
        return [key_value_shape(config)] * config.num_hidden_layers + list(self.kind.attentions)

    @property
    def head_VD(self) -> torch.Tensor:
        weight_VD = self.causal_lm.get_output_embeddings().weight
        return self.kind.head(weight_VD) if self.kind.trains_weights else weight_VD

    @property
    def head_bias_V(self) -> torch.Tensor | None:
        return self.causal_lm.get_output_embeddings().bias

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return self.kind.parameters()

    def base_checksum(self) -> str:
        """Changes with any bit of the frozen weights, which an engine may hold."""
        trained = {id(weight) for weight in self.kind.weights()} if self.kind.trains_weights else {}
        frozen = {n: p for n, p in self.model.named_parameters() if not p.requires_grad and id(p) not in trained}
        return checksum(frozen | states(self.model))

    def checkpoint_layers(self, layers: int) -> None:
        """Recompute the activations of the first `layers` decoder layers in the backward."""
        for number, layer in enumerate(self.decoder.layers):
            layer.gradient_checkpointing = number < layers
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The frozen weights alone, with what earlier rounds merged into them."""
        with self.kind.off():
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
        self.load_adapter(self.kind.fitted(adapter))
        try:
            yield
        finally:
            self.load_adapter(own)

    # The adapter -----------------------------------------------------------------------------------------------

    def adapter(self) -> Adapter:
        """A host copy of the trainable adapter, relative to the base with everything folded so far."""
        return self.kind.adapter()

    def load_adapter(self, adapter: Adapter) -> None:
        """Copy tensors into the trainable adapter. Raises UserError if they do not fit this base."""
        self.kind.load(adapter)

    def full_adapter(self) -> Adapter:
        """The adapter relative to the original base: what is folded and what is trained, stacked."""
        return adapters.stack([*self.folded, self.adapter()])

    def grown(self, start: Adapter, own: Adapter) -> Adapter:
        """A foreign adapter in the place of `own`, an idle one of this policy. Raises UserError if it can't."""
        return self.kind.grown(start, own)

    def updated(self) -> None:
        self.kind.updated()

    def serving(self, adapter: Adapter | None) -> tuple[AbstractContextManager, Adapter | None]:
        if not self.kind.trains_weights:
            return nullcontext(), adapter and self.kind.lora(adapter)
        if adapter is None:
            return self.without_adapter(), None
        live = adapters.fingerprint(adapter) == adapters.fingerprint(self.adapter())
        return (nullcontext() if live else self.playing(adapter)), None

    def save_adapter(self, path: Path, exact: bool = False) -> None:
        adapter = self.full_adapter()
        adapters.save(adapter if exact else self.kind.saved(adapter), path)

    def restore(self, adapter: Adapter) -> None:
        """Become base + `adapter`, a full_adapter() of this or an earlier process: fold all parts but the last."""
        *merged, last = self.kind.parts(adapter)
        if not _starts_with(merged, self.folded):
            self._unfold()
        for part in merged[len(self.folded) :]:
            self.load_adapter(part)
            self._fold()
        self.load_adapter(last)

    def restart(self, seed: int) -> None:
        """The base as it was loaded, and the adapter that a new policy of this seed has."""
        self._unfold()
        self.kind.restart(seed)

    def merge_and_restart(self, seed: int) -> None:
        """Fold the adapter into the base and start a fresh one by `seed`, which changes nothing yet."""
        self._fold()
        self.kind.renew(seed)

    def leave(self) -> PreTrainedModel:
        """Give the base back as it was loaded, for another policy; this one is of no use any more."""
        self._unfold()
        self.unfuse()
        self.kind.leave()
        return self.causal_lm

    def unfuse(self) -> None:
        """The layers as transformers has them."""
        while self._unfuse:
            self._unfuse.pop()()

    @torch.no_grad()
    def _fold(self) -> None:
        weights = self.kind.weights()
        check_mergeable(weights)
        if not self.folded:
            self._before = [weight.to("cpu", copy=True) for weight in weights]
        self.folded.append(self.adapter())
        for weight, delta in zip(weights, self.kind.deltas(), strict=True):
            weight.copy_(weight.float() + delta.float())

    @torch.no_grad()
    def _unfold(self) -> None:
        """Put back the weights that merging changed; subtracting would leave its roundings."""
        if self.folded:
            for weight, before in zip(self.kind.weights(), self._before, strict=True):
                weight.copy_(before)
        self.folded, self._before = [], []


def _starts_with(parts: list[Adapter], first: list[Adapter]) -> bool:
    """Are the `first` adapters the first of these?"""
    return len(parts) >= len(first) and all(
        torch.equal(part.tensors[name], tensor)
        for part, other in zip(parts, first, strict=False)
        for name, tensor in other.tensors.items()
    )


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
    kind = KINDS[lora.implementation]

    def adapt(base: PreTrainedModel) -> AdapterKind:
        try:
            return kind.of(base, lora, name, revision, seed, path)
        except torch.OutOfMemoryError:
            bare(base, kind.LAYER)  # another may be put on it
            raise

    return TransformersPolicy(base, adapt, ops, fuse)
