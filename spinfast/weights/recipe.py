"""mergekit's YAML: which models, which of their layers, by which method, with which numbers (mergekit 0.1.5).

Every recipe of mergekit's is read as it is; what is not built is refused by name, an unknown key with the nearest one.
A number may be a gradient, a list of knots at equal distances over a slice's layers, and may hold for some tensors
only, `{filter: self_attn, value: 0.5}`: the first filter that is part of the tensor's name counts. Levels, strongest
first: of a source or model, of a slice, of a module, of the recipe.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from spinfast.config import Section, plain_yaml, validated
from spinfast.errors import UserError
from spinfast.store.files import expanded
from spinfast.weights.merge import METHODS

OTHERS = (  # mergekit's methods that are not built
    *("multislerp", "breadcrumbs_ties", "della", "della_linear", "sce", "ram", "ramplus_tl", "nearswap"),
    "arcee_fusion",
)
SWITCHES = {"normalize", "rescale", "int8_mask", "nuslerp_flatten", "nuslerp_row_wise", "filter_wise"}
KNOWN = {"int8_mask", "epsilon"} | {name for m in METHODS.values() for name in (*m.each, *m.shared)}
SHARES = ("density", "gamma")  # between 0 and 1
RESCALES = {"l1": True, "density": "density"}
DTYPES = ("float32", "float16", "bfloat16")
TEMPLATES = {  # that mergekit knows by name
    "chatml": "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama3": "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>"
    "\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
}


@dataclass(frozen=True)
class Reference:
    """path@revision+adapter@revision: a model as `resolve_model` takes it, and what is added before it is merged."""

    name: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    @classmethod
    def parse(cls, given: Any) -> Reference:
        if isinstance(given, Reference):
            return given
        if isinstance(given, dict) and "model" in given and not given.keys() - {"model", "lora"}:
            parts = [part for part in (given["model"], given.get("lora")) if part is not None]  # mergekit's other form
        elif isinstance(given, str):
            parts = [given] if expanded(given).exists() else given.split("+")  # a directory may have a + in its name
        else:
            parts = []
        if not 1 <= len(parts) <= 2:
            raise ValueError("expected path@revision+adapter@revision, each once and as needed")
        return cls(*(word for part in parts for word in _place(part)))

    def __str__(self) -> str:
        parts = ((self.name, self.revision), (self.adapter, self.adapter_revision))
        return "+".join(f"{name}@{revision}" if revision else name for name, revision in parts if name)


def _place(given: Any) -> tuple[str, str | None]:
    """(path or hub id, revision) of path@revision, or of mergekit's {path, revision}."""
    if isinstance(given, dict) and not given.keys() - {"path", "revision"}:
        name, *revision = (given[key] for key in ("path", "revision") if given.get(key) is not None)
    elif isinstance(given, str):
        name, *revision = [given] if expanded(given).exists() else given.split("@")
    else:
        name, revision = "", []
    if len(revision) > 1 or not all(isinstance(word, str) and word.strip() for word in (name, *revision)):
        raise ValueError("expected path@revision+adapter@revision, each once and as needed")
    return name, *(revision or [None])


@dataclass(frozen=True)
class Setting:
    """A value, or the knots of a gradient, for tensors whose name holds the filter."""

    value: bool | float | str | tuple
    filter: str | None = None

    def holds(self, name: str) -> bool:
        return self.filter in (None, "*") or self.filter in name

    def at(self, t: float) -> bool | float | str:
        """The gradient at t in [0, 1]; of switches the knot at or before it."""
        if not isinstance(self.value, tuple):
            return self.value
        place = t * (len(self.value) - 1)
        left = int(place)
        if isinstance(self.value[0], (bool, str)):
            return self.value[left]
        right = min(left + 1, len(self.value) - 1)
        return (1 - (place - left)) * self.value[left] + (place - left) * self.value[right]


Settings = Mapping[str, tuple[Setting, ...]]


def _settings(given: Any) -> Settings:
    if not isinstance(given, dict):
        raise ValueError("expected names of parameters with a value each")
    for name in given:
        if name not in KNOWN:
            near = difflib.get_close_matches(str(name), KNOWN, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(KNOWN))}"
            raise ValueError(f"unknown parameter {name!r}; {hint}, got {given[name]!r}")
    return {name: _setting(name, value) for name, value in given.items()}


def _setting(name: str, given: Any) -> tuple[Setting, ...]:
    several = given if isinstance(given, list) and given and isinstance(given[0], dict) else [{"value": given}]
    if isinstance(given, dict):
        several = [given]
    settings = []
    for each in several:
        if not isinstance(each, dict) or "value" not in each or set(each) - {"filter", "value"}:
            raise ValueError(f"{name}: expected value and filter, got {each!r}")
        if not isinstance(each.get("filter"), (str, type(None))):
            raise ValueError(f"{name}: expected a part of a tensor's name as the filter, got {each['filter']!r}")
        value = each["value"]
        if isinstance(value, list):
            if not value:
                raise ValueError(f"{name}: expected at least one knot of the gradient, got []")
            value = tuple(_scalar(name, knot) for knot in value)
        settings.append(Setting(value if isinstance(value, tuple) else _scalar(name, value), each.get("filter")))
    return tuple(settings)


def _scalar(name: str, value: Any) -> bool | float | str:
    if name == "rescale" and value in RESCALES:
        return RESCALES[value]
    if name in SWITCHES:
        if value not in (True, False):  # 0 and 1 too
            raise ValueError(f"{name}: expected true or false, got {value!r}")
        return bool(value)
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # YAML takes 1e-3 for a word
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a number or a list of numbers, got {value!r}")
    if name in SHARES and not 0 <= number <= 1:
        raise ValueError(f"{name}: expected a share between 0 and 1, got {value!r}")
    return number


Model = Annotated[Reference, BeforeValidator(Reference.parse)]
Parameters = Annotated[dict[str, Any], BeforeValidator(_settings)]


def _left_out(value: Any) -> None:
    if value is not None:
        raise ValueError(f"this is not built, leave it out, got {value!r}")


Unbuilt = Annotated[None, BeforeValidator(_left_out)]


class Input(Section):
    model: Model
    parameters: Parameters = Field(default_factory=dict)


class Source(Input):
    layer_range: tuple[Annotated[int, Field(ge=0)], int]  # start, end; the end is not taken

    @field_validator("layer_range")
    @classmethod
    def _some(cls, bounds: tuple[int, int]) -> tuple[int, int]:
        if bounds[0] >= bounds[1]:
            raise ValueError("expected [start, end] with start below end")
        return bounds


class Slice(Section):
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]
    base_model: Model | None = None
    parameters: Parameters = Field(default_factory=dict)
    residual_weight: Unbuilt = None  # mergekit reads it and does nothing with it

    @model_validator(mode="after")
    def _equally_long(self):
        lengths = [end - start for start, end in (source.layer_range for source in self.sources)]
        if len({*lengths}) > 1:
            raise ValueError(f"sources: expected equally many layers of each, got {', '.join(map(str, lengths))}")
        return self


class Body(Section):
    models: Annotated[tuple[Input, ...], Field(min_length=1)] | None = None
    slices: Annotated[tuple[Slice, ...], Field(min_length=1)] | None = None
    parameters: Parameters = Field(default_factory=dict)


class Module(Body):
    @model_validator(mode="after")
    def _one_of_them(self):
        return _exactly_one(self, ("models", "slices"))


class Tokenizer(Section):
    source: str = "union"
    tokens: Unbuilt = None
    pad_to_multiple_of: Annotated[int, Field(ge=1)] | None = None


class Recipe(Body):
    merge_method: str
    modules: dict[str, Module] | None = None
    base_model: Model | None = None
    dtype: Literal[DTYPES] | None = None
    out_dtype: Literal[DTYPES] | None = None
    tokenizer_source: str | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None

    @field_validator("merge_method")
    @classmethod
    def _built(cls, name: str) -> str:
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.7)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            hint = "; that one is mergekit's alone" if name in OTHERS else hint
            raise ValueError(f"expected {', '.join(METHODS)}, got {name!r}{hint}")
        return name

    @field_validator("dtype", "out_dtype", mode="before")
    @classmethod
    def _short(cls, name: Any) -> Any:
        return name.removeprefix("torch.") if isinstance(name, str) else name

    @field_validator("chat_template")
    @classmethod
    def _a_template(cls, text: str | None) -> str | None:
        if text not in (None, "auto", *TEMPLATES) and "{" not in text:
            raise ValueError(f"expected auto, {', '.join(TEMPLATES)}, or the template as Jinja, got {text!r}")
        return TEMPLATES.get(text, text)

    @model_validator(mode="after")
    def _whole(self):
        _exactly_one(self, ("models", "slices", "modules"))
        if self.modules and [*self.modules] != ["default"]:
            raise ValueError(f"modules: expected default alone, which is the decoder, got {', '.join(self.modules)}")
        if self.tokenizer and self.tokenizer_source:
            raise ValueError("tokenizer, tokenizer_source: expected one of them, got both")
        if self.vocabulary not in (None, "base", "union", *map(str, self.models_named)):
            raise ValueError(f"tokenizer_source: expected union, base or one of the models, got {self.vocabulary!r}")
        return self

    @property
    def body(self) -> Body:
        return self.modules["default"] if self.modules else self

    @property
    def vocabulary(self) -> str | None:
        """Whose tokens the rows of embedding and head are brought to (`vocabulary.py`); None: they stay as they are."""
        return self.tokenizer.source if self.tokenizer else self.tokenizer_source

    @property
    def models_named(self) -> list[Reference]:
        """Base first, then in the order of the file, each once."""
        named = [self.base_model] if self.base_model else []
        named += [each.model for each in self.body.models or ()]
        for each in self.body.slices or ():
            named += [each.base_model] if each.base_model else []
            named += [source.model for source in each.sources]
        return [*dict.fromkeys(named)]

    @property
    def donor(self) -> Reference:
        """Whose config and tokenizer the output has."""
        return self.models_named[0]

    def all_settings(self) -> list[tuple[str, Setting]]:
        """(parameter, setting) of all levels."""
        body = self.body
        slices = body.slices or ()
        owners = [self, *([body] * bool(self.modules)), *slices, *(body.models or ())]
        owners += [source for each in slices for source in each.sources]
        return [(name, one) for owner in owners for name, several in owner.parameters.items() for one in several]

    def laid_out(self, layers: Callable[[Reference], int]) -> tuple[Slice, ...]:
        """The output's slices in order: `models` are one slice of all their layers, the base added if it is not there.

        `layers` tells how many a model has.
        """
        if self.body.slices:
            return self.body.slices
        inputs = [*self.body.models]
        if self.base_model and self.base_model not in [each.model for each in inputs]:
            inputs.append(Input.model_construct(model=self.base_model, parameters={}))
        counts = {each.model: layers(each.model) for each in inputs}
        if len({*counts.values()}) > 1:
            told = ", ".join(f"{model} has {count} layers" for model, count in counts.items())
            raise UserError(f"models: expected equally deep ones, {told}; take parts of them by slices")
        sources = [
            Source.model_construct(model=each.model, parameters=each.parameters, layer_range=(0, counts[each.model]))
            for each in inputs
        ]
        return (Slice.model_construct(sources=tuple(sources), base_model=None, parameters={}),)


def _exactly_one(section: Section, names: Sequence[str]):
    given = [name for name in names if getattr(section, name) is not None]
    if len(given) != 1:
        raise ValueError(f"{', '.join(names)}: expected exactly one of them, got {', '.join(given) or 'none'}")
    return section


def read_recipe(path: Path) -> Recipe:
    """Raises UserError with one line: where, expected, got."""
    where = f"recipe {path}"
    if not path.is_file():
        raise UserError(f"{where}: no such file")
    tree = plain_yaml(path, where)
    if not isinstance(tree, dict):
        raise UserError(f"{where}: expected merge_method, models ..., got {type(tree).__name__}")
    return validated(tree, where, Recipe)


def resolved(name: str, levels: Sequence[Settings], tensor: str, t: float) -> bool | float | str | None:
    """The parameter of this tensor at t by the strongest level that says something of it; None: none does."""
    settings = (each for level in levels for each in level.get(name, ()))
    return next((each.at(t) for each in settings if each.holds(tensor)), None)
