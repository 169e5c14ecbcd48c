"""One budget for all texts: rows as plain text trains them, twins of the same tokens, runs of words in common."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import closing

import numpy as np
import pytest
from fixtures import LINES, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from test_methods import configured, opened
from test_run import train_rows
from tokenizers.processors import TemplateProcessing

from spinfast import methods
from spinfast.data.examples import load_examples
from spinfast.data.readers import Table
from spinfast.data.renderer import Renderer
from spinfast.errors import UserError
from spinfast.methods.run import begin
from spinfast.packing import pack
from spinfast.progress import Display
from spinfast.store.record import RunDir
from spinfast.studies.samples import Sample, contamination, encode, mixture, take, token_shuffled
from spinfast.studies.texts import Text

RENDERER = Renderer(tiny_tokenizer())
LONG = Text("long", "\n".join(f"{line} {i}" for i in range(40) for line in LINES))
SHORT = Text("short", LINES[1])


def ids_of(sample: Sample) -> Counter:
    return Counter(token for row in sample.rows for token in row)


def trained(sample: Sample) -> int:
    return sum(example.group.lengths[0] for example in sample.examples(RENDERER))


def with_bos() -> Renderer:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    return Renderer(tokenizer)


BOS = with_bos()


@pytest.mark.parametrize("renderer", [RENDERER, BOS], ids=["no bos", "bos"])
def test_rows_are_what_sft_makes_of_plain_text(renderer):
    encoded = encode(LONG, renderer)
    sample = take(encoded, tokens=500, length=32, seed=3)
    examples, compared = sample.examples(renderer), 0
    assert [len(row) for row in sample.rows[:-1]] == [32] * (len(examples) - 1)
    for row, example in zip(sample.rows[:-1], examples, strict=False):
        piece = row[len(encoded.before) : len(row) - len(encoded.after)]
        words = renderer.tokenizer.decode(piece)
        if tuple(renderer.tokenizer(words, add_special_tokens=False).input_ids) == piece:  # a cut word may not be
            table = Table("t", ("text",), 1, lambda i, words=words: {"text": words}, str)
            loaded = load_examples(table, renderer=renderer, max_prompt_tokens=99, max_answer_tokens=99).examples[0]
            assert (loaded.prompt_ids, loaded.real_ids) == (example.prompt_ids, example.real_ids)
            compared += 1
    assert compared > 5


@given(tokens=st.integers(1, 3000), length=st.integers(4, 70), seed=st.integers(0, 5), bos=st.booleans())
def test_every_text_trains_exactly_the_budget_in_equal_rows(tokens, length, seed, bos):
    renderer = RENDERER if not bos else BOS
    encoded = [encode(text, renderer) for text in (LONG, SHORT)]
    samples = [take(one, tokens, length, seed) for one in encoded]
    samples += [token_shuffled(sample, seed) for sample in samples]
    samples.append(mixture(encoded, tokens, length, seed))
    for sample in samples:
        assert trained(sample) == tokens == sum(len(row) - 1 for row in sample.rows)
        assert [len(row) for row in sample.rows] == [len(row) for row in samples[0].rows]
    for sample, twin in zip(samples[:2], samples[2:4], strict=True):
        assert ids_of(sample) == ids_of(twin)


def test_passes_and_the_places_that_are_drawn():
    encoded = encode(LONG, RENDERER)
    n, size = len(encoded.ids), 31
    sample = take(encoded, tokens=10 * 31, length=32, seed=0)
    assert sample.passes == 10 * size / n
    assert len({*sample.rows}) == 10
    assert sample.fingerprint == take(encoded, 310, 32, 0).fingerprint != take(encoded, 310, 32, 1).fingerprint
    stream = encoded.ids.tolist()
    for row in sample.rows:
        assert any(stream[i : i + size] == list(row[:-1]) for i in range(n))
    short = encode(SHORT, RENDERER)
    repeated = take(short, tokens=10 * 31, length=32, seed=0)
    assert repeated.passes == 10 * size / len(short.ids) > 2
    drawn = np.concatenate([row[:-1] for row in repeated.rows])
    assert (drawn[: -len(short.ids)] == drawn[len(short.ids) :]).all()


def test_a_twin_is_shuffled_and_comes_again_as_its_text_does():
    encoded = encode(SHORT, RENDERER)
    sample = take(encoded, tokens=310, length=32, seed=0)
    twin = token_shuffled(sample, 0)
    assert twin.rows != sample.rows
    assert twin.fingerprint != token_shuffled(sample, 1).fingerprint
    drawn, n = np.concatenate([row[:-1] for row in twin.rows]), len(encoded.ids)
    assert (drawn[:-n] == drawn[n:]).all()
    assert all(row[-1] == RENDERER.tokenizer.eos_token_id for row in twin.rows)


def test_a_mixture_has_a_stretch_of_each_text():
    encoded = [encode(Text(letter, letter * 3000), RENDERER) for letter in "abc"]
    counts = ids_of(mixture(encoded, tokens=930, length=32, seed=0))
    letters = Counter({RENDERER.tokenizer.decode([token])[:1]: 0 for token in counts})
    for token, count in counts.items():
        letters[RENDERER.tokenizer.decode([token])[:1]] += count
    assert all(letters[letter] >= 300 for letter in "abc")


@pytest.mark.parametrize(("tokens", "length"), [(0, 32), (5, 1)])
def test_a_budget_without_room_is_refused(tokens, length):
    with pytest.raises(UserError, match="expected room for a piece"):
        take(encode(SHORT, RENDERER), tokens, length, 0)


def test_rows_pack_to_the_tokens_they_train():
    groups = [example.group for example in take(encode(LONG, RENDERER), 500, 32, 0).examples(RENDERER)]
    assert pack(groups, range(len(groups))).scored_N.numel() == 500


def test_a_text_and_its_twin_train_as_they_are(tmp_path, tiny_model):
    """The ids reach the optimizer undecoded: equal steps and tokens, and only the text that has an order is learnt."""
    settings = {"lr": 1e-2, "groups_per_step": 4, "epochs": 1}
    config = configured(
        tmp_path, tiny_model("llama"), method="sft", spin=None, sft=settings, evaluate={"problems": 0, "pairs": 0}
    )
    sample = take(encode(LONG, RENDERER), tokens=1240, length=32, seed=0)
    rows = {}
    with opened(config, tmp_path / "first") as run:
        for name, one in (("text", sample), ("twin", token_shuffled(sample, 0))):
            with closing(RunDir(tmp_path / name, config)) as place:
                list(methods.play(begin(run.session, place, Display(), one.examples(RENDERER), [])))
            rows[name] = train_rows(tmp_path / name)
    assert [row["train/tokens"] for row in rows["text"]] == [row["train/tokens"] for row in rows["twin"]]
    assert sum(row["train/tokens"] for row in rows["text"]) == 1240 + len(sample.rows)  # the first of each
    assert rows["text"][-1]["train/loss"] < rows["twin"][-1]["train/loss"] - 0.2


# Contamination ------------------------------------------------------------------------------------------------------


def brute(text: str, items: list[str], n: int) -> list[float]:
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    shares = []
    for item in items:
        own = re.findall(r"\w+|[^\w\s]", item.lower())
        size = min(n, len(own))
        runs = {tuple(own[i : i + size]) for i in range(len(own) - size + 1)}
        shares.append(sum(any(words[i : i + size] == list(run) for i in range(len(words))) for run in runs) / len(runs))
    return shares


WORDS = st.lists(st.sampled_from(["one", "Two", "3", "+"]), min_size=1, max_size=12).map(" ".join)


@given(text=WORDS, items=st.lists(WORDS, min_size=1, max_size=4), n=st.integers(1, 4))
def test_contamination_counts_as_by_hand(text, items, n):
    found, expected = contamination(Text("t", text), items, n), brute(text, items, n)
    assert found.share == np.mean(np.array(expected) > 0)
    assert found.whole == sum(share == 1 for share in expected)
    assert found.worst_share == max(expected) == expected[found.worst]


def test_a_text_that_holds_an_item_is_found_out():
    item = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
    held = contamination(Text("t", f"Before. {item.upper()} After."), ["Nothing of it is here", item])
    assert (held.share, held.whole, held.worst, held.worst_share) == (0.5, 1, 1, 1.0)
    assert contamination(Text("t", item.replace("April", "June")), [item]).share == 0
