"""SIGTERM and SIGINT: finish the unit of work, save, say how to go on. A second signal leaves at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODE = 75  # EX_TEMPFAIL: not done, run again to go on
_asked = False


class Stopped(Exception):
    """Raised between two units of work after a signal; what was done is saved."""


@contextmanager
def catching_signals() -> Iterator[None]:
    """Turn the first signal into a request to stop, for the duration of the block."""
    global _asked
    _asked = False

    def ask(signum, frame):
        global _asked
        if _asked:
            os._exit(128 + signum)
        _asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_if_asked(save: Callable[[], object] = lambda: None) -> None:
    """Call between two units of work: saves and raises Stopped if a signal came."""
    if _asked:
        save()
        raise Stopped
