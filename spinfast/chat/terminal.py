"""The prompt: questions, and commands that begin with a slash. Ctrl-C ends an answer, twice at the prompt the talk."""

from __future__ import annotations

import difflib
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.text import Text

from spinfast.chat.options import RULES
from spinfast.chat.show import show
from spinfast.chat.talk import Talk
from spinfast.errors import UserError
from spinfast.store import files

PROMPT, MORE, QUOTES = ">>> ", "... ", '"""'


class Terminal:
    """Reads, answers, obeys. `load(talk, item)` gives it a speaker with one more adapter, [NAME=]DIR, -> its name."""

    def __init__(self, console: Console, talk: Talk, load: Callable[[Talk, str], str]):
        self.console, self.talk, self.load = console, talk, load
        self.first_system = talk.system
        self.written: set = set()  # files of /save, which may be written again
        self.over = False

    def run(self) -> None:
        with suppress(ImportError):
            import readline  # noqa: F401 - lines can be edited and called back
        warned = False
        while not self.over:
            try:
                line = self.read()
                line.encode()  # bytes that are no text come as halves of surrogate pairs
                warned = False
                self.take(line)
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:
                self.console.print()
                if warned:
                    return
                warned = True
                self.say("Ctrl-C again, Ctrl-D or /bye leaves")
            except UnicodeError:
                self.wrong("those are bytes that are no text in this terminal's encoding: type it again")
            except UserError as error:
                self.wrong(str(error))

    def read(self) -> str:
        r"""A line, or several between \"\"\" and \"\"\"."""
        self.console.file.flush()
        with waits_cut_short():
            line = input(PROMPT)
            if not line.lstrip().startswith(QUOTES):
                return line
            lines = [line.lstrip().removeprefix(QUOTES)]
            while not lines[-1].rstrip().endswith(QUOTES):
                lines.append(input(MORE))
        return "\n".join(lines).rstrip().removesuffix(QUOTES)

    def take(self, line: str) -> None:
        """Answer a question, or obey a command."""
        if not line.startswith("/"):
            if line.strip():
                self.talk.ask(line.strip())
                self.answer()
            return
        name, _, rest = line[1:].strip().partition(" ")
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists them."
            raise UserError(f"there is no /{name}: {hint} A question that begins with a slash: put a space before it")
        COMMANDS[name][0](self, rest.strip())

    def answer(self) -> None:
        with interrupts() as came:
            show(self.console, self.talk, came)

    def say(self, text: str) -> None:
        self.console.print(Text(text, style="dim"))

    def wrong(self, text: str) -> None:
        self.console.print(Text(text, style="red"))

    # Commands --------------------------------------------------------------------------------------------------

    def help(self, rest: str) -> None:
        for name, (_, words, does) in COMMANDS.items():
            self.console.print(Text(f"/{name} {words}".ljust(22), style="bold") + Text(f" {does}"))
        self.say(f"Several lines: between {QUOTES} and {QUOTES}. Ctrl-C ends an answer, Ctrl-D the talk.")

    def clear(self, rest: str) -> None:
        self.talk.turns.clear()
        self.say("the conversation is empty" + "; the system prompt stands" * bool(self.talk.system))

    def retry(self, rest: str) -> None:
        self.talk.retry()
        self.answer()

    def system(self, rest: str) -> None:
        if rest:
            before, self.talk.system = self.talk.system, rest.strip("\"'") or None
            try:
                self._check_system()
            except UserError:
                self.talk.system = before
                raise
        self.say(f"system: {self.talk.system}" if self.talk.system else "no system prompt")

    def _check_system(self) -> None:
        if self.talk.system and not self.talk.rendered:
            raise UserError("this model has no chat template, so nothing could write a system prompt")
        if self.talk.system:
            turns = [{"role": "system", "content": self.talk.system}, {"role": "user", "content": "?"}]
            self.talk.speaker.renderer.prompt_ids(turns)

    def set(self, rest: str) -> None:
        if rest:
            name, _, value = rest.replace("=", " ", 1).partition(" ")
            self.talk.settings.set(name, value.strip())
        self.say(str(self.talk.settings))

    def adapter(self, rest: str) -> None:
        if rest and rest not in self.talk.speaker.names:
            if not files.expanded(rest.partition("=")[2] or rest).exists():
                raise UserError(f"{rest}: expected {', '.join(self.talk.speaker.names)}, or an adapter's directory")
            self.say("loading ...")
            rest = self.load(self.talk, rest)
        if rest:
            self.talk.choose((rest,))
        names = (f"[{name}]" if name in self.talk.names else name for name in self.talk.speaker.names)
        self.say(" ".join(names))

    def compare(self, rest: str) -> None:
        if len(self.talk.names) > 1 and not rest:
            self.talk.choose((self.talk.speaker.own,))
            self.say(f"{self.talk.names[0]} alone")
            return
        names = tuple(rest.split()) or self.talk.compared()
        if len(names) < 2:
            raise UserError(f"/compare {rest}: expected two names or more of {', '.join(self.talk.speaker.names)}")
        self.talk.choose(names)
        self.say(" | ".join(self.talk.names))

    def save(self, rest: str) -> None:
        path = files.expanded(rest)
        if not rest or path.is_dir():
            raise UserError(f"/save {rest}: {'is a directory' if rest else 'expected a name'}; /save talk.jsonl")
        if path.exists() and path.resolve() not in self.written:
            raise UserError(f"/save {rest}: is there already; give another name")
        rows = self.talk.record()
        try:
            files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        except OSError as error:
            raise UserError(f"/save {rest}: {error.strerror or error}") from error
        self.written.add(path.resolve())
        self.say(f"{path}: {len(self.talk.turns)} turns, as data.source reads them")

    def bye(self, rest: str) -> None:
        self.over = True


COMMANDS: dict[str, tuple[Callable[[Terminal, str], None], str, str]] = {
    "clear": (Terminal.clear, "", "forget the conversation"),
    "retry": (Terminal.retry, "", "another answer to the last question"),
    "system": (Terminal.system, "TEXT", 'the system prompt; "" takes it away'),
    "set": (Terminal.set, "NAME VALUE", ", ".join(RULES)),
    "adapter": (Terminal.adapter, "NAME | DIR", "who answers; a DIR is loaded"),
    "compare": (Terminal.compare, "[A B ...]", "side by side: base and adapter, or these; again: no more"),
    "save": (Terminal.save, "FILE", "the conversation as JSON lines"),
    "help": (Terminal.help, "", "this list"),
    "bye": (Terminal.bye, "", "leave, as Ctrl-D does"),
}


@contextmanager
def waits_cut_short() -> Iterator[None]:
    """Inside the block input() looks twice a second for signals: one that came just before it began to wait is seen."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Inside the block the first Ctrl-C is remembered, and a second one raises KeyboardInterrupt."""
    came = []

    def remember(signum, frame):
        if came:
            raise KeyboardInterrupt
        came.append(signum)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)
