"""The adapter's section, a class per kind of policy/adapters/: what is trained beside the frozen base."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from spinfast.config.sections import Section


class AnyKind(Section):
    kind: str
    r: int = Field(16, gt=0, description="rank")
    target_modules: str | tuple[str, ...] = Field(
        "all-linear", description="all-linear, names or a regular expression, as PEFT's"
    )
    start: str | None = Field(
        None, description="directory of an adapter that the run trains on (or of a run: its best); null: a fresh one"
    )


class Lora(AnyKind):
    kind: Literal["lora"] = Field(
        "lora", description="what is trained beside the frozen base: lora, lora_xs, tiny_lora"
    )
    alpha: float = Field(32, gt=0, description="scaling is alpha / r")
    init: Literal["continue", "merge"] = Field(
        "continue",
        description="the next round or stage trains the same adapter on, or merges it and starts a fresh one",
    )


class InFrame(AnyKind):
    """Kinds in the frame of the base's own weights: that base stays."""

    init: ClassVar[str] = "continue"


class LoraXs(InFrame):
    kind: Literal["lora_xs"]
    alpha: float = Field(16, gt=0, description="scaling is alpha / r")


class TinyLora(InFrame):
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


KINDS = {"(lora)": Lora, "(lora_xs)": LoraXs, "(tiny_lora)": TinyLora}  # in a place of errors the kind, in brackets


def _tag(value: Any) -> str | None:
    kind = value.get("kind", "lora") if isinstance(value, dict) else getattr(value, "kind", "lora")
    return f"({kind})"


Adapter = Annotated[
    Annotated[Lora, Tag("(lora)")] | Annotated[LoraXs, Tag("(lora_xs)")] | Annotated[TinyLora, Tag("(tiny_lora)")],
    Discriminator(_tag),
]
