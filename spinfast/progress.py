"""What a person sees while a run goes on: one live bar per phase on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from spinfast.store.record import memory_now

log = logging.getLogger("spinfast")
PLAIN_INTERVAL = 10.0  # seconds between two plain lines of one phase
PLAIN_WIDTH = 160  # a file or pipe has no width of its own


class Display:
    """Progress of one run on `console`; also writes everything logged to RUN/log.txt."""

    def __init__(self, console: Console | None = None):
        console = console or Console(highlight=False)
        self.console = (
            console if console.is_terminal else Console(file=console.file, width=PLAIN_WIDTH, highlight=False)
        )

    def log_to(self, path: Path) -> None:
        """Send the spinfast logger to this console and append it to `path`."""
        log.setLevel(logging.INFO)
        log.propagate = False
        to_file = logging.FileHandler(path, encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()
        log.addHandler(to_file)
        log.addHandler(RichHandler(console=self.console, show_path=False, show_level=False, markup=False))

    @contextmanager
    def phase(self, name: str, total: int, unit: str) -> Iterator[Tick]:
        """Show `name` advancing to `total` units."""
        if not self.console.is_terminal:
            tick = PlainTick(name, total, unit)
            yield tick
            tick.close()
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(name, total=total, note="")
            tick = Tick(name, total, unit)
            tick.show = lambda: progress.update(task, completed=tick.done, note=tick.note)
            yield tick
        log.info(tick.line())

    def table(self, rows: list[dict]) -> None:
        """The closing table: one line per iteration, each value with its standard error."""
        self.console.print(result_table(rows))


class Tick:
    """A counter that shows itself: advance(n, note)."""

    def __init__(self, name: str, total: int, unit: str):
        self.name, self.total, self.unit = name, total, unit
        self.done, self.tokens, self.note = 0, 0, ""
        self.metrics = ""
        self.started = time.monotonic()

    def advance(self, count: int = 1, tokens: int = 0, metrics: str = "") -> None:
        self.done += count
        self.tokens += tokens
        self.metrics = metrics or self.metrics
        memory = memory_now()
        held = memory.get("memory/allocated_mib", memory["memory/rss_mib"])
        self.note = "  ".join(
            part for part in (self.metrics, f"{self.rate:,.0f} tok/s", f"{held / 1024:.1f} GiB") if part
        )
        self.show()

    @property
    def rate(self) -> float:
        """Tokens per second since the phase started."""
        return round(self.tokens / max(time.monotonic() - self.started, 1e-9), 1)

    def line(self) -> str:
        seconds = time.monotonic() - self.started
        return f"{self.name}: {self.done}/{self.total} {self.unit} in {seconds:.1f} s  {self.note}"

    def show(self) -> None:
        """Replaced by the display that owns the tick."""


class PlainTick(Tick):
    """Prints a line now and then, and one at the end."""

    def __init__(self, name: str, total: int, unit: str):
        super().__init__(name, total, unit)
        self.shown = self.started

    def show(self) -> None:
        if time.monotonic() - self.shown >= PLAIN_INTERVAL:
            self.shown = time.monotonic()
            log.info(self.line())

    def close(self) -> None:
        log.info(self.line())


COLUMNS = {
    "heldout/accuracy_strict": "accuracy strict",
    "heldout/accuracy_flexible": "accuracy flexible",
    "heldout/pair_accuracy": "pair accuracy",
    "heldout/margin": "margin",
    "heldout/real_logp_vs_base": "Δ log p(real)",
    "heldout/length": "tokens",
    "heldout/eos_rate": "ended",
}


def result_table(rows: list[dict]) -> Table:
    """Rows of results.json as a table; ± is one standard error."""
    table = Table(title="iterations on held-out problems (± one standard error)")
    table.add_column("iteration")
    table.add_column("pairs", justify="right")
    table.add_column("loss first→last", justify="right")
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    for row in rows:
        train = row["train"]
        losses = f"{train['first_loss']:.3f}→{train['last_loss']:.3f}" if train else ""
        cells = [_cell(row["evaluation"].get(metric)) for metric in COLUMNS]
        table.add_row(str(row["iteration"]), str(row["pairs"] or ""), losses, *cells)
    return table


def _cell(estimate: dict | None) -> str:
    if estimate is None:
        return ""
    digits = 1 if abs(estimate["value"]) >= 10 else 3
    error = "" if estimate["stderr"] is None else f" ± {estimate['stderr']:.{digits}f}"
    return f"{estimate['value']:.{digits}f}{error}"
