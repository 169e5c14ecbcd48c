"""What a person sees while a run goes on: one live bar per phase on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from spinfast import spread
from spinfast.store.record import memory_now
from spinfast.terminal import LogFile, plain

log = logging.getLogger("spinfast")
PLAIN_INTERVAL = 10.0  # seconds between two plain lines of one phase
PLAIN_WIDTH = 160  # a file or pipe has no width of its own
NARROW = 60  # a console with fewer columns gets lists for tables


def open_console(file: TextIO | None = None) -> Console:
    """As wide as COLUMNS says, else as the terminal, else PLAIN_WIDTH; of several ranks the first one's alone shows."""
    if not spread.first():
        return silent()
    file = file or sys.stdout  # or rich would not ask for its encoding
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return Console(file=file, highlight=False, width=int(columns), height=25)  # a dumb terminal's too
    console = Console(file=file, highlight=False)
    return console if console.is_terminal else Console(file=file, highlight=False, width=PLAIN_WIDTH)


def silent() -> Console:
    """One that shows nothing."""
    return Console(quiet=True, force_terminal=False)


class Display:
    """Progress of one run on `console`."""

    def __init__(self, console: Console | None = None):
        self.console = console or open_console()

    @contextmanager
    def logged(self, path: Path) -> Iterator[None]:
        """Inside the block the spinfast logger speaks on this console and, with what libraries warn of, to `path`."""
        file = LogFile(path if spread.first() else Path(os.devnull))
        loggers = (logging.root, log)  # to the root goes what libraries warn of
        before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
        try:
            for logger in loggers:
                logger.handlers = [h for h in logger.handlers if not isinstance(h, (LogFile, Lines))] + [file]
            log.addHandler(Lines(self.console))
            log.setLevel(logging.INFO)
            log.propagate = False
            yield
        finally:
            for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
                logger.handlers, logger.propagate = handlers, propagate
                logger.setLevel(level)
            file.close()

    @contextmanager
    def phase(self, name: str, total: int, unit: str) -> Iterator[Tick]:
        """Show `name` advancing to `total` units."""
        if not self.console.is_interactive:
            tick = PlainTick(name, total, unit)
            yield tick
            tick.close()
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn(f"{{task.completed:.0f}}/{{task.total:.0f}} {unit}"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=self.console, transient=True, expand=True) as progress:
            task = progress.add_task(name, total=total, note="")
            tick = Tick(name, total, unit)
            tick.show = lambda: progress.update(task, completed=tick.done, note=tick.note)
            yield tick
        log.info(tick.line())


@contextmanager
def heard(console: Console) -> Iterator[Display]:
    """What is logged inside the block goes to `console`; for a command that leaves no log.txt."""
    lines, level = Lines(console), log.level
    log.addHandler(lines)
    log.setLevel(logging.INFO)
    try:
        yield Display(console)
    finally:
        log.removeHandler(lines)
        log.setLevel(level)


class Lines(logging.Handler):
    """A record after its time of day: wrapped beside it on a terminal, elsewhere one line however long.

    The traceback of an error stands below it.
    """

    def __init__(self, console: Console):
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            warns = record.levelno >= logging.WARNING
            message = Text("warning: " * warns + record.getMessage(), style="yellow" if warns else "")
            clock = Text(time.strftime("%H:%M:%S", time.localtime(record.created)), style="dim")
            if record.exc_info:
                message.append("\n" + logging.Formatter().formatException(record.exc_info))
            if not self.console.is_terminal:
                self.console.print(clock + " " + message, soft_wrap=True)
                return
            line = Table.grid(padding=(0, 1))
            line.add_row(clock, message)
            self.console.print(line)
        except Exception:
            self.handleError(record)


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
            part
            for part in (self.metrics, f"{self.rate:,.0f} tok/s" * bool(self.tokens), f"{held / 1024:.1f} GiB")
            if part
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
        if self.done < self.total and time.monotonic() - self.shown >= PLAIN_INTERVAL:
            self.shown = time.monotonic()
            log.info(self.line())

    def close(self) -> None:
        log.info(self.line())


def show(
    console: Console, title: str | None, headings: Sequence[str], rows: Iterable[Sequence[str]], keys: int = 1
) -> None:
    """Print a table; several with the same first `keys` columns where it is too wide, a list on a narrow console.

    Columns without a value are left out.
    """
    said = partial(plain, encoding=console.encoding)
    title, headings, rows = title and said(title), [*map(said, headings)], [[*map(said, row)] for row in rows]
    columns = [i for i in range(keys, len(headings)) if any(row[i] for row in rows)]
    if console.width < NARROW:
        if title:
            console.print(title, markup=False)
        for row in rows:
            console.print(", ".join(f"{headings[i]} {row[i]}" for i in range(keys)), markup=False)
            for i in filter(row.__getitem__, columns):
                console.print(f"  {headings[i]}: {row[i]}", markup=False)
        return
    cells = [max([0, *(cell_len(row[i]) for row in rows)]) for i in range(len(headings))]
    least = [max(n, *map(cell_len, name.split())) for n, name in zip(cells, headings, strict=True)]  # headings wrap
    names = [min(max(cells[i], cell_len(headings[i])), console.width // (3 * keys)) for i in range(keys)]
    room, parts = console.width - 1 - _across(names), [[]]
    for i in columns:
        if parts[-1] and _across(least[j] for j in (*parts[-1], i)) > room:
            parts.append([])
        parts[-1].append(i)
    for part in parts:
        table = Table(title=title if part is parts[0] else None)
        left = console.width - 1 - _across(least[i] for i in part)
        for i in range(keys):
            width = min(max(cells[i], cell_len(headings[i])), left // (keys - i) - 3)
            table.add_column(headings[i], width=width, overflow="fold")
            left -= width + 3
        for i in part:
            more = min(left, max(cell_len(headings[i]) - least[i], 0))  # room for the heading in one line
            table.add_column(headings[i], width=least[i] + more, justify="right", overflow="fold")
            left -= more
        for row in rows:
            table.add_row(*(Text(row[i]) for i in (*range(keys), *part)))
        console.print(table)


def _across(widths: Iterable[int]) -> int:
    """Characters of columns with their padding and rules."""
    return sum(width + 3 for width in widths)
