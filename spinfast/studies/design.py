"""STUDY.yaml: a base config, axes, seeds, and what is measured of every cell. A cell is a run, with files of its own.

base: smollm2-135m-sft-cpu.yaml      a config, beside the study's file or among the ready ones
set: {sft.epochs: 1}                 keys of every cell, over the base's; {seed} in a value is the cell's
axes:
  adapter.r: [4, 16, 64]             a key and its values
  data:                              or a name, and levels that set several keys each
    right: {data.source: right.jsonl}
    wrong: {data.source: wrong.jsonl}
controls: {right: wrong}             a level's score is what it brings more than this one; else than the base
seeds: 5                             or a list
learning: {sums: {source: "reasoning_gym:chain_sum"}}
forgetting: {texts: ["package:pydoc_data.topics"]}
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, JsonValue, field_validator, model_validator

from spinfast.config import Config, Section, load_config, plain_yaml, validated
from spinfast.config.sections import Data
from spinfast.errors import UserError

FEWEST = 5  # seeds: with three, the smallest p of a test that permutes them is above 0.05
ONE_BASE = ("model", "device", "generation", "prompt")  # sections of which all cells have the same


class Items(Data):
    """Held-out problems with worked answers, or a benchmark task, by which learning is told."""

    source: str = Field("", description="problems with worked answers, as in data.source; or give task")
    task: str | None = Field(None, description="a task of `spinfast eval`: its verdicts, and its margins")
    rows: str | None = Field(None, description="of a task: folder with SPLIT.jsonl, or commit of the hub's data set")
    split: str = "test"
    size: int | None = Field(200, gt=0, description="items")
    exact: bool = Field(False, description="answers are written too, greedily, and compared")
    max_tokens: int = Field(128, gt=0, description="of such an answer")

    @model_validator(mode="after")
    def _one_of(self):
        if bool(self.source) == bool(self.task):
            raise ValueError("expected source or task, one of them")
        return self


class Forgetting(Section):
    """What the model could before: unrelated texts, and its own answers."""

    texts: tuple[str, ...] = Field((), description="as `spinfast rate` names texts; never those that are trained on")
    tokens: int = Field(4096, ge=256, description="of each text")
    own: int = Field(24, ge=0, description="general questions whose answers, the base's own, are scored; 0: none")
    max_tokens: int = Field(96, gt=0, description="of such an answer")


Seeds = Annotated[
    tuple[Annotated[int, Field(ge=0, lt=2**32)], ...],
    BeforeValidator(lambda v: tuple(range(v)) if isinstance(v, int) and not isinstance(v, bool) else v),
    Field(min_length=1),
]


class Design(Section):
    base: str = Field(description="a config: a path beside the study's file, or the name of a ready one")
    set: dict[str, JsonValue] = Field({}, description="keys of every cell, over the base's")
    axes: dict[str, dict[str, dict[str, JsonValue]]] = Field(
        {}, description="a key and its values, or a name and its levels, each with the keys that it sets"
    )
    controls: dict[str, str] = Field({}, description="level: the level whose effect is taken off its own")
    seeds: Seeds = Field((0, 1, 2, 3, 4), description="their number, or a list")
    learning: dict[str, Items] = Field(min_length=1, description="item sets by name")
    forgetting: Forgetting = Forgetting()
    curve: int = Field(
        0, ge=0, description="points of each stage at which likelihoods are measured as it trains; 0: none"
    )
    together: bool = Field(
        False, description="all adapters write their answers in one vLLM, too, for the table of lifts"
    )
    score: str | None = Field(None, description="the outcome that ranks: SET/READING; null: the first set's first")

    @field_validator("axes", mode="before")
    @classmethod
    def _levels(cls, axes: Any) -> Any:
        """`adapter.r: [4, 16]` is {"4": {adapter.r: 4}, "16": {adapter.r: 16}}."""
        if not isinstance(axes, dict):
            return axes
        for name, levels in axes.items():
            if not levels:
                raise ValueError(f"{name}: expected levels, got {levels}")
            labels = [_label(level) for level in levels] if isinstance(levels, list) else []
            if twice := [label for label in labels if labels.count(label) > 1]:
                raise ValueError(f"{name}: {twice[0]} is there twice")
            if isinstance(levels, dict) and (odd := [level for level in levels if not isinstance(level, str)]):
                raise ValueError(f'{name}: a level is named {odd[0]}, no text; quote it: "{_label(odd[0])}"')
        return {
            name: {_label(value): {name: value} for value in levels} if isinstance(levels, list) else levels
            for name, levels in axes.items()
        }

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or len({*seeds}) < len(seeds):
            raise ValueError("expected each seed once, and one at the least")
        return seeds

    @model_validator(mode="after")
    def _one_axis_each(self):
        names = [level for levels in self.axes.values() for level in levels]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"axes: {twice[0]!r} is a level of two axes; call one of them otherwise")
        for level, control in self.controls.items():
            axis = next((levels for levels in self.axes.values() if level in levels), {})
            if level not in axis or control not in axis or level == control or control in self.controls:
                raise ValueError(
                    f"controls: {level}: {control}: expected two levels of one axis ({', '.join(names)}), the second "
                    "without a control itself"
                )
        return self


@dataclass(frozen=True)
class Cell:
    """One run: a level of each axis, and a seed."""

    levels: tuple[str, ...]
    seed: int
    config: Config

    @property
    def setting(self) -> str:
        return ", ".join(self.levels) or "base config"

    @property
    def name(self) -> str:
        """Of its directory."""
        return "+".join(re.sub(r"[^\w.-]+", "-", level) for level in self.levels or ("run",)) + f".{self.seed}"


def load_design(path: Path) -> Design:
    """Raises UserError with one line: where, expected, got."""
    if not path.is_file():
        raise UserError(f"study {path}: no such file")
    tree = plain_yaml(path, f"study {path}")
    if not isinstance(tree, dict):
        raise UserError(f"study {path}: expected base:, axes:, learning: ..., got {type(tree).__name__}")
    return validated(tree, f"study {path}", Design)


def cells_of(design: Design, beside: Path) -> list[Cell]:
    """All of them, a whole replication after the other; relative names of configs are looked for in `beside` first."""
    base, settings = find_base(design.base, beside), []
    if "seed" in design.set:
        raise UserError("study: set: sets seed; seeds: lists them")
    for levels in itertools.product(*(axis.items() for axis in design.axes.values())):
        keys = dict(design.set)
        for name, sets in levels:
            keys |= sets
            if "seed" in sets:
                raise UserError(f"study: axes: {name} sets seed; seeds: lists them")
        settings.append((tuple(name for name, _ in levels), keys))
    cells = [
        Cell(levels, seed, _cell_config(base, _seeded(keys, seed) | {"seed": seed}, levels))
        for seed in design.seeds
        for levels, keys in settings
    ]
    first = cells[0].config
    for cell in cells:
        for section in ONE_BASE:
            if getattr(cell.config, section) != getattr(first, section):
                raise UserError(
                    f"study: {cell.setting} changes {section}; a study has one base, engine and prompt: make it two"
                )
    if len({cell.name for cell in cells}) < len(cells):
        raise UserError("study: axes: two cells would have one directory; give levels names that differ in letters")
    return cells


def _seeded(keys: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The keys, {seed} in a value replaced, also in the values that this one holds."""
    return {key: json.loads(json.dumps(value).replace("{seed}", str(seed))) for key, value in keys.items()}


def _cell_config(base: Path, keys: Mapping[str, Any], levels: Sequence[str]) -> Config:
    try:
        return load_config(base, [f"{key}={json.dumps(value)}" for key, value in keys.items()])
    except UserError as error:
        raise UserError(f"study, cell {', '.join(levels) or '(base)'}: {error}") from None


def find_base(name: str, beside: Path) -> Path:
    from spinfast.run import CONFIGS

    places = [beside / name, Path(name), CONFIGS / name]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise UserError(f"study: base: {name}: no such file; tried {', '.join(map(str, places))}")
    return found


def _label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
