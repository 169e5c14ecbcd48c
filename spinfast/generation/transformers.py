"""Answers by the policy's own module: continuous batching over a static K/V cache, no copy of the weights.

Every step is one forward of one packed row [one token per answer in progress | the prompts admitted now], so the
weights are read once for both. The cache is the attention layout of that step (attention.py asks it): decoding rows
attend to their slot, trimmed to the longest answer in steps of 64; prompts attend to themselves, segment by segment.
An answer that ends leaves the batch at once, the last slot moves into its place, and a waiting prompt gets the room.
A further sample of a prompt in the cache starts as a decoding row: it gets a copy of the prompt's keys and values, and
its first step feeds the prompt's last token.

A token is drawn with one uniform per (request, step), see draw.py, so that the draw does not depend on the batch.

Shape suffixes: T packed tokens, S answers scored in a step, V vocabulary, H query heads, G key/value heads, d head
dim, L cached positions, 1 the batch of one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F

from spinfast.generation import with_sampling
from spinfast.generation.draw import sample, uniform
from spinfast.generation.slots import Answer, SlotCache, source_of
from spinfast.policy import Policy
from spinfast.policy.adapters.files import settings
from spinfast.policy.quantised import dense
from spinfast.types import Adapter, Completion, Request, Sampling, Token

PREFILL_TOKENS = 1024  # prompt tokens admitted in one step
SAMPLED_ROWS = 16  # rows of logits sampled together: their fp32 copies stay in the cache


class TransformersGenerator:
    """Generates with the policy's module. An adapter that is not the live one is swapped in from answer to answer.

    Same requests, batch size and order: same tokens. The random stream depends on the request's seed alone. Measured
    on SmolLM2-135M, 24 answers of up to 40 tokens, order reversed or batch 5 for 24: in fp32 all tokens and log-probs
    were equal to the bit (x86, MKL; without slots.MIN_ROWS one answer forked); in bf16, where a GEMM rounds a row
    differently for different numbers of rows, 6 and 3 of the 24 stayed the same.
    """

    name, takes_turns = "transformers", True

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
        self._taken: Adapter | None = None  # what the last step of a batch made of the policy

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
        return self._answers(requests, sampling, self._player(adapter))

    def generate_live(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        """The same by the policy as it stands, which may have no values."""
        return self._answers(requests, sampling, nullcontext)

    def _answers(self, requests, sampling, player: Callable[[], AbstractContextManager]) -> Iterator[Completion]:
        asked = with_sampling(requests, sampling, self.max_model_len)
        stream = self._stream(deque(Answer(*each) for each in asked), player)
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
    def evaluating(self) -> Iterator[None]:
        model = self.policy.model
        if not model.training:  # or each token would go through all modules twice
            yield
            return
        model.eval()
        try:
            yield
        finally:
            model.train()

    def batch(self, adapter: Adapter | None) -> SlotBatch:
        """Answers token by token. The policy is left to whoever steps batches: it stays what the last step made it."""
        return SlotBatch(self, SlotCache(self.policy, 0, 0, self.attention), self._taker(adapter))

    def _taker(self, adapter: Adapter | None) -> Callable[[], AbstractContextManager]:
        """What makes the policy base + adapter and leaves it so."""

        def take() -> AbstractContextManager:
            if self._taken is not adapter:
                self.policy.load_adapter(adapter)
                self._taken = adapter
            return nullcontext()

        return take if adapter else self.policy.without_adapter

    def _stream(self, waiting: deque[Answer], player: Callable[[], AbstractContextManager]) -> Iterator[Completion]:
        """Whoever takes the answers finds the policy as it was: it is another one only while answers are made."""
        if not waiting:
            return
        longest = max(len(answer.request.prompt_ids) + answer.sampling.max_tokens for answer in waiting)
        cache = SlotCache(self.policy, min(self.batch_size, len(waiting)), longest, self.attention)
        batch = SlotBatch(self, cache, player, waiting)
        with dense(self.policy.decoder.layers[: self.dense_layers]):
            while len(batch):
                ended: list[Answer] = []
                with player(), self.evaluating():
                    while not ended:
                        ended = [answer for answer in batch.advance() if answer.finished]
                yield from (answer.completion() for answer in ended)


class SlotBatch:
    """Answers in progress, a slot of the cache each; requests join and leave between two steps."""

    def __init__(
        self,
        generator: TransformersGenerator,
        cache: SlotCache,
        player: Callable[[], AbstractContextManager],
        waiting: Iterable[Answer] = (),
    ):
        self.generator, self.cache, self.player = generator, cache, player
        self.waiting, self.active = deque(waiting), []

    def __len__(self) -> int:
        return len(self.waiting) + len(self.active)

    def add(self, request: Request, sampling: Sampling) -> None:
        self.waiting += [Answer(*each) for each in with_sampling([request], sampling, self.generator.max_model_len)]

    def drop(self, request: Request) -> None:
        self.waiting = deque(answer for answer in self.waiting if answer.request != request)
        for answer in self.active:
            answer.dropped |= answer.request == request
        self.active = self.cache.keep(self.active)

    def step(self) -> list[Token]:
        with self.player(), self.generator.evaluating():
            return [answer.token() for answer in self.advance()]

    def advance(self) -> list[Answer]:
        """Every answer in progress, a token longer; those that ended leave the batch."""
        again, fresh = _admit(self.waiting, self.active, self.generator.batch_size - len(self.active))
        answers = [*self.active, *again, *fresh]
        self.cache.make_room(len(answers), max(answer.cached for answer in answers))
        sampled = self._forward(again, fresh)
        for answer, (token, logp) in zip(answers, sampled, strict=True):
            answer.append(int(token), logp)
        self.active = self.cache.keep(answers)
        return answers

    @torch.inference_mode()
    def _forward(self, again: list[Answer], fresh: list[Answer]) -> list[tuple[float, float]]:
        """The next (token, log-prob) of every active and admitted answer, read back in one sync."""
        policy = self.generator.policy
        ids_1T, positions_1T, last_S = self.cache.plan(self.active, again, fresh)
        output = policy.decoder(input_ids=ids_1T, position_ids=positions_1T, use_cache=False, layout=self.cache)
        answers = self.active + again + fresh
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


def _by_distribution(answers: Sequence[Answer]) -> dict[tuple[float, float], list[int]]:
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


def _admit(waiting: deque[Answer], active: list[Answer], room: int) -> tuple[list[Answer], list[Answer]]:
    """As many waiting answers as there are free slots, within the step's token budget (one always fits).

    First those whose prompt is in the cache, or will be: an active answer's or one admitted now; then the others.
    """
    again, fresh, tokens = [], [], 0
    while waiting and len(again) + len(fresh) < room:
        answer = waiting[0]
        known = source_of(answer, active + fresh) is not None
        tokens += 1 if known else len(answer.request.prompt_ids)
        if (again or fresh) and tokens > PREFILL_TOKENS:
            break
        answer.shared = len(answer.request.prompt_ids) - 1 if known else 0
        (again if known else fresh).append(answer)
        waiting.popleft()
    return again, fresh
