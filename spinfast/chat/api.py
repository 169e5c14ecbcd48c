"""OpenAI's requests and responses as plain data: what is asked, checked key by key, and what is said.

Every key either acts, or has the value that means nothing, or is refused by name.
"""

from __future__ import annotations

import difflib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spinfast.chat.speaker import BASE, Speaker
from spinfast.chat.text import UNFINISHED, TextStream, Until
from spinfast.data.conversations import template_variables, turns, with_system
from spinfast.data.renderer import plain_ids
from spinfast.errors import UserError
from spinfast.generation import prompt_seed
from spinfast.types import Request, Sampling, Token

MOST_ANSWERS = 64  # n
COMMON = ("model", "max_tokens", "temperature", "top_p", "n", "seed", "stop", "stream", "stream_options", "logprobs")
KEYS = {
    "chat.completion": (*COMMON, "messages", "max_completion_tokens", "chat_template_kwargs"),
    "text_completion": (*COMMON, "prompt"),
}
TOLD = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier")  # of the caller, not the answer
NOTHING = {  # keys that are not computed -> the values that ask for nothing
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "top_logprobs"), (0,)),
    **dict.fromkeys(("logit_bias", "tools", "functions", "suffix"), ({}, [], "")),
    **dict.fromkeys(("echo", "store"), (False,)),
    "best_of": (1,),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
}


class ApiError(Exception):
    """A request that is refused, as OpenAI's clients know it."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Asked:
    """A request that can be answered: a list of answers to each of its prompts."""

    kind: str  # "chat.completion" or "text_completion"
    model: str
    voice: str
    requests: tuple[Request, ...]  # request number i is choice number i
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
    usage: bool  # in the stream
    logprobs: bool
    prompt_tokens: int
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))


def models(speaker: Speaker) -> dict[str, str]:
    """The name of each voice to clients: the base's own, and the adapters'."""
    return {speaker.model if voice == BASE else voice: voice for voice in (*speaker.adapters, BASE)}


def parse(kind: str, body: bytes, speaker: Speaker, number: int) -> Asked:
    """The request in `body`; `number` tells it from all others. Raises ApiError."""
    try:
        given = json.loads(body)
        json.dumps(given, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not valid JSON: {error}") from None
    if not isinstance(given, dict):
        raise ApiError(f"the body is {type(given).__name__}, expected a JSON object")
    given = {key: value for key, value in given.items() if value is not None}
    _refuse_unknown(given, KEYS[kind])
    take = _Taker(given)
    names = models(speaker)
    model = take("model", str, next(iter(names)))
    if model not in names:
        raise ApiError(f"there is no model {model!r}; expected {', '.join(names)}", "model", "model_not_found", 404)
    ids, tokens = _prompts(kind, take, speaker), take("max_tokens", int, None, lambda v: v >= 1)
    if kind == "chat.completion":
        tokens = take("max_completion_tokens", int, tokens, lambda v: v >= 1)
    longest = max(map(len, ids))
    default = 16 if kind == "text_completion" else speaker.context - longest
    tokens = default if tokens is None else tokens
    if longest + tokens > speaker.context or tokens < 1:
        raise ApiError(
            f"this model's context is {speaker.context} tokens; the prompt has {longest}, and {max(tokens, 1)} are "
            "asked for the answer: ask for less, or serve with a larger --context",
            "messages" if kind == "chat.completion" else "prompt",
            "context_length_exceeded",
        )
    temperature = float(take("temperature", (int, float), speaker.temperature, lambda v: 0 <= v <= 10))
    top_p = float(take("top_p", (int, float), speaker.top_p, lambda v: 0 < v <= 1)) if temperature else 1.0
    count = take("n", int, 1, lambda v: 1 <= v <= MOST_ANSWERS)
    seed = take("seed", int, None)
    run_seed = secrets.randbits(63) if seed is None else seed
    requests = [
        Request((number << 32) + i, prompt, prompt_seed(run_seed, 0, i, "serve", k), k)
        for i, prompt in enumerate(ids)
        for k in range(count)
    ]
    stops = take("stop", (str, list), [], _are_stops)
    options = take("stream_options", dict, {}, _are_stream_options)
    return Asked(
        kind,
        model,
        names[model],
        tuple(requests),
        Sampling(temperature, top_p, tokens, speaker.renderer.stop_ids),
        (stops,) if isinstance(stops, str) else tuple(stops),
        take("stream", bool, False),
        options.get("include_usage", False),
        _wants_logprobs(kind, take, speaker),
        sum(map(len, ids)),
    )


def _refuse_unknown(given: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key, value in given.items():
        if key in NOTHING and key not in keys:
            if not any(value == nothing and type(value) in _alike(nothing) for nothing in NOTHING[key]):
                raise ApiError(f"{key}: not supported here, got {json.dumps(value)[:80]}; leave it out", key)
        elif key not in keys and key not in TOLD:
            near = difflib.get_close_matches(key, keys, n=1)
            raise ApiError(f"{key}: no such key" + (f"; did you mean {near[0]}?" if near else ""), key)


def _alike(value) -> tuple[type, ...]:
    """The types of values that mean the same: clients write numbers as 0 or as 0.0."""
    return (int, float) if type(value) is int else (type(value),)


class _Taker:
    """take(key, type, default, holds) -> the value; an ApiError where it is of another type, or does not hold."""

    def __init__(self, given: Mapping[str, Any]):
        self.given = given

    def __call__(self, key: str, kind, default, holds=lambda value: True):
        if key not in self.given:
            return default
        value = self.given[key]
        is_bool = isinstance(value, bool)
        if not isinstance(value, kind) or (is_bool and kind is not bool) or not holds(value):
            raise ApiError(f"{key}: {json.dumps(value)[:80]} is not what it can be; {EXPECTED.get(key, '')}", key)
        return value


EXPECTED = {
    "max_tokens": "expected a whole number, 1 or more",
    "max_completion_tokens": "expected a whole number, 1 or more",
    "temperature": "expected a number from 0 to 10",
    "top_p": "expected a number above 0, 1 at most",
    "n": f"expected a whole number from 1 to {MOST_ANSWERS}",
    "seed": "expected a whole number",
    "stop": "expected a text, or up to 16 of them, none empty",
    "stream": "expected true or false",
    "stream_options": 'expected {"include_usage": true}',
    "model": "expected a name of /v1/models",
    "messages": "expected a list of turns",
    "prompt": "expected a text, a list of texts, or token ids",
    "logprobs": "expected true, false or, of completions, 0: the drawn tokens' alone",
    "chat_template_kwargs": "expected an object",
}


def _are_stops(value) -> bool:
    several = [value] if isinstance(value, str) else value
    return len(several) <= 16 and all(isinstance(stop, str) and stop for stop in several)


def _are_stream_options(value) -> bool:
    """`include_obfuscation` pads OpenAI's chunks against listeners on the way; the loopback address has none."""
    known = value.keys() <= {"include_usage", "include_obfuscation"}
    return known and all(isinstance(option, bool) for option in value.values())


def _wants_logprobs(kind: str, take: _Taker, speaker: Speaker) -> bool:
    if kind == "chat.completion":
        wanted = take("logprobs", bool, False)
    else:
        wanted = take("logprobs", int, None, lambda v: v == 0) is not None
    if wanted and speaker.backend == "llama.cpp":
        raise ApiError("logprobs: not told by llama.cpp; serve the model itself", "logprobs")
    return wanted


def _prompts(kind: str, take: _Taker, speaker: Speaker) -> list[tuple[int, ...]]:
    renderer = speaker.renderer
    if kind == "chat.completion":
        messages = take("messages", list, None, bool)
        if messages is None:
            raise ApiError("messages: is missing", "messages")
        try:
            talk = with_system(turns(messages), speaker.system)
            kwargs = dict(take("chat_template_kwargs", dict, {}))
            variables = template_variables({"tools": kwargs.pop("tools", None), "chat_template_kwargs": kwargs})
            return [renderer.prompt_ids(talk, variables)]
        except UserError as error:
            raise ApiError(f"messages: {error}", "messages") from None
    prompt = take("prompt", (str, list), None, bool)
    if prompt is None:
        raise ApiError("prompt: is missing", "prompt")
    several = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    rows = len(renderer.tokenizer)
    ids = [plain_ids(renderer.tokenizer, one) if isinstance(one, str) else one for one in several]
    for one in ids:
        if not one or not isinstance(one, (list, tuple)) or not all(type(i) is int and 0 <= i < rows for i in one):
            raise ApiError(f"prompt: {EXPECTED['prompt']}, each with a token or more", "prompt")
    return [tuple(one) for one in ids]


# What is said ---------------------------------------------------------------------------------------------------


class Choice:
    """One answer while it is made: tokens in, text and log-probs out, up to a stop string."""

    def __init__(self, asked: Asked, index: int, tokenizer):
        self.asked, self.index = asked, index
        self._text, self._until = TextStream(tokenizer), Until(asked.stops)
        self.tokens = 0
        self.ends: str | None = None

    def push(self, token: Token) -> tuple[str, list[tuple[str, float]]]:
        """The text that is certain now, and the token with its log-prob where these are wanted."""
        self.tokens += token.id >= 0
        piece = self._until.push(self._text.push(token))
        if self._until.met:
            self.ends = "stop"
        elif token.ends:
            piece, self.ends = piece + self._until.rest(), token.ends
        told = self.asked.logprobs and token.ends != "stop"
        return piece, [(self._text.decode([token.id]), token.logp)] if told else []


def usage(asked: Asked, tokens: int) -> dict:
    """Tokens read and written; a prompt is counted once however many answers it gets."""
    return {
        "prompt_tokens": asked.prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": asked.prompt_tokens + tokens,
    }


def response(asked: Asked, choices: list[dict], tokens: int) -> dict:
    return _envelope(asked, asked.kind) | {"choices": choices, "usage": usage(asked, tokens)}


def chunk(asked: Asked, choices: list[dict], tokens: int | None = None) -> dict:
    """A part of a stream; the last one, where it is wanted, has the usage and no choice."""
    found = _envelope(asked, asked.kind + ".chunk" * (asked.kind == "chat.completion")) | {"choices": choices}
    return found | ({"usage": usage(asked, tokens)} if tokens is not None else {})


def whole(choice: Choice, text: str, logps: list[tuple[str, float]]) -> dict:
    """A choice of a response."""
    ended = {"index": choice.index, "finish_reason": choice.ends, "logprobs": _logprobs(choice.asked, logps)}
    if choice.asked.kind == "chat.completion":
        return ended | {"message": {"role": "assistant", "content": text}}
    return ended | {"text": text}


def piece(choice: Choice, text: str, logps: list[tuple[str, float]], first: bool) -> dict:
    """A choice of a chunk."""
    found = {"index": choice.index, "finish_reason": choice.ends, "logprobs": _logprobs(choice.asked, logps)}
    if choice.asked.kind == "chat.completion":
        return found | {"delta": ({"role": "assistant"} if first else {}) | ({"content": text} if text else {})}
    return found | {"text": text}


def _envelope(asked: Asked, kind: str) -> dict:
    start = "chatcmpl" if asked.kind == "chat.completion" else "cmpl"
    return {"id": f"{start}-{asked.id}", "object": kind, "created": asked.created, "model": asked.model}


def _logprobs(asked: Asked, logps: list[tuple[str, float]]) -> dict | None:
    if not asked.logprobs:
        return None
    if asked.kind == "chat.completion":
        return {"content": [_logprob(*each) for each in logps]}
    return {"tokens": [text for text, _ in logps], "token_logprobs": [logp for _, logp in logps]}


def _logprob(text: str, logp: float) -> dict:
    """`bytes` is null for a token that is a part of a character."""
    known = None if UNFINISHED in text else list(text.encode())
    return {"token": text, "logprob": logp, "bytes": known, "top_logprobs": []}
