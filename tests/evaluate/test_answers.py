"""Verdicts against the harness itself: lm_eval's own task files, filters and metrics on the same transcripts."""

import json
from importlib import metadata
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinfast.evaluate import answers

TRANSCRIPTS = [json.loads(line) for line in (Path(__file__).parent / "transcripts.jsonl").read_text().splitlines()]


def harness_task(name: str, rows: list[dict]):
    """lm_eval's task of that file with our rows as its data set: its filters, its metric, its clean-up."""
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    data = datasets.Dataset.from_list(rows)
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / name) | {
        **{"training_split": None, "validation_split": None, "fewshot_split": None, "num_fewshot": 0},
        **{"test_split": "rows", "custom_dataset": lambda **_: {"rows": data}},
    }
    return ConfigurableTask(config=config)


def harness_verdicts(task, texts: list[str]) -> list[dict[str, float]]:
    from lm_eval.api.instance import Instance

    docs = list(task.eval_docs)
    instances = [
        Instance("generate_until", doc=doc, arguments=("", {}), idx=0, resps=[text])
        for doc, text in zip(docs, texts, strict=True)
    ]
    task._instances = instances
    task.apply_filters()
    return [
        {
            f"{metric},{name}": float(value)
            for name, answer in instance.filtered_resps.items()
            for metric, value in task.process_results(doc, [answer]).items()
        }
        for doc, instance in zip(docs, instances, strict=True)
    ]


def test_harness_version():
    assert metadata.version("lm_eval") == "0.4.13"


def test_gsm8k_parity_on_recorded_transcripts():
    rows = [{"question": row["question"], "answer": row["answer"]} for row in TRANSCRIPTS]
    texts = [row["text"] for row in TRANSCRIPTS]
    theirs = harness_verdicts(harness_task("gsm8k/gsm8k.yaml", rows), texts)
    ours = [answers.score_gsm8k(text, row["answer"]) for text, row in zip(texts, rows, strict=True)]
    assert len(ours) >= 200
    assert ours == theirs
    for metric in ours[0]:  # a parity of all-wrong (or all-right) verdicts would say nothing
        assert 20 <= sum(verdict[metric] for verdict in ours) <= len(ours) - 20


PIECES = ["#### ", "####", "$", "18", "1,234", ".", "-", " ", "\n", "0.5", "%", "x", "The answer is ", "½", "٣"]
number_soup = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@settings(max_examples=40)
@given(st.lists(st.tuples(number_soup, number_soup), min_size=30, max_size=30))
def test_gsm8k_parity_on_number_soup(cases):
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    texts = [text for text, _ in cases]
    strict = RegexFilter(r"#### (\-?[0-9\.\,]+)").apply([[t] for t in texts], [{}] * len(texts))
    flexible = RegexFilter("(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1).apply(
        [[t] for t in texts], [{}] * len(texts)
    )
    assert [[answers.gsm8k_strict(t)] for t in texts] == strict
    assert [[answers.gsm8k_flexible(t)] for t in texts] == flexible
    for answer, reference in cases:
        score = exact_match_hf_evaluate(
            predictions=[answer],
            references=[reference],
            ignore_case=True,
            regexes_to_ignore=[",", "\\$", "(?s).*#### ", "\\.$"],
        )
        assert answers.same_number(answer, reference) == bool(score["exact_match"])


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("6 * 3 = 18 dollars\n#### 18", "18", "18"),
        ("#### $18", answers.INVALID, "$18"),  # the strict pattern has no room for a dollar sign
        ("#### 1,234.", "1,234.", "1,234."),
        ("#### 7\nQuestion: 5\n#### 9", "7", "9"),  # strict takes the first, flexible the last
        ("a lone digit 5", answers.INVALID, "5"),
        ("no number", answers.INVALID, answers.INVALID),
        ("the answer is 18...", answers.INVALID, "18..."),
        ("18 and then ...", answers.INVALID, "..."),
    ],
)
def test_gsm8k_readings(text, strict, flexible):
    assert (answers.gsm8k_strict(text), answers.gsm8k_flexible(text)) == (strict, flexible)


MATH = [
    *("\\boxed{204}", "\\boxed 204$.", "so $x = 204$", "204", "\\boxed{\\frac12}", "\\boxed{1/2}", "0.5", ".5"),
    *("\\boxed{\\dfrac{1}{2}}", "\\boxed{\\sqrt3}", "\\sqrt{3}", "\\boxed{a/b}", "a/b", "\\fbox{7}", "7"),
    *("\\boxed{12\\text{ cm}}", "12", "12\\text{ a}\\text{ b}", "\\boxed{5", "\\boxed{x=5}", "5", "\\boxed5 {6}"),
    *("$1$ and $2$", "\\frac", "\\sqrt", "\\frac1", "90^{\\circ}", "90", "50\\%", "50", "", "\\boxed{}", "\\$5"),
    *(
        "\\left(1,2\\right)",
        "(1,2)",
        "\\boxed{\\boxed{3}}",
        "xyz=3",
        "xy=3",
        "3",
        "\\tfrac12",
        "3/4",
        "\\frac34",
        "03/4",
        "{.5}",
        "{0.5}",
    ),
]
LATEX = [
    "\\frac",
    "\\boxed{",
    "\\boxed ",
    "\\sqrt",
    "{",
    "}",
    "1",
    "2",
    "/",
    "=",
    "x",
    " ",
    "$",
    ".",
    "\\text{ ",
    "\\\\",
]
latex = st.sampled_from(MATH) | st.lists(st.sampled_from(LATEX), max_size=10).map("".join)


@settings(max_examples=40)
@given(st.lists(st.tuples(latex, latex), min_size=20, max_size=20))
def test_math_parity_on_latex_soup(cases):
    from lm_eval.tasks.aime import utils

    for text, reference in cases:
        theirs = utils.process_results({"Answer": reference}, [text])["exact_match"]
        assert answers.score_boxed(text, reference) == {"exact_match,none": theirs}, (text, reference)


def test_math_parity_on_all_pairs():
    from lm_eval.tasks.aime import utils as aime
    from lm_eval.tasks.hendrycks_math import utils as hendrycks

    right = 0
    for text in MATH:
        for reference in MATH:
            theirs = aime.process_results({"Answer": reference}, [text])["exact_match"]
            assert answers.score_boxed(text, reference)["exact_match,none"] == theirs, (text, reference)
            right += theirs
            box = f"\\boxed{{{reference}}}"
            if hendrycks.last_boxed_only_string(box) == box and "\\boxed " not in box:
                theirs = hendrycks.process_results({"solution": box}, [text])["exact_match"]
                assert answers.score_math(text, reference)["exact_match,none"] == theirs, (text, reference)
    assert right > len(MATH)  # equal pairs beyond the diagonal, so the normalisation was used


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes, it is.", "yes"),
        ("no", "no"),
        ("I know nothing", answers.INVALID),
        ("NO. Yes?", "no"),
        ("", answers.INVALID),
    ],
)
def test_yes_no(text, answer):
    assert answers.yes_no(text) == answer


def test_scorers_name_the_harness_metrics():
    assert answers.SCORERS["gsm8k"]("#### 3", "#### 3") == {
        "exact_match,strict-match": 1.0,
        "exact_match,flexible-extract": 1.0,
    }
    assert answers.SCORERS["yes_no"]("Yes.", "yes") == {"exact_match,none": 1.0}
    assert answers.SCORERS["text"](" Paris\n", "paris") == {"exact_match,none": 1.0}
    assert answers.SCORERS["text"]("Paris, France", "paris") == {"exact_match,none": 0.0}
