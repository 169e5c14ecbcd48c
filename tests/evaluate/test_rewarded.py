"""How reward functions get prompts and answers where the config leaves it open."""

import pytest

from spinfast.evaluate.rewarded import has_turns
from spinfast.types import Example

TURNS = [{"role": "user", "content": "2 + 3?"}]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "2 + 3?"}, False),
        ({"question": "2 + 3?", "answer": "5"}, False),  # docs/rewards.md's own function reads text
        ({"question": "2 + 3?", "tests": [{"input": "2"}]}, False),
        ({"prompt": TURNS}, True),
        ({"messages": TURNS}, True),
        ({"conversations": [{"from": "human", "value": "2 + 3?"}]}, True),
    ],
)
def test_a_row_with_a_conversation_gives_messages_any_other_text(row, messages):
    assert has_turns(Example(0, (), "", (), (), columns=row)) is messages
