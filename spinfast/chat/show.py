"""Answers on a terminal as they come: one below the question, several side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from spinfast.chat.talk import Answer, Talk
from spinfast.terminal import plain

COLUMN = 30  # characters of the narrowest column of several
ENDS = {
    None: "stopped",
    "length": "cut at max_tokens: /set max_tokens N",
    "context": "cut where the context is full: /clear, or a larger --context",
}


def show(console: Console, talk: Talk, stop: Callable[[], bool]) -> None:
    """Let the voices answer the last question until they are done, or `stop()` says so."""
    for voice in talk.names:
        if left_out := talk.prompt(voice)[1]:
            console.print(f"(the context is full: {voice} no longer reads the oldest {left_out} turns)", style="yellow")
            break
    if len(talk.names) > 1 and console.is_terminal and console.width // len(talk.names) >= COLUMN:
        return _beside(console, talk, stop)
    for voice in talk.names:
        if len(talk.names) > 1:
            console.print(Text(f"[{voice}]", style="bold"))
        for _, piece in _pieces(talk, (voice,), stop):
            console.out(visible(piece), end="", highlight=False)
            console.file.flush()
        console.print()
        console.print(Text(report(talk.turns[-1].answers[voice]), style="dim"))
        if stop():
            return


def _pieces(talk: Talk, voices: tuple[str, ...], stop: Callable[[], bool]) -> Iterator[tuple[str, str]]:
    pieces = talk.answer(voices)
    try:
        for piece in pieces:
            yield piece
            if stop():
                return
    finally:
        pieces.close()


def _beside(console: Console, talk: Talk, stop: Callable[[], bool]) -> None:
    """Columns that grow; while they are higher than the screen, their ends."""
    with Live(console=console, refresh_per_second=8, transient=True, vertical_overflow="crop") as live:
        for _ in _pieces(talk, talk.names, stop):
            live.update(_Columns(talk, console.height - 4))
    console.print(_Columns(talk, None))


class _Columns:
    """The last turn's answers beside one another; their last `height` lines, None: all."""

    def __init__(self, talk: Talk, height: int | None):
        self.talk, self.height = talk, height

    def __rich_console__(self, console, options):
        answers = self.talk.turns[-1].answers
        width = (options.max_width - 3 * (len(answers) - 1)) // len(answers)
        table = Table.grid(padding=(0, 3, 0, 0))
        cells = []
        for voice, answer in answers.items():
            table.add_column(width=width, overflow="fold")
            lines = Text(plain(visible(answer.text), console.encoding)).wrap(console, width)
            shown = lines[-self.height :] if self.height else lines
            cells.append(Group(Text(voice, style="bold"), *shown, Text(report(answer), style="dim")))
        table.add_row(*cells)
        yield table


def report(answer: Answer) -> str:
    """Tokens, how fast, and why it ended where that was not the model's own end."""
    if not answer.tokens:
        return "(stopped before its first token)" if answer.ends is None else ""
    rate = "" if math.isnan(answer.rate) else f", {answer.rate:.1f} tokens/s"
    ended = "" if answer.ends == "stop" else f", {ENDS[answer.ends]}"
    return f"({answer.tokens} tokens{rate}, first after {answer.first:.2f} s{ended})"


def visible(text: str) -> str:
    """Without what a terminal would obey: control characters but for line ends and tabs."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))
