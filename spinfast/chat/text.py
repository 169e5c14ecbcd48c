"""Tokens -> text as they come. The pieces, joined, are what decoding all tokens at once gives: always with a byte-level
tokenizer, with sentencepiece where the bytes are text (else its decoder spoils the valid ones before them too).

A character may take several tokens, and a decoder may look at a token's neighbours (sentencepiece takes the first one's
space away). So a few tokens are decoded together, from where the text was last complete, and what may still become
another character waits.
"""

from __future__ import annotations

from collections.abc import Sequence

from spinfast.types import Token

UNFINISHED = "�"  # what decoders write for bytes that are no character, or not yet


class TextStream:
    """push(token) -> the text that is certain now; with the token that ends an answer, all that is left."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # those decoded together
        self._known = 0  # how many of them were complete text before
        self._given = 0  # characters of theirs that were given

    def push(self, token: Token) -> str:
        """An end token is no text, whatever it is called."""
        if token.text is not None:
            return token.text
        piece = "" if token.ends == "stop" else self._more(token.id)
        return piece + self.decode(self._ids)[self._given :] if token.ends else piece

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _more(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self.decode(self._ids)
        certain = text.rstrip(UNFINISHED)
        piece, self._given = certain[self._given :], max(self._given, len(certain))
        if certain and len(certain) == len(text):
            self._ids, self._known = self._ids[self._known :], len(self._ids) - self._known
            self._given = len(self.decode(self._ids))
        return piece


class Until:
    """Text up to the first of some stop strings, which is left out; what may begin one waits."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = stops, ""
        self.met = False

    def push(self, piece: str) -> str:
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.met, self._held = True, ""
            return text[: min(places)]
        longest = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]

    def rest(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the text's end that the stop string starts with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
