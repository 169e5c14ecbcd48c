"""The adapter's section, a class per kind of policy/adapters/: what is trained of, or beside, the frozen base."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from spinfast.config.sections import Section

Layer = Annotated[int, Field(ge=0)]
Pair = tuple[Layer, Layer]
Names = str | Annotated[tuple[str, ...], Field(min_length=1)]


class AnyKind(Section):
    kind: str
    start: str | None = Field(
        None, description="directory of an adapter that the run trains on (or of a run: its best); null: a fresh one"
    )

    @property
    def implementation(self) -> str:
        """Its name in policy.adapters.KINDS."""
        return self.kind

    @property
    def saved_per_trained(self) -> int:
        """Numbers in its file for each that is trained."""
        return 1

    @property
    def largest_rank(self) -> int:
        """Of any module, as an engine serves it."""
        return self.r


class OfModules(AnyKind):
    """Kinds that are put on matrices of the model."""

    target_modules: Names = Field("all-linear", description="all-linear, names or a regular expression, as PEFT's")
    exclude_modules: Names | None = Field(None, description="names or a regular expression of target_modules left out")
    layers_to_transform: Annotated[tuple[Layer, ...], Field(min_length=1)] | None = Field(
        None, description="numbers of the layers that are trained; null: all"
    )

    @model_validator(mode="after")
    def _layers_of_names(self):
        if self.layers_to_transform and isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            raise ValueError(
                "layers_to_transform goes with names in target_modules; write the layers into the regular expression"
            )
        return self


class Continued(OfModules):
    """Kinds that are never merged between rounds."""

    init: ClassVar[str] = "continue"


class Lora(OfModules):
    kind: Literal["lora"] = Field("lora", description="what is trained: lora, lora_xs, tiny_lora, full, calm")
    r: int = Field(16, gt=0, description="rank")
    alpha: float = Field(32, gt=0, description="scaling is alpha / r")
    use_rslora: bool = Field(False, description="scaling is alpha / sqrt(r) (arXiv 2312.03732)")
    rank_pattern: dict[str, Annotated[int, Field(gt=0)]] = Field(
        {}, description="other ranks, by module name or regular expression"
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field({}, description="other alphas, likewise")
    init_lora_weights: Annotated[
        Literal["kaiming", "gaussian", "orthogonal", "pissa"], BeforeValidator(lambda v: "kaiming" if v is True else v)
    ] = Field(
        "kaiming",
        description="how A is drawn, B is 0; orthogonal: both are drawn, B A is 0, and ranks are even; pissa: the "
        "principal components of the weight, which stays as it is; served and saved at rank 2 r",
    )
    init: Literal["continue", "merge"] = Field(
        "continue",
        description="the next round or stage trains the same adapter on, or merges it and starts a fresh one",
    )

    @property
    def implementation(self) -> str:
        return "pissa" if self.init_lora_weights == "pissa" else self.kind

    @property
    def saved_per_trained(self) -> int:
        return 2 if self.implementation == "pissa" else 1

    @property
    def trained_rank(self) -> int:
        """The largest of any module."""
        return max([self.r, *self.rank_pattern.values()])

    @property
    def largest_rank(self) -> int:
        return self.trained_rank * self.saved_per_trained


class LoraXs(Continued):
    kind: Literal["lora_xs"]
    r: int = Field(16, gt=0, description="rank of the frozen frame; r^2 numbers a module")
    alpha: float = Field(16, gt=0, description="scaling is alpha / r")


class TinyLora(Continued):
    kind: Literal["tiny_lora"]
    r: int = Field(2, gt=0, description="rank of the frozen frame")
    u: int = Field(13, gt=0, description="numbers that modules which are tied share")
    tie: Annotated[int, Field(gt=0)] | Literal["all"] = Field(1, description="modules that share them; or all")
    sharing: Literal["tiled", "structured"] = Field(
        "tiled", description="neighbours in the model's order share, or neighbours of one type"
    )
    projection_seed: int = Field(42, ge=0, lt=2**32, description="seed of the fixed projections P")
    payload: Literal["float32", "bfloat16"] = Field(
        "float32", description="what a number is saved as; in bfloat16 13 of them are 26 bytes"
    )


class Full(Continued):
    r: ClassVar[int] = 0  # of what an engine would have to serve as LoRA

    kind: Literal["full"]
    target_modules: Names = Field(
        "all-linear", description="also a file: the list that `spinfast spectrum` writes, or Axolotl's or TRL users'"
    )
    embeddings: bool = Field(False, description="the token embeddings and the head too, 16 bytes a number")


class Calm(AnyKind):
    """The model is the anchor; `model: {anchor, augmenting, connections}` says the same."""

    r: ClassVar[int] = 0
    init: ClassVar[str] = "continue"

    kind: Literal["calm"]
    augmenting: str = Field(min_length=1, description="the other model, named as model.name is")
    augmenting_revision: str | None = Field(None, description="its commit at the hub")
    connections: Annotated[int, Field(gt=0)] | Annotated[tuple[Pair, ...], Field(min_length=1)] = Field(
        4,
        description="every n-th layer of the augmenting model, on as many of the anchor's at equal distances; or pairs "
        "[layer of the augmenting model, layer of the anchor], counted from 0",
    )
    norm: bool = Field(True, description="RMSNorm without weights before the projections; the paper has none")
    rope: bool = Field(True, description="queries and keys are turned by their positions; the paper's are not")

    @field_validator("connections")
    @classmethod
    def _one_each(cls, connections: int | tuple[Pair, ...]) -> int | tuple[Pair, ...]:
        anchors = [] if isinstance(connections, int) else [anchor for _, anchor in connections]
        if len({*anchors}) < len(anchors):
            raise ValueError("expected each layer of the anchor once")
        return connections


KINDS = {  # in the place of an error the kind, in brackets
    "(lora)": Lora,
    "(lora_xs)": LoraXs,
    "(tiny_lora)": TinyLora,
    "(full)": Full,
    "(calm)": Calm,
}


def _tag(value: Any) -> str | None:
    kind = value.get("kind", "lora") if isinstance(value, dict) else getattr(value, "kind", "lora")
    return f"({kind})"


Adapter = Annotated[
    Annotated[Lora, Tag("(lora)")]
    | Annotated[LoraXs, Tag("(lora_xs)")]
    | Annotated[TinyLora, Tag("(tiny_lora)")]
    | Annotated[Full, Tag("(full)")]
    | Annotated[Calm, Tag("(calm)")],
    Discriminator(_tag),
]
