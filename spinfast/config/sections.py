"""The sections that every run has: frozen, validated, each field documented beside itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    field_validator,
    model_validator,
)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


def listed(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else (value,)


def weighed(value: Any) -> Any:
    """A name or a list of names as {name: 1}."""
    if isinstance(value, list) and len({*map(str, value)}) < len(value):
        raise ValueError("expected each name once")
    return value if isinstance(value, dict) else dict.fromkeys(map(str, listed(value)), 1.0)


PerRound = Annotated[tuple[Annotated[float, Field(ge=0, le=1e6)], ...], BeforeValidator(listed), Field(min_length=1)]


Weighed = Annotated[dict[str, Annotated[float, Field(gt=0, le=1e6)]], BeforeValidator(weighed), Field(min_length=1)]
PositivePerRound = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1e6)], ...], BeforeValidator(listed), Field(min_length=1)
]


class Model(Section):
    name: str = Field(description="hub id, local directory, .gguf file, or package:NAME/FILE.gguf")
    revision: str | None = Field(None, description="commit of a hub model; the resolved one is recorded")
    backend: Literal["transformers", "unsloth"] = Field(
        "transformers", description="who loads the model and runs its layers"
    )
    load_in_4bit: bool = Field(False, description="NF4 base weights (bitsandbytes)")


class Source(Section):
    """One of several sources; what it leaves out is as the section has it."""

    source: str = Field(min_length=1)
    weight: float | None = Field(None, gt=0, le=1e9)
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    columns: dict[str, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


ONE, SEVERAL = "(one)", "(several)"


class Data(Section):
    source: Annotated[
        Annotated[str, Field(min_length=1), Tag(ONE)]
        | Annotated[tuple[Source, ...], Field(min_length=1), Tag(SEVERAL)],
        Discriminator(lambda value: SEVERAL if isinstance(value, (list, tuple)) else ONE),
    ] = Field(
        description="file, folder or pattern (.jsonl .json .csv .tsv .parquet .arrow, also .gz .zst .bz2), saved data "
        "set, hub id, or reasoning_gym:TASK; a list mixes several, each a source or {source, weight, subset, split, "
        "revision, columns}: rows by weight, none twice; without weights all of them"
    )
    subset: str | None = Field(None, description="configuration name of a hub data set or a copy of one")
    split: str = Field("train", description="split or slices: train[:25%], train+test; a single file is train")
    revision: str | None = Field(None, description="commit of a hub data set")
    size: int | None = Field(None, gt=0, description="examples to use, chosen by a seeded shuffle; all if null")
    seed: int = Field(0, ge=0, description="seed of the choice (reasoning_gym: of the problems themselves)")
    turns: Literal["first", "last", "all"] = Field("first", description="which answers of a conversation are learnt")
    columns: dict[str, str] | None = Field(None, description="recognised column name: the data's own name for it")
    bad_rows: Literal["error", "skip"] = Field("error", description="a faulty row stops the run, or is counted")

    @field_validator("source")
    @classmethod
    def _all_or_no_weights(cls, source: str | tuple[Source, ...]) -> str | tuple[Source, ...]:
        if not isinstance(source, str) and len({each.weight is None for each in source}) > 1:
            raise ValueError("expected a weight for each source, or for none")
        return source

    def parts(self) -> list[tuple[float | None, Data]]:
        """The weight and the section of each source, as if it were the only one."""
        if isinstance(self.source, str):
            return [(None, self)]
        own = {"exclude_none": True, "exclude": {"weight"}}
        return [(each.weight, self.model_copy(update=each.model_dump(**own))) for each in self.source]


class Prompt(Section):
    system: str | None = Field(None, description="system turn put before every prompt that has none")
    max_prompt_tokens: int = Field(512, gt=0, description="longer prompts are rejected and counted")
    max_answer_tokens: int = Field(512, gt=0, description="longer answers of the data are rejected and counted, or cut")
    overlong: Literal["drop", "cut"] = Field("drop", description="cut keeps the start of answers that are too long")
    template: dict[str, JsonValue] = Field(default_factory=dict, description="extra variables of the chat template")


class Generation(Section):
    backend: Literal["auto", "transformers", "vllm"] = Field("auto", description="auto: vLLM where it can run")
    temperature: float = Field(1.0, ge=0, description="sampling temperature")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus; 1 is off")
    max_tokens: int = Field(256, gt=0, description="answers are cut here, without an end-of-turn token")
    batch_size: int = Field(64, gt=0, description="answers written at once")
    kv_cache_gib: float = Field(1.0, gt=0, le=1e6, description="GiB of vLLM's KV cache")


class Train(Section):
    microbatch_tokens: int | Literal["auto"] = Field(
        "auto", description="packed tokens of one forward; auto: the memory plan's choice"
    )
    checkpointing: bool | Literal["auto"] = Field("auto", description="recompute activations in the backward")
    save_every_steps: int = Field(50, gt=0, description="steps between checkpoints")
    save_every_seconds: float = Field(300, gt=0, description="seconds between checkpoints, whichever comes first")
    virtual_shards: int = Field(
        0, ge=0, le=1024, description="shares of a step that any number of ranks sums in one order; 0: one per rank"
    )
    max_overflows: int = Field(20, gt=0, description="abort after so many non-finite steps in a row")


class Evaluate(Section):
    problems: int = Field(64, ge=0, description="held-out problems answered greedily; 0 answers none")
    pairs: int = Field(64, ge=0, description="held-out rows scored, by spin played for pair accuracy; 0 scores none")
    max_tokens: int = Field(256, gt=0, description="tokens of a held-out answer")
    every: int = Field(
        1,
        gt=0,
        description="SPIN iterations from one evaluation to the next; the last and all other stages have theirs",
    )


class Device(Section):
    profile: str = Field("auto", description="auto, cpu, t4, l4, a10, a100, h100, h200; a smaller one rehearses it")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field("auto", description="compute dtype")
    kernels: Literal["auto", "eager", "triton", "numba"] = Field("auto", description="table of operators")
    attention: Literal["auto", "xformers", "aten_efficient", "numba", "sdpa"] = Field(
        "auto", description="attention backend"
    )
    deterministic: bool = Field(False, description="torch.use_deterministic_algorithms (CUDA: slower)")


def section_of(annotation: Any) -> Any:
    """The section in a field's type, or None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(section_of, getattr(annotation, "__args__", ()))), None)
