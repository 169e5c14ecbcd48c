"""What goes wrong in other people's functions: one line each, that names the function and what it was at."""

from __future__ import annotations

import re
import signal
import threading
import time
from pathlib import Path

import pytest
from reward_cases import batch, one, own, values, written

from spinfast.errors import UserError
from spinfast.rewards import load

FAULTS = {
    "raises": (
        "def f(completions):\n    return [1 / len(c) for c in completions]",
        "reward f (own.py): line 3: ZeroDivisionError: division by zero, for sample 2 of 3 (completion '')",
    ),
    "raises in async": (
        "async def f(completions):\n    return [1 / len(c) for c in completions]",
        "reward f (own.py): line 3: ZeroDivisionError: division by zero, for sample 2 of 3 (completion '')",
    ),
    "raises for no sample alone": (
        "def f(completions): assert len(completions) == 1, 'one by one'; return [0]",
        "reward f (own.py): line 2: AssertionError: one by one, only with the whole batch of 3",
    ),
    "exits": ("import sys\ndef f(completions): sys.exit('bye')", "SystemExit: bye, for sample 1 of 3"),
    "NaN": (
        "def f(completions): return [0, float('nan'), 1]",
        "reward f (own.py): expected a finite number or None, got nan for sample 2 of 3 (completion '')",
    ),
    "infinity": (
        "import torch\ndef f(completions): return torch.tensor([0, 1, -torch.inf])",
        "got -inf for sample 3 of 3",
    ),
    "text": ("def f(completions): return ['1', 0, 0]", "expected a finite number or None, got '1' for sample 1"),
    "too big": ("def f(completions): return [10**400, 0, 0]", "expected a finite number or None, got 1000"),
    "two-dimensional": (
        "import torch\ndef f(completions): return torch.ones(3, 2)",
        "number or None, got [1.0, 1.0] for",
    ),
    "too few": (
        "def f(completions): return [1.0]",
        "reward f (own.py): expected 3 values, one per completion, got 1",
    ),
    "none at all": ("def f(completions): print('no return')", "expected a list of 3 numbers, got None"),
    "a number": ("import torch\ndef f(completions): return torch.tensor(1.0)", "expected a list of 3 numbers, got 1.0"),
    "a dict": ("def f(completions): return {'a': 1}", "expected a list of 3 numbers, got {'a': 1}"),
    "messages expected": (
        "def f(completions): return [len(c[0]['content']) for c in completions if c]",
        "; completions are strings here: for the other form set grpo.completions=messages",
    ),
    "extra of a wrong length": (
        "def f(completions, log_extra): log_extra('a', [1]); return [0, 0, 0]",
        "reward f (own.py): log_extra('a'): expected 3 values, one per completion, got 1",
    ),
    "metric that is not finite": (
        "def f(completions, log_metric): log_metric('m', float('nan')); return [0, 0, 0]",
        "ValueError: log_metric('m', nan): expected a finite number",
    ),
    "metric of the trainer's": (
        "def f(completions, log_metric): log_metric('reward', 9); return [0, 0, 0]",
        "ValueError: log_metric('reward', ...): the trainer has a metric of this name",
    ),
}


def complaint(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_a_call(tmp_path, name):
    code, said = FAULTS[name]
    # one line of code above the function, or none: the line in the message is the file's own
    assert said in complaint(own(tmp_path, f"\n{code}"), batch("four", "", "six"))


def test_strings_expected_of_messages(tmp_path):
    rewards = own(tmp_path, "import re\ndef f(completions): return [bool(re.match('a', c)) for c in completions]")
    assert "completions are lists of messages here: for the other form set grpo.completions=text" in complaint(
        rewards, batch("a", messages=True)
    )


SLOW = {
    "sleeps": "import time\ndef f(completions): time.sleep(30)",
    "computes": "def f(completions):\n    while True: pass",
    "backtracks": "import re\ndef f(completions): re.match('(a+)+$', 'a' * 60 + 'b')",
    "awaits": "import asyncio\nasync def f(completions): await asyncio.sleep(30)",
    "goes on after each sample": """
        import time
        def f(completions):
            for _ in range(300):
                try: time.sleep(0.1)
                except: pass
            return [0.0] * len(completions)""",
    "never lets go": """
        import time
        def f(completions):
            while True:
                try: time.sleep(1)
                except: pass""",
    "resets alarms": """
        import signal, time
        def f(completions):
            before = signal.signal(signal.SIGALRM, lambda *_: None)
            signal.alarm(20); signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
            time.sleep(30)""",
    "makes an error of it": """
        import time
        def f(completions):
            try: time.sleep(30)
            except BaseException: raise ValueError("interrupted")""",
}


@pytest.mark.parametrize("name", SLOW)
def test_time_limit(tmp_path, name):
    rewards, before, start = own(tmp_path, SLOW[name], timeout=0.3), signal.getsignal(signal.SIGALRM), time.monotonic()
    assert complaint(rewards, batch("a", "b")) == (
        "reward f (own.py): took longer than 0.3 s for 2 completions; make it faster or raise grpo.reward_timeout"
    )
    assert time.monotonic() - start < 10
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_coroutine_that_blocks_does_not_stop_the_next_call(tmp_path):
    rewards = own(tmp_path, "import time\nasync def f(completions): time.sleep(5)", timeout=0.2)
    assert "took longer than 0.2 s" in complaint(rewards, batch("a"))
    assert values(own(tmp_path, "async def f(completions): return [1]"), batch("a")) == [1.0]


def test_search_for_the_sample_is_limited_too(tmp_path):
    code = "import time\ndef f(completions):\n    time.sleep(0.2)\n    if len(completions) > 1: raise ValueError('no')"
    start = time.monotonic()
    assert "ValueError: no, only with the whole batch of 50" in complaint(
        own(tmp_path, code, timeout=0.5), batch(*"a" * 50)
    )
    assert time.monotonic() - start < 5


def test_outside_the_main_thread_functions_run_without_a_limit(tmp_path):
    rewards, found = own(tmp_path, "def f(completions): return [1]"), []
    thread = threading.Thread(target=lambda: found.append(values(rewards, batch("a"))))
    thread.start()
    thread.join()
    assert found == [[1.0]]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "def f(completions, solution): ...",
            "needs 'solution'; the data has the columns answer, level, solutions; did you mean 'solutions'?",
        ),
        ("def f(completions_ids, **kwargs): ...", "did you mean 'completion_ids'?"),
        (
            "def f(completions, prompt): ...",
            "needs 'prompt'; the data has the columns answer, level, solutions; did you mean 'prompts'?",
        ),
        (
            "def f(zzz, /): ...",
            "needs 'zzz'; the data has the columns answer, level, solutions; give the data this column",
        ),
    ],
)
def test_missing_columns(tmp_path, code, said):
    assert said in complaint(own(tmp_path, code).check, ["answer", "solutions", "level", "prompt", "completion"])


IMPORTS = {
    "syntax": ("\n\ndef f(:\n", "own.py, line 3: SyntaxError on import: "),
    "raises": ("import math\n\nmath.sqrt(-1)\n", "own.py, line 3: ValueError on import: "),
    "lacks a package": (
        "import no_such_package_here\n",
        "own.py, line 1: ModuleNotFoundError on import: No module named",
    ),
    "exits": ("import argparse\nargparse.ArgumentParser().error('x')", "own.py, line 2: SystemExit on import: 2"),
    "lacks the function": ("def fn(completions): ...\ng = 1", "own.py has no 'f'; did you mean 'fn'?"),
    "empty": ("", "own.py has no 'f'; there are no functions"),
    "is no function": ("f = 3", "own.py:f: expected a function, got a int"),
    "is a module of torch": (
        "import torch\nf = torch.nn.Linear(1, 1)",
        "expected a function, got a Linear; write a function",
    ),
    "class without call": ("class f: ...", "expected a class with __call__, got f without it"),
    "class that raises": (
        "class f:\n    def __init__(self): self.x = 1 / 0\n    def __call__(self): ...",
        "line 2: ZeroDivisionError",
    ),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_files_that_do_not_load(tmp_path, capsys, name):
    code, said = IMPORTS[name]
    message = complaint(own, tmp_path, code)
    assert message.startswith("grpo.rewards: ")
    assert said in message


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            {"accuracy_reward": 1},
            "expected a ready reward or FILE.py:function, got 'accuracy_reward'; did you mean 'math'?",
        ),
        ({"gsm8": 1}, "expected a ready reward or FILE.py:function, got 'gsm8'; did you mean 'gsm8k'?"),
        (
            {"nothing.py": 1},
            "expected a ready reward or FILE.py:function, got 'nothing.py'; ready ones are gsm8k, math",
        ),
        ({"nothing.py:f": 1}, "nothing.py: no such file (looked for /"),
        ({"owner/name:f": 1}, "expected a ready reward or FILE.py:function, got 'owner/name:f'"),
        ({"https://hub/owner/rewards.py:f": 1}, "rewards.py: no such file"),
        ({"gsm8k": float("nan")}, "weight of gsm8k: expected a finite number, got nan"),
        ({"gsm8k": {"weight": True}}, "weight of gsm8k: expected a finite number, got True"),
        ({"gsm8k": {"readin": "strict"}}, "gsm8k: no option 'readin'; did you mean 'reading'?"),
        (
            {"gsm8k": {"reading": "loose"}},
            "gsm8k: reading: input should be 'flexible', 'strict' or 'tags', got 'loose'",
        ),
        ({"format": {"tags": ["think"]}}, "format: tags.1: field required"),
        ({"repetition": {"max_penalty": 1}}, "repetition: max_penalty: input should be less than or equal to 0, got 1"),
        ({"soft_overlong": {"max_tokens": 5}}, "soft_overlong: no option 'max_tokens'; did you mean 'max_len'?"),
        ({"soft_overlong": {"cache": 101}}, "cache: expected at most max_len 100, got 101"),
        ({"cosine": {"max_value_correct": float("inf")}}, "cosine: max_value_correct: input should be a finite number"),
    ],
)
def test_specs_that_are_refused(spec, said):
    assert said in complaint(lambda: load(spec, timeout=1, max_tokens=100))


def test_options_that_a_function_does_not_take(tmp_path):
    assert "takes no option 'scale'; it takes completions, size" in complaint(
        lambda: own(tmp_path, "def f(completions, size=1): ...", scale=2)
    )
    assert "option 'prompts' has the name of an argument" in complaint(
        lambda: own(tmp_path, "def f(completions, **kw): ...", prompts=2)
    )


def test_ready_rewards_name_the_columns_they_look_for():
    for name in ("gsm8k", "math", "cosine"):
        one(name).check(["question", "answer"])
        assert "reward " + name + " needs a column with the result" in complaint(
            one(name).check, ["question", "completion"]
        )


def test_same_names_do_not_collide(tmp_path, monkeypatch):
    """Files of one stem, their helpers of one name, functions of one name; imports at the call as well."""
    for folder, value in (("a", 1), ("b", 2)):
        written(tmp_path, f"VALUE = {value}", f"{folder}/helpers.py")
        written(tmp_path, f"LATE = {value}", f"{folder}/late_{folder}.py")
        code = f"import helpers\ndef f(prompts):\n    import late_{folder} as late\n    "
        code += "return [10 * helpers.VALUE + late.LATE]"
        written(tmp_path, code, f"{folder}/own.py")
    written(tmp_path, "def f(prompts): return [3]", "other.py")
    written(tmp_path, "def format(prompts): return [4]\ndef g(prompts): return [5]", "third.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["a/own.py:f", "b/own.py:f", "~/other.py:f", "third.py:format", "format", "./third.py:g"]
    scores = load(dict.fromkeys(names, 1.0), timeout=20, max_tokens=10)(batch("a"))
    assert scores.values == {
        "own.f": [11.0], "own.f_2": [22.0], "other.f": [3.0], "third.format": [4.0], "format": [0.0], "g": [5.0],
    }  # fmt: skip


def test_a_file_is_imported_once_for_all_its_functions(tmp_path):
    path = written(
        tmp_path, "calls = []\ndef f(prompts): calls.append(1); return [0]\ndef g(prompts): return [len(calls)]"
    )
    rewards = load({f"{path}:f": 1, f"{path}:g": 1}, timeout=20, max_tokens=10)
    assert rewards(batch("a")).values == {"f": [0.0], "g": [1.0]}


def test_fault_labels_name_no_directory(tmp_path):
    message = complaint(own(tmp_path, "def f(completions): return []"), batch("a"))
    assert not re.search(re.escape(str(Path(tmp_path))), message)
