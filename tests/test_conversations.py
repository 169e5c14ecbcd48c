"""A row's turns in all the forms that data sets have them, and which of them are learnt from."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinfast.data.conversations import RowError, learnt, template_variables, turns, unpadded, with_system

CASES = Path(__file__).parent / "cases"
ARGUMENTS = {"city": "Sampleville", "days": None}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
USER, ASSISTANT = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TEXT_CALL = {"function": {"name": "get_weather", "arguments": json.dumps(ARGUMENTS)}}
RESULT = {"role": "tool", "tool_call_id": "a1", "content": ""}


def case(name):
    return [json.loads(line) for line in (CASES / name).read_text().splitlines()]


@pytest.mark.parametrize(
    ("given_turns", "expected"),
    [
        ([USER, ASSISTANT], [USER, ASSISTANT]),
        (json.dumps([USER, ASSISTANT]), [USER, ASSISTANT]),
        ([{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}], [USER, ASSISTANT]),
        ([{"role": None, "content": None, "from": "human", "value": "1+1?"}], [USER]),
        ([{"from": "User", "value": "1+1?"}, {"from": "ChatGPT", "value": "2"}], [USER, ASSISTANT]),
        ([{"role": "system", "content": ""}, {"role": "developer", "content": None}, USER], [USER]),
        ([{"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]}], [USER]),
        ([CALLING | {"content": None}], [CALLING]),
        ([{"role": "assistant", "tool_calls": json.dumps([CALL])}], [CALLING]),
        ([CALLING | {"tool_calls": [CALL["function"]]}], [CALLING]),
        ([CALLING | {"tool_calls": [TEXT_CALL]}], [CALLING]),
        ([{"role": "assistant", "content": None, "function_call": CALL["function"]}], [CALLING]),
        ([{"from": "function_call", "value": json.dumps(CALL["function"])}], [CALLING]),
        ([ASSISTANT | {"tool_calls": []}, ASSISTANT | {"tool_calls": None}], [ASSISTANT, ASSISTANT]),
        (
            [{"from": "observation", "value": "sunny"}, {"role": "function", "name": "f", "content": "dry"}],
            [{"role": "tool", "content": "sunny"}, {"role": "tool", "name": "f", "content": "dry"}],
        ),
        ([RESULT], [RESULT]),
        ([ASSISTANT | {"thinking": "one and one"}], [ASSISTANT | {"reasoning_content": "one and one"}]),
        ([ASSISTANT | {"reasoning_content": ""}], [ASSISTANT]),
    ],
)  # fmt: skip
def test_turns_have_one_form(given_turns, expected):
    assert turns(given_turns) == expected


@pytest.mark.parametrize(
    ("marks", "weight"),
    [
        ({}, 1),
        ({"weight": 0}, 0),
        ({"weight": 1.0}, 1),
        ({"weight": None}, 1),
        ({"train": False}, 0),
        ({"training": True}, 1),
        ({"trainable": False}, 0),
        ({"loss": 0}, 0),
        ({"mask": True}, 0),
        ({"masked": False}, 1),
    ],
)
def test_marked_turns(marks, weight):
    assert turns([USER, ASSISTANT | marks])[1] == ASSISTANT | ({} if weight else {"weight": 0})


@pytest.mark.parametrize(
    ("given_turns", "reason", "message"),
    [
        (None, "no conversation", "it is null"),
        ("What?", "not a conversation", "list of turns, got 'What\\?'"),
        ([USER, "x"], "not a conversation", "list of turns"),
        ([{"role": "critic", "content": "x"}], "unknown role", "turn 1 has role 'critic'; expected one of system"),
        ([{"content": "x"}], "unknown role", "turn 1 has role None"),
        ([ASSISTANT | {"content": None}], "empty text", r"no turn 1 \(assistant\): it is null"),
        ([USER | {"content": [{"type": "image", "url": "x"}]}], "not text", "part of type 'image'"),
        ([USER | {"content": {"a": 1}}], "not text", "expected text, got dict"),
        ([USER | {"content": "\ud800"}], "invalid Unicode", "half of a surrogate pair"),
        ([ASSISTANT | {"weight": 0.5}], "turn learnt in part", "weight is '0.5'"),
        ([ASSISTANT | {"train_detail": [{"begin_offset": 0}]}], "turn learnt in part", "train_detail is"),
        ([USER | {"train": True}], "turn of another marked as learnt", r"turn 1 \(user\): only assistant turns"),
        ([CALLING | {"tool_calls": ["get_weather()"]}], "not a tool call", r"turn 1 \(assistant\): expected a name"),
        ([{"from": "function_call", "value": "get_weather()"}], "not a tool call", "got 'get_weather"),
        ([CALLING | {"tool_calls": [{"name": "f", "arguments": "x="}]}], "not a tool call", "JSON object"),
        ([CALLING | {"tool_calls": [{"function": {"arguments": {}}}]}], "not a tool call", "expected a name"),
    ],
)  # fmt: skip
def test_faulty_turns(given_turns, reason, message):
    with pytest.raises(RowError, match=message) as caught:
        turns(given_turns)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.text(max_size=4) | st.sampled_from(["user", "gpt", "{}", "[]"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "weight"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_value_is_a_conversation_or_refused(value):
    try:
        messages = turns(value)
    except RowError:
        return
    assert all(isinstance(message["content"], str) for message in messages)
    assert turns(json.loads(json.dumps(messages))) == messages


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), st.sampled_from([0, 1]))))
def test_learnt_turns(marked):
    conversation = [{"role": role, "content": "x", **({} if weight else {"weight": 0})} for role, weight in marked]
    roles = [role for role, _ in marked]
    expected = [i for i, mark in enumerate(marked) if mark == ("assistant", 1) and {"user", "tool"} & set(roles[:i])]
    if not expected:
        with pytest.raises(RowError, match="no answer: "):
            learnt(conversation, "all")
        return
    assert learnt(conversation, "all") == expected
    assert learnt(conversation, "first") == expected[:1]
    assert learnt(conversation, "last") == expected[-1:]
    assert learnt(conversation, "all", start=expected[-1]) == expected[-1:]


def test_masked_answers_are_not_learnt_from():
    (weighted,) = case("05-masked-answers-trained-on/weight.jsonl")
    messages = turns(weighted["messages"])
    assert [learnt(messages, which) for which in ("first", "last", "all")] == [[3]] * 3
    (masked,) = case("05-masked-answers-trained-on/train.jsonl")
    with pytest.raises(RowError, match="every assistant turn is marked as not learnt from") as caught:
        learnt(turns(masked["conversations"]), "all")
    assert caught.value.reason == "no answer"


def test_a_system_turn_is_added_where_there_is_none():
    own = {"role": "developer", "content": "Own."}
    assert with_system([USER], "Be brief.") == [{"role": "system", "content": "Be brief."}, USER]
    assert with_system([own, USER], "Be brief.") == [own, USER]
    assert with_system([USER], None) == [USER]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, {}),
        ({"tools": [], "chat_template_kwargs": None}, {}),
        ({"tools": [TOOL]}, {"tools": [TOOL]}),
        ({"tools": json.dumps([TOOL])}, {"tools": [TOOL]}),
        ({"tools": [json.dumps(TOOL)]}, {"tools": [TOOL]}),
        ({"chat_template_kwargs": {"enable_thinking": False, "documents": None}}, {"enable_thinking": False}),
        ({"chat_template_kwargs": '{"x": false}', "tools": TOOL}, {"tools": [TOOL], "x": False}),
    ],
)  # fmt: skip
def test_template_variables(row, expected):
    assert template_variables(row) == expected


@pytest.mark.parametrize("row", [{"tools": "search the web"}, {"tools": [["f"]]}, {"chat_template_kwargs": ["x"]}])
def test_faulty_template_variables(row):
    with pytest.raises(RowError, match="expected a"):
        template_variables(row)


def test_arrow_pads_objects_with_nulls():
    other = {"type": "function", "function": {"name": "g", "parameters": {"properties": {"x": {"type": "string"}}}}}
    padded = pa.Table.from_pylist([{"tools": [TOOL, other]}, {"tools": None}]).to_pylist()
    assert padded[0]["tools"][0] != TOOL
    assert unpadded(padded[0])["tools"][1] == other
    assert unpadded(padded[0])["tools"][0]["function"]["name"] == "get_weather"
    assert unpadded(padded[1]) == {}
    assert template_variables(padded[0])["tools"][1] == other
