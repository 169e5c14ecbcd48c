"""What a command stands on, whoever started it: streams that outlive their reader, a home, options in any order."""

from __future__ import annotations

import argparse
import codecs
import difflib
import errno
import getpass
import logging
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from spinfast.errors import UserError

log = logging.getLogger("spinfast")
PLAIN = {"→": "->", "±": "+-", "Δ": "d", "×": "x", "–": "-", "…": "...", "≥": ">=", "≤": "<="}
NOBODY_READS = (errno.EPIPE, errno.EBADF, errno.EIO)  # a pipe, a descriptor, a terminal that is gone


def _replaced(error: UnicodeEncodeError) -> tuple[str, int]:
    return "".join(PLAIN.get(character, "?") for character in error.object[error.start : error.end]), error.end


codecs.register_error("spinfast", _replaced)


def plain(text: str, encoding: str) -> str:
    """The text as a stream of this encoding shows it, so that it can be measured before it is laid out."""
    return text.encode(encoding, "spinfast").decode(encoding)


class Lasting:
    """A text stream that takes any character in any encoding; once nobody reads it, what is written is dropped."""

    def __init__(self, stream: TextIO):
        self._stream, self.gone = stream, False
        self.then = "the work goes on without"  # said once nobody reads

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._attempt(self._stream.write, text)
        except UnicodeEncodeError:
            self._attempt(self._stream.write, plain(text, self._stream.encoding))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable, *values: str) -> None:
        if self.gone:
            return
        try:
            action(*values)
        except OSError as error:
            if error.errno not in NOBODY_READS:
                raise
            self._end()
        except ValueError:
            if not self._stream.closed:
                raise
            self._end()

    def _end(self) -> None:
        """What is still in the stream's buffer, and what others write to its descriptor, goes nowhere too."""
        self.gone = True
        with suppress(OSError, ValueError):
            _fill(self._stream.fileno())
        if self is sys.stdout:
            print(f"spinfast: nobody reads the output any more; {self.then}", file=sys.stderr)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """stdout and stderr last for the duration of the block, and there are such and a stdin."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _fill(number)  # or the next file that is opened would be taken for it
    before = sys.stdin, sys.stdout, sys.stderr
    with open(os.devnull) as nothing, open(os.devnull, "w") as nowhere:
        sys.stdin = nothing if sys.stdin is None else sys.stdin
        sys.stdout, sys.stderr = (Lasting(nowhere if stream is None else stream) for stream in before[1:])
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdin, sys.stdout, sys.stderr = before


def _fill(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere == number:
        os.set_inheritable(number, True)
        return
    os.dup2(nowhere, number)
    os.close(nowhere)


class LogFile(logging.FileHandler):
    """RUN/log.txt: what is logged, with date and level."""

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))


@contextmanager
def notes_to_log() -> Iterator[None]:
    """What the block writes to the process's stderr, compiled code included, goes to the LogFile if there is one."""
    file = next((handler for handler in logging.root.handlers if isinstance(handler, LogFile)), None)
    if file is None:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with open(file.baseFilename, "ab") as notes:  # whoever configures logging closes the handler's until it logs again
        os.dup2(notes.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def find_home() -> None:
    """A name, a home and a place for caches to whoever has none; libraries ask for them while they are imported."""
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["USER"] = f"uid-{os.getuid()}"
    home = Path(os.path.expanduser("~"))
    caches = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    nearest = next((place for place in (caches, *caches.parents) if place.exists()), Path())
    if home.is_absolute() and os.access(nearest, os.W_OK):
        return
    spare = Path(tempfile.gettempdir()) / f"spinfast-{os.getuid()}"
    spare.mkdir(mode=0o700, exist_ok=True)
    found = spare.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
        raise UserError(f"user {os.getuid()} can keep no caches in {caches}, and {spare} is another's: set HOME")
    log.warning("user %d can keep no caches in %s; they go to %s (set HOME to choose)", os.getuid(), caches, spare)
    if not home.is_absolute():
        os.environ["HOME"] = str(spare)
        return
    if (hub := caches / "huggingface").is_dir():  # models may be there, to be read
        os.environ.setdefault("HF_HOME", str(hub))
    os.environ |= {"XDG_CACHE_HOME": str(spare), "TRITON_HOME": str(spare)}
    os.environ.setdefault("SPINFAST_CACHE", str(spare / "spinfast"))


class Parser(argparse.ArgumentParser):
    """Options stand anywhere on the line; what is wrong with it is one line."""

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        arguments, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            word = unknown[0].partition("=")[0]
            options = [name for action in self._actions for name in action.option_strings]
            nearest = difflib.get_close_matches(word, options, n=1)
            places = [str(action.metavar) for action in self._actions if not action.option_strings]
            expected = f"did you mean {nearest[0]}?" if nearest else f"expected {', '.join([*places, *options])}"
            self.error(f"unknown option {unknown[0]}: {expected}")
        return arguments

    def error(self, message: str):
        raise UserError(f"{message} ({self.prog} --help says more)")
