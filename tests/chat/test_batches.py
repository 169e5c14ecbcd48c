"""Batches that requests join and leave: the answers of generate(), under any adapter, whatever goes on beside."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from spinfast.errors import UserError
from spinfast.generation import Voices
from spinfast.types import Request, Sampling

GREEDY = Sampling(0.0, 1.0, 12, ())
DRAWN = Sampling(0.9, 0.9, 12, tuple(range(2, 384, 29)))


def asked(count, seed=0, longest=50):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=draw).tolist()
    return [
        Request(i, tuple(torch.randint(3, 384, (n,), generator=draw).tolist()), seed=100 + i)
        for i, n in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def alone(speaker):
    """(voice, request) -> the tokens that generate() gives."""
    generator, found = speaker.voices.generator, {}
    for voice, adapter in speaker.voices.adapters.items():
        for request in asked(9):
            sampling = DRAWN if request.index % 2 else GREEDY
            (completion,) = generator.generate([request], sampling, adapter)
            found[voice, request.index] = completion.token_ids
    assert len({*found.values()}) > 20, "the case is too easy"
    return found


@settings(max_examples=15)
@given(st.data())
def test_whoever_joins_or_leaves_the_others_answer_as_alone(speaker, alone, data):
    voices = Voices(speaker.voices.generator, speaker.voices.adapters)
    waiting = data.draw(st.permutations([(voice, r) for voice in speaker.names for r in asked(9)]))[:14]
    waiting = [(voice, Request(1000 * n + r.index, r.prompt_ids, r.seed)) for n, (voice, r) in enumerate(waiting)]
    written, left, place = {}, set(), {r.index: (voice, r) for voice, r in waiting}
    while waiting or len(voices):
        for voice, request in waiting[: (joining := data.draw(st.integers(0 if len(voices) else 1, 4)))]:
            voices.add(voice, request, DRAWN if request.index % 1000 % 2 else GREEDY)
            written[request.index] = []
        waiting = waiting[joining:]
        if written and data.draw(st.integers(0, 9)) == 0:
            index = data.draw(st.sampled_from(sorted(written)))
            voices.drop(place[index][1])
            left.add(index)
        if len(voices):
            for token in voices.step():
                assert token.request.index not in left
                written[token.request.index].append(token.id)
                if token.ends:
                    left.add(token.request.index)
                    expected = alone[place[token.request.index][0], token.request.index % 1000]
                    assert tuple(written[token.request.index]) == expected
    assert left == place.keys()


def test_more_than_fit_wait_and_the_cache_grows_with_the_answers(speaker, alone):
    generator = speaker.voices.generator
    batch, done = generator.batch(None), {}
    for request in asked(9):
        batch.add(request, DRAWN if request.index % 2 else GREEDY)
    assert batch.cache.layers[0][0].numel() == 0
    while len(batch):
        for token in batch.step():
            done.setdefault(token.request.index, []).append(token.id)
        slots, _, length, _ = batch.cache.layers[0][0].shape
        assert slots <= 2 * generator.batch_size
        assert length <= 256
    assert {i: tuple(ids) for i, ids in done.items()} == {i: alone["base", i] for i in range(9)}


def test_greedy_answers_are_transformers_own(speaker, adapters, alone):
    from peft import PeftModel

    for voice in speaker.names:
        model = AutoModelForCausalLM.from_pretrained(speaker.path, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, adapters[voice]) if voice in adapters else model
        for request in asked(9)[::2]:
            ids = torch.tensor([request.prompt_ids])
            out = model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
            assert tuple(out[0, ids.shape[1] :].tolist()) == alone[voice, request.index]


def test_batches_that_cannot_take_turns_come_in_the_order_of_asking():
    class Batch(list):
        def add(self, request, sampling):
            self.append(request)

        def step(self):
            log.extend(self)
            self.clear()
            return []

    class Generator:
        max_model_len, takes_turns = 100, False

        def batch(self, adapter):
            return Batch()

    log, voices = [], Voices(Generator(), {"base": None, "a": None})
    requests = [Request(i, (1,), 0) for i in range(5)]
    for voice, request in zip(("a", "a", "base", "a", "base"), requests, strict=True):
        voices.add(voice, request, GREEDY)
    turns = []
    while len(voices):
        before = len(log)
        voices.step()
        turns.append((voices.turn, [r.index for r in log[before:]]))
    assert turns == [("a", [0, 1]), ("base", [2]), ("a", [3]), ("base", [4])]


def test_a_request_that_does_not_fit_is_refused_before_it_waits(speaker):
    voices = Voices(speaker.voices.generator, speaker.voices.adapters)
    with pytest.raises(UserError, match="do not fit the context of 512"):
        voices.add("base", Request(0, (5,) * 505, 0), GREEDY)
    assert len(voices) == 0
