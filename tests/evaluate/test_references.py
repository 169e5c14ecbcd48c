"""What is a reference, and that each real answer passes its own: shared by training data, held-out data and eval."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_data import RENDERER
from test_run import play, write_config

from spinfast.config import load_config
from spinfast.data import load_data
from spinfast.evaluate import tasks
from spinfast.evaluate.answers import score_gsm8k
from spinfast.evaluate.references import FLEXIBLE, STRICT, reference_of, same_result, score, unmatched
from spinfast.types import Example

CASES = Path(__file__).parents[1] / "cases"
RIGHT = {STRICT: 1.0, FLEXIBLE: 1.0}
RESULTS = {  # what follows #### -> the reference
    **{"1,234.00": "1234.00", "-5": "-5", ".5": ".5", "42.": "42", "$1,234": "1234", " 7": "7", "42 apples": "42"},
    **{"50%": "50", "1/2": "1/2", "**42**": "42", "\\boxed{42}": "42", "\u22125": "-5", "-$5": "-5", "\\$5.50": "5.50"},
    **{"1 234": "1234", "1\u202f234": "1234", "1'234": "1234", "1.234,5": "1234.5", "1,00,000": "100000"},
    **{"$9{,}500": "9500", "1,5": "1,5", "3:4": "3:4", "2024-01-05": "2024-01-05", "5 May 2024": "5 May 2024"},
    **{
        "10\u201320": "10-20",
        "\\frac12": "1/2",
        "$\\frac{1}{2}$": "1/2",
        "-\\frac{1}{2}": "-1/2",
        "1\\frac12": "1 1/2",
    },
    **{"12\\text{ cm}": "12", "6.02e23": "6.02e23", "6.02 \\times 10^{23}": "6.02e23", "5 km/h": "5", "5 cm^2": "5"},
    **{"72°F": "72", "20kg": "20", "18 eggs a day": "18", "5 million": "5 million", "2 pi": "2 pi", "5x": "5x"},
    **{"x = 5": "x = 5", "(3, 4)": "(3, 4)", "yes": "yes", "No.": "No", "B": "B", "(C)": "C", "Answer: 42": "42"},
    **{"42\nThe answer is: 42": "42", "3 hours 20 minutes": "3 hours 20 minutes", "1e999999": "1e999999", "1/0": "1/0"},
}


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def example(answer, reference, index=0):
    return Example(index, ({"role": "user", "content": "q"},), answer, (1,), (2,), reference)


@pytest.mark.parametrize(("written", "reference"), RESULTS.items(), ids=ascii)
def test_results_after_hashes(written, reference):
    real = f"It is so, 3 times.\n#### {written}"
    assert reference_of({"answer": real}, real) == reference
    assert score(real, reference, real) == RIGHT
    assert score("It is so.\n#### 77", reference, real) == {STRICT: 0.0, FLEXIBLE: 0.0}


@pytest.mark.parametrize("row", rows(CASES / "02-references-no-answer-can-match" / "answers.jsonl"), ids=ascii)
def test_case_02_each_real_answer_passes_its_own_reference(row):
    assert score(row["answer"], reference_of(row, row["answer"]), row["answer"]) == RIGHT


@pytest.mark.parametrize(
    ("real", "reference"),
    [
        ("So it is \\boxed{\\frac{3}{4}}.", "3/4"),
        ("\\boxed{5} or rather \\boxed{x^2+1}", "x^2+1"),
        ("AIME: \\boxed{073}", "073"),
        ("\\boxed{\\text{(B)}}", "B"),
        ("\\boxed{12,13}", "12,13"),
        ("$\\boxed{90^\\circ}$", "90^\\circ"),
        ("\\boxed{\\text{Monday}}", "Monday"),
    ],
)
def test_results_in_a_box(real, reference):
    assert reference_of({}, real) == reference
    assert score(real, reference, real) == RIGHT


@pytest.mark.parametrize(
    "answer",
    [
        *(row["messages"][1]["content"] for row in rows(CASES / "01-markdown-heading-as-reference" / "train.jsonl")),
        *("#### 1. Mix\nFlour.", "#### 3 Ways to Save\nNone.", "Say:\n#### 2023\nRain.\n#### 2024\nSnow.", "##### 5"),
        *("#### Step 2: Bake", "#### Summary", "#### 1. Introduction", "#### 2) Mix", "#### (Optional) Garnish"),
        *("#### Phase 3", "#### [Docs](https://x.y/2)", "#### 🎯 Goal 1", "#### \n42", "\\boxed{}", "", "It is 42."),
    ],
)
def test_headings_and_prose_are_no_reference(answer):
    assert reference_of({"answer": answer}, answer) is None


@pytest.mark.parametrize(
    ("row", "answer", "reference"),
    [
        ({"reference": 42.0}, "It is 42.", "42"),
        ({"reference": "#### 1,234 apples"}, "#### 5", "1234"),
        ({"reference": float("nan"), "final_answer": "\\frac{1}{2}"}, "half", "1/2"),
        ({"reference": None, "expected_answer": ["$5"]}, "five", "5"),
        ({"reference": " "}, "#### 6", "6"),
        ({"reference": True}, "true", "True"),
        ({"ground_truth": "B"}, "B) Paris", "B"),
        ({"answer": "42"}, "It is \\boxed{42}", "42"),  # messages beside the result
        ({"answer": "42"}, "It is 42", "42"),
        ({"solution": "As \\boxed{7} says."}, "Seven.", "7"),
        ({"answer": "Paris is nice."}, "Lyon is nice.", None),
        ({"answer": "42"}, "42", None),  # the real answer itself, which states no result
        ({"reward_model": {"style": "rule", "ground_truth": "42"}}, "", "42"),
        ({"reward_model": {"ground_truth": {"target": 42}}}, "", None),
        ({"reward_model": "deberta"}, "", None),
        ({"ground_truth": ["42", "forty-two"]}, "", None),
        ({"ground_truth": '{"func_name": "verify"}', "answer": "42"}, "", "42"),
    ],
)
def test_columns(row, answer, reference):
    assert reference_of(row, answer) == reference


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        *[("0.5", "1/2", True), ("50/100", ".5", True), ("$1,234.50", "1234.5", True), ("1e3", "1000", True)],
        *[("YES", "yes", True), ("x=5", "5", True), ("3 : 4", "3:4", True), ("\\dfrac{x}{2}", "\\frac{x}{2}", True)],
        *[("5 million", "5", False), ("2 pi", "2", False), ("5x", "5", False), ("12.13", "12,13", False)],
        *[("-5", "5", False), ("10-20", "10", False), ("1/0", "0", False), ("A", "B", False), (None, "5", False)],
    ],
)
def test_equality(answer, reference, same):
    assert same_result(answer, reference) is same


@pytest.mark.parametrize(
    ("text", "reference", "real", "strict", "flexible"),
    [
        ("#### 1/2", "2", "#### 2", 0, 0),  # the last number is 2, the result is not
        ("#### 18\nQuestion: 3?\n#### 7", "18", "#### 18", 1, 0),  # it goes on: the first counts, as in the harness
        ("\\boxed{18}", "18", "#### 18", 0, 1),  # not as the data states it
        ("#### 18", "18", "\\boxed{18}", 0, 1),
        ("It costs $18.00 then.", "18", "#### 18", 0, 1),
        ("Yes, as it is so.", "yes", "#### yes", 0, 1),
        ("I say no. Yes?", "yes", "#### yes", 0, 0),
        ("The answer is (B).", "B", "#### B", 0, 1),
        ("A banana", "B", "#### B", 0, 0),
        ("B", "B", "B", 1, 1),
        ("So 1,012.\n#### 1,012", "1012", "", 1, 1),  # a prompt alone: no answer shows how its result is stated
        ("\\boxed{\\frac12}", "1/2", "", 1, 1),
        ("18", "18", "", 1, 1),
        ("It costs $18.00 then.", "18", "", 0, 1),
        ("#### 17, not 18", "18", "", 0, 0),
        ("No idea.", "18", "", 0, 0),
    ],
)
def test_readings(text, reference, real, strict, flexible):
    assert score(text, reference, real) == {STRICT: strict, FLEXIBLE: flexible}


def test_gsm8k_is_read_as_the_harness_reads_it():
    """Models' transcripts get the harness's verdicts; odd ones, made by hand, at least those."""
    seen = 0
    for row in rows(Path(__file__).parent / "transcripts.jsonl"):
        reference = reference_of(row, row["answer"])
        if reference is None or row["text"] in ("1,8", "#### ,18"):  # 18 to the harness, for want of the comma
            continue
        ours, theirs = score(row["text"], reference, row["answer"]), score_gsm8k(row["text"], row["answer"])
        assert all(ours[reading] >= theirs[reading] for reading in theirs), row
        assert row["source"] == "odd" or ours == theirs, row
        seen += row["source"] != "odd"
    assert seen == 180


PIECES = ["#### ", "####", "$", "18", "1,234", ".", "-", " ", "\n", "/", "%", "x", "\\boxed{", "}", "\\frac", "**", "½"]
soup = st.lists(st.sampled_from(PIECES), max_size=10).map("".join) | st.text(max_size=30)


@given(soup, soup)
def test_any_text_is_scored_and_a_stated_result_passes_itself(text, real):
    reference = reference_of({}, real)
    if reference is not None:
        assert score(real, reference, real) == RIGHT
        assert set(score(text, reference, real)) == {STRICT, FLEXIBLE}
    assert set(score(real, text, text)) <= {STRICT, FLEXIBLE}


def test_real_answers_that_miss_their_reference_are_told_and_not_scored():
    examples = [
        example("It is 42.", "42", 0),
        example("It is 41.\n#### 41", "42", 4),
        example("No idea.", "x^2", 7),
        example("#### 42", "42", 8),
        example("free text", None, 9),
    ]
    wrong, loose = unmatched(examples)
    assert wrong.startswith("2 of 4 real answers do not give their own reference and are not scored (row 5: ")
    assert "reference '42', the answer ends in 'It is 41.\\n#### 41'" in wrong
    assert loose.startswith("1 of 4 real answers give their reference in passing only")
    assert "(row 1: " in loose
    assert score("#### 42", "42", "It is 41.") == {}
    assert set(score("#### 42", "42", "It is 42.")) == {FLEXIBLE}
    assert unmatched(examples[3:]) == []


def test_they_are_told_as_the_data_is_loaded(tmp_path, tiny_model, caplog):
    config = load_config(write_config(tmp_path, tiny_model("llama")))
    with (tmp_path / "heldout.jsonl").open("a") as file:
        file.write(json.dumps({"question": "1+1?", "answer": "#### 2", "reference": "3"}) + "\n")
    load_data(config, RENDERER)
    told = {r.message for r in caplog.records if r.levelname == "WARNING" and "real answers" in r.message}
    assert [sentence[:65] for sentence in told] == ["heldout: 1 of 7 real answers do not give their own reference and "]


def test_case_01_answers_with_headings_show_no_accuracy_and_keep_the_last_iteration(tmp_path, tiny_model):
    case = CASES / "01-markdown-heading-as-reference"
    sources = {"data": {"source": str(case / "train.jsonl")}, "heldout": {"source": str(case / "heldout.jsonl")}}
    run_dir = play(tmp_path, tiny_model("llama"), spin={"iterations": 1}, **sources)
    results = json.loads((run_dir / "results.json").read_text())
    assert not any("accuracy" in metric.split("/")[1][:8] for row in results for metric in row["evaluation"])
    assert json.loads((run_dir / "best.json").read_text())["stage"] == "iter_000"
    assert "real answers" not in (run_dir / "log.txt").read_text()


@pytest.mark.parametrize(
    ("scorer", "row", "reference"),
    [
        ("gsm8k", {"answer": "So.\n#### **1,234 apples**"}, "1234"),
        ("gsm8k", {"answer": "$42"}, "42"),
        ("gsm8k", {"answer": "So it is 42.", "reference": 42}, "42"),
        ("yes_no", {"answer": "Yes."}, "Yes"),
        ("boxed", {"answer": "So \\boxed{1,234}."}, "1,234"),  # the harness compares it as it stands
        ("text", {"answer": "Paris."}, "Paris."),
    ],
)
def test_files_of_eval_have_the_same_references(scorer, row, reference):
    task = tasks.find_task("mine.jsonl", scorer)
    assert task.target(row) == reference
    assert tasks.hopeless(task, [row]) is None


def test_a_file_that_its_scorer_cannot_judge_is_told():
    task = tasks.find_task("mine.jsonl", "gsm8k")
    said = tasks.hopeless(task, [{"answer": "2"}, {"answer": "1/2"}, {"answer": "Paris"}])
    assert said.startswith("the file's own answer is wrong in 2 of 3 rows by --scorer gsm8k (row 2: answer '1/2'")


def test_rows_without_an_answer_are_no_task(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"question": "1+1?", "answer": null}\n')
    with pytest.raises(tasks.UserError, match=r"no row of task mine .*no answer"):
        tasks.load_rows(tasks.find_task(str(tmp_path / "mine.jsonl")), "")
    (tmp_path / "test.jsonl").write_text('{"problem": "1+1?", "solution": "2"}\n')
    with pytest.raises(tasks.UserError, match="boxed"):
        tasks.load_rows(tasks.TASKS["math500_chat"], "test", tmp_path)
