"""The ready functions: TRL's own beside ours on made inputs, and the popular GSM8K ones where those fail."""

from __future__ import annotations

import pytest
import trl.rewards
from hypothesis import given
from hypothesis import strategies as st
from reward_cases import HERE, batch, one, values

from spinfast.errors import UserError
from spinfast.rewards import load

IDS = st.lists(st.lists(st.integers(0, 2), max_size=30), min_size=1, max_size=4)
PARTS = ["<think>", "</think>", "<reasoning>", "</reasoning>", "<answer>", "</answer>", "\n", " ", "why", "42"]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=9).map("".join)


@given(IDS, st.integers(1, 5), st.floats(-3, 0))
def test_repetition_is_trls(ids, size, penalty):
    theirs = trl.rewards.get_repetition_penalty_reward(size, penalty)(completion_ids=ids)
    ours = values(one("repetition", ngram_size=size, max_penalty=penalty), batch(*["x"] * len(ids), ids=ids))
    assert ours == pytest.approx(theirs)


@given(IDS, st.integers(1, 28), st.data())
def test_soft_overlong_is_trls(ids, longest, data):
    cache = data.draw(st.integers(0, longest))
    theirs = trl.rewards.get_soft_overlong_punishment(longest, cache)(completion_ids=ids)
    ours = values(one("soft_overlong", max_tokens=longest, cache=cache), batch(*["x"] * len(ids), ids=ids))
    assert ours == pytest.approx(theirs)


def test_soft_overlong_begins_at_four_fifths_of_the_longest_answer():
    ids = [[0] * n for n in (80, 81, 90, 100)]
    assert values(one("soft_overlong"), batch(*"abcd", ids=ids)) == pytest.approx([0, -0.05, -0.5, -1])


@given(TEXTS)
def test_think_format_is_trls(text):
    made = batch(text, messages=True)
    assert values(one("think_format"), made) == trl.rewards.think_format_reward(made.completions)


SOLUTIONS = ["42", r"\frac{1}{3}", r"so $\boxed{x^2 + 1}$", "0.5", "no number at all", r"\{1, 2\}", "1,234", ""]
BOXED = [
    *(r"\boxed{42}", r"\boxed{\frac13}", r"$\boxed{1 + x^2}$", r"\boxed{\frac{1}{2}}", "42", r"\boxed{2,1}", "$x$"),
    *(r"<think>\boxed{1}</think> \boxed{42}", r"<think>\boxed{42}", r"\boxed{1234}", r"\boxed{\{2, 1\}}", ""),
]


@pytest.fixture(scope="module")
def pairs():
    """(completions, solutions) of every answer with every solution; needs the package math-verify."""
    pytest.importorskip("math_verify")
    return [b for b in BOXED for _ in SOLUTIONS], [s for _ in BOXED for s in SOLUTIONS]


def test_math_is_trls_accuracy(pairs):
    texts, solutions = pairs
    made = batch(*texts, messages=True, solution=solutions)
    theirs = trl.rewards.accuracy_reward(made.completions, solution=solutions)
    assert {0.0, 1.0, None} == {*theirs}
    assert values(one("math", comparison="math_verify"), made) == theirs
    assert values(one("math"), batch(*texts, solution=solutions)) == theirs


def test_math_after_the_reasoning_is_trls_reasoning_accuracy(pairs):
    texts, solutions = pairs
    made = batch(*texts, messages=True, solution=solutions)
    theirs = trl.rewards.reasoning_accuracy_reward(made.completions, solution=solutions)
    ours = values(one("math", comparison="math_verify", reasoning_delimiters=["</think>"]), made)
    assert ours == theirs


def test_cosine_is_trls(pairs):
    texts, solutions = pairs
    made = batch(*texts, messages=True, solution=solutions)
    theirs = trl.rewards.get_cosine_scaled_reward(12)(made.completions, solutions, made.completion_ids)
    assert values(one("cosine", max_tokens=12), made) == pytest.approx(theirs)


def test_math_reads_gsm8k_answers(pairs):
    answers = ["half of 9 is\n#### 4.5", "#### 12"]
    assert values(one("math"), batch(r"\boxed{\frac{9}{2}}", r"\boxed{13}", answer=answers)) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("result", "right", "wrong"),
    [
        ("2x + 1", "1 + 2x", "1"),
        (r"\{1, 2\}", r"\{2, 1\}", r"\{1\}"),
        ("50%", r"50\%", "5"),
        (r"$\frac{1}{3}$", r"\frac{1}{3}", "3"),
        ("1,234", "1234", "234"),
        ("x = 5", "5", "x"),
        ("-3", "-3", "3"),
    ],
)
@pytest.mark.parametrize("column", ["reference", "answer"])
def test_math_reads_a_result_that_stands_alone(pairs, column, result, right, wrong):
    """Where TRL's reads the last number of it; a solution beside it does not matter."""
    texts = [rf"\boxed{{{text}}}" for text in (right, wrong)]
    assert values(one("math"), batch(*texts, solution=["so 7"] * 2, **{column: [result] * 2})) == [1.0, 0.0]


def test_math_without_math_verify_compares_after_normalisation():
    made = batch(r"\boxed{\frac12}", r"\boxed{3}", "0.5", r"\boxed{1}", solution=["0.5", "so 3", r"\boxed{0.5}", None])
    assert values(one("math", comparison="normalised"), made) == [1.0, None, 0.0, None]


def test_cosine_of_gsm8k_needs_no_package():
    made = batch("#### 7", "#### 8", "#### 7", ids=[[0] * 50, [0] * 50, [0] * 200], answer=["#### 7"] * 3)
    assert values(one("cosine", correct="gsm8k"), made) == pytest.approx([0.75, -0.75, 0.5])


@pytest.mark.parametrize(
    ("text", "flexible", "strict", "tags"),
    [
        ("6 * 7 = 42\n#### 42", 1, 1, 0),
        ("It is 42.", 1, 0, 0),
        ("<reasoning>\nsix\nseven\n</reasoning>\n<answer>\n42\n</answer>\n", 1, 0, 1),
        ("<answer>$42</answer> (found in 3 ways)", 0, 0, 1),
        ("#### 41", 0, 0, 0),
        ("42", 1, 0, 1),
        ("", 0, 0, 0),
    ],
)
@pytest.mark.parametrize("column", [{"answer": ["so\n#### 42"]}, {"answer": ["42"]}, {"reference": [42]}], ids=str)
@pytest.mark.parametrize("messages", [False, True])
def test_gsm8k(text, flexible, strict, tags, column, messages):
    made = batch(text, messages=messages, **column)
    for reading, expected in (("flexible", flexible), ("strict", strict), ("tags", tags)):
        assert values(one("gsm8k", reading=reading), made) == [expected], reading


def test_gsm8k_does_not_apply_to_a_row_without_a_result():
    assert values(one("gsm8k"), batch("42", "42", answer=["who knows", "42"])) == [None, 1.0]


MULTILINE = "<reasoning>\nsix times seven\nis 42\n</reasoning>\n<answer>\n42\n</answer>"


def test_formats_fire_on_reasoning_of_several_lines_and_the_popular_ones_do_not():
    made = batch(MULTILINE, MULTILINE + "\n", messages=True)
    popular = [f"{HERE / 'gsm8k_functions'}.py:{kind}_format_reward_func" for kind in ("soft", "strict")]
    for name in popular:
        assert values(one(name), made) == [0.0, 0.0]
    for name in ("format", "strict_format"):
        assert values(one(name), made) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "soft", "strict", "count"),
    [
        (MULTILINE, 1, 1, 0.5),
        (MULTILINE + " and so on", 1, 0, 0.491),
        ("\n" + MULTILINE, 1, 0, 0.5),
        ("Well, " + MULTILINE, 0, 0, 0.5),
        ("<reasoning>a</reasoning><answer>b</answer>", 1, 0, 0.5),
        ("<reasoning></reasoning><answer>b</answer>", 0, 0, 0.5),
        ("<reasoning>\n \n</reasoning>\n<answer>\n1\n</answer>", 0, 0, 0.5),
        (MULTILINE.replace("six", "<answer>"), 1, 0, 0.375),
        ("<reasoning>a", 0, 0, 0.125),
        ("<answer>a</answer>" + "b" * 900, 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_formats(text, soft, strict, count):
    for name, expected in (("format", soft), ("strict_format", strict), ("tag_count", count)):
        assert values(one(name), batch(text)) == pytest.approx([expected]), name
        tagged = text.replace("reasoning>", "think>").replace("answer>", "a.b>")
        assert values(one(name, tags=["think", "a.b"]), batch(tagged)) == pytest.approx([expected]), name


@given(TEXTS)
def test_a_tag_that_the_prompt_opened(text):
    for name, start in (("format", "<think>"), ("tag_count", "<think>"), ("think_format", "<think>")):
        tags = {} if name == "think_format" else {"tags": ["think", "answer"]}
        assert values(one(name, opened=True, **tags), batch(text)) == values(one(name, **tags), batch(start + text))
    tags = {"tags": ["think", "answer"]}
    assert values(one("strict_format", opened=True, **tags), batch(text)) == values(
        one("strict_format", **tags), batch("<think>\n" + text)
    )


@given(TEXTS)
def test_the_strict_format_is_a_format_with_all_tags(text):
    scores = load({"format": 1, "strict_format": 1, "tag_count": 1}, timeout=9, max_tokens=9)(batch(text)).values
    if scores["strict_format"] == [1.0]:
        assert (scores["format"], scores["tag_count"]) == ([1.0], [0.5])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("<answer>\n42\n</answer>", 0.5), ("<answer>-1,234</answer>", 0.5), ("7", 0.5), ("<answer>4.5</answer>", 0),
     ("", 0), ("<answer>1,23</answer>", 0), ("<answer>42 apples</answer>", 0),
     ("<answer>x</answer> <answer>3</answer>", 0.5)],
)  # fmt: skip
def test_integer(text, expected):
    assert values(one("integer"), batch(text)) == [expected]


def test_math_verify_asked_for_and_not_there_is_refused(monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package: pip install math-verify"):
        one("math", comparison="math_verify")
    one("math")
    assert "math-verify is not installed" in caplog.text


def test_a_coin_is_fair_and_knows_nothing_of_the_answer():
    made = batch(*["x"] * 2000, ids=[[i % 7, 5] for i in range(2000)])
    first, again = (values(one("coin"), made) for _ in range(2))
    assert first == again
    assert abs(sum(first) / 2000 - 0.5) < 0.05
    by_answer = [first[i::7] for i in range(7)]
    assert all(abs(sum(falls) / len(falls) - 0.5) < 0.15 for falls in by_answer)
