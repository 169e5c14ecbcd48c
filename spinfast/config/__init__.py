"""The configuration tree: frozen, validated, each field documented once, beside itself.

A config is one YAML file of the sections below; `section.key=value` overrides a single field. An unknown key
is an error that names the nearest valid one. The resolved tree is saved with every run.
`python -m spinfast.config` prints this reference as a Markdown table.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from spinfast.config.adapters import KINDS, Adapter, Calm, Full, Lora, LoraXs, TinyLora
from spinfast.config.methods import (
    PAIRED,
    REFERENCE_FREE,
    UNPAIRED,
    Dpo,
    Grpo,
    Optimisation,
    Passes,
    Sft,
    Spin,
    Watched,
)
from spinfast.config.sections import (
    Data,
    Device,
    Evaluate,
    Generation,
    Model,
    Prompt,
    Section,
    Source,
    Train,
    listed,
)
from spinfast.errors import UserError
from spinfast.names import FILE_SUFFIXES, suffix_of

__all__ = [
    "PAIRED",
    "REFERENCE_FREE",
    "UNPAIRED",
    "Calm",
    "Config",
    "Data",
    "Dpo",
    "Full",
    "Lora",
    "LoraXs",
    "Optimisation",
    "Passes",
    "Section",
    "Sft",
    "Source",
    "Spin",
    "TinyLora",
    "Watched",
    "at",
    "load_config",
    "parse_config",
    "plain_yaml",
    "reference_table",
    "validated",
]


Kind = TypeVar("Kind", bound=Section)


class Config(Section):
    method: Annotated[tuple[str, ...], BeforeValidator(listed), Field(min_length=1)] = Field(
        ("spin",), description="what is played, stage after stage: sft, spin, dpo, grpo"
    )
    model: Model
    data: Data
    heldout: Data | None = Field(None, description="held-out data; null: no evaluation")
    prompt: Prompt = Prompt()
    adapter: Adapter = Lora()
    sft: Sft = Sft()
    spin: Spin = Spin()
    dpo: Dpo = Dpo()
    grpo: Grpo = Grpo()
    generation: Generation = Generation()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    device: Device = Device()
    report_to: tuple[Literal["wandb", "trackio"], ...] = Field(
        (), description="services that get the metrics too; TensorBoard files are always written"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seeds adapter, order and sampling")

    @classmethod
    def methods(cls) -> list[str]:
        """The methods there are: those that have a section."""
        return [
            name
            for name, field in cls.model_fields.items()
            if isinstance(field.annotation, type) and issubclass(field.annotation, Optimisation)
        ]

    @model_validator(mode="before")
    @classmethod
    def _composed(cls, tree: Any) -> Any:
        """model: {anchor, augmenting, connections ...} says model.name and an adapter of kind calm."""
        model = tree.get("model") if isinstance(tree, dict) else None
        if not isinstance(model, dict) or {"anchor", *OF_CALM}.isdisjoint(model):
            return tree
        if "name" in model:
            raise ValueError("model.name: a composition has an anchor in its place; leave one of both out")
        if missing := [key for key in ("anchor", "augmenting") if key not in model]:
            raise ValueError(f"model.{missing[0]}: a composition has an anchor and an augmenting model; name both")
        adapter = tree.get("adapter") or {}
        if not isinstance(adapter, dict) or adapter.get("kind", "calm") != "calm":
            raise ValueError(f"adapter.kind: a composition trains its connections, expected calm, got {adapter}")
        own = {key: model[key] for key in OF_CALM if key in model}
        if twice := [key for key in own if key in adapter]:
            raise ValueError(f"adapter.{twice[0]}: model.{twice[0]} says it too; leave one of both out")
        plain = {key: value for key, value in model.items() if key not in ("anchor", *OF_CALM)}
        return tree | {
            "model": plain | {"name": model["anchor"]},
            "adapter": {"kind": "calm"} | adapter | own,
        }

    @field_validator("method")
    @classmethod
    def _known_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        strangers = [name for name in names if name not in cls.methods()]
        if strangers:
            word = strangers[0].lower()
            near = [word] if word in cls.methods() else difflib.get_close_matches(word, cls.methods(), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            hint = "; it is a dpo.loss" if word in (*PAIRED, *UNPAIRED) else hint
            raise ValueError(f"expected {', '.join(cls.methods())}, got {strangers[0]!r}{hint}")
        if len({*names}) < len(names):
            raise ValueError("expected each method once")
        return names

    @model_validator(mode="after")
    def _trains_what_it_samples(self):
        if "grpo" not in self.method:
            return self
        if not self.generation.temperature:
            raise ValueError(
                "generation.temperature: 0 gives one and the same answer to a prompt again and again, and grpo "
                "compares different ones; set it above 0 (1.0)"
            )
        if self.generation.top_p < 1:
            raise ValueError(
                "generation.top_p: grpo trains the whole distribution, so it must sample from it; expected 1, got "
                f"{self.generation.top_p:g}"
            )
        return self

    @model_validator(mode="after")
    def _who_can_train_it(self):
        if self.model.backend == "unsloth" and (made := self.adapter.implementation) != "lora":
            key = "init_lora_weights" if self.adapter.kind == "lora" else "kind"
            raise ValueError(f"adapter.{key}: {made} is trained by model.backend transformers alone, got unsloth")
        if self.adapter.kind == "calm" and self.generation.backend == "vllm":
            raise ValueError(
                "generation.backend: vllm runs one model, and a composition is two; leave it out, or set transformers"
            )
        if self.model.load_in_4bit and self.adapter.kind == "full":
            raise ValueError("adapter.kind: full trains 16- or 32-bit weights, model.load_in_4bit leaves none")
        return self

    def longest_generated(self) -> int:
        """Tokens of the longest answer that is written, 0 if none is."""
        heldout = self.evaluate.max_tokens if self.heldout and self.evaluate.problems else 0
        return max(heldout, self.generation.max_tokens if {"spin", "grpo"} & {*self.method} else 0)

    def identity(self) -> dict:
        """What a run's results depend on, defaults left out: a key that is added later with one changes nothing."""
        tree = self.model_dump(mode="json", exclude_defaults=True, exclude=CHANGES_NO_RESULT)
        return {name: value for name, value in tree.items() if value != {}}

    def hash(self) -> str:
        """16 hex digits that name what the run computes; a run directory belongs to one of them."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]

    def dump(self, changed: bool = False) -> str:
        """As YAML every value, or those that are not the defaults; sections of methods that are not named are left out,
        as a config must."""
        unnamed = {*self.methods()} - {*self.method}
        tree = self.model_dump(mode="json", exclude=unnamed, exclude_defaults=changed)
        return yaml.safe_dump(tree, sort_keys=False)


OF_CALM = [key for key in Calm.model_fields if key not in ("kind", "start")]  # what model may say of a composition
CHANGES_NO_RESULT = {
    "report_to": True,
    "train": {"save_every_steps", "save_every_seconds", "max_overflows"},
    "grpo": {"reward_timeout"},
}
MOVED = {  # keys of the first edition
    "lora": "adapter",
    "sft.examples_per_step": "sft.groups_per_step",
    "train.pairs_per_step": "spin.groups_per_step",
    **{
        f"train.{key}": f"spin.{key}"
        for key in ("optimizer", "lr", "weight_decay", "schedule", "warmup_ratio", "epochs", "max_grad_norm")
    },
}

ELSEWHERE = {  # keys of other tools' files, where likeness alone leads to another key or to none -> ours
    "model_name_or_path": "model: {name: ...}",
    "base_model": "model: {name: ...}",
    "model_name": "model: {name: ...}",
    "dataset_name": "data: {source: ...}",
    "dataset": "data: {source: ...}",
    "datasets": "data: {source: ...}",
    "output_dir": "--run-dir",
    "lora_alpha": "adapter.alpha",
    "num_generations": "grpo.samples",
    "reward_funcs": "grpo.rewards",
    "reward_weights": "grpo.rewards, {name: weight}",
    "max_completion_length": "generation.max_tokens",
    "max_prompt_length": "prompt.max_prompt_tokens",
    "loss_type": "loss",
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule",
    "max_steps": "grpo.steps",
    "num_train_epochs": "epochs, of grpo grpo.steps",
    "warmup_steps": "warmup_ratio",
    "per_device_train_batch_size": "groups_per_step, of grpo prompts_per_step; memory is planned",
    "gradient_accumulation_steps": "groups_per_step, of grpo prompts_per_step; memory is planned",
    "generation_batch_size": "grpo.prompts_per_step * grpo.samples * grpo.steps_per_generation",
    "importance_sampling_level": "grpo.loss: gspo where it is sequence",
    "mask_truncated_completions": "grpo.mask_truncated",
    "multi_objective_aggregation": "grpo.aggregation",
    "use_vllm": "generation.backend: vllm",
    "vllm_importance_sampling_correction": "grpo.correction",
    "vllm_importance_sampling_mode": "grpo.correction",
    "vllm_importance_sampling_clip_max": "grpo.correction_max",
    "vllm_importance_sampling_cap": "grpo.correction_max",
}
REFUSED = {  # keys of PEFT's LoraConfig that nothing here does
    "lora_dropout": "adapters are trained without dropout",
    "use_dora": "DoRA is not supported, plain LoRA is",
}


def at(values: Sequence[float], number: int) -> float:
    """The value for this round; the last one holds for all later ones."""
    return values[min(number, len(values) - 1)]


class PlainLoader(yaml.SafeLoader):
    """YAML's plain values: no objects, no aliases, by which a short file can stand for an endless one, no key twice."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"alias *{self.peek_event().anchor}: write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = next(key for number, key in enumerate(keys) if key in keys[:number])
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {twice} is there twice, and only one would count")
        return found


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read, override, validate. Raises UserError with one line: where, expected, got."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config {path}: no such file")
    if suffix_of(path) in {*FILE_SUFFIXES} - {".json"}:
        raise UserError(f"config {path}: a data file, expected a YAML file; after a config give data.source={path}")
    tree = plain_yaml(path, f"config {path}")
    if not isinstance(tree, dict):
        raise UserError(f"config {path}: expected sections (model:, data:, ...), got {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    if any(override.startswith("method=") for override in overrides):  # the file's other methods are not meant
        named = listed(tree["method"])
        given = {override.partition("=")[0].partition(".")[0] for override in overrides}
        left_out = [name for name in Config.methods() if name not in named and name not in given]
        tree = {key: value for key, value in tree.items() if key not in left_out}
    return parse_config(tree, where=f"config {path}")


def plain_yaml(path: Path, where: str) -> Any:
    """The plain values of a YAML file. Raises UserError where it is none."""
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or a number that is none
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def parse_config(tree: dict, where: str = "config", kind: type[Config] = Config) -> Config:
    """Validate a plain tree."""
    config = validated(tree, where, kind)
    for name in kind.methods():
        if name in tree and name not in config.method:
            raise UserError(
                f"{where}: section {name} has no use, method is [{', '.join(config.method)}]; "
                f"name {name} there too, or leave the section out"
            )
    return config


def validated(tree: dict, where: str, kind: type[Kind]) -> Kind:
    """The section of a plain tree. Raises UserError with one line: where, which key, expected, got."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_one_line(error, kind)}") from None


def _override(tree: dict, override: str) -> None:
    dotted, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not dotted or not text:
        raise UserError(f"override {override!r}: expected section.key=value, without spaces around the =")
    *parents, key = dotted.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section")
    try:
        node[key] = yaml.load(text, PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"override {override!r}: the value is not valid YAML") from None


def _one_line(error: ValidationError, kind: type[Section]) -> str:
    errors = error.errors()  # what is there and unknown says more of a foreign file than what is not there
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    dotted = ".".join(str(part) for part in first["loc"] if not _is_tag(part))
    if first["type"] == "extra_forbidden":
        key, siblings = str(first["loc"][-1]), _siblings(first["loc"], kind)
        if issubclass(kind, Config) and (known := _known_otherwise(key, dotted, first["loc"])):
            return known
        near = _elsewhere(key, kind) or difflib.get_close_matches(key, siblings, n=1, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"valid keys: {', '.join(siblings)}"
        return f"unknown key {dotted!r}; {hint}"
    if first["type"] == "union_tag_invalid":
        expected = ", ".join(tag[1:-1] for tag in KINDS)
        return f"{dotted}.kind: expected {expected}, got {first['input'].get('kind')!r}"
    if first["type"] == "missing":
        return f"{dotted}: this key is required"
    said = first["msg"].removeprefix("Value error, ")
    if not dotted:  # of several sections: it names them itself
        return said
    if ", got " in said:
        return f"{dotted}: {said}"
    return f"{dotted}: {said[0].lower()}{said[1:]}, got {reprlib.repr(first['input'])}"


def _known_otherwise(key: str, dotted: str, location: tuple) -> str | None:
    """What a config's unknown key is where likeness would not tell: one that moved, another tool's, another kind's."""
    if dotted in MOVED:
        return f"{dotted}: is now {MOVED[dotted]}" + ("" if "." in dotted else f", its keys {MOVED[dotted]}.r ...")
    if key in ELSEWHERE:
        return f"unknown key {dotted!r}; it is {ELSEWHERE[key]} here"
    if key in REFUSED:
        return f"unknown key {dotted!r}; {REFUSED[key]}"
    if kinds := [tag[1:-1] for tag, each in KINDS.items() if key in each.model_fields and tag not in location]:
        return f"unknown key {dotted!r}; it is one of adapter.kind {' or '.join(kinds)}"
    return None


def _is_tag(part: str | int) -> bool:
    """Which member of a union is meant, no key."""
    return not str(part).replace("_", "").isalnum()


def _siblings(location: tuple, kind: type[Section]) -> list[str]:
    section: Any = kind
    for part in location[:-1]:
        if part in KINDS:
            section = KINDS[part]
        elif part in section.model_fields:
            section = _section_of(section.model_fields[part].annotation) or section
    return list(section.model_fields)


def _elsewhere(key: str, kind: type[Section]) -> list[str]:
    """The sections' keys of exactly this name."""
    sections = {name: _section_of(field.annotation) for name, field in kind.model_fields.items()}
    return [f"{name}.{key}" for name, section in sections.items() if section and key in section.model_fields]


def _section_of(annotation: Any) -> Any:
    """The section in a field's type, or None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_of, getattr(annotation, "__args__", ()))), None)


def reference_table() -> str:
    """Every key with its default and meaning, as Markdown; of a method's keys its own first."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in Config.model_fields.items():
        if _section_of(field.annotation) is None:
            lines.append(f"| `{name}` | `{_shown(field.default)}` | {field.description} |")
            continue
        keys = _section_of(field.annotation).model_fields
        for key, inner in sorted(keys.items(), key=lambda item: item[0] in Optimisation.model_fields):
            lines.append(_row(f"{name}.{key}", inner, inner.description))
        for tag, section in KINDS.items() if name == "adapter" else ():
            for key, inner in section.model_fields.items():
                if key != "kind" and (key not in keys or inner.default != keys[key].default):
                    lines.append(_row(f"{name}.{key}", inner, f"of {tag[1:-1]}: {inner.description}"))
    return "\n".join(lines)


def _row(name: str, field: Any, meaning: str) -> str:
    default = "required" if field.is_required() else f"`{_shown(field.get_default(call_default_factory=True))}`"
    return f"| `{name}` | {default} | {meaning} |"


def _shown(value: Any) -> Any:
    if isinstance(value, tuple):
        return value[0] if len(value) == 1 else list(value)
    return "null" if value is None else value
