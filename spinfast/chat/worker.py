"""The one thread that owns the model: requests in, tokens out to whoever asked, from any number of clients at once."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence

from spinfast.errors import UserError
from spinfast.generation import Voices
from spinfast.types import Request, Sampling, Token

log = logging.getLogger("spinfast")
Deliver = Callable[[Token | Exception], None]


class Worker:
    """Started on entering; leaving ends what is in progress."""

    def __init__(self, voices: Voices):
        self._voices = voices
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._open: dict[tuple[int, int], tuple[str, Request, Deliver]] = {}  # by index and sample
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def __enter__(self) -> Worker:
        self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._inbox.put(None)
        self._thread.join()

    def ask(self, voice: str, requests: Sequence[Request], sampling: Sampling, deliver: Deliver) -> None:
        """`deliver` is called in the worker's thread with each token, or with what kept it from coming."""

        def add() -> None:
            for request in requests:
                try:
                    self._voices.add(voice, request, sampling)
                except UserError as error:
                    deliver(error)
                else:
                    self._open[request.index, request.sample] = voice, request, deliver

        self._inbox.put(add)

    def drop(self, requests: Sequence[Request]) -> None:
        """Nobody waits for these any more, if they are not finished."""

        def drop() -> None:
            for request in requests:
                if self._open.pop((request.index, request.sample), None):
                    self._voices.drop(request)

        self._inbox.put(drop)

    def _run(self) -> None:
        while True:
            try:
                while not (self._inbox.empty() and len(self._voices)):
                    order = self._inbox.get()
                    if order is None:
                        self._fail(None, UserError("the server is shutting down"))
                        return
                    order()
                self._step()
            except Exception as error:
                if not isinstance(error, UserError):
                    log.exception("%s failed", self._voices.turn)
                self._fail(self._voices.turn, error)

    def _step(self) -> None:
        for token in self._voices.step():
            key = token.request.index, token.request.sample
            _, _, deliver = self._open[key]
            if token.ends:
                del self._open[key]
            deliver(token)

    def _fail(self, voice: str | None, error: Exception) -> None:
        """All that this voice was asked, None: every one, gets the error."""
        for key, (asked, request, deliver) in list(self._open.items()):
            if voice in (None, asked):
                del self._open[key]
                self._voices.drop(request)
                deliver(error)
