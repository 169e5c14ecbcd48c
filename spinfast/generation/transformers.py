"""Answers by the policy's own module: continuous batching over a static K/V cache, no copy of the weights.

Every step is one forward of one packed row [one token per answer in progress | the prompts admitted now], so the
weights are read once for both. The cache is the attention layout of that step (attention.py asks it): decoding rows
attend to their slot, trimmed to the longest answer in steps of 64; prompts attend to themselves, segment by segment.
An answer that ends leaves the batch at once, the last slot moves into its place, and a waiting prompt gets the room.

Sampling is inverse-CDF in fp32 with one uniform per (request, step): SplitMix64 (Steele, Lea, Flood 2014) of the
request's seed as a counter-based stream, so what is drawn does not depend on the batch. The logits still come from
GEMMs whose rounding may depend on the number of rows; see `TransformersGenerator`.

Shape suffixes: T packed tokens, S answers scored in a step, V vocabulary, H query heads, G key/value heads, d head
dim, L cached positions, 1 the batch of one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from spinfast.attention import packed_attention
from spinfast.errors import UserError
from spinfast.policy import Policy
from spinfast.types import Adapter, Completion, PackedLayout, Request, Sampling

TRIM = 64  # decode attention reads the cache up to the longest answer, rounded up to this
PREFILL_TOKENS = 4096  # prompt tokens admitted in one step
NUCLEUS = 512  # candidates sorted first when top_p < 1; the nucleus seldom is larger


class TransformersGenerator:
    """Generates with the policy's module and its live adapter, or without any adapter.

    Same request, same answer: the random stream depends on the request's seed alone. In fp32 the tokens were equal
    for every batch size and order tried; in bf16 the GEMMs round differently for different numbers of rows, and an
    answer may fork where two tokens are nearly tied.
    """

    name = "transformers"

    def __init__(self, policy: Policy, *, batch_size: int = 64, max_model_len: int | None = None):
        self.policy = policy
        self.batch_size = batch_size
        self.max_model_len = max_model_len or policy.model.config.max_position_embeddings
        self._cache: SlotCache | None = None

    def __enter__(self) -> TransformersGenerator:
        return self

    def __exit__(self, *exc) -> None:
        self._cache = None
        if self.policy.device.type == "cuda":
            torch.cuda.empty_cache()

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, adapter: Adapter | None
    ) -> Iterator[Completion]:
        """Completions as they finish. `logp` sums the sampled tokens' log-probs at temperature 1, all tokens kept."""
        for request in requests:
            needed = len(request.prompt_ids) + sampling.max_tokens
            if needed > self.max_model_len:
                raise UserError(
                    f"prompt {request.index}: {len(request.prompt_ids)} prompt tokens + max_tokens "
                    f"{sampling.max_tokens} = {needed} do not fit the context of {self.max_model_len}; "
                    "drop the prompt or lower max_tokens"
                )
        if adapter is not None:
            self._check_live(adapter)
        return self._stream(deque(requests), sampling, adapter)

    def _check_live(self, adapter: Adapter) -> None:
        live = self.policy.adapter().tensors
        if live.keys() != adapter.tensors.keys() or any(
            not torch.equal(tensor, adapter.tensors[name].to(tensor.dtype)) for name, tensor in live.items()
        ):
            raise UserError(
                "expected the policy's live adapter or None, got other tensors; the transformers generator shares "
                "the policy's module, so call policy.load_adapter(adapter) first"
            )

    def _stream(self, waiting: deque[Request], sampling: Sampling, adapter: Adapter | None) -> Iterator[Completion]:
        if not waiting:
            return
        model = self.policy.model
        was_training = model.training
        longest = max(len(request.prompt_ids) for request in waiting) + sampling.max_tokens
        slots = min(self.batch_size, len(waiting))
        self._cache = SlotCache(self.policy, slots, longest)
        active: list[_Answer] = []
        try:
            model.eval()
            while waiting or active:
                admitted = _admit(waiting, slots - len(active))
                if adapter is None:
                    with model.disable_adapter():
                        sampled = self._step(active, admitted, sampling)
                else:
                    sampled = self._step(active, admitted, sampling)
                active += admitted
                for answer, (token, logp) in zip(active, sampled, strict=True):
                    answer.token_ids.append(int(token))
                    answer.logp += logp
                yield from [answer.completion(sampling) for answer in active if answer.finished(sampling)]
                active = self._cache.keep(active, sampling)
        finally:
            model.train(was_training)
            self._cache = None

    @torch.inference_mode()
    def _step(self, active: list[_Answer], admitted: list[_Answer], sampling: Sampling) -> list[tuple[float, float]]:
        """One forward: the next (token, log-prob) of every active and admitted answer, read back in one sync."""
        policy, cache = self.policy, self._cache
        ids_1T, positions_1T, last_S = cache.plan(active, admitted)
        output = policy.decoder(input_ids=ids_1T, position_ids=positions_1T, use_cache=False, layout=cache)
        logits_SV = F.linear(output.last_hidden_state[0, last_S], policy.head_VD, policy.head_bias_V).float()
        answers = active + admitted
        stream = [[answer.request.seed for answer in answers], [len(answer.token_ids) for answer in answers]]
        seed_S, step_S = torch.tensor(stream).to(policy.device)
        token_S = sample(logits_SV, uniform(seed_S, step_S), sampling.temperature, sampling.top_p)
        logp_S = logits_SV.gather(1, token_S[:, None])[:, 0] - logits_SV.logsumexp(-1)
        return torch.stack([token_S.double(), logp_S.double()], dim=1).tolist()


@dataclass
class _Answer:
    """One answer in progress; its place in the active list is its slot in the cache."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    logp: float = 0.0

    @property
    def cached(self) -> int:
        """Tokens in the cache once the newest one is: all but it has been fed."""
        return len(self.request.prompt_ids) + len(self.token_ids)

    def finished(self, sampling: Sampling) -> bool:
        return self.token_ids[-1] in sampling.stop_ids or len(self.token_ids) == sampling.max_tokens

    def completion(self, sampling: Sampling) -> Completion:
        reason = "stop" if self.token_ids[-1] in sampling.stop_ids else "length"
        return Completion(self.request.index, tuple(self.token_ids), reason, self.logp)


def _admit(waiting: deque[Request], room: int) -> list[_Answer]:
    """As many waiting prompts as there are free slots, within the step's token budget (one always fits)."""
    admitted, tokens = [], 0
    while waiting and len(admitted) < room:
        tokens += len(waiting[0].prompt_ids)
        if admitted and tokens > PREFILL_TOKENS:
            break
        admitted.append(_Answer(waiting.popleft()))
    return admitted


class SlotCache:
    """Keys and values of up to `slots` answers, and the attention layout of the step that `plan` was called for."""

    def __init__(self, policy: Policy, slots: int, length: int):
        config = policy.model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (slots, config.num_key_value_heads, -(-length // TRIM) * TRIM, head_dim)
        self.device = policy.device
        self.layers = [
            [torch.zeros(shape, dtype=policy.dtype, device=self.device) for _ in "kv"]
            for _ in range(config.num_hidden_layers)
        ]

    def plan(self, active: list[_Answer], admitted: list[_Answer]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids (1, T), positions (1, T) and the rows to score (S,) of the next step."""
        self.decoding = len(active)
        ids = [answer.token_ids[-1] for answer in active]
        positions = [answer.cached - 1 for answer in active]
        slots = list(range(self.decoding))
        starts = [0]
        for slot, answer in enumerate(admitted, self.decoding):
            prompt = answer.request.prompt_ids
            ids += prompt
            positions += range(len(prompt))
            slots += [slot] * len(prompt)
            starts.append(starts[-1] + len(prompt))
        last = slots[: self.decoding] + [self.decoding + end - 1 for end in starts[1:]]
        ids_T, positions_T, self.slot_T = torch.tensor([ids, positions, slots]).to(self.device)
        self.position_T = positions_T
        if active:
            longest = -(-max(answer.cached for answer in active) // TRIM) * TRIM
            self.mask_S11L = (torch.arange(longest, device=self.device) <= positions_T[: self.decoding, None])[
                :, None, None
            ]
        if admitted:
            bounds = torch.tensor(starts, dtype=torch.int32, device=self.device)
            lengths = [len(answer.request.prompt_ids) for answer in admitted]
            index = torch.arange(starts[-1], device=self.device)
            self.prompts = PackedLayout(bounds, bounds, index, tuple((n, n) for n in lengths))
        return ids_T[None], positions_T[None], torch.tensor(last).to(self.device)

    def attend(self, layer: int, query_1HTd, key_1GTd, value_1GTd, scaling: float) -> torch.Tensor:
        """Writes the step's keys and values to their slots; attention output (1, T, H, d)."""
        keys, values = self.layers[layer]
        keys[self.slot_T, :, self.position_T] = key_1GTd[0].transpose(0, 1)
        values[self.slot_T, :, self.position_T] = value_1GTd[0].transpose(0, 1)
        n, tokens = self.decoding, query_1HTd.shape[2]
        parts = []
        if n:
            parts.append(self._decode(keys, values, query_1HTd[0, :, :n].transpose(0, 1), scaling))
        if n < tokens:
            rest = (x[:, :, n:] for x in (query_1HTd, key_1GTd, value_1GTd))
            parts.append(packed_attention(*rest, self.prompts, scaling))
        return torch.cat(parts, dim=1)

    def _decode(self, keys, values, query_SHd, scaling: float) -> torch.Tensor:
        """One query per answer; the query heads of a key head stand as its rows, so no key is copied."""
        n, heads, dim = query_SHd.shape
        length = self.mask_S11L.shape[-1]
        out = F.scaled_dot_product_attention(
            query_SHd.reshape(n, keys.shape[1], -1, dim),
            keys[:n, :, :length],
            values[:n, :, :length],
            attn_mask=self.mask_S11L,
            scale=scaling,
        )
        return out.reshape(1, n, heads, dim)

    @torch.inference_mode()
    def keep(self, active: list[_Answer], sampling: Sampling) -> list[_Answer]:
        """The unfinished answers in slots 0, 1, ...: the last ones move into the places of those that ended."""
        going = [slot for slot, answer in enumerate(active) if not answer.finished(sampling)]
        holes = [slot for slot in range(len(going)) if active[slot].finished(sampling)]
        movers = [slot for slot in going if slot >= len(going)]
        if holes:
            to, source = torch.tensor([holes, movers]).to(self.device)
            length = max(active[slot].cached for slot in movers)
            for layer in self.layers:
                for tensor in layer:
                    tensor[to, :, :length] = tensor[source, :, :length]
        moved = dict(zip(holes, movers, strict=True))
        return [active[moved.get(slot, slot)] for slot in range(len(going))]


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


def sample(logits_SV: torch.Tensor, uniform_S: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Token ids (S,): argmax at temperature 0, else the inverse CDF at `uniform_S` within the top-p nucleus."""
    if temperature == 0:
        return logits_SV.argmax(-1)
    probs_SV = torch.softmax(logits_SV / temperature, dim=-1)
    if top_p < 1:
        probs_SV = probs_SV.where(probs_SV >= _nucleus_floor(probs_SV, top_p), 0.0)
    cdf_SV = probs_SV.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cdf_SV, (uniform_S * cdf_SV[:, -1])[:, None], right=True)[:, 0]


def _nucleus_floor(probs_SV: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest probability (S, 1) in the nucleus: fewest likeliest tokens of mass >= top_p, ties included."""
    candidates = min(NUCLEUS, probs_SV.shape[1])
    while True:
        top = probs_SV.topk(candidates).values
        mass = top.cumsum(-1, dtype=torch.float64)
        if candidates == probs_SV.shape[1] or bool((mass[:, -1] >= top_p).all()):
            size = (mass < top_p).sum(-1, keepdim=True).clamp(max=candidates - 1)
            return top.gather(1, size)
        candidates = min(8 * candidates, probs_SV.shape[1])
