"""Answers by the policy's own module: continuous batching over a static K/V cache, no copy of the weights.

Every step is one forward of one packed row [one token per answer in progress | the prompts admitted now], so the
weights are read once for both. The cache is the attention layout of that step (attention.py asks it): decoding rows
attend to their slot, trimmed to the longest answer in steps of 64; prompts attend to themselves, segment by segment.
An answer that ends leaves the batch at once, the last slot moves into its place, and a waiting prompt gets the room.
A further sample of a prompt in the cache starts as a decoding row: it gets a copy of the prompt's keys and values, and
its first step feeds the prompt's last token.

Sampling is inverse-CDF in fp32 with one uniform per (request, step): SplitMix64 (Steele, Lea, Flood 2014) of the
request's seed as a counter-based stream, so that the draw does not depend on the batch.

Shape suffixes: T packed tokens, S answers scored in a step, V vocabulary, H query heads, G key/value heads, d head
dim, L cached positions, 1 the batch of one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from spinfast.attention import packed_attention
from spinfast.errors import UserError
from spinfast.generation import with_sampling
from spinfast.policy import Policy
from spinfast.policy.adapters.files import settings
from spinfast.policy.quantised import dense
from spinfast.types import Adapter, Completion, PackedLayout, Request, Sampling

TRIM = 64  # decode attention reads the cache up to the longest answer, rounded up to this
PREFILL_TOKENS = 1024  # prompt tokens admitted in one step
MIN_ROWS = 16  # a step is padded to this: with fewer rows fp32 GEMMs round otherwise (MKL on x86)
BLOCK = 256  # vocabulary entries summed first when a token is drawn
SAMPLED_ROWS = 16  # rows of logits sampled together: their fp32 copies stay in the cache
NUCLEUS = 256  # candidates looked at first when top_p < 1; rows that need more are looked at again


class TransformersGenerator:
    """Generates with the policy's module. An adapter that is not the live one is swapped in from answer to answer.

    Same requests, batch size and order: same tokens. The random stream depends on the request's seed alone. Measured
    on SmolLM2-135M, 24 answers of up to 40 tokens, order reversed or batch 5 for 24: in fp32 all tokens and log-probs
    were equal to the bit (x86, MKL; without MIN_ROWS one answer forked); in bf16, where a GEMM rounds a row
    differently for different numbers of rows, 6 and 3 of the 24 stayed the same.
    """

    name = "transformers"

    def __init__(
        self,
        policy: Policy,
        *,
        batch_size: int = 64,
        max_model_len: int | None = None,
        attention: str = "sdpa",
        dense_layers: int = 0,
    ):
        """`attention` is the packed backend of the prompts (attention.py); decoding is SDPA everywhere.

        dense_layers: how many layers hold their 4-bit weights dense while answers are made.
        """
        self.policy = policy
        self.attention = attention
        self.batch_size = batch_size
        self.max_model_len = max_model_len or policy.model.config.max_position_embeddings
        self.dense_layers = dense_layers
        self._streams = ExitStack()

    def __enter__(self) -> TransformersGenerator:
        return self

    def __exit__(self, *exc) -> None:
        self._streams.close()
        if self.policy.device.type == "cuda":
            torch.cuda.empty_cache()

    def serve(self, policy: Policy, dense_layers: int = 0) -> None:
        """Answer for this policy from now on; dense_layers as for a new generator."""
        self.policy, self.dense_layers = policy, dense_layers

    def rest(self) -> None:
        """Nothing to give back: the cache lives as long as the stream of answers."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling | Sequence[Sampling], adapter: Adapter | None
    ) -> Iterator[Completion]:
        """Completions as they finish; requests are taken in their order."""
        asked = with_sampling(requests, sampling, self.max_model_len)
        stream = self._stream(deque(_Answer(*each) for each in asked), self._player(adapter))
        self._streams.callback(stream.close)
        return stream

    def _player(self, adapter: Adapter | None) -> Callable[[], AbstractContextManager]:
        """What turns the policy into base + adapter."""
        if adapter is None:
            return self.policy.without_adapter
        if _same(self.policy.adapter(), adapter):
            return nullcontext
        return partial(self.policy.playing, adapter)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        model = self.policy.model
        was_training = model.training
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)

    def _stream(self, waiting: deque[_Answer], player: Callable[[], AbstractContextManager]) -> Iterator[Completion]:
        """Whoever takes the answers finds the policy as it was: it is another one only while answers are made."""
        if not waiting:
            return
        longest = max(len(answer.request.prompt_ids) + answer.sampling.max_tokens for answer in waiting)
        slots = min(self.batch_size, len(waiting))
        cache = SlotCache(self.policy, slots, longest, self.attention)
        active: list[_Answer] = []
        with dense(self.policy.decoder.layers[: self.dense_layers]):
            while waiting or active:
                ended: list[Completion] = []
                with player(), self._evaluating():
                    while not ended:
                        again, fresh = _admit(waiting, active, slots - len(active))
                        sampled = self._step(cache, active, again, fresh)
                        active += again + fresh
                        for answer, (token, logp) in zip(active, sampled, strict=True):
                            answer.append(int(token), logp)
                        ended = [answer.completion() for answer in active if answer.finished]
                        active = cache.keep(active)
                yield from ended

    @torch.inference_mode()
    def _step(
        self, cache: SlotCache, active: list[_Answer], again: list[_Answer], fresh: list[_Answer]
    ) -> list[tuple[float, float]]:
        """One forward: the next (token, log-prob) of every active and admitted answer, read back in one sync."""
        policy = self.policy
        ids_1T, positions_1T, last_S = cache.plan(active, again, fresh)
        output = policy.decoder(input_ids=ids_1T, position_ids=positions_1T, use_cache=False, layout=cache)
        answers = active + again + fresh
        logits_SV = F.linear(output.last_hidden_state[0, last_S], policy.head_VD, policy.head_bias_V)[: len(answers)]
        stream = [[answer.request.seed for answer in answers], [len(answer.token_ids) for answer in answers]]
        seed_S, step_S = torch.tensor(stream).to(policy.device)
        uniform_S, drawn, order = uniform(seed_S, step_S), [], []
        for (temperature, top_p), places in _by_distribution(answers).items():
            for some in batched(places, SAMPLED_ROWS):
                token, logp = sample(logits_SV[some].float(), uniform_S[some], temperature, top_p)
                drawn.append(torch.stack([token.double(), logp.double()], dim=1))
            order += places
        found = dict(zip(order, torch.cat(drawn).tolist(), strict=True))
        return [found[place] for place in range(len(answers))]


def _by_distribution(answers: Sequence[_Answer]) -> dict[tuple[float, float], list[int]]:
    """(temperature, top_p) -> the places of the answers that are drawn so."""
    places: dict[tuple[float, float], list[int]] = {}
    for place, answer in enumerate(answers):
        places.setdefault((answer.sampling.temperature, answer.sampling.top_p), []).append(place)
    return places


def batched(items: list, size: int) -> Iterator[list]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _same(live: Adapter, given: Adapter) -> bool:
    """Equal scaling and equal values, NaN too, whatever dtype `given` was stored in."""
    if settings(live) != settings(given) or live.tensors.keys() != given.tensors.keys():
        return False
    twins = [(tensor, given.tensors[name].to(tensor)) for name, tensor in live.tensors.items()]
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in twins)


@dataclass
class _Answer:
    """One answer in progress; its place in the active list is its slot in the cache."""

    request: Request
    sampling: Sampling
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    shared: int = 0  # tokens of its prompt that another answer's computed

    @property
    def cached(self) -> int:
        """Tokens in the cache once the newest one is: all but it has been fed."""
        return len(self.request.prompt_ids) + len(self.token_ids)

    @property
    def newest(self) -> int:
        return self.token_ids[-1] if self.token_ids else self.request.prompt_ids[-1]

    def has_prompt_of(self, other: _Answer) -> bool:
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
        return self.ended or len(self.token_ids) == self.sampling.max_tokens

    def completion(self) -> Completion:
        reason = "stop" if self.ended else "length"
        request = self.request
        return Completion(request.index, tuple(self.token_ids), reason, tuple(self.logps), request.sample, self.shared)


def _admit(waiting: deque[_Answer], active: list[_Answer], room: int) -> tuple[list[_Answer], list[_Answer]]:
    """As many waiting answers as there are free slots, within the step's token budget (one always fits).

    First those whose prompt is in the cache, or will be: an active answer's or one admitted now; then the others.
    """
    again, fresh, tokens = [], [], 0
    while waiting and len(again) + len(fresh) < room:
        answer = waiting[0]
        known = _source(answer, active + fresh) is not None
        tokens += 1 if known else len(answer.request.prompt_ids)
        if (again or fresh) and tokens > PREFILL_TOKENS:
            break
        answer.shared = len(answer.request.prompt_ids) - 1 if known else 0
        (again if known else fresh).append(answer)
        waiting.popleft()
    return again, fresh


def _source(answer: _Answer, others: Sequence[_Answer]) -> int | None:
    """Where among the others the first one stands that has the same prompt."""
    return next((place for place, other in enumerate(others) if other.has_prompt_of(answer)), None)


class SlotCache:
    """Keys and values of up to `slots` answers, and the attention layout of the step that `plan` was called for."""

    def __init__(self, policy: Policy, slots: int, length: int, attention: str):
        config = policy.model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (slots, config.num_key_value_heads, -(-length // TRIM) * TRIM, head_dim)
        self.device, self.attention = policy.device, attention
        self.layers = [
            [torch.zeros(shape, dtype=policy.dtype, device=self.device) for _ in "kv"]
            for _ in range(config.num_hidden_layers)
        ]

    def plan(
        self, active: list[_Answer], again: list[_Answer], fresh: list[_Answer]
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
            place = _source(answer, active + fresh)
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
    def keep(self, active: list[_Answer]) -> list[_Answer]:
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


def uniform(seed_S: torch.Tensor, step_S: torch.Tensor) -> torch.Tensor:
    """Output number `step` of the SplitMix64 stream that starts at `seed`, as a double in [0, 1) of 48 bits."""

    def shifted(z, bits):  # a logical shift of signed integers
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    z = seed_S + (step_S + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return shifted(z ^ shifted(z, 31), 16).double() * 2.0**-48


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def sample(logits_SV: torch.Tensor, uniform_S: torch.Tensor, temperature: float, top_p: float):
    """(token ids, log-probs they are drawn by), both (S,): the inverse CDF; greedy at temperature 0, scored at 1."""
    probs_SV = torch.softmax(logits_SV if temperature in (0, 1) else logits_SV / temperature, dim=-1)
    if temperature == 0:
        token_S1 = logits_SV.argmax(-1, keepdim=True)
        return token_S1[:, 0], probs_SV.gather(1, token_S1)[:, 0].log()
    if top_p < 1:
        probs_SV = probs_SV.where(probs_SV >= _nucleus_floor(probs_SV, top_p), 0.0)
        probs_SV = probs_SV / probs_SV.sum(-1, keepdim=True)
    token_S1 = _inverse_cdf(probs_SV, uniform_S[:, None])
    return token_S1[:, 0], probs_SV.gather(1, token_S1)[:, 0].log()


def _inverse_cdf(weights_SV: torch.Tensor, uniform_S1: torch.Tensor) -> torch.Tensor:
    """The token (S, 1) under which `uniform` falls. Two levels, blocks then tokens, spare a scan of the vocabulary."""
    block = math.gcd(weights_SV.shape[1], BLOCK)
    blocks_SBb = weights_SV.unflatten(1, (-1, block))
    block_S1, rest_S1 = _search(blocks_SBb.sum(-1), uniform_S1)
    within_S1, _ = _search(blocks_SBb.take_along_dim(block_S1[:, :, None], 1)[:, 0], rest_S1)
    return block_S1 * block + within_S1


def _search(weights_SK: torch.Tensor, uniform_S1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The entry (S, 1) under which `uniform` of the total falls, never one of weight 0, and how far into it."""
    cdf_SK = weights_SK.cumsum(-1, dtype=torch.float64)
    target_S1 = (uniform_S1 * cdf_SK[:, -1:]).minimum(cdf_SK[:, -1:].nextafter(torch.zeros_like(uniform_S1)))
    found_S1 = torch.searchsorted(cdf_SK, target_S1, right=True).clamp(max=cdf_SK.shape[1] - 1)  # NaN ends beyond
    weight_S1 = weights_SK.gather(1, found_S1)
    return found_S1, (target_S1 - cdf_SK.gather(1, found_S1) + weight_S1) / weight_S1


def _nucleus_floor(probs_SV: torch.Tensor, top_p: float, candidates: int = NUCLEUS) -> torch.Tensor:
    """The smallest probability (S, 1) in the nucleus: fewest likeliest tokens of mass >= top_p, ties included."""
    candidates = min(candidates, probs_SV.shape[1])
    top_SK = probs_SV.topk(candidates).values
    mass_SK = top_SK.cumsum(-1, dtype=torch.float64)
    floor_S1 = top_SK.gather(1, (mass_SK < top_p).sum(-1, keepdim=True).clamp(max=candidates - 1))
    short_S = mass_SK[:, -1] < top_p
    if candidates < probs_SV.shape[1] and short_S.any():
        floor_S1[short_S] = _nucleus_floor(probs_SV[short_S], top_p, 8 * candidates)
    return floor_S1
