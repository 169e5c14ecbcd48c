"""The K/V cache of continuous batching: answers in progress, a slot each, and a step's attention over the slots.

Shape suffixes as in transformers.py: T packed tokens, S answers scored in a step, H query heads, G key/value heads,
d head dim, L cached positions, 1 the batch of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F

from spinfast.attention import packed_attention
from spinfast.errors import UserError
from spinfast.policy import Policy
from spinfast.types import Completion, PackedLayout, Request, Sampling, Token

TRIM = 64  # decode attention reads the cache up to the longest answer, rounded up to this
MIN_ROWS = 16  # a step is padded to this: with fewer rows fp32 GEMMs round otherwise (MKL on x86)


@dataclass
class Answer:
    """One answer in progress; its place in the active list is its slot in the cache."""

    request: Request
    sampling: Sampling
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    shared: int = 0  # tokens of its prompt that another answer's computed
    dropped: bool = False  # nobody waits for it any more

    @property
    def cached(self) -> int:
        """Tokens in the cache once the newest one is: all but it has been fed."""
        return len(self.request.prompt_ids) + len(self.token_ids)

    @property
    def newest(self) -> int:
        return self.token_ids[-1] if self.token_ids else self.request.prompt_ids[-1]

    def has_prompt_of(self, other: Answer) -> bool:
        return self.request.index == other.request.index and self.request.prompt_ids == other.request.prompt_ids

    def append(self, token: int, logp: float) -> None:
        if math.isnan(logp):
            raise UserError(
                f"prompt {self.request.index}: expected finite logits, got NaN at answer token {len(self.token_ids)}; "
                "the adapter has diverged (lower the learning rate) or the compute dtype overflows (use another)"
            )
        self.token_ids.append(token)
        self.logps.append(logp)

    @property
    def ended(self) -> bool:
        return self.token_ids[-1] in self.sampling.stop_ids

    @property
    def finished(self) -> bool:
        return self.dropped or self.ended or len(self.token_ids) == self.sampling.max_tokens

    @property
    def reason(self) -> Literal["stop", "length"]:
        return "stop" if self.ended else "length"

    def token(self) -> Token:
        return Token(self.request, self.token_ids[-1], self.logps[-1], self.reason if self.finished else None)

    def completion(self) -> Completion:
        request, ids, logps = self.request, tuple(self.token_ids), tuple(self.logps)
        return Completion(request.index, ids, self.reason, logps, request.sample, self.shared)


def source_of(answer: Answer, others: Sequence[Answer]) -> int | None:
    """Where among the others the first one stands that has the same prompt."""
    return next((place for place, other in enumerate(others) if other.has_prompt_of(answer)), None)


class SlotCache:
    """Keys and values of up to `slots` answers, and the attention layout of the step that `plan` was called for."""

    def __init__(self, policy: Policy, slots: int, length: int, attention: str):
        length = -(-length // TRIM) * TRIM
        self.device, self.attention = policy.device, attention
        self.layers = [
            [torch.zeros(slots, heads, length, dim, dtype=policy.dtype, device=self.device) for _ in "kv"]
            for heads, dim in policy.attentions
        ]

    def make_room(self, slots: int, length: int) -> None:
        """Twice the slots, or positions, where there are too few; what is cached stays."""
        old_slots, _, old_length, _ = self.layers[0][0].shape
        if slots <= old_slots and length <= old_length:
            return
        slots = old_slots if slots <= old_slots else max(slots, 2 * old_slots)
        length = old_length if length <= old_length else -(-max(length, 2 * old_length) // TRIM) * TRIM
        for layer in self.layers:
            for place, tensor in enumerate(layer):
                layer[place] = tensor.new_zeros(slots, tensor.shape[1], length, tensor.shape[3])
                layer[place][:old_slots, :, :old_length] = tensor

    def plan(
        self, active: list[Answer], again: list[Answer], fresh: list[Answer]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids (1, T), positions (1, T) and the rows to score, S and then padding, of the next step.

        The prompts of `again` are those of other answers, active or fresh.
        """
        decoding = active + again
        self.decoding = len(decoding)
        ids = [answer.newest for answer in decoding]
        positions = [answer.cached - 1 for answer in decoding]
        slots = list(range(self.decoding))
        starts = [0]
        for slot, answer in enumerate(fresh, self.decoding):
            prompt = answer.request.prompt_ids
            ids += prompt
            positions += range(len(prompt))
            slots += [slot] * len(prompt)
            starts.append(starts[-1] + len(prompt))
        last = slots[: self.decoding] + [self.decoding + end - 1 for end in starts[1:]]
        self.padding = max(0, MIN_ROWS - len(ids))
        filler = [0] * self.padding
        ids_T, positions_T, slot_T = torch.tensor([ids + filler, positions + filler, slots + filler]).to(self.device)
        self.slot_T, self.position_T = slot_T[: len(ids)], positions_T[: len(ids)]
        self.copies = []
        for slot, answer in enumerate(again, len(active)):
            place = source_of(answer, active + fresh)
            source = place if place < len(active) else place + len(again)
            first = self.copies.pop()[1] if self.copies and self.copies[-1][0] == source else slot
            self.copies.append((source, first, slot + 1, len(answer.request.prompt_ids)))
        if decoding:
            longest = -(-max(answer.cached for answer in decoding) // TRIM) * TRIM
            self.mask_S11L = (torch.arange(longest, device=self.device) <= positions_T[: self.decoding, None])[
                :, None, None
            ]
        if fresh:
            bounds = torch.tensor(starts, dtype=torch.int32, device=self.device)
            lengths = [len(answer.request.prompt_ids) for answer in fresh]
            index = torch.arange(starts[-1], device=self.device)
            self.prompts = PackedLayout(bounds, bounds, index, tuple((n, n) for n in lengths), self.attention)
        last += [0] * (MIN_ROWS - len(last))
        return ids_T[None], positions_T[None], torch.tensor(last).to(self.device)

    def attend(self, layer: int, query_1HTd, key_1GTd, value_1GTd, scaling: float) -> torch.Tensor:
        """Writes the step's keys and values to their slots; attention output (1, T, H, d)."""
        keys, values = self.layers[layer]
        n, tokens = self.decoding, len(self.slot_T)
        query_1HTd, key_1GTd, value_1GTd = (x[:, :, :tokens] for x in (query_1HTd, key_1GTd, value_1GTd))
        keys[self.slot_T, :, self.position_T] = key_1GTd[0].transpose(0, 1)
        values[self.slot_T, :, self.position_T] = value_1GTd[0].transpose(0, 1)
        for source, first, end, length in self.copies:  # after the source's own rows are written: it may be fresh
            keys[first:end, :, :length] = keys[source, :, :length]
            values[first:end, :, :length] = values[source, :, :length]
        parts = []
        if n:
            parts.append(self._decode(keys, values, query_1HTd[0, :, :n].transpose(0, 1), scaling))
        if n < tokens:
            rest = (x[:, :, n:] for x in (query_1HTd, key_1GTd, value_1GTd))
            parts.append(packed_attention(*rest, self.prompts, scaling))
        parts.append(query_1HTd.new_zeros(1, self.padding, *query_1HTd.shape[1::2]))
        return torch.cat(parts, dim=1)

    def _decode(self, keys, values, query_SHd, scaling: float) -> torch.Tensor:
        """One query per answer over its slot; no key is copied for the query heads that share it."""
        n, heads, dim = query_SHd.shape
        length = self.mask_S11L.shape[-1]
        keys, values = keys[:n, :, :length], values[:n, :, :length]
        rows = _query_rows(query_SHd.device, heads // keys.shape[1])
        out = F.scaled_dot_product_attention(
            query_SHd.reshape(n, heads // rows, rows, dim),
            keys,
            values,
            attn_mask=self.mask_S11L,
            scale=scaling,
            enable_gqa=rows == 1,
        )
        return out.reshape(1, n, heads, dim)

    @torch.inference_mode()
    def keep(self, active: list[Answer]) -> list[Answer]:
        """The unfinished answers in slots 0, 1, ...: the last ones move into the places of those that ended."""
        going = [slot for slot, answer in enumerate(active) if not answer.finished]
        holes = [slot for slot in range(len(going)) if active[slot].finished]
        movers = [slot for slot in going if slot >= len(going)]
        if holes:
            to, source = torch.tensor([holes, movers]).to(self.device)
            length = max(active[slot].cached for slot in movers)
            for layer in self.layers:
                for tensor in layer:
                    tensor[to, :, :length] = tensor[source, :, :length]
        moved = dict(zip(holes, movers, strict=True))
        return [active[moved.get(slot, slot)] for slot in range(len(going))]


def _query_rows(device: torch.device, shared: int) -> int:
    """CUDA's kernels with a mask know no shared heads: there the query heads that share a key head stand as its rows.

    On a CPU one row per head is 1.3 times as fast.
    """
    return shared if device.type == "cuda" else 1
