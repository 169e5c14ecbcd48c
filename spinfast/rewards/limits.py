"""Bounds of other people's code in the main thread, of time and place, and one event loop for their coroutines."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_AGAIN = tuple(0.1 / 2**halvings for halvings in range(17))  # seconds: down to the length of an `except: pass`
_BEAT = 0.1  # seconds


class Overtime(BaseException):
    """The limit is over. No Exception, so that `except Exception` in the limited code lets it pass."""


def limited(call: Callable[[], Any], seconds: float) -> Any:
    """call(), which raises Overtime where it takes longer than `seconds`; outside the main thread there is no limit.

    The alarm comes again and again, so that code which swallows Overtime ends too; even if it then returns, it was
    late. Besides the timer a thread sends it, since math-verify's own limit resets the timer. Code that stays in one
    native call without looking at signals is not reached.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    inside, late, done, pauses, own = False, False, threading.Event(), itertools.cycle(_AGAIN), os.getpid()

    def alarm(*_) -> None:
        nonlocal late
        if inside and time.monotonic() >= end:
            late = True
            signal.setitimer(signal.ITIMER_REAL, next(pauses))
            raise Overtime

    def ring() -> None:
        pause = seconds
        while not done.wait(pause):
            pause = _BEAT
            signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)

    before, end = signal.signal(signal.SIGALRM, alarm), time.monotonic() + seconds
    signal.setitimer(signal.ITIMER_REAL, seconds)
    ringer = threading.Thread(target=ring, daemon=True)
    ringer.start()
    try:
        inside = True
        result = call()
        inside = False
    except Exception:
        inside = False
        if not late:
            raise
    finally:
        inside = False  # Python looks at signals after calls and jumps: from here on none of them raises
        if os.getpid() != own:
            os._exit(1)  # a child that the code forked; what follows is the parent's to do
        done.set()
        ringer.join()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if late:
        raise Overtime
    return result


@contextmanager
def staying() -> Iterator[None]:
    """Come back to the working directory, by which a run may know its own."""
    here = os.open(".", os.O_RDONLY)
    try:
        yield
    finally:
        os.fchdir(here)
        os.close(here)


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """The loop of all coroutines, in a thread of its own: what they keep open stays open from batch to batch."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop
