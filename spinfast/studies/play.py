"""Play a study's cells in one session: the base is loaded once, each cell has a fresh adapter and is a run of its own.

    STUDY/own.json      the base's own answers, by which forgetting is told
    STUDY/base.json     what is measured of the base
    STUDY/cells/NAME/   a run directory, and its outcomes.json

A cell that has its outcomes is skipped. Whoever comes second to a cell that is being played takes another one, so that
several processes may play one study; what is measured of the base one of them makes while the others wait.
"""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from rich.console import Console

from spinfast.config import Config
from spinfast.data import LoadedData, load_data
from spinfast.environment import describe
from spinfast.errors import Busy, UserError, out_of_memory
from spinfast.memory.planner import StepPlan
from spinfast.methods import play as play_methods
from spinfast.methods.run import inputs, prepare
from spinfast.progress import Display, Lines
from spinfast.scoring import Budget
from spinfast.session import Machine, Session, for_run, look, open_session
from spinfast.store import files
from spinfast.store.record import RunDir, check_inputs
from spinfast.studies import outcomes
from spinfast.studies.curves import CURVE, Curve, quiet
from spinfast.studies.design import ONE_BASE, Cell, Design
from spinfast.studies.outcomes import Player, Probe, Readings, Told, digest
from spinfast.studies.samples import encode, take
from spinfast.studies.scores import ranking
from spinfast.studies.texts import read_texts
from spinfast.types import Group

log = logging.getLogger("spinfast")
OUTCOMES, OWN, BASE = "outcomes.json", "own.json", "base.json"
QUESTIONS = Path(__file__).with_name("questions.txt")
OWN_NAME = "own answers"
ROW = 256  # tokens of a row of the texts that tell forgetting
WAIT = 1.0  # seconds until it is looked again whether others have played their cells
AT_ONCE = 4096  # packed tokens that are scored together
WRITING = {"spin", "grpo"}


@dataclass
class Measured:
    """What is known of a study: readings of the base, and of cells by their names; why others have none."""

    base: Readings
    cells: dict[str, Readings] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    curves: dict[str, list[dict]] = field(default_factory=dict)


def play(
    design: Design, cells: Sequence[Cell], directory: Path, display: Display, waits: bool = False
) -> Iterator[tuple[Cell, Measured]]:
    """Play the cells that have no outcomes yet, yielding each and what is known then. What a cell fails of is told and
    known; the others go on. `waits`: for the cells that other processes play, too.
    """
    config = cells[0].config
    machine = look(config)
    probes = asked(design, config, machine)
    writes = bool(design.forgetting.own) or any(probe.generates for probe in probes)
    writes = writes or any(_writes(cell.config) for cell in cells)
    longest = max([design.forgetting.max_tokens, *(items.max_tokens for items in design.learning.values())])
    context = config.prompt.max_prompt_tokens + max(longest, config.prompt.max_answer_tokens)
    others = [cell.config for cell in cells]
    with _frozen(), open_session(config, machine, StepPlan(AT_ONCE), writes, others, context) as session:
        with one_at_a_time(directory):
            if design.forgetting.own:
                probes.append(own_answers(design, directory, session))
                _check_enough(probes)
            owner = owner_of(probes)
            of_base = owner + digest([machine.model.revision, *(getattr(config, section) for section in ONE_BASE)])
            if (base := files.read_sealed(directory / BASE, of_base)) is None:
                session.fresh()
                base = outcomes.measured(probes, _player(session))
                files.write_sealed(directory / BASE, base, of_base)
        ranking(design, base)  # whether there is what ranks
        known, playing = Measured(base), _Playing(session, directory, probes, owner, display, design.curve)
        pending = list(cells)
        while pending:
            busy = []
            for cell in pending:
                try:
                    playing.play(cell)
                except Busy:
                    busy.append(cell)
                    continue
                except (UserError, torch.OutOfMemoryError) as error:
                    reason = out_of_memory(error) if isinstance(error, torch.OutOfMemoryError) else error
                    log.warning("cell %s: %s", cell.name, reason)
                    known.failed[cell.name] = str(reason)
                else:
                    known.cells[cell.name] = outcome(directory, cell, owner)
                    known.curves[cell.name] = playing.curve(cell).known() if design.curve else []
                yield cell, known
            if len(busy) == len(pending) and waits:
                time.sleep(WAIT)
            elif len(busy) == len(pending):
                log.warning("another process plays the last %d cells", len(busy))
                break
            pending = busy


@contextmanager
def _frozen() -> Iterator[None]:
    """What was imported stays: looking for garbage in it after each cell would be a twentieth of a short one."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def one_at_a_time(directory: Path) -> Iterator[None]:
    """Processes that play one study write what is the study's own one after the other."""
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def asked(design: Design, config, machine: Machine) -> list[Probe]:
    """What is asked of every cell, the base's own answers excepted."""
    prompt, renderer = config.prompt, machine.renderer
    probes: list[Probe] = [outcomes.probe_of(name, items, prompt, renderer) for name, items in design.learning.items()]
    for text in read_texts(design.forgetting.texts):
        rows = take(encode(text, renderer), design.forgetting.tokens, ROW, seed=0).rows
        probes.append(Told(text.name, [Group(row[:1], (row[1:],)) for row in rows if len(row) > 1]))
    _check_enough(probes)
    return probes


def _check_enough(probes: Sequence[Probe]) -> None:
    for probe in probes:
        if probe.items < 2:
            raise UserError(f"study: {probe.name}: expected two items or more, got {probe.items}; raise size or tokens")


def _writes(config: Config) -> bool:
    """Whether such a run may write answers."""
    return bool(WRITING & {*config.method} or (config.heldout and config.evaluate.problems))


def own_answers(design: Design, directory: Path, session: Session) -> Told:
    """The base's greedy answers to general questions: written once, the same for all cells."""
    of = design.forgetting
    questions = QUESTIONS.read_text(encoding="utf-8").splitlines()[: of.own]
    if len(questions) < of.own:
        raise UserError(f"study: forgetting.own: there are {len(questions)} questions, got {of.own}; lower it")
    machine, system = session.machine, session.config.prompt.system
    owner = digest([machine.model.revision, str(machine.device.dtype), questions, of.max_tokens, system])
    known = files.read_sealed(directory / OWN, owner)
    if known is None:
        session.fresh()
        groups = outcomes.own_answers(_player(session), questions, of.max_tokens, system)
        known = {"rows": [[group.prompt_ids, group.answers[0]] for group in groups]}
        files.write_sealed(directory / OWN, known, owner)
    return Told(OWN_NAME, [Group(tuple(prompt), (tuple(answer),)) for prompt, answer in known["rows"]])


def owner_of(probes: Sequence[Probe]) -> str:
    """Names what is asked: outcomes of other items are not compared with these."""
    return digest([(probe.name, probe.fingerprint()) for probe in probes])


def outcome(directory: Path, cell: Cell, owner: str) -> Readings | None:
    """What was measured of the cell, None if that was not done yet."""
    return files.read_sealed(directory / "cells" / cell.name / OUTCOMES, owner + cell.config.hash())


@dataclass
class _Playing:
    """Cells, one after the other in one session, which is that of the last cell, whatever became of it."""

    session: Session
    directory: Path
    probes: Sequence[Probe]
    owner: str
    display: Display
    points: int  # of a curve
    plans: dict[str, StepPlan] = field(default_factory=dict)
    data: dict[str, dict[str, LoadedData]] = field(default_factory=dict)  # of the cells that are there, by their config

    def play(self, cell: Cell) -> None:
        """Leaves the cell's outcomes, if they are not there yet."""
        path = self.directory / "cells" / cell.name
        machine = for_run(self.session.machine, cell.config)
        if outcome(self.directory, cell, self.owner) is not None:
            return check_inputs(path, inputs(cell.config, machine, self._data(cell.config)))
        gc.collect()  # the last cell's optimizer and, where this one has another kind, its adapter
        with closing(RunDir(path, cell.config)) as record:
            if outcome(self.directory, cell, self.owner) is not None:  # another process was faster
                return None
            with _aside(path / "log.txt", self.display) as aside:
                describe(path / "environment.json")
                ready = prepare(cell.config, machine, record)
                self._turn(cell.config, machine, ready.plan(record, self.plans))
                run = ready.begin(self.session, record, aside)
                if self.points:
                    run.each_step = self.curve(cell).see
                for _ in play_methods(run):
                    pass
                found = outcomes.measured(self.probes, _player(self.session, own=True))
                files.write_sealed(path / OUTCOMES, found, self.owner + cell.config.hash())
        return None

    def curve(self, cell: Cell) -> Curve:
        """The cell's, which is played or was."""
        asked = quiet(self.probes)
        owner = f"{owner_of(asked)}{cell.config.hash()}/{self.points}"
        path = self.directory / "cells" / cell.name / CURVE
        return Curve(path, owner, self.points, asked, lambda: _player(self.session))

    def _turn(self, config: Config, machine: Machine, plan: StepPlan) -> None:
        try:
            self.session = self.session.turned(config, machine, plan)
        except (UserError, torch.OutOfMemoryError):
            self.session = self.session.put_back()
            raise

    def _data(self, config: Config) -> dict[str, LoadedData]:
        """A config's data, read once for all cells that have the same."""
        key = digest([config.data, config.heldout, config.prompt, config.method, config.dpo])
        if key not in self.data:
            with _aside(Path(os.devnull), self.display):
                self.data[key] = load_data(config, self.session.machine.renderer)
        return self.data[key]


def _player(session: Session, own: bool = False) -> Player:
    """The policy as it stands, or where it has nothing of its own the base."""
    budget = Budget(AT_ONCE, session.machine.device.attention)
    return Player(session, budget, session.policy.adapter() if own else None)


@contextmanager
def _aside(path: Path, display: Display) -> Iterator[Display]:
    """A cell's display: all that it says goes to its log, and a warning to the study's, the first time there is one."""
    with open(os.devnull, "w") as nowhere:
        aside = Display(Console(file=nowhere))
        with aside.logged(path):
            told = _Once(display)
            log.addHandler(told)
            yield aside


class _Once(Lines):
    """Warnings that were not told yet."""

    seen: ClassVar[set[str]] = set()

    def __init__(self, display: Display):
        super().__init__(display.console)
        self.setLevel(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() not in self.seen:
            self.seen.add(record.getMessage())
            super().emit(record)
