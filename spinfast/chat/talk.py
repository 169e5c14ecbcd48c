"""A conversation with one or several voices, each with its own answers to the same questions; no terminal in it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from spinfast.chat.options import RULES
from spinfast.chat.speaker import BASE, Speaker
from spinfast.chat.text import TextStream
from spinfast.data.renderer import plain_ids
from spinfast.errors import UserError
from spinfast.generation import prompt_seed
from spinfast.types import Request, Sampling

MAX_TOKENS = 1024


@dataclass
class Settings:
    """How answers are drawn."""

    temperature: float
    top_p: float
    max_tokens: int = MAX_TOKENS
    seed: int = 0

    def set(self, name: str, text: str) -> None:
        """Raises UserError for a name that there is not, and a value that it cannot have."""
        if name not in RULES:
            raise UserError(f"{name}: expected one of {', '.join(RULES)}")
        kind, holds, expected = RULES[name]
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise UserError(f"{name}: expected {expected}, got {text!r}")
        setattr(self, name, value)

    def __str__(self) -> str:
        return ", ".join(f"{name} {getattr(self, name)}" for name in RULES)


@dataclass
class Answer:
    """What a voice said, and how fast."""

    text: str = ""
    tokens: int = 0
    ends: Literal["stop", "length", "context"] | None = None  # None: not finished, or stopped by a person
    first: float = math.nan  # seconds until its first token
    seconds: float = 0.0  # until its last one

    @property
    def rate(self) -> float:
        """Tokens per second after the first one; NaN of fewer than two."""
        return (self.tokens - 1) / (self.seconds - self.first) if self.tokens > 1 else math.nan


@dataclass
class Turn:
    question: str
    answers: dict[str, Answer] = field(default_factory=dict)
    tries: int = 0


class Talk:
    """Turns so far, who answers the next one, and how."""

    def __init__(self, speaker: Speaker, settings: Settings, system: str | None, names: tuple[str, ...] = ()):
        self.speaker, self.settings, self.system = speaker, settings, system
        self.names = names or (speaker.own,)  # several: they are compared
        self.turns: list[Turn] = []

    @property
    def rendered(self) -> bool:
        """Whether there is a chat template; without one a question is text that is continued, each for itself."""
        return self.speaker.renderer.has_template

    def messages(self, voice: str, first: int = 0, asking: bool = False) -> list[dict[str, str]]:
        """The conversation as this voice knows it, from turn number `first` on; when asking, to the last question.

        Where it was not asked, another's answer stands for its own; a question without an answer is left out.
        """
        found = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns[first:]:
            said = turn.answers.get(voice) or next(iter(turn.answers.values()), Answer())
            asked = asking and turn is self.turns[-1]
            found += [{"role": "user", "content": turn.question}] * bool(said.text or asked)
            found += [{"role": "assistant", "content": said.text}] * bool(said.text and not asked)
        return found

    def prompt(self, voice: str) -> tuple[tuple[int, ...], int]:
        """(token ids, how many of the oldest turns were left out to make room for the answer)."""
        context, number = self.speaker.context, len(self.turns)
        room = min(self.settings.max_tokens, context // 4)
        for first in range(number) if self.rendered else [number - 1]:
            if self.rendered:
                ids = self.speaker.renderer.prompt_ids(self.messages(voice, first, asking=True))
            else:
                ids = plain_ids(self.speaker.renderer.tokenizer, self.turns[-1].question)
            if len(ids) + room <= context:
                return ids, first if self.rendered else 0
        raise UserError(
            f"the question has {len(ids)} tokens with what the template adds; with {room} for the answer it does not "
            f"fit the context of {context}: shorten it, or start with a larger --context"
        )

    def ask(self, question: str) -> None:
        """A new turn. Raises UserError, and leaves the conversation as it was, where its prompt cannot be made."""
        self.turns.append(Turn(question))
        try:
            for voice in self.names:
                self.prompt(voice)
        except UserError:
            self.turns.pop()
            raise

    def retry(self) -> None:
        """The last turn has no answer again, and its next one is drawn otherwise. Raises UserError as `ask` does."""
        if not self.turns:
            raise UserError("nothing was asked yet")
        for voice in self.names:
            self.prompt(voice)
        self.turns[-1].answers, self.turns[-1].tries = {}, self.turns[-1].tries + 1

    def answer(self, voices: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        """(voice, a piece of its text) as they come; they are in the turn's answers too. Leaving early ends them."""
        turn, settings, context = self.turns[-1], self.settings, self.speaker.context
        tokenizer, stop_ids = self.speaker.renderer.tokenizer, self.speaker.renderer.stop_ids
        seed = prompt_seed(settings.seed, 0, len(self.turns), "chat", turn.tries)
        began, open_requests = time.monotonic(), {}
        for index, voice in enumerate(voices):
            ids, _ = self.prompt(voice)
            turn.answers.pop(voice, None)
            top_p = settings.top_p if settings.temperature else 1.0
            limit = min(settings.max_tokens, context - len(ids))
            cut = "context" if limit < settings.max_tokens else "length"
            request = Request(index, ids, seed)
            self.speaker.voices.add(voice, request, Sampling(settings.temperature, top_p, limit, stop_ids))
            text = TextStream(tokenizer)
            open_requests[index] = voice, request, text, cut
        for voice in voices:
            turn.answers[voice] = Answer()
        try:
            while open_requests:
                for token in self.speaker.voices.step():
                    voice, request, text, cut = open_requests[token.request.index]
                    answer, now = turn.answers[voice], time.monotonic() - began
                    answer.first = answer.first if answer.tokens else now
                    answer.tokens, answer.seconds = answer.tokens + (token.id >= 0), now
                    piece = text.push(token)
                    if token.ends:
                        answer.ends = "stop" if token.ends == "stop" else cut
                        del open_requests[request.index]
                    answer.text += piece
                    yield voice, piece
        finally:
            for _, request, *_ in open_requests.values():
                self.speaker.voices.drop(request)

    def choose(self, names: tuple[str, ...]) -> None:
        """Who answers from now on. Raises UserError for one that there is not."""
        for name in names:
            if name not in self.speaker.names:
                raise UserError(f"{name}: expected {', '.join(self.speaker.names)}, or an adapter's directory")
        if len({*names}) < len(names):
            raise UserError(f"{names[0]}: expected different ones to compare")
        self.names = names

    def compared(self) -> tuple[str, ...]:
        """The pair that is compared unless others are named: the base and who answers now."""
        other = next((name for name in (*self.names, self.speaker.own) if name != BASE), None)
        if other is None:
            raise UserError(
                "there is no adapter to compare the base with; load one with /adapter DIR, or --adapter DIR"
            )
        return BASE, other

    def record(self) -> list[dict]:
        """A row per voice, as data.source takes them. Raises UserError where nothing was said."""
        if not any(answer.text for turn in self.turns for answer in turn.answers.values()):
            raise UserError("nothing was said yet")
        how = {"model": self.speaker.model, "sampling": vars(self.settings)}
        return [{"messages": self.messages(name), "voice": name, **how} for name in self.names]
