"""Answers by the opponent: one protocol, the backends imported only where chosen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol

from spinfast.errors import UserError
from spinfast.types import Adapter, Completion, Request, Sampling


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
