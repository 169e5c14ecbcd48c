"""Answers by the opponent: one protocol, the backends imported only where chosen."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from spinfast.errors import UserError
from spinfast.types import Adapter, Completion, Request, Sampling, Token


class Generator(Protocol):
    """A context manager that holds what generation needs; leaving it gives the memory back."""

    name: str

    def __enter__(self) -> Generator: ...

    def __exit__(self, *exc) -> None: ...

    def generate(
        self, requests: Sequence[Request], sampling: Sampling | Sequence[Sampling], adapter: Adapter | None
    ) -> Iterator[Completion]:
        """Answers under (base + adapter) as they finish, in any order, one per request, with their log-probs.

        sampling: one for all requests, or one for each; greedy and drawn answers go in one batch. Several answers to
        one prompt are requests with its index, another sample and another seed each; side by side they share the
        prompt's keys and values. Any adapter that fits the base may be asked, not only the policy's
        live one; None means the frozen weights alone, with what merged rounds folded into them. Each prompt must
        leave room for max_tokens in the context.
        """

    def serve(self, policy, dense_layers: int = 0) -> None:
        """Answer for another policy on the same base. dense_layers: how many hold their 4-bit weights dense meanwhile,
        where the policy itself answers."""

    def rest(self) -> None:
        """Give back what the next generate() can make again, for the phases that need the memory."""


class Batch(Protocol):
    """Answers in progress under one adapter. Requests, no two of them equal, join and leave between two steps."""

    def __len__(self) -> int:
        """Answers that are not finished, those that wait for a place included."""

    def add(self, request: Request, sampling: Sampling) -> None: ...

    def drop(self, request: Request) -> None:
        """Nobody waits for this answer any more: its place is free."""

    def step(self) -> list[Token]:
        """The next tokens, one of each answer that has a place. A batch that raises is of no more use."""


class Streaming(Protocol):
    """A context manager whose answers can be taken token by token: for people and servers."""

    name: str
    max_model_len: int  # tokens of the longest prompt with its answer
    takes_turns: bool  # whether batches under several adapters may be stepped in turn

    def batch(self, adapter) -> Batch:
        """A new one under (base + adapter); None means the base."""


class Voices:
    """Answers of one generator under several adapters, by their names; each step is another one's turn.

    Where batches cannot take turns, they come one after the other, each with what asked before the next one's did.
    """

    def __init__(self, generator: Streaming, adapters: Mapping[str, object]):
        self.generator, self.adapters = generator, adapters
        self._batches: dict[str, Batch] = {}  # of those that answer, in the order of their turns
        self._waiting: deque[tuple[str, Request, Sampling]] = deque()
        self.turn = ""  # whose the last step was

    def __len__(self) -> int:
        return len(self._waiting) + sum(map(len, self._batches.values()))

    def add(self, voice: str, request: Request, sampling: Sampling) -> None:
        """Raises UserError where the prompt leaves no room for max_tokens."""
        with_sampling([request], sampling, self.generator.max_model_len)
        self._waiting.append((voice, request, sampling))

    def drop(self, request: Request) -> None:
        self._waiting = deque(waits for waits in self._waiting if waits[1] != request)
        for batch in self._batches.values():
            batch.drop(request)
        self._forget()

    def step(self) -> list[Token]:
        """The next tokens of one of them. Where its batch fails, that batch is gone; `turn` says whose it was."""
        self._admit()
        self.turn, batch = next(iter(self._batches.items()))
        del self._batches[self.turn]
        tokens = batch.step()
        self._batches[self.turn] = batch
        self._forget()
        return tokens

    def _admit(self) -> None:
        while self._waiting:
            voice = self._waiting[0][0]
            if voice not in self._batches:
                if self._batches and not self.generator.takes_turns:
                    return
                self._batches[voice] = self.generator.batch(self.adapters[voice])
            self._batches[voice].add(*self._waiting.popleft()[1:])

    def _forget(self) -> None:
        self._batches = {voice: batch for voice, batch in self._batches.items() if len(batch)}


def prompt_seed(run_seed: int, iteration: int, index: int, purpose: str = "train", sample: int = 0) -> int:
    """A 63-bit seed for one answer to a prompt, independent of batch size and order (BLAKE2b of its coordinates)."""
    key = f"{run_seed}/{iteration}/{purpose}/{index}" + (f"#{sample}" if sample else "")
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def with_sampling(
    requests: Sequence[Request], sampling: Sampling | Sequence[Sampling], max_model_len: int
) -> list[tuple[Request, Sampling]]:
    """Each request and how it is answered; UserError for the first prompt that leaves no room in the context."""
    given = [sampling] * len(requests) if isinstance(sampling, Sampling) else sampling
    asked = list(zip(requests, given, strict=True))
    for request, how in asked:
        needed = len(request.prompt_ids) + how.max_tokens
        if needed > max_model_len:
            raise UserError(
                f"prompt {request.index}: {len(request.prompt_ids)} prompt tokens + max_tokens "
                f"{how.max_tokens} = {needed} do not fit the context of {max_model_len}; "
                "drop the prompt or lower max_tokens"
            )
    return asked
