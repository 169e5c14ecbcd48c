"""The call: what functions are given and may give back, several together, one sample at a time, constant ones."""

from __future__ import annotations

import logging
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reward_cases import batch, own, values, written

from spinfast.errors import UserError
from spinfast.rewards import ConstantWatch, Scores, load


@pytest.mark.parametrize(
    "code",
    [
        "def f(answer): return [float(a) for a in answer]",
        "def f(completions, *, answer, other=7): return tuple(a * other // 7 for a in answer)",
        "async def f(answer): return answer",
        "class F:\n    def __call__(self, answer, **kwargs): return answer\nf = F()",
        "class F:\n    async def __call__(self, answer): return answer\nf = F()",
        "class f:\n    def __call__(self, answer): return answer",
        "import functools\ndef g(answer, scale): return [a * scale for a in answer]\nf = functools.partial(g, scale=1)",
        "f = lambda answer, **kwargs: (a for a in answer)",
        "import numpy\ndef f(answer): return numpy.array(answer, 'float32')",
        "import numpy\ndef f(answer): return [numpy.float16(a) for a in answer]",
        "import torch\ndef f(answer): return torch.tensor(answer)",
        "import torch\ndef f(answer): return [torch.tensor(a) for a in answer]",
        "from fractions import Fraction\ndef f(answer): return [Fraction(a) for a in answer]",
    ],
    ids=str,
)
def test_forms_of_functions_and_results(tmp_path, code):
    rewards = own(tmp_path, code)
    rewards.check(["answer", "unused"])
    assert values(rewards, batch("a", "b", answer=[1, 0], unused=[2, 3])) == [1.0, 0.0]


def test_truth_values_are_numbers_and_none_is_kept(tmp_path):
    assert values(own(tmp_path, "def f(completions): return [True, False, None]"), batch("a", "b", "c")) == [1, 0, None]


def test_options_are_keyword_arguments_and_come_before_columns(tmp_path):
    rewards = own(
        tmp_path, "def f(completions, scale=1, **kw): return [scale] * len(completions)", scale=4, weight=-0.5
    )
    assert values(rewards, batch("a", scale=[9])) == [4.0]
    assert rewards.weights == {rewards.names[0]: -0.5}
    made = own(
        tmp_path,
        "class f:\n    def __init__(self, k): self.k = k\n    def __call__(self, prompts): return [self.k]",
        k=3,
    )
    assert values(made, batch("a")) == [3.0]


def test_functions_cannot_change_the_data(tmp_path):
    code = """
    def f(prompts, completions, completion_ids, info):
        for each in (prompts, completions, completion_ids):
            each[0].clear()
            each.append(1)
        info[0]["seen"] = True
        return [float(len(info))]
    """
    made = batch("text", messages=True, info=[{"k": [1]}])
    rewards = own(tmp_path, code)
    assert [values(rewards, made) for _ in range(2)] == [[1.0], [1.0]]
    assert made.prompts == [[{"role": "user", "content": "question 0"}]]
    assert made.completions == [[{"role": "assistant", "content": "text"}]]
    assert made.completion_ids == [[*b"text"]]
    assert made.columns == {"info": [{"k": [1]}]}


def test_async_functions_wait_together(tmp_path):
    code = """
    import asyncio
    async def f(completions): await asyncio.sleep(0.5); return [1.0] * len(completions)
    async def g(completions): await asyncio.sleep(0.5); return [2.0] * len(completions)
    def h(completions): return [3.0] * len(completions)
    """
    path = written(tmp_path, code)
    rewards = load({f"{path}:{name}": 1.0 for name in "fhg"}, timeout=20, max_tokens=10)
    start = time.monotonic()
    assert rewards(batch("a")).values == {"f": [1.0], "h": [3.0], "g": [2.0]}
    assert time.monotonic() - start < 0.95


def test_what_async_functions_keep_open_stays_open(tmp_path):
    code = """
    import asyncio
    lock = asyncio.Lock()  # of the loop that first waits for it
    async def one():
        async with lock: await asyncio.sleep(0)
    async def f(completions):
        await asyncio.gather(*(one() for _ in range(4)))
        return [0.0] * len(completions)
    """
    rewards = own(tmp_path, code)
    assert [values(rewards, batch("a")) for _ in range(2)] == [[0.0], [0.0]]


def test_logged_columns_and_metrics(tmp_path):
    code = """
    import numpy, torch
    def f(completions, log_extra, log_metric):
        for i, text in enumerate(completions):
            log_extra("length", [numpy.int64(len(text))])
            log_metric("share", torch.tensor(float(i)))
        log_extra("pair", [(1, {2})] * len(completions))
        return [0] * len(completions)
    def g(completions, log_extra, log_metric):
        log_extra("length", [-1] * len(completions))
        log_metric("share", 5)
        return [0] * len(completions)
    """
    path = written(tmp_path, code)
    scores = load({f"{path}:{name}": 1.0 for name in "fg"}, timeout=20, max_tokens=10)(batch("a", "bcd"))
    assert scores.extra == {"length": [1, 3], "pair": [[1, [2]]] * 2, "length (g)": [-1, -1]}
    assert scores.metrics == {"share": 2.0}


def test_rows_to_which_nothing_applies_are_named_once(tmp_path, caplog):
    rewards = own(tmp_path, "def f(task): return [None if t == 'code' else 1 for t in task]")
    made = batch("first", "second", "third", task=["maths", "code", "code"])
    with caplog.at_level(logging.WARNING, "spinfast"):
        for _ in range(2):
            assert values(rewards, made) == [1.0, None, None]
    (message,) = caplog.messages
    assert "2 of 3 completions" in message
    assert "sample 2 of 3 (completion 'second')" in message
    assert "'task': 'code'" in message


SINGLE = """
    from spinfast.rewards import per_sample
    {}
    f = per_sample(fn{})
"""


@pytest.mark.parametrize(
    ("code", "constants", "expected"),
    [
        ("def fn(completion, answer): return completion == answer", "", [1.0, 0.0]),
        ("async def fn(completion, answer, **kwargs): return completion == answer", "", [1.0, 0.0]),
        (
            "def fn(prompt, state, task, info): return len(prompt) + len(state['answer']) + len(task) + len(info)",
            "",
            [18, 18],
        ),
        ("def fn(parser, completion, answer): return parser(completion) == answer", ", parser=str.upper", [0.0, 1.0]),
        (
            "def fn(data_source, solution_str, ground_truth, extra_info=None): "
            "return {'score': float(solution_str == ground_truth), 'source': data_source}",
            "",
            [1.0, 1.0],
        ),
    ],
    ids=["verifiers", "async", "state", "parser", "verl"],
)
@pytest.mark.parametrize("messages", [False, True])
def test_per_sample(tmp_path, code, constants, expected, messages):
    if messages:
        code = code.replace("completion == ", "completion[0]['content'] == ").replace(
            "parser(completion)", "parser(completion[0]['content'])"
        )
        code = code.replace("len(prompt)", "len(prompt[0]['content'])")
    columns = {"answer": ["a", "B"], "data_source": ["x", "y"]}
    columns["reward_model"] = [{"style": "rule", "ground_truth": text} for text in "ab"]
    rewards = own(tmp_path, SINGLE.format(code, constants))
    rewards.check(columns)
    scores = rewards(batch("a", "b", messages=messages, **columns))
    assert scores.values["f"] == expected
    assert scores.extra == ({"source": ["x", "y"]} if "data_source" in code else {})


def test_per_sample_names_what_the_data_lacks(tmp_path):
    rewards = own(tmp_path, SINGLE.format("def fn(solution_str, ground_truth, task, state): return 1", ""))
    with pytest.raises(
        UserError,
        match=r"reward f .own.py. needs 'ground_truth'; .*ground_truths; did you mean 'ground_truths'",
    ):
        rewards.check(["ground_truths"])


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, None]), min_size=2, max_size=2), min_size=1, max_size=12))
def test_constant_functions_are_told_once_until_they_change(batches):
    watch = ConstantWatch(load({"gsm8k": 1.0}, timeout=1, max_tokens=10), batches=3)
    run = 0
    for given_ in batches:
        run = run + 1 if given_[0] == given_[1] else 0
        assert len(watch(Scores({"gsm8k": given_}, {}, {}), 0.0)) == (run == 3)


@pytest.mark.parametrize(
    ("name", "value", "clipped", "said"),
    [
        ("format", 0.0, 0.5, "reward format gave 0.0 to every answer of 10 batches in a row: no answer has its format"),
        ("gsm8k", 0.0, 0.5, "no answer earns it"),
        ("gsm8k", 0.0, 1.0, "raise generation.max_tokens"),
        ("gsm8k", None, 1.0, "it applies to no row"),
        ("gsm8k", 1.0, 0.0, "it tells no answers apart"),
        ("repetition", 0.0, 0.0, None),
        ("soft_overlong", -1.0, 1.0, "raise generation.max_tokens"),
    ],
)
def test_causes_of_a_constant_reward(name, value, clipped, said):
    watch = ConstantWatch(load({name: 1.0}, timeout=1, max_tokens=10))
    told = [line for _ in range(12) for line in watch(Scores({name: [value] * 4}, {}, {}), clipped)]
    assert len(told) == (said is not None)
    assert said is None or said in told[0]
