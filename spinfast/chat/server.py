"""OpenAI's endpoints over one worker: /v1/models, /v1/chat/completions and /v1/completions, with server-sent events."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from spinfast.chat import api
from spinfast.chat.speaker import Speaker
from spinfast.chat.worker import Worker
from spinfast.errors import UserError
from spinfast.types import Token

log = logging.getLogger("spinfast")
MOST_BYTES = 16 << 20  # of a request's body
GONE = 499  # for nobody: the client has left
HOSTS = ["127.0.0.1", "localhost"]  # names that a browser may have been sent here by; another's would be a trick


def application(speaker: Speaker, worker: Worker) -> Starlette:
    """The endpoints as an ASGI application."""
    numbers = itertools.count()

    async def models(request: HttpRequest) -> Response:
        cards = [_card(name, speaker) for name in api.models(speaker)]
        if (wanted := request.path_params.get("name")) is None:
            return JSONResponse({"object": "list", "data": cards})
        if found := [card for card in cards if card["id"] == wanted]:
            return JSONResponse(found[0])
        raise api.ApiError(f"there is no model {wanted!r}", "model", "model_not_found", 404)

    async def health(request: HttpRequest) -> Response:
        return Response(status_code=200)

    def answering(kind: str):
        async def answer(request: HttpRequest) -> Response:
            body = await _body(request)
            asked = await asyncio.to_thread(api.parse, kind, body, speaker, next(numbers))
            answers = _Answers(asked, speaker, worker)
            if asked.stream:
                left = BackgroundTask(worker.drop, asked.requests)
                return StreamingResponse(answers.events(), media_type="text/event-stream", background=left)
            return await _unless_gone(request, answers.response())

        return answer

    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", models),
        Route("/v1/chat/completions", answering("chat.completion"), methods=["POST"]),
        Route("/v1/completions", answering("text_completion"), methods=["POST"]),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)],
        exception_handlers={
            api.ApiError: _refused,
            HTTPException: _no_such,
            ClientDisconnect: _gone,
            Exception: _failed,
        },
    )


class _Answers:
    """The choices of one request. However they end, the worker is left without it."""

    def __init__(self, asked: api.Asked, speaker: Speaker, worker: Worker):
        self.asked, self.worker, self.speaker = asked, worker, speaker

    @asynccontextmanager
    async def _tokens(self) -> AsyncIterator[AsyncIterator[tuple[api.Choice, str, list]]]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(token: Token | Exception) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(arrived.put_nowait, token)

        requests, tokenizer = self.asked.requests, self.speaker.renderer.tokenizer
        self.choices = [api.Choice(self.asked, index, tokenizer) for index in range(len(requests))]
        place = {(each.index, each.sample): choice for each, choice in zip(requests, self.choices, strict=True)}

        async def pieces():
            while any(choice.ends is None for choice in self.choices):
                token = await arrived.get()
                if isinstance(token, Exception):
                    raise token
                choice = place[token.request.index, token.request.sample]
                if choice.ends is None:  # else it met a stop string, and this token was on its way
                    text, logps = choice.push(token)
                    if choice.ends and not token.ends:
                        self.worker.drop([token.request])
                    yield choice, text, logps

        self.worker.ask(self.asked.voice, requests, self.asked.sampling, deliver)
        try:
            yield pieces()
        finally:
            self.worker.drop(requests)
            counts = Counter(choice.ends or "left" for choice in self.choices)
            ends = ", ".join(f"{count} {end}" if count > 1 else end for end, count in counts.items())
            log.info(
                "%s: %d tokens read, %d written, %s", self.asked.model, self.asked.prompt_tokens, self.written, ends
            )

    @property
    def written(self) -> int:
        return sum(choice.tokens for choice in self.choices)

    async def response(self) -> Response:
        texts: dict[int, str] = {}
        logps: dict[int, list] = {}
        try:
            async with self._tokens() as pieces:
                async for choice, text, told in pieces:
                    texts[choice.index] = texts.get(choice.index, "") + text
                    logps.setdefault(choice.index, []).extend(told)
        except Exception as error:
            raise _fault(error) from error
        found = [api.whole(choice, texts[choice.index], logps[choice.index]) for choice in self.choices]
        return JSONResponse(api.response(self.asked, found, self.written))

    async def events(self) -> AsyncIterator[str]:
        try:
            begun: set[int] = set()
            async with self._tokens() as pieces:
                async for choice, text, told in pieces:
                    first = choice.index not in begun
                    if first or text or told or choice.ends:
                        begun.add(choice.index)
                        yield _event(api.chunk(self.asked, [api.piece(choice, text, told, first)]))
            if self.asked.usage:
                yield _event(api.chunk(self.asked, [], self.written))
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield _event(_fault(error).body)


def _event(value: dict) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _body(request: HttpRequest) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a page in a browser may send anywhere without asking is none
        raise api.ApiError(f"Content-Type is {kind or 'missing'}, expected application/json", status=415)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise api.ApiError(f"the body is larger than {MOST_BYTES >> 20} MiB", status=413)
    return bytes(body)


async def _unless_gone(request: HttpRequest, answer) -> Response:
    """The answer, unless the client leaves before: then what makes it is cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(answer), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else Response(status_code=GONE)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _fault(error: Exception) -> api.ApiError:
    if isinstance(error, api.ApiError):
        return error
    if isinstance(error, UserError):
        return api.ApiError(str(error), status=503)
    return api.ApiError("it failed; the server's log says why", status=500)


async def _refused(request: HttpRequest, error: api.ApiError) -> Response:
    return JSONResponse(error.body, error.status)


async def _no_such(request: HttpRequest, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(api.ApiError(message, status=error.status_code).body, error.status_code, error.headers)


async def _gone(request: HttpRequest, error: ClientDisconnect) -> Response:
    return Response(status_code=GONE)


async def _failed(request: HttpRequest, error: Exception) -> Response:
    log.error("%s failed", request.url.path, exc_info=error)
    return JSONResponse(_fault(error).body, 500)


def _card(name: str, speaker: Speaker) -> dict:
    return {"id": name, "object": "model", "created": 0, "owned_by": "spinfast", "max_model_len": speaker.context}
