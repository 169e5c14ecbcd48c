"""Every format of docs/data.md: what is learnt of its row, what is told of unused columns, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_rows import FORMATS, page
from hypothesis import given
from hypothesis import strategies as st
from test_data import RENDERER, load, write

from spinfast.data import formats
from spinfast.data.conversations import RowError
from spinfast.data.formats import BEFORE, Noting, recognise
from spinfast.errors import UserError

DOCS = Path(__file__).parents[1] / "docs" / "data.md"


def test_the_page_of_formats_is_what_the_rows_give():
    assert DOCS.read_text() == page(), "python tests/data_rows.py > docs/data.md"


def test_every_format_there_is_has_a_row():
    known = (*formats.FORMATS, *formats.ALONE)
    shown = {known.index(recognise("x", {*row}, alone="grpo" in who)) for who, rows in FORMATS.values() for row in rows}
    aliases = {form for form in known if {"response", "answers"} & {*form.needs}}
    aliases |= {form for form in formats.ALONE if form.needs[0] in ("question", "instruction")}
    assert {*range(len(known))} - shown == {known.index(form) for form in aliases}


def one(tmp_path, row, **kwargs):
    return load(write(tmp_path / "data.jsonl", [row]), **kwargs)


def texts(example):
    return [RENDERER.text(answer) for answer in (example.real_ids, *example.others)]


QUESTION = {"role": "user", "content": "How many?"}


def said(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "How many?", "chosen": "12", "rejected": "9"},
        {"question": "How many?", "chosen": "12", "rejected": "9"},
        {"prompt": [QUESTION], "chosen": [said("12")], "rejected": [said("9")]},
        {"prompt": "How many?", "chosen": said("12"), "rejected": said("9")},
        {"chosen": [QUESTION, said("12")], "rejected": [QUESTION, said("9")]},
        {"prompt": "How many?", "chosen": [QUESTION, said("12")], "rejected": [QUESTION, said("9")]},  # UltraFeedback's
        {"chosen": "\n\nHuman: How many?\n\nAssistant: 12", "rejected": "\n\nHuman: How many?\n\nAssistant: 9"},
        {"real": [QUESTION, said("12")], "generated": [QUESTION, said("9")]},
        {"prompt": "How many?", "responses": ["12", "9"]},
        {"prompt": "How many?", "answers": ["9", "12"], "scores": [0, 1]},
    ],
)
def test_pairs_in_every_form_are_one(tmp_path, row):
    (example,) = one(tmp_path, row).examples
    assert (example.messages, texts(example)) == ((QUESTION,), ["12", "9"])
    assert example.ranked.prompt_ids == RENDERER.prompt_ids([QUESTION])


def test_the_prompt_of_two_conversations_is_what_both_begin_with(tmp_path):
    start = [QUESTION, said("Eggs?"), {"role": "user", "content": "Eggs."}]
    row = {"chosen": [*start, said("12")], "rejected": [*start, said("9")]}
    assert one(tmp_path, row).examples[0].messages == (*start,)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "12", "rejected": "9"}, "no prompt"),
        ({"prompt": "How many?", "chosen": "12", "rejected": None}, "no rejected: it is null"),
        ({"chosen": [QUESTION, said("12")], "rejected": [said("9")]}, "one begins with a prompt, the other does not"),
        (
            {"chosen": [QUESTION, said("1")], "rejected": [{"role": "user", "content": "Who?"}, said("9")]},
            "share no prompt",
        ),
        ({"prompt": "?", "chosen": [said("1"), QUESTION, said("2")], "rejected": "9"}, "expected one turn after"),
        ({"prompt": "?", "completion": "12", "label": 3}, "label: expected true or false, got 3"),
        ({"prompt": "?", "completion": "12", "label": None}, "label: expected true or false, got None"),
        ({"prompt": "?", "responses": ["12"]}, "expected a list of two answers or more"),
        ({"prompt": "?", "responses": ["12", "9"], "scores": [1]}, "expected a number for each of 2 answers"),
        ({"prompt": "?", "responses": ["12", "9"], "scores": [1, 1]}, "none is better than another"),
        ({"instruction": "?", "output": "12", "history": ["a"]}, "expected pairs of a question and an answer"),
        ({"instruction": "?", "output": "12", "history": ["ab"]}, "expected pairs of a question and an answer"),
        ({"instruction": "?", "output": "12", "history": 5}, "expected pairs of a question and an answer"),
        ({"prompt": "?", "responses": ["12", "9"], "scores": 5}, "expected a number for each of 2 answers"),
        ({"prompt": "?", "completion": [said("12"), QUESTION, said("9")], "label": True}, "expected one turn beside"),
    ],
)
def test_a_row_that_is_no_example_is_told_by_its_line_and_counted_where_asked(tmp_path, row, message):
    good = {"chosen": [QUESTION, said("12")], "rejected": [QUESTION, said("9")]}
    if not {"chosen", "rejected"} <= row.keys():
        good = {
            key: {"label": True, "responses": ["a", "b"], "scores": [2, 1], "history": []}.get(key, "good")
            for key in row
        }
    source = write(tmp_path / "data.jsonl", [good, {**dict.fromkeys(good), **row}])
    with pytest.raises(UserError, match=rf"data\.jsonl, line 2: .*{message}"):
        load(source)
    assert sum(load(source, bad_rows="skip").rejected.values()) == 1


def test_answers_of_equal_score_are_taken_once(tmp_path):
    row = {"prompt": "?", "responses": ["a", "b", "c", "d"], "scores": [1, 3, 3, 2]}
    loaded = one(tmp_path, row)
    assert texts(loaded.examples[0]) == ["b", "d", "a"]
    assert any("answers of equal score" in warning for warning in loaded.warnings)


def test_an_undesirable_answer_is_no_reference(tmp_path):
    rows = [{"prompt": str(label), "completion": "#### 5", "label": label} for label in (True, False)]
    assert [e.reference for e in load(write(tmp_path / "data.jsonl", rows)).examples] in (["5", None], [None, "5"])


def test_equal_answers_of_a_ranking_are_taken_once(tmp_path):
    assert texts(one(tmp_path, {"prompt": "?", "responses": ["b", "c", "c", "b"]}).examples[0]) == ["b", "c"]


def test_equal_answers_and_equal_rows_are_counted(tmp_path):
    rows = [{"prompt": "?", "chosen": "a", "rejected": worse} for worse in ("b", "a", "b")]
    assert load(write(tmp_path / "data.jsonl", rows)).rejected == {"chosen equals rejected": 1, "duplicate": 1}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "?", "chosen": "a", "rejected": "b", "messages": [1]}, ["messages"]),
        (
            {"messages": [QUESTION, said("a")], "label": 1, "prompt": "x", "images": ["x"]},
            ["label", "prompt", "images"],
        ),
        ({"text": "x", "label": 1, "tools": [1]}, ["label", "tools"]),
        ({"question": "?", "answer": "a", "id": 7, "tools": [], "reference": "x", "system": ""}, []),
        ({"prompt": "Translate:", "input": "Hallo", "completion": "Hello"}, ["input"]),
        ({"instruction": "In French.", "question": "?", "answer": "a"}, ["instruction"]),
        ({"prompt": [QUESTION], "history": [["a", "b"]], "completion": "c"}, ["history"]),
        ({"prompt": "?", "completion": "a", "reasoning": "Well.", "weight": 0.5}, ["reasoning", "weight"]),
    ],
)
def test_a_column_that_looks_like_one_to_learn_from_and_is_not_used_is_named(tmp_path, row, expected):
    warnings = one(tmp_path, row).warnings
    named = [line.partition("; ")[2].rpartition(" ")[0].rpartition(" not")[0] for line in warnings if "read as" in line]
    assert [name.removesuffix(" is").removesuffix(" are") for name in named] == (
        [", ".join(expected)] if expected else []
    )


def test_the_line_about_unused_columns_names_the_format(tmp_path):
    loaded = one(tmp_path, {"prompt": "?", "chosen": "a", "rejected": "b", "text": "x", "label": True})
    assert any("read as chosen + rejected; text, label are not used" in warning for warning in loaded.warnings)


def test_token_ids_are_taken_as_they_are(tmp_path):
    text = one(tmp_path, {"text": "Twelve eggs."}).examples[0]
    ids = [*text.prompt_ids, *text.real_ids]
    rows = [
        {"input_ids": ids},
        {"input_ids": ids, "labels": [-100, -100, *ids[2:-1], -100]},
        {"input_ids": [*ids[::-1], 0], "attention_mask": [1] * len(ids) + [0]},
    ]
    loaded = load(write(tmp_path / "ids.jsonl", rows)).examples
    plain, masked, padded = sorted(loaded, key=lambda example: example.index)
    assert (plain.prompt_ids, plain.real_ids, plain.scored) == (text.prompt_ids, text.real_ids, None)
    assert (masked.prompt_ids, masked.real_ids) == (tuple(ids[:2]), tuple(ids[2:]))
    assert masked.scored == (*[True] * (len(ids) - 3), False)
    assert [*padded.prompt_ids, *padded.real_ids] == ids[::-1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"input_ids": [1, 10**6]}, "strange token ids"),
        ({"input_ids": [5]}, "nothing to learn"),
        ({"input_ids": [5, 6], "labels": [5, -100]}, "nothing to learn"),
        ({"input_ids": [5, 6], "labels": [6, 5]}, "labels that are others"),
        ({"input_ids": [5, 6], "labels": [5]}, "labels that are others"),
        ({"input_ids": "5 6"}, "not token ids"),
        ({"input_ids": 1}, "not token ids"),
        ({"input_ids": None, "labels": [5, 6]}, "not token ids"),
        ({"input_ids": [5, 6.0]}, "not token ids"),
    ],
)
def test_token_ids_that_are_none_are_refused(tmp_path, row, reason):
    rows = [{"input_ids": [5, 6]}, row]
    assert load(write(tmp_path / "ids.jsonl", rows), bad_rows="skip").rejected == {reason: 1}


@pytest.mark.parametrize(("turns", "expected"), [("first", ["a"]), ("last", ["b"]), ("all", ["a", "b"])])
def test_turns_say_which_answers_are_learnt(tmp_path, turns, expected):
    loaded = one(tmp_path, {"messages": [QUESTION, said("a"), QUESTION, said("b")]}, turns=turns)
    (example,) = loaded.examples
    scored = example.scored or (True,) * len(example.real_ids)
    learnt = [token for token, used in zip(example.real_ids, scored, strict=True) if used]
    assert RENDERER.tokenizer.decode(learnt) == "".join(f"{text}<|im_end|>" for text in expected)
    assert any("data.turns" in warning for warning in loaded.warnings) == (turns != "all")


@pytest.mark.parametrize("overlong", ["drop", "cut"])
def test_answers_that_are_too_long_are_counted_or_cut(tmp_path, overlong):
    rows = [{"prompt": "?", "chosen": "a" * n, "rejected": "b" * 3} for n in (2, 40)]
    loaded = load(write(tmp_path / "data.jsonl", rows), max_answer_tokens=6, overlong=overlong)
    if overlong == "drop":
        assert loaded.rejected == {"answer longer than 6 tokens": 1}
    else:
        assert [len(example.real_ids) for example in loaded.examples][1] == 6
        assert RENDERER.end_id not in loaded.examples[1].real_ids
        assert any("1 rows have answers that are cut after 6 tokens" in warning for warning in loaded.warnings)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [QUESTION, said("12")], "target": 1}, "prompt: expected turns that end in a user's"),
        ({"prompt": [], "target": 1}, "prompt: expected turns that end in a user's"),
        ({"prompt": None, "target": 1}, "no prompt: it is null"),
        ({"question": "", "answer": "12"}, "no question: it is empty"),
        ({"messages": [said("12")]}, "no assistant turn after a user's"),
        ({"messages": [QUESTION, {"role": "critic", "content": "x"}]}, "turn 2 has role 'critic'"),
    ],
)
def test_a_row_that_asks_nothing_is_no_prompt_either(tmp_path, row, message):
    with pytest.raises(UserError, match=rf"line 1: .*{message}"):
        one(tmp_path, row, prompts_alone=True)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["", "x", "\n\nHuman: a\n\nAssistant: b"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "user", "assistant"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.sampled_from((*formats.FORMATS, *formats.ALONE)), st.booleans(), st.data())
def test_any_value_in_any_column_is_parsed_or_refused(form, alone, data):
    row = {column: data.draw(VALUES) for column in (*form.needs, *BEFORE, "scores")}
    try:
        parsed, _ = formats.parsed(form, Noting(row), alone)
    except RowError:
        return
    assert parsed.text or all(message["role"] for message in parsed.conversation)
    json.dumps(parsed.conversation)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3", "prompt": "Add. 1 2 3"}, ["Add.\n\n1 2"]),
        ({"instruction": "Who?", "context": "Ann came.", "response": "Ann"}, ["Who?\n\nAnn came."]),  # Dolly's
        ({"system_prompt": "Brief.", "question": "?", "chosen": "a", "rejected": "b"}, ["Brief.", "?"]),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " a", "rejected": " b"}, ["Hi"]),
        ({"system": "S", "messages": [{"role": "system", "content": "S"}, QUESTION, said("a")]}, ["S", "How many?"]),
        (
            {
                "prompt": [{"role": "system", "content": "S"}, QUESTION],
                "chosen": [QUESTION, said("a")],
                "rejected": [QUESTION, said("b")],
            },
            ["S", "How many?"],
        ),
    ],
)
def test_prompts_as_people_spread_them_over_columns(tmp_path, row, expected):
    assert [message["content"] for message in one(tmp_path, row).examples[0].messages] == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Another?", "chosen": [QUESTION, said("a")], "rejected": [QUESTION, said("b")]}, "differ"),
        ({"system": "T", "messages": [{"role": "system", "content": "S"}, QUESTION, said("a")]}, "differ"),
        ({"prompt": "?", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2}, "chosen scores 1"),
    ],
)
def test_columns_that_contradict_each_other_are_told(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        one(tmp_path, row)
