"""`spinfast chat RUN | MODEL | ADAPTER | FILE.gguf [QUESTION]`: a talk in a terminal, or a question by a pipe."""

from __future__ import annotations

import argparse
import logging
import math
import signal
import sys
from contextlib import ExitStack

from rich.text import Text

from spinfast.chat.options import RULES
from spinfast.chat.speaker import named, open_speaker
from spinfast.chat.talk import Settings, Talk
from spinfast.errors import UserError
from spinfast.progress import Lines, open_console
from spinfast.run import quiet_libraries

log = logging.getLogger("spinfast")
INTERRUPTED = 130  # as shells say it of Ctrl-C


def main(arguments: argparse.Namespace) -> int:
    """0: the talk is over, or the question answered; 130: stopped by Ctrl-C."""
    check_settings(arguments)
    quiet_libraries()
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty() and arguments.question is None
    question = None if at_terminal else read_question(arguments.question)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # streams and cursor are restored
    lines = Lines(open_console(sys.stderr))
    log.addHandler(lines)
    try:
        with Opened(arguments) as opened:
            talk = opened.talk()
            if at_terminal:
                converse(opened, talk)
            else:
                answer(talk, question)
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        log.removeHandler(lines)
        signal.signal(signal.SIGTERM, before)


class Opened:
    """The speaker while it is talked to; one more adapter means that the model is opened anew."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments

    def __enter__(self) -> Opened:
        self._open(self.arguments)
        return self

    def __exit__(self, *exc) -> None:
        self._stack.close()

    def _open(self, arguments: argparse.Namespace) -> None:
        with ExitStack() as stack:
            self.speaker = stack.enter_context(open_speaker(arguments, batch_size=8))
            self._stack = stack.pop_all()

    def talk(self) -> Talk:
        speaker, a = self.speaker, self.arguments
        settings = Settings(speaker.temperature, speaker.top_p)
        for name in RULES:
            if (text := getattr(a, name)) is not None:
                settings.set(name, text)
        talk = Talk(speaker, settings, speaker.system)
        if a.compare:
            talk.choose(talk.compared())
        return talk

    def load(self, talk: Talk, item: str) -> str:
        """Give the talk a speaker with one more adapter, [NAME=]DIR, and return its name.

        Where it cannot be opened, or Ctrl-C comes first, the talk goes on with what it had, opened anew.
        """
        (name,) = named([item])
        if name in self.speaker.names:
            raise UserError(f"{item}: there is one named {name!r} already; give it a name, NAME=DIR")
        before = self.arguments
        wider = argparse.Namespace(**vars(before) | {"adapter": [*before.adapter, item]})
        self.speaker = talk.speaker = None  # there may be room for one model only
        self._stack.close()
        try:
            self._open(wider)
            self.arguments = wider
        except (UserError, KeyboardInterrupt):
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # without a model there is no talk
            try:
                self._open(before)
            finally:
                signal.signal(signal.SIGINT, handler)
            raise
        finally:
            talk.speaker = self.speaker
        return name


def check_settings(arguments: argparse.Namespace) -> None:
    """What can be wrong is told before a model is loaded."""
    trial = Settings(math.nan, math.nan)
    for name in RULES:
        if (text := getattr(arguments, name)) is not None:
            try:
                trial.set(name, text)
            except UserError as error:
                raise UserError(f"--{name.replace('_', '-')}: {str(error).partition(': ')[2]}") from None


def read_question(given: str | None) -> str:
    """The one on the command line, and below it what a pipe brings."""
    piped = ""
    if not sys.stdin.isatty():
        data = sys.stdin.buffer.read()
        try:
            piped = data.decode(sys.stdin.encoding)
        except UnicodeDecodeError as error:
            raise UserError(f"stdin: byte {error.start} is not {error.encoding}: {data[error.start]:#04x}") from None
    elif given is None:
        piped = sys.stdin.read()  # the answer goes to a file, the question is typed up to Ctrl-D
    question = "\n\n".join(part for part in ((given or "").strip(), piped.strip()) if part)
    if not question:
        raise UserError("no question: give one on the line or by a pipe; for a talk, run it in a terminal")
    return question


def converse(opened: Opened, talk: Talk) -> None:
    from spinfast.chat.terminal import Terminal

    console, speaker = open_console(), opened.speaker
    who = f"{speaker.model} with {speaker.own}" if speaker.adapters else speaker.model
    console.print(Text(who, style="bold"), Text(f"({speaker.backend}, context {speaker.context})", style="dim"))
    console.print(Text(f"{talk.settings}. /help lists the commands, Ctrl-D leaves.", style="dim"))
    if talk.system:
        console.print(Text(f"system: {talk.system}", style="dim"))
    if not talk.rendered:
        log.warning("this model has no chat template: what you type is text that it continues, each line for itself")
    Terminal(console, talk, opened.load).run()


def answer(talk: Talk, question: str) -> None:
    """On stdout as it comes, the voices one after the other."""
    if not talk.rendered:
        log.warning("%s has no chat template: the text is continued", talk.speaker.model)
    talk.ask(question)
    sys.stdout.then = "the answer ends here"
    for number, voice in enumerate(talk.names):
        if len(talk.names) > 1:
            print("\n" * bool(number) + f"[{voice}]")
        for _, piece in talk.answer((voice,)):
            print(piece, end="", flush=True)
            if getattr(sys.stdout, "gone", False):
                return
        print(flush=True)
        if talk.turns[-1].answers[voice].ends != "stop":
            log.warning("the answer is cut at its length of %d tokens", talk.turns[-1].answers[voice].tokens)
