"""The adapter's section, a class per kind of policy/adapters/: what is trained of, or beside, the frozen base."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from spinfast.config.sections import Section


class AnyKind(Section):
    kind: str
    target_modules: str | tuple[str, ...] = Field(
        "all-linear", description="all-linear, names or a regular expression, as PEFT's"
    )
    start: str | None = Field(
        None, description="directory of an adapter that the run trains on (or of a run: its best); null: a fresh one"
    )


class Continued(AnyKind):
    """Kinds that are never merged between rounds."""

    init: ClassVar[str] = "continue"


class Lora(AnyKind):
    kind: Literal["lora"] = Field("lora", description="what is trained: lora, lora_xs, tiny_lora, full")
    r: int = Field(16, gt=0, description="rank")
    alpha: float = Field(32, gt=0, description="scaling is alpha / r")
    init: Literal["continue", "merge"] = Field(
        "continue",
        description="the next round or stage trains the same adapter on, or merges it and starts a fresh one",
    )


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
    target_modules: str | tuple[str, ...] = Field(
        "all-linear", description="also a file: the list that `spinfast spectrum` writes, or Axolotl's or TRL users'"
    )
    embeddings: bool = Field(False, description="the token embeddings and the head too, 16 bytes a number")


KINDS = {  # in the place of an error the kind, in brackets
    "(lora)": Lora,
    "(lora_xs)": LoraXs,
    "(tiny_lora)": TinyLora,
    "(full)": Full,
}


def _tag(value: Any) -> str | None:
    kind = value.get("kind", "lora") if isinstance(value, dict) else getattr(value, "kind", "lora")
    return f"({kind})"


Adapter = Annotated[
    Annotated[Lora, Tag("(lora)")]
    | Annotated[LoraXs, Tag("(lora_xs)")]
    | Annotated[TinyLora, Tag("(tiny_lora)")]
    | Annotated[Full, Tag("(full)")],
    Discriminator(_tag),
]
