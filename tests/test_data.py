"""Data sets: every format from every kind of file, every fault named by its row, nothing drawn twice."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures import CHATML, SPECIAL, tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spinfast.data import sources
from spinfast.data.examples import check_overlap, load_examples
from spinfast.data.renderer import Renderer
from spinfast.errors import UserError
from spinfast.names import FILE_SUFFIXES

RENDERER = Renderer(tiny_tokenizer())
Q, A, A2 = "How many eggs?", "Six and six.\n#### 1,012", "Yes."
USER, ASSISTANT = {"role": "user", "content": Q}, {"role": "assistant", "content": A}
MORE = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": A2}]
SHAREGPT = [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]
FORMATS = {
    "spin": {"real": [USER, ASSISTANT], "generated": [USER, MORE[1]]},
    "messages": {"prompt": Q, "prompt_id": "x", "messages": [USER, ASSISTANT, *MORE]},  # ultrachat_200k's columns
    "sharegpt": {"conversations": SHAREGPT},
    "prompt-completion": {"prompt": Q, "completion": A},
    "prompt-completion-turns": {"prompt": [USER], "completion": [ASSISTANT]},
    "alpaca": {"instruction": Q, "input": "", "output": A},
    "question-answer": {"question": Q, "answer": A},  # gsm8k's columns
}


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def load(source, **kwargs):
    limits = {"max_prompt_tokens": 200, "max_answer_tokens": 200}
    return load_examples(str(source), renderer=RENDERER, **(limits | kwargs))


def qa(count):
    return [{"question": f"{Q} {i}", "answer": f"{i}"} for i in range(count)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, name, suffix):
    (example,) = load(write(tmp_path / f"data{suffix}", [FORMATS[name]])).examples
    assert (example.index, example.messages, example.answer) == (0, (USER,), A)
    assert example.prompt_ids == RENDERER.prompt_ids([USER])
    assert example.real_ids == RENDERER.example_ids([USER], A)[1]
    assert example.reference == "1012"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (FORMATS["messages"], [USER, ASSISTANT, MORE[0]]),
        ({"messages": [USER, ASSISTANT, *MORE, USER]}, [USER, ASSISTANT, MORE[0]]),
        ({"prompt": [USER, ASSISTANT, MORE[0]], "completion": A2}, [USER, ASSISTANT, MORE[0]]),
    ],
    ids=["last-answer", "a-question-after-it", "prompt-of-three-turns"],
)
def test_last_turns(tmp_path, row, expected):
    (example,) = load(write(tmp_path / "data.jsonl", [row]), turns="last").examples
    assert (list(example.messages), example.answer, example.reference) == (expected, A2, None)


def test_a_prompt_of_several_turns_keeps_them_all(tmp_path):
    source = write(tmp_path / "data.jsonl", [{"prompt": [USER, ASSISTANT, MORE[0]], "completion": A2}])
    assert load(source, turns="first").examples == load(source, turns="last").examples


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ([], "Be brief."),
        ([{"role": "system", "content": "Own."}], "Own."),
        ([{"role": "system", "content": ""}], "Be brief."),
    ],
    ids=["none", "own", "empty"],
)
def test_system_turn(tmp_path, own, expected):
    source = write(tmp_path / "data.jsonl", [{"messages": [*own, USER, ASSISTANT]}])
    (example,) = load(source, system="Be brief.").examples
    assert list(example.messages) == [{"role": "system", "content": expected}, USER]


def test_alpaca_input_follows_the_instruction(tmp_path):
    (example,) = load(write(tmp_path / "d.json", [{"instruction": "Add.", "input": "1 2", "output": "3"}])).examples
    assert example.messages[0]["content"] == "Add.\n\n1 2"


def test_columns_are_renamed(tmp_path):
    source = write(tmp_path / "data.jsonl", [{"problem": Q, "solution": A, "result": 12}])
    columns = {"question": "problem", "answer": "solution", "reference": "result"}
    (example,) = load(source, columns=columns).examples
    assert (example.messages, example.answer, example.reference) == ((USER,), A, "12")
    with pytest.raises(UserError, match=r"no column 'missing'; columns are problem, solution, result"):
        load(source, columns={"question": "missing"})
    with pytest.raises(
        UserError, match=r"columns: 'questoin' is no recognised column; expected answer, answers, chat_"
    ):
        load(source, columns={"questoin": "problem"})


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": Q, "answer": None}, "no answer: it is null"),
        ({"question": Q, "answer": " \n"}, "no answer: it is empty"),
        ({"question": "", "answer": A}, "no question: it is empty"),
        ({"messages": [USER]}, "the conversation has no assistant turn"),
        ({"messages": [ASSISTANT, USER]}, "the conversation has no assistant turn after a user's"),
        ({"messages": [{"role": "system", "content": "S"}, ASSISTANT]}, "no assistant turn after a user's"),
        ({"messages": [USER, {"role": "critic", "content": "x"}]}, "turn 2 has role 'critic'"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, r"no turn 2 \(assistant\): it is null"),
        ({"question": ["x"], "answer": A}, "expected a list of turns, got"),
        ({"conversations": [{"from": "human", "value": Q}]}, "the conversation has no assistant turn"),
        ({"prompt": Q, "completion": 7}, "completion: expected text, got int"),
    ],
)
def test_faulty_rows_are_named(tmp_path, suffix, row, message):
    fine = {k: next(f[k] for f in FORMATS.values() if k in f) for k in row}
    if suffix == ".parquet":  # a column has one type
        source, where = write(tmp_path / "data.parquet", [row, row]), r"data\.parquet, row [12]: "
    else:
        source, where = write(tmp_path / "data.jsonl", [fine, row]), r"data\.jsonl, line 2: "
    with pytest.raises(UserError, match=where + ".*" + message) as caught:
        load(source)
    assert "\n" not in str(caught.value)


def test_faulty_rows_can_be_counted_instead(tmp_path):
    rows = [*qa(3), {"question": Q}, {"question": Q, "answer": ""}]
    data = load(write(tmp_path / "data.jsonl", rows), bad_rows="skip")
    assert len(data.examples) == 3
    assert data.rejected == {"empty text": 2}
    assert "2 of 5 rows rejected (empty text: 2)" in data.warnings[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"question": "a", "answer": "b"}\n\n{"question": \n', r"line 3: not valid JSON"),
        (b'{"question": "a", "answer": "b"}\n[1]\n', r"line 2: expected a JSON object, got list"),
        (b'{"question": "a", "answer": "\xff"}\n', r"line 1: invalid UTF-8 at byte 29; save the file as UTF-8"),
        (b'{"question": "a", "answer": "\\ud800"}\n', r"line 1: answer: half of a surrogate pair"),
        (b'{"a": ' + b"[" * 200_000, r"line 1: not valid JSON"),
        (b'{"question": "a", "answer": "b"}\n{"a": "' + b"b" * sources.MAX_LINE_BYTES, r"line 2: longer than 8 MiB"),
        (b'[{"question": "a", "answer": "b"}, 3]', r"row 2: expected a JSON object, got int"),
        (b"[{", "not valid JSON"),
        (b"", "no rows; expected at least one example"),
        (b"\n \n", "no rows"),
        (b"[]", "no rows"),
        (b"{}\n", r"columns  are no known format; expected one of: real \+ generated; chosen \+ rejected;"),
        (
            b'{"Frage": "a", "Antwort: kurz": "b"}\n',
            r"if 'Frage' is the question and 'Antwort: kurz' is the answer, say so: "
            r"'data.columns=\{question: Frage, answer: '.*Antwort: kurz.*'\}'; expected one of: real",
        ),
        (
            b'{"problem": "a", "answer": "b"}\n',
            r"'problem' is the question, say so: 'data.columns=\{question: problem\}'",
        ),
        (b'{"prompt": "a", "solution": "b"}\n', r"say so: 'data.columns=\{completion: solution\}'"),
        (b'{"words": "a"}\n', r"columns words are no known format.*question \+ answer"),
    ],
)
def test_faulty_files(tmp_path, content, message):
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / "data.jsonl")
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(FORMATS["question-answer"]).encode())
    assert load(tmp_path / "data.jsonl").examples[0].messages == (USER,)


def test_invalid_utf8_in_parquet_names_the_row(tmp_path):
    texts = pa.array([b"fine", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"question": ["a", "b"], "answer": texts}), tmp_path / "data.parquet")
    with pytest.raises(UserError, match=r"data\.parquet, row 2: invalid UTF-8"):
        load(tmp_path / "data.parquet")


def test_a_directory_is_a_copy_of_a_hub_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        FORMATS["messages"],
        *({"messages": [*MORE[:1], {"role": "assistant", "content": str(i)}]} for i in range(4)),
    ]
    (tmp_path / "copy" / "data").mkdir(parents=True)
    for split, part in (("train_sft", rows), ("test_sft", rows[:1])):
        write(tmp_path / "copy" / "data" / f"{split}-00000-of-00001.parquet", part)
    copy = tmp_path / "copy"
    data = load(copy, split="train_sft")
    assert data.examples == load(copy / "data" / "train_sft-00000-of-00001.parquet").examples
    assert len(load(copy, split="test_sft").examples) == 1
    with pytest.raises(UserError, match=r'Unknown split "validation".*it has test_sft, train_sft'):
        load(copy, split="validation")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", "no such file"),
        (__file__, "expected a file ending in"),
        ("no such thing", "expected a hub id, a local file"),
        ("https://example.org/train.jsonl", "a URL is not read; download the file"),
        ("nobody/nothing", r"cannot be loaded.*HF_HUB_OFFLINE"),
        ("reasoning_gym:leg_counting", "only gsm_symbolic, chain_sum"),
        ("reasoning_gym:gsm_symbolic", "set data.size to a number"),
    ],
)
def test_sources_that_cannot_be_opened(source, message):
    with pytest.raises(UserError, match=message) as caught:
        load(source)
    assert "\n" not in str(caught.value)


def test_limits_reject_and_count(tmp_path):
    rows = [*qa(4), *qa(2), {"question": Q * 50, "answer": "x"}, {"question": Q, "answer": "x" * 300}]
    data = load(write(tmp_path / "data.jsonl", rows))
    assert len(data.examples) == 4
    assert data.rejected == {
        "duplicate": 2,
        "prompt longer than 200 tokens": 1,
        "answer longer than 200 tokens": 1,
    }
    with pytest.raises(UserError, match=r"all 8 rows were rejected \(prompt longer than 5 tokens: 8\); raise"):
        load(tmp_path / "data.jsonl", max_prompt_tokens=5)


@pytest.mark.parametrize("limit", ["max_prompt_tokens", "max_answer_tokens"])
def test_limits_are_inclusive(tmp_path, limit):
    source = write(tmp_path / "data.jsonl", qa(1))
    (example,) = load(source).examples
    length = len(example.prompt_ids if limit == "max_prompt_tokens" else example.real_ids)
    assert load(source, **{limit: length}).examples == [example]
    with pytest.raises(UserError, match="all 1 rows were rejected"):
        load(source, **{limit: length - 1})


@given(st.integers(0, 2**40), st.integers(1, 12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_fewer_rows_are_the_first_of_more(tmp_path, seed, size):
    source = write(tmp_path / "data.jsonl", qa(20))
    whole = [e.index for e in load(source, seed=seed).examples]
    fewer = [e.index for e in load(source, seed=seed, size=size).examples]
    assert sorted(whole) == list(range(20))
    assert fewer == whole[:size]


def test_the_choice_depends_on_the_seed_alone(tmp_path):
    jsonl, parquet = (write(tmp_path / f"data{suffix}", qa(50)) for suffix in (".jsonl", ".parquet"))
    first = load(jsonl, size=10, seed=1)
    assert load(parquet, size=10, seed=1) == first
    assert load(jsonl, size=10, seed=2).fingerprint != first.fingerprint
    assert {e.index for e in first.examples} != set(range(10))
    for example in first.examples:
        assert example.messages[0]["content"] == f"{Q} {example.index}"  # the index is the row number


def test_asking_for_more_than_there_is(tmp_path):
    source = write(tmp_path / "data.jsonl", qa(3))
    assert load(source, size=5).warnings == [f"data {source}: asked for 5 rows, it has 3"]
    with pytest.raises(UserError, match=r"data.json: no rows; expected at least one example"):
        load(write(tmp_path / "data.json", []))


def test_typed_control_tokens_are_reported_and_stay_text(tmp_path):
    row = {"question": f"{Q} {''.join(SPECIAL)}", "answer": "<|im_end|> 42"}
    data = load(write(tmp_path / "data.jsonl", [row, *qa(2)]))
    assert data.warnings == [
        f"data {tmp_path}/data.jsonl: 1 rows spell control tokens in their text; they are kept as text"
    ]
    example = next(e for e in data.examples if e.index == 0)
    assert example.real_ids.count(RENDERER.end_id) == 1
    assert RENDERER.pad_id not in example.prompt_ids


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("two-users", "messages | length > 2 and messages[1].role == 'user'"),
        ("system-row", "messages[0].role == 'system'"),
    ],
)
def test_rows_that_the_template_refuses_are_counted(name, refused):
    source = Path(__file__).parent / f"cases/12-bad-rows-skip-and-templates/{name}.jsonl"
    template = f"{{% if {refused} %}}{{{{ raise_exception('no') }}}}{{% endif %}}{CHATML}"
    options = {"renderer": Renderer(tiny_tokenizer(template)), "max_prompt_tokens": 99, "max_answer_tokens": 99}
    with pytest.raises(UserError, match=r"line 9: .*the chat template refuses the turns"):
        load_examples(str(source), **options)
    loaded = load_examples(str(source), bad_rows="skip", **options)
    assert (len(loaded.examples), loaded.rejected) == (8, {"the template refuses the turns": 1})


def test_a_template_fault_names_the_row(tmp_path):
    renderer = Renderer(tiny_tokenizer("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
                                       "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"))  # fmt: skip
    source = write(tmp_path / "data.jsonl", qa(1))
    with pytest.raises(UserError, match=r"line 1: .*refuses the turns system, user.*prompt\.system"):
        load_examples(source, renderer=renderer, max_prompt_tokens=99, max_answer_tokens=99, system="Be brief.")


def test_overlap_ignores_case_and_spaces(tmp_path):
    train = load(write(tmp_path / "train.jsonl", qa(5))).examples
    rows = [{"question": f"how  MANY eggs? {i}", "answer": "other"} for i in range(3, 9)]
    assert check_overlap(train, load(write(tmp_path / "test.jsonl", rows), system="S").examples) == 2
    assert check_overlap(train, []) == 0


def test_gsm_symbolic_has_worked_solutions_and_disjoint_splits():
    kwargs = {"max_prompt_tokens": 999, "max_answer_tokens": 999}
    train = load("reasoning_gym:gsm_symbolic", size=60, seed=3, **kwargs)
    assert train == load("reasoning_gym:gsm_symbolic", size=60, seed=3, **kwargs)
    for example in train.examples:
        assert example.answer.endswith(f"\n#### {example.reference}")
        assert example.answer.count("####") == 1
        assert example.answer.index("####") > 20
    for other in (
        load("reasoning_gym:gsm_symbolic", size=60, seed=3, split="test", **kwargs),
        load("reasoning_gym:gsm_symbolic", size=60, seed=4, **kwargs),
    ):
        assert check_overlap(train.examples, other.examples) <= 1  # two may be drawn alike by chance


PROBLEM, TRACE = "Find $x$ if $x + 1 = 3$.", "<think>" + "Well. " * 100 + "</think> So \\boxed{2}."
ASKED = [{"role": "user", "content": PROBLEM}]
TRACED = [*ASKED, {"role": "assistant", "content": TRACE}]
GRPO = {  # data sets for rewards: a row with their columns, its reference, whether it has an answer
    "openai/gsm8k": ({"question": PROBLEM, "answer": "3 - 1 = <<3-1=2>>2\n#### 2"}, "2", True),
    "open-r1/OpenR1-Math-220k": (
        {
            "problem": PROBLEM,
            "solution": "Subtract 1, so $x = 2$.",
            "answer": "2",
            "problem_type": "Algebra",
            "question_type": "math-word-problem",
            "source": "olympiads",
            "uuid": "a1",
            "is_reasoning_complete": [True, True],
            "generations": [TRACE, TRACE],
            "correctness_math_verify": [True, False],
            "correctness_llama": None,
            "finish_reasons": None,
            "correctness_count": 1,
            "messages": TRACED,
        },
        "2",
        False,  # longer than max_answer_tokens
    ),
    "BytedTsinghua-SIA/DAPO-Math-17k": (
        {
            "data_source": "math_dapo",
            "prompt": ASKED,
            "ability": "MATH",
            "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4"},
        },
        "2",
        False,
    ),
    "verl's gsm8k, several right results": (
        {
            "data_source": "openai/gsm8k",
            "prompt": ASKED,
            "reward_model": {"style": "rule", "ground_truth": ["2", "two"]},
        },
        None,
        False,
    ),
    "TinyZero's countdown": (
        {
            "target": 24,
            "nums": [6, 4],
            "data_source": "countdown",
            "prompt": ASKED,
            "reward_model": {"style": "rule", "ground_truth": {"target": 24, "numbers": [6, 4]}},
            "extra_info": {"split": "train", "index": 0},
        },
        None,
        False,
    ),
    "trl-lib/DeepMath-103K": ({"prompt": ASKED, "solution": "\\dfrac{1}{2}"}, "1/2", False),
    "trl-lib/tldr": ({"prompt": PROBLEM, "completion": " Subtract one."}, None, True),
    "AI-MO/NuminaMath-TIR": (
        {"problem": PROBLEM, "solution": "Thus \\(\\boxed{2}\\).", "messages": [*ASKED, ASSISTANT]},
        "2",
        True,
    ),
    "SynthLabsAI/Big-Math-RL-Verified": (
        {"problem": PROBLEM, "answer": "2", "source": "orca_math", "domain": ["Algebra"], "llama8b_solve_rate": 0.9},
        "2",
        False,
    ),
    "agentica-org/DeepScaleR-Preview-Dataset": ({"problem": PROBLEM, "answer": "2", "solution": "So..."}, "2", False),
    "reasoning-gym": ({"question": PROBLEM, "answer": "2", "metadata": {"difficulty": {"n": 1}}}, "2", True),
    "a number as the answer": ({"question": PROBLEM, "answer": 2.0}, "2", False),
    "allenai's IFEval": (
        {"messages": ASKED, "ground_truth": '{"func_name": "verify_case", "N": 3}', "constraint_type": "Case"},
        None,
        False,
    ),
    "code": ({"prompt": PROBLEM, "ground_truth": '["assert f(1) == 2"]', "info": {"tests": []}}, None, False),
}


def load_for_rewards(source, **kwargs):
    return load(source, prompts_alone=True, keep_columns=True, **kwargs)


@pytest.mark.parametrize(("row", "reference", "answered"), GRPO.values(), ids=GRPO)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_data_sets_of_prompts_and_what_rewards_read(tmp_path, suffix, row, reference, answered):
    if suffix == ".parquet":  # an object of no keys has no type there
        row = {name: {"tests": [""]} if name == "info" else value for name, value in row.items()}
    source = write(tmp_path / f"data{suffix}", [row])
    loaded = load_for_rewards(source)
    (example,) = loaded.examples
    assert (list(example.messages), example.prompt_ids) == (ASKED, RENDERER.prompt_ids(ASKED))
    assert (example.reference, bool(example.answer), bool(example.real_ids)) == (reference, answered, answered)
    assert dict(example.columns) == row
    assert not any("not used" in warning for warning in loaded.warnings)
    if not answered:
        with pytest.raises(UserError):
            load(source)
    else:
        assert load(source).examples[0].columns == {}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": ASKED, "solution": "2"}, "columns prompt, solution are no known format"),
        ({"problem": PROBLEM, "answer": "2"}, "columns answer, problem are no known format"),
        ({"messages": ASKED}, "no answer: the conversation has no assistant turn"),
    ],
)
def test_who_takes_prompts_alone_is_told(tmp_path, row, said):
    with pytest.raises(UserError, match=f"{said}.*; method grpo takes prompts alone"):
        load(write(tmp_path / "data.jsonl", [row]))
    with pytest.raises(UserError, match="no known format") as caught:
        load(write(tmp_path / "data.jsonl", [{"target": 24, "nums": [6, 4]}]), prompts_alone=True)
    assert "grpo" not in str(caught.value)


def test_columns_have_their_own_and_the_recognised_names(tmp_path):
    source = write(
        tmp_path / "data.jsonl", [{"Problem": PROBLEM, "Answer": "2", "prompt": "x", "image": {"bytes": "x"}}]
    )
    loaded = load_for_rewards(source, columns={"prompt": "Problem", "reference": "Answer"})
    (example,) = loaded.examples
    assert example.messages[0]["content"] == PROBLEM
    assert example.columns == {"Problem": PROBLEM, "Answer": "2", "prompt": PROBLEM, "reference": "2"}
    assert any(warning.endswith("neither text nor numbers: image") for warning in loaded.warnings)
    blobs = write(tmp_path / "data.parquet", [{"prompt": PROBLEM, "blob": b"x", "more": [{"sound": b"x"}], "n": 1}])
    assert load_for_rewards(blobs).examples[0].columns == {"prompt": PROBLEM, "n": 1}


def test_answers_that_nobody_can_learn_are_counted_and_asked(tmp_path):
    rows = [
        *qa(2),
        {"question": "a", "answer": None},
        {"question": "b", "answer": 3},
        {"question": "c", "answer": "x" * 300},
    ]
    loaded = load_for_rewards(write(tmp_path / "data.jsonl", rows))
    assert [(e.index, bool(e.real_ids)) for e in sorted(loaded.examples, key=lambda e: e.index)] == [
        *((0, True), (1, True), (2, False), (3, False), (4, False))
    ]
    told = "\n".join(loaded.warnings)
    for words in ("empty text", "not text"):
        assert f"1 rows have no answer to learn from ({words}); they are prompts alone" in told
    assert "1 rows have answers longer than 200 tokens; they are prompts alone" in told
    assert loaded.rejected == {}
    compared = load_for_rewards(write(tmp_path / "b.jsonl", [{"prompt": Q, "chosen": "x" * 300, "rejected": "y"}]))
    assert (compared.examples[0].real_ids, compared.rejected) == ((), {})


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [
        ({"reference": "2", "id": 1}, {"reference": "2", "id": 2}, 1),
        ({"reference": "2"}, {"reference": "3"}, 2),
        ({"target": 2}, {"target": 3}, 2),
        ({"target": 2}, {"target": 2}, 1),
        ({"completion": "2"}, {"completion": "3"}, 2),
    ],
)
def test_one_prompt_twice_is_one_example_unless_its_result_differs(tmp_path, first, second, count):
    rows = [{"prompt": PROBLEM, **more} for more in (first, second)]
    source = write(tmp_path / "data.jsonl", rows)
    loaded = load_for_rewards(source)
    assert (len(loaded.examples), loaded.rejected.get("duplicate", 0)) == (count, 2 - count)


def test_the_fingerprint_holds_what_rewards_read(tmp_path):
    row = {"question": PROBLEM, "answer": "2"}
    sources = [write(tmp_path / f"{level}.jsonl", [row | {"level": level}]) for level in "ab"]
    assert len({load(source).fingerprint for source in sources}) == 1
    assert len({load_for_rewards(source).fingerprint for source in sources}) == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
COLUMNS = st.sampled_from(
    ["messages", "question", "answer", "real", "generated", "prompt", "completion", "conversations"]
)


@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(st.dictionaries(COLUMNS, JSON, max_size=4), max_size=3).map(
            lambda rows: "\n".join(map(json.dumps, rows)).encode()
        ),
    ),
    st.sampled_from(FILE_SUFFIXES),
    st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_any_file_loads_or_is_refused_in_one_line(tmp_path, content, suffix, rewards):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    refused = None
    try:
        assert load(path, prompts_alone=rewards, keep_columns=rewards).examples
    except UserError as error:
        refused = str(error)
    assert refused is None or (str(path) in refused and "\n" not in refused)
