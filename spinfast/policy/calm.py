"""CALM (arXiv 2401.02412): an anchor model B that reads the hidden states of an augmenting model A, both frozen.

    H_B <- H_B + W_O MHA(H_B W_Q, f(H_A) W_K, f(H_A) W_V),    f linear, D_A -> D_B

at the outputs of chosen layers. Every token goes through both models; attention is causal over the same packed layout
as theirs, with the anchor's number of heads. W_O starts at zero, so that the composition starts as the anchor, to the
bit. With `norm` H_A and H_B pass an RMSNorm without weights before the projections: residual streams grow from layer to
layer and differ between models. A runs without a gradient and keeps nothing but the states that are read.
With `rope` queries and keys are turned by their positions, as in both models: which of several equal-looking states is
meant is otherwise told by nothing. The paper has neither; bench/compose.py measures both.

Shapes: T packed tokens, A and B the widths of the two models, H the anchor's heads, d = B / H, n connections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from spinfast_kernels.blocks import Lora
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from spinfast import attention
from spinfast.errors import UserError
from spinfast.models import ResolvedModel, load_tokenizer, resolve_model
from spinfast.ops import Ops
from spinfast.types import PackedLayout

PARTS = ("f", "q", "k", "v", "o")
EPS = 1e-6
Pair = tuple[int, int]  # layer of the augmenting model, layer of the anchor


class Connection(torch.nn.Module):
    """One cross-attention, fp32 parameters; it runs in the dtype of the hidden states.

    `reads`: the augmenting model's layer. `layer_idx`: the place of its keys and values in a generator's cache.
    """

    def __init__(
        self, augmenting: PretrainedConfig, anchor: PretrainedConfig, settings, reads: int, layer_idx: int, device
    ):
        super().__init__()
        widths, self.heads = (augmenting.hidden_size, anchor.hidden_size), anchor.num_attention_heads
        self.head_dim = widths[1] // self.heads
        if widths[1] % (2 * self.heads):
            raise UserError(
                f"adapter.kind: calm needs an anchor whose width is a multiple of twice its heads, got {widths[1]} and "
                f"{self.heads} heads"
            )
        self.norm, self.rope, self.reads, self.layer_idx = settings.norm, settings.rope, reads, layer_idx
        for part in PARTS:
            width = widths[0] if part == "f" else widths[1]
            self.register_parameter(part, torch.nn.Parameter(torch.zeros(widths[1], width, device=device)))
        for name, width in zip(("unit_A", "unit_B"), widths, strict=True):
            self.register_buffer(name, torch.ones(width, device=device), persistent=False)
        theta = (getattr(anchor, "rope_parameters", None) or {}).get("rope_theta", 10_000.0)
        turns = theta ** -(torch.arange(0, self.head_dim, 2, device=device) / self.head_dim)
        self.register_buffer("turns", turns.repeat(2), persistent=False)

    def get_base_layer(self) -> None:
        """It stands around nothing."""

    def draw(self, generator: torch.Generator) -> None:
        """f, W_Q, W_K, W_V ~ N(0, 1 / inputs), W_O = 0."""
        for part, parameter in self.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5
            parameter.data.copy_(drawn * (part != "o"))

    def forward(
        self,
        ops: Ops,
        hidden_1TB: torch.Tensor,
        augmented_1TA: torch.Tensor,
        position_ids_1T: torch.Tensor,
        layout: PackedLayout,
    ) -> torch.Tensor:
        """The anchor's hidden states with what they take of the augmenting model's."""
        project, read_1TA, asking_1TB = partial(self._project, ops), augmented_1TA, hidden_1TB
        if self.norm:
            read_1TA = ops.rms_norm(read_1TA, self.unit_A.to(read_1TA.dtype), EPS)
            asking_1TB = ops.rms_norm(asking_1TB, self.unit_B.to(asking_1TB.dtype), EPS)
        source_1TB = project("f", read_1TA)
        query, key, value = project("q", asking_1TB), project("k", source_1TB), project("v", source_1TB)
        if self.rope:
            angles_1Td = position_ids_1T[..., None] * self.turns
            query, key = ops.rope(query, key, angles_1Td.cos().to(query.dtype), angles_1Td.sin().to(query.dtype))
        parts = (x.view(*x.shape[:-1], self.heads, self.head_dim).transpose(1, 2) for x in (query, key, value))
        mixed_1THd = attention.attend(self.layer_idx, *parts, layout, self.head_dim**-0.5)
        return project("o", mixed_1THd.flatten(2), residual=hidden_1TB)

    def _project(self, ops: Ops, part: str, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        master = getattr(self, part)
        return ops.lora_linear(x, *Lora(partial(_cast, master, x.dtype), master=master), residual=residual)


def _cast(master: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return master.detach().to(dtype)


def parameters(connections: int, augmenting: int, anchor: int) -> int:
    """n (D_A D_B + 4 D_B^2): how many numbers n connections train. The paper's formula leaves W_O out."""
    return connections * (augmenting * anchor + 4 * anchor**2)


def pairs(connections: int | tuple[Pair, ...], augmenting: int, anchor: int) -> list[Pair]:
    """What is joined of models of so many layers. Every n-th layer: the n-th, 2n-th ... of the augmenting model, and as
    many of the anchor, at equal distances. Raises UserError for layers that there are not."""
    if isinstance(connections, int):
        count = min(augmenting // connections, anchor)
        if not count:
            raise UserError(
                f"adapter.connections: every {connections}th layer of an augmenting model of {augmenting} layers is "
                "none; lower it"
            )
        return [(connections * i - 1, anchor * i // count - 1) for i in range(1, count + 1)]
    for place, name, layers in ((0, "augmenting model", augmenting), (1, "anchor", anchor)):
        if (last := max(pair[place] for pair in connections)) >= layers:
            raise UserError(f"adapter.connections: the {name} has layers 0 to {layers - 1}, got {last}")
    return sorted(connections, key=lambda pair: pair[1])


def augmenting_of(section: Mapping) -> tuple[ResolvedModel, PretrainedConfig]:
    """The augmenting model's files and shape, by a config's adapter section."""
    found = resolve_model(section["augmenting"], section["augmenting_revision"])
    return found, AutoConfig.from_pretrained(found.path, local_files_only=True)


def check_vocabulary(anchor, augmenting: ResolvedModel) -> None:
    """Raises UserError unless every token id means the same to both; `anchor` is a tokenizer."""
    own, other = ({i: t for t, i in each.get_vocab().items()} for each in (anchor, load_tokenizer(augmenting.path)))
    if differing := sorted(i for i in own.keys() | other.keys() if own.get(i) != other.get(i)):
        first = differing[0]
        raise UserError(
            f"adapter.augmenting: {augmenting.name} has another vocabulary: {len(differing)} tokens differ, the first, "
            f"{first}, is {other.get(first)!r} there and {own.get(first)!r} to the anchor; both must have one tokenizer"
        )


def decoder(found: ResolvedModel, shape: PretrainedConfig, load: Callable, like: PreTrainedModel) -> PreTrainedModel:
    """The augmenting model without its head, frozen, as `like` is held: on its device, in its dtype, in 4 bits or not.

    `load` makes it of files; on the meta device there is its shape alone.
    """
    if like.device.type == "meta":
        return AutoModel.from_config(shape, dtype=like.dtype, attn_implementation=attention.NAME).requires_grad_(False)
    four_bit = getattr(like, "is_loaded_in_4bit", False)
    return load(found.path, like.dtype, like.device, four_bit).get_decoder().requires_grad_(False)
