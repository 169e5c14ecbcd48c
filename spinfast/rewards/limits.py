"""A time limit on other people's code in the main thread, and one event loop for their coroutines."""

from __future__ import annotations

import asyncio
import functools
import itertools
import signal
import threading
from collections.abc import Callable
from typing import Any

_AGAIN = tuple(0.1 / 2**halvings for halvings in range(17))  # seconds: down to the length of an `except: pass`


class Overtime(BaseException):
    """The limit is over. No Exception, so that `except Exception` in the limited code lets it pass."""


def limited(call: Callable[[], Any], seconds: float) -> Any:
    """call(), which raises Overtime where it takes longer than `seconds`; outside the main thread there is no limit.

    A thread sends the signal, since timers are not safe here: math-verify's own limit resets alarm() and setitimer().
    It sends it again and again, so that code which swallows Overtime ends too; even if it then returns, it was late.
    Code that stays in one native call without looking at signals is not reached.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    inside, late, done = False, False, threading.Event()

    def ring() -> None:
        nonlocal late
        for pause in itertools.chain([seconds], itertools.cycle(_AGAIN)):
            if done.wait(pause):
                return
            late = True
            signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)

    def alarm(*_) -> None:
        if inside:
            raise Overtime

    before = signal.signal(signal.SIGALRM, alarm)
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
        done.set()
        ringer.join()
        signal.signal(signal.SIGALRM, before)
    if late:
        raise Overtime
    return result


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """The loop of all coroutines, in a thread of its own: what they keep open stays open from batch to batch."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop
