"""A run as others will see it: which stages, under which names, of which base and data, under which licences."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from yaml import YAMLError

from spinfast.config import load_config
from spinfast.errors import UserError
from spinfast.hub import origin
from spinfast.models import ResolvedModel, at_hub, resolve_model
from spinfast.policy.adapters import files as adapters
from spinfast.report import card as cards
from spinfast.report.read import read_run
from spinfast.store import files

log = logging.getLogger("spinfast")
SUFFIXES = {"data": "", "adapter": "", "rollouts": "-rollouts", "merged": "-merged", "gguf": "-GGUF"}
DATA = ("data", "rollouts")  # what is a data set at the hub; all else is a model


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for."""

    to: str  # OWNER/NAME
    stages: Sequence[str] = ()  # names of directories, or best; all that are finished
    data: bool = True
    rollouts: bool = False
    expanded: bool = False
    merged: bool = False
    gguf: Sequence[str] = ()
    base: str | None = None  # hub id
    licence: str | None = None


class Publication:
    """Raises UserError for what is no run, has nothing finished, is damaged, or holds not what is asked for."""

    def __init__(self, path: Path, wanted: Wanted):
        try:
            as_played = read_run(path)
            trained = [row["stage"] for row in as_played.rows if row["stage"] != "base"]
        except (ValueError, TypeError, LookupError, RecursionError, YAMLError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: config.yaml or results.json is damaged; run the same config again") from error
        self.wanted, self.run = wanted, replace(as_played, config=origin.told(as_played.config))
        config = load_config(path / "config.yaml")
        if config.adapter.kind == "calm":
            raise UserError(f"{path}: trains connections between two models, which no library at the hub loads")
        self.id = config.hash()
        if self.run.control:
            self.id += f" {self.run.control}"
        self.stages = self._stages([stage for stage in trained if Path(stage).name == stage])
        for stage in self.stages:
            if damaged := files.damage(self.run.path / stage / "adapter"):
                raise UserError(f"{self.run.path / stage}: {damaged}; run the same config again to mend it")
        self._description = cards.description(self.run.path / self.stages[-1] / "adapter")
        if wanted.expanded and config.adapter.kind not in ("lora_xs", "tiny_lora"):
            log.warning(
                "--expanded has no effect: the run's adapters are %s, not LoRA-XS or TinyLoRA", config.adapter.kind
            )
        if wanted.base and at_hub(self._base_here) and wanted.base != self._base_here:
            raise UserError(f"--base {wanted.base}: the run's base is {self._base_here}, a hub id itself; leave it out")

    def _stages(self, trained: list[str]) -> list[str]:
        """Those to publish of the ones that are trained; a name out of a file that leads elsewhere is none."""
        run, asked = self.run, self.wanted.stages
        if not trained:
            raise UserError(f"{run.path}: no stage is finished yet, so there is nothing to publish; let the run go on")
        if not run.finished:
            log.warning("the run is not finished; finished of it, and published, is %s", ", ".join(trained))
        named = [self.best if stage == "best" else stage for stage in asked]
        if unknown := [stage for stage in named if stage not in trained]:
            raise UserError(f"--stage {unknown[0]}: expected best or of {', '.join(trained)}, which are finished")
        return [stage for stage in trained if stage in named or not asked]

    @property
    def best(self) -> str:
        """The best stage; of a control and of a run that goes on the last one that is finished."""
        if not self.run.finished or self.run.control:
            return self.run.stages[-1]
        return adapters.find(self.run.path).parent.name

    @property
    def whole(self) -> Sequence[str]:
        """The stages that whole models are made of: those asked for, else the best."""
        if not self.wanted.stages and self.best not in self.stages:
            raise UserError("no stage did better than the base, so none is made a whole model; name one by --stage")
        return self.stages if self.wanted.stages else [self.best]

    def parcels(self) -> list[tuple[str, str]]:
        """(stage, what of it) for each repository."""
        run, wanted, found = self.run, self.wanted, []
        for stage in self.stages:
            there = {
                "data": wanted.data and self.played(stage),
                "rollouts": wanted.rollouts and stage in run.rollouts,
                "adapter": True,
            }
            found += [(stage, what) for what, is_there in there.items() if is_there]
        if wanted.rollouts and not any(what == "rollouts" for _, what in found):
            raise UserError("--rollouts: there are none; only GRPO keeps what it samples")
        for what, asked in {"merged": wanted.merged, "gguf": wanted.gguf}.items():
            found += [(stage, what) for stage in self.whole] if asked else []
        return found

    def played(self, stage: str) -> bool:
        """Whether the stage is self-play's."""
        return (self.run.path / stage / "pairs.parquet").exists()

    def repo(self, stage: str, what: str) -> str:
        number = self.run.label(stage).partition("iteration ")[2]
        return f"{self.wanted.to}-{f'iter{number}' if number else stage}{SUFFIXES[what]}"

    # -- base and data ------------------------------------------------------------------------------------------------

    @property
    def base(self) -> str:
        return self.wanted.base or origin.told(self._base_here)

    @property
    def _base_here(self) -> str:
        return self._description["base_model_name_or_path"]

    def public(self, config: dict) -> dict:
        """An adapter's description that names the base for others; a sum of local files is no revision at the hub."""
        revision = config.get("revision") if self.base == self._base_here else None
        return config | {"base_model_name_or_path": self.base, "revision": revision}

    @cached_property
    def model(self) -> ResolvedModel:
        """The base's files: where the run had them, else by --base."""
        try:
            return resolve_model(self._base_here, self._description["revision"] if at_hub(self._base_here) else None)
        except UserError:
            if not self.wanted.base:
                raise
        return resolve_model(self.wanted.base)

    @property
    def moved(self) -> str | None:
        """What the base is to be called where its name in the adapter leads nowhere any more."""
        return None if self.model.name == self._base_here else self.model.name

    @cached_property
    def base_licence(self) -> dict[str, str]:
        if self.wanted.base:
            return origin.licence_of_model(self.wanted.base)
        return origin.licence_of_model(self._base_here)

    @cached_property
    def data_licences(self) -> dict[str, dict[str, str]]:
        """Source of the training data -> front matter, {} where it is unknown."""
        source = self.run.config["data"]["source"]
        names = [source] if isinstance(source, str) else [each["source"] for each in source]
        return {name: origin.licence_of_data(name) for name in names}

    @property
    def base_told(self) -> str:
        return f"{self.base} (licence: {origin.in_words(self.base_licence)})"

    @property
    def data_told(self) -> str:
        return " + ".join(f"{name} (licence: {origin.in_words(of)})" for name, of in self.data_licences.items())

    def licence(self, of: dict[str, str]) -> dict[str, str]:
        """What a card states."""
        return {"license": self.wanted.licence} if self.wanted.licence else dict(of)
