"""Text as it comes: pieces that join to what decoding everything at once gives, nothing lost at stop strings."""

import pytest
from fixtures import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spinfast.chat.text import TextStream, Until
from spinfast.types import Request, Token

TEXTS = [
    "naïve 你好 🙂👍🏽 a",
    " two  spaces",
    "<|im_start|>user\nhi<|im_end|>\n",
    "नमस्ते ½",
    "e\u0301 \ufffd end",
    "\ufffd",
]


def sentencepiece_like():
    """▁ for spaces, bytes where a character is unknown, and the first space taken away, as Llama 2's decoder does."""
    words = ["<unk>", "▁", "▁a", "a", "b", "▁the", "é", *(f"<0x{i:02X}>" for i in range(256))]
    backend = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


TOKENIZERS = {"byte level": tiny_tokenizer(), "sentencepiece": sentencepiece_like()}


def pieces(tokenizer, ids):
    stream, request = TextStream(tokenizer), Request(0, (), 0)
    found = [stream.push(Token(request, i, 0.0)) for i in ids]
    return [*found, stream.push(Token(request, 0, 0.0, "stop"))], stream.decode(ids)


@given(st.lists(st.integers(0, len(TOKENIZERS["byte level"]) - 1), max_size=40))
def test_pieces_of_any_tokens_join_to_the_whole(ids):
    """Bytes that are no text too. Of sentencepiece that cannot be: there one bad byte takes its whole run with it."""
    found, whole = pieces(TOKENIZERS["byte level"], ids)
    assert "".join(found) == whole


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(st.data())
def test_no_piece_of_a_text_holds_half_a_character(kind, data):
    tokenizer, text = TOKENIZERS[kind], data.draw(st.sampled_from(TEXTS) | st.text(max_size=30))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    found, whole = pieces(tokenizer, ids)
    assert "".join(found) == whole
    assert "".join(found).count("\ufffd") == whole.count("\ufffd")
    if kind == "byte level" and "\ufffd" not in whole:
        known = 0
        for count, piece in enumerate(found[:-1], 1):  # a character comes with the token that completes it
            known += len(piece)
            assert len(tokenizer.decode(ids[:count], skip_special_tokens=True).rstrip("\ufffd")) == known


@given(st.text("ab\n", max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.data())
def test_text_ends_before_the_first_stop_string(text, stops, data):
    until, out, rest = Until(stops), "", text
    while rest and not until.met:
        size = data.draw(st.integers(1, len(rest)))
        out, rest = out + until.push(rest[:size]), rest[size:]
    out += until.rest()
    ends = {text[: text.find(stop)] for stop in stops if stop in text}
    assert until.met == bool(ends)
    assert out in (ends or {text})
