"""SIGTERM and SIGINT: save, say how to go on, leave with a code of its own. A second signal leaves at once.

Everything a run writes is whole or append-only, so most work may be left at any instant: there the first signal
raises Stopped where it arrives. Training says `finishing_steps` instead and asks between two steps. torchrun repeats
its signals, and kills who has not ended 30 s later: under it a second one changes nothing.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODE = 75  # EX_TEMPFAIL: not done, run again to go on
_asked = False
_finishing = False


class Stopped(BaseException):
    """A signal came; what was done is saved. No Exception, so that nobody takes it for a fault of its own."""


@contextmanager
def catching_signals() -> Iterator[None]:
    """Turn the first signal into Stopped, for the duration of the block."""
    global _asked
    _asked, own = False, os.getpid()

    def stop(signum, frame):
        global _asked
        if os.getpid() != own:  # a process that a reward function forked: as if nobody had caught anything
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        if _asked and "TORCHELASTIC_RUN_ID" not in os.environ:
            os._exit(128 + signum)
        again, _asked = _asked, True
        if not (_finishing or again):
            raise Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except Exception:
        if not _asked:
            raise
        raise Stopped from None  # a library made an error of its own of the signal's exception
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def finishing_steps() -> Iterator[None]:
    """Inside the block a signal waits for the next stop_if_asked, or for the block's end."""
    global _finishing
    _finishing = True
    try:
        yield
    finally:
        _finishing = False
    stop_if_asked()


def stop_if_asked(save: Callable[[], object] = lambda: None) -> None:
    """Call between two units of work: saves and raises Stopped if a signal came."""
    if _asked:
        save()
        raise Stopped
