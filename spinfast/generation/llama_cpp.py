"""Answers by llama.cpp, in this process (xllamacpp): for .gguf files as they are, with LoRAs that are .gguf files too.

xllamacpp's server listens on the loopback address under a key of our own; each answer is a streaming request to its
/completion, whose prompt is token ids. It decodes by itself and keeps the keys and values of what it read before: the
next turn of a conversation reads only what is new. Adapters are switched per request by their scales.
"""

from __future__ import annotations

import http.client
import json
import queue
import secrets
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from spinfast.errors import UserError
from spinfast.types import Request, Sampling, Token

POOL = 4  # contexts whose keys and values there is memory for
ENDS = {"limit": "length"}  # of llama.cpp's stop_type; any other is the model's own end


class LlamaCpp:
    """Implements spinfast.generation.Streaming. An adapter is its number among `loras`."""

    name, takes_turns = "llama.cpp", True

    def __init__(self, file: Path, loras: Sequence[Path], context: int, slots: int, threads: int):
        """Raises UserError where llama.cpp does not load the files. slots: answers written at once, as far as they fit
        into POOL contexts together."""
        import xllamacpp

        self.max_model_len, self.loras, self._key = context, len(loras), secrets.token_hex(16)
        self._room, self._waiting, self._lock = context * min(slots, POOL), deque(), threading.Lock()
        params = xllamacpp.CommonParams()
        params.model.path, params.hostnames, params.port, params.api_keys = str(file), ["127.0.0.1"], 0, [self._key]
        params.n_ctx, params.n_parallel, params.kv_unified, params.cache_ram_mib = self._room, slots, True, 0
        params.warmup, params.verbosity, params.cpuparams.n_threads = False, -1, threads
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 0.0) for path in loras]
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            files = ", ".join(map(str, (file, *loras)))
            raise UserError(f"llama.cpp cannot load {files}: {error}; is a LoRA of another model?") from error
        self._address = self._server.listening_address.partition("://")[2]

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *exc) -> None:
        self._server = None

    def batch(self, adapter: int | None) -> LlamaBatch:
        return LlamaBatch(self, [{"id": i, "scale": float(i == adapter)} for i in range(self.loras)])

    def enter(self, stream: _Stream) -> None:
        """Start it once there is room for it."""
        with self._lock:
            self._waiting.append(stream)
            self._admit()

    def leave(self, stream: _Stream) -> None:
        with self._lock:
            self._room += stream.tokens
            self._admit()

    def _admit(self) -> None:
        while self._waiting and self._waiting[0].tokens <= self._room:
            stream = self._waiting.popleft()
            self._room -= stream.tokens
            threading.Thread(target=stream.read, daemon=True).start()

    def ask(self, body: dict) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """An open stream of events."""
        connection = http.client.HTTPConnection(self._address)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        connection.request("POST", "/completion", json.dumps(body), headers)
        return connection, connection.getresponse()


class LlamaBatch:
    """Implements spinfast.generation.Batch: a thread per answer, which waits for llama.cpp."""

    def __init__(self, engine: LlamaCpp, scales: list[dict]):
        self.engine, self.scales = engine, scales
        self.open: dict[tuple[int, int], _Stream] = {}
        self.arrived: queue.SimpleQueue[tuple[_Stream, Token | Exception]] = queue.SimpleQueue()

    def __len__(self) -> int:
        return len(self.open)

    def add(self, request: Request, sampling: Sampling) -> None:
        body = {
            "prompt": list(request.prompt_ids),
            "n_predict": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "seed": request.seed & 0x7FFFFFFF,
            "stream": True,
            "return_tokens": True,
            "cache_prompt": True,
            "lora": self.scales,
        }
        self.open[request.index, request.sample] = _Stream(self, request, body)

    def drop(self, request: Request) -> None:
        if stream := self.open.pop((request.index, request.sample), None):
            stream.close()

    def step(self) -> list[Token]:
        """Waits for the next tokens, and takes what has come."""
        found, stream_and_token = [], self.arrived.get()
        while True:
            stream, token = stream_and_token
            key = stream.request.index, stream.request.sample
            if self.open.get(key) is stream:  # else it was dropped
                if isinstance(token, Exception):
                    raise token
                found.append(token)
                if token.ends:
                    del self.open[key]
            try:
                stream_and_token = self.arrived.get_nowait()
            except queue.Empty:
                return found


class _Stream:
    """One answer: events -> tokens, put into the batch's queue."""

    def __init__(self, batch: LlamaBatch, request: Request, body: dict):
        self.batch, self.request, self.body, self.closed = batch, request, body, False
        self.tokens = len(body["prompt"]) + body["n_predict"]
        self.connection = None
        batch.engine.enter(self)

    def close(self) -> None:
        """llama.cpp ends an answer whose reader is gone."""
        self.closed = True
        if self.connection is not None and self.connection.sock is not None:
            with suppress(OSError):
                self.connection.sock.shutdown(2)

    def read(self) -> None:
        """In a thread of its own, until the answer ends or nobody waits for it."""
        try:
            if self.closed:
                return
            self.connection, response = self.batch.engine.ask(self.body)
            if response.status != 200:
                raise UserError(f"llama.cpp: {response.read().decode(errors='replace')[:300]}")
            for line in response:
                if self.closed:
                    return
                if line.startswith(b"data: "):
                    self.batch.arrived.put((self, self._token(json.loads(line[6:]))))
        except Exception as error:
            self.batch.arrived.put((self, error))
        finally:
            if self.connection is not None:
                self.connection.close()
            self.batch.engine.leave(self)

    def _token(self, event: dict) -> Token:
        """`text` is what can be shown; the last event, of no token of its own, says why it ended."""
        if "error" in event:
            raise UserError(f"llama.cpp: {event['error'].get('message', event['error'])}")
        ids, ends = event.get("tokens") or [-1], None
        if event.get("stop"):
            ends = ENDS.get(event.get("stop_type"), "stop")
        return Token(self.request, ids[-1], None, ends, event.get("content", ""))
