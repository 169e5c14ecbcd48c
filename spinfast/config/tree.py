"""The whole tree of sections, and what they ask of one another."""

from __future__ import annotations

import difflib
import hashlib
import json
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, field_validator, model_validator

from spinfast.config.adapters import Adapter, Calm, Lora
from spinfast.config.methods import PAIRED, UNPAIRED, Dpo, Grpo, Optimisation, Sft, Spin
from spinfast.config.sections import Data, Device, Evaluate, Generation, Model, Prompt, Section, Train, listed

OF_CALM = [key for key in Calm.model_fields if key not in ("kind", "start")]  # what model may say of a composition
CHANGES_NO_RESULT = {
    "report_to": True,
    "train": {"save_every_steps", "save_every_seconds", "max_overflows"},
    "grpo": {"reward_timeout"},
}


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
