"""What a study has found so far: compared and written each time a seed is whole, told at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from spinfast.errors import UserError
from spinfast.progress import Display
from spinfast.report.plots import Plot
from spinfast.session import Machine
from spinfast.store import files
from spinfast.studies import curves, outputs
from spinfast.studies.design import Cell, Design
from spinfast.studies.lift import Lift, lifts, sentences
from spinfast.studies.outcomes import Probe, Readings
from spinfast.studies.play import Measured
from spinfast.studies.rate import Rated
from spinfast.studies.scores import Found, compare
from spinfast.studies.together import index, together


@dataclass
class Results:
    design: Design
    cells: Sequence[Cell]
    directory: Path
    rated: Sequence[Rated] = ()
    notes: Sequence[str] = ()
    known: Measured | None = None
    found: Found | None = None
    lifts: Sequence[Lift] = ()
    drawn: Sequence[Plot] = ()

    def take(self, cell: Cell, known: Measured, console: Console) -> None:
        """After each cell: where its seed is over, compare and write."""
        self.known, over = known, {*known.cells, *known.failed}
        if all(each.name in over for each in self.cells if each.seed == cell.seed):
            self._write(known.cells, known.base)
            if self.found and len(over) < len(self.cells):
                outputs.tell(console, self.found)

    def together(self, probes: Sequence[Probe], machine: Machine, display: Display) -> None:
        """Let all adapters answer in one engine, and write the lifts by these answers."""
        cells = [cell for cell in self.cells if cell.name in self.known.cells]
        written, base = together(cells, self.known.cells, self.known.base, self.directory, probes, machine, display)
        same = [
            left == right
            for cell, readings in written.items()
            for name in readings
            if name.endswith("/exact")
            for left, right in zip(readings[name], self.known.cells[cell][name], strict=True)
        ]
        self.notes = [
            *self.notes,
            f"All {len(cells)} adapters answered in one vLLM: {sum(same)} of {len(same)} verdicts are those of each "
            "alone.",
        ]
        merged = {name: readings | written.get(name, {}) for name, readings in self.known.cells.items()}
        self._write(merged, self.known.base | base)

    def tell(self, console: Console) -> None:
        """The pictures, and the table for a person. Raises UserError where there is none, or where cells failed."""
        failed = self.known.failed if self.known else {}
        if self.found:
            outputs.draw(self.directory, self.drawn)
            outputs.tell(console, self.found, [*sentences(self.lifts), *self.notes])
        if failed:
            name, reason = next(iter(failed.items()))
            raise UserError(f"{len(failed)} of {len(self.cells)} cells failed; the first, {name}: {reason}")
        if not self.found:
            raise UserError("study: no seed is played whole yet; another process plays it, start again when it is done")

    def _write(self, measured: Mapping[str, Readings], base: Readings) -> None:
        """`measured` and `base` are what the lifts are of."""
        of = self.known
        self.found = compare(self.design, self.cells, of.cells, of.base, of.failed)
        if self.found is None:
            return
        self.lifts = lifts(self.cells, measured, base)
        drawn = curves.plots(self.design, self.cells, self.found, of.base, of.curves)
        files.write_json(self.directory / "index.json", index(self.design, self.cells, of.cells, self.directory))
        words = (self.directory, self.found, self.cells, of.cells, of.base, self.rated, self.notes)
        self.drawn = outputs.write(*words, self.lifts, drawn)
