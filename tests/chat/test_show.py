"""What a screen gets of an answer, without a screen."""

import io
import re

import pytest
from rich.console import Console

from spinfast.chat.show import COLUMN, report, show, visible
from spinfast.chat.talk import Answer, Settings, Talk


def test_control_characters_are_not_shown():
    assert visible("a\x1b[2J\x07b\r\tc\n\x9bd\u200b é🙂") == "a[2Jb\tc\nd\u200b é🙂"


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (Answer("x", 5, "stop", 0.25, 2.25), "(5 tokens, 2.0 tokens/s, first after 0.25 s)"),
        (Answer("x", 1, "length", 0.25, 0.25), "(1 tokens, first after 0.25 s, cut at max_tokens: /set max_tokens N)"),
        (Answer("x", 2, None, 1.0, 2.0), "(2 tokens, 1.0 tokens/s, first after 1.00 s, stopped)"),
        (Answer(), "(stopped before its first token)"),
    ],
)
def test_the_line_below_an_answer(answer, line):
    assert report(answer) == line


@pytest.mark.parametrize("width", [20, 40, 61, 80, 200])
@pytest.mark.parametrize("voices", [("base",), ("base", "all"), ("base", "all", "few")])
def test_answers_fit_any_width_and_encoding(speaker, width, voices):
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    console = Console(file=file, width=width, height=24, force_terminal=True, color_system=None)
    talk = Talk(speaker, Settings(0.9, 1.0, 30), None, voices)
    talk.ask("What?")
    show(console, talk, lambda: False)
    file.flush()
    lines = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", file.buffer.getvalue().decode()).splitlines()
    if len(voices) > 1 and width // len(voices) >= COLUMN:
        assert max(map(len, lines[-5:])) <= width
    assert all(answer.tokens for answer in talk.turns[-1].answers.values())
