"""Odd configs, data, adapters, tokenizers, tasks and run directories through the real command line.

Every one is done (exit 0) or refused (exit 2) with exactly one line on stderr; no traceback, no hang, and a refused
start leaves nothing behind. Found by hypothesis and by hand; how many were tried is printed at the end (-s).
"""

import contextlib
import io
import json
import pickle
import shutil
import signal
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fixtures import CHATML
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_run import write_config

from spinfast.config import Config
from spinfast.config.sections import section_of
from spinfast.data.formats import KNOWN
from spinfast.run import main

pytestmark = pytest.mark.faults
SECONDS = 60  # no case takes so long: it hangs
SMALL = {
    "spin": {"iterations": 1},
    "evaluate": {"problems": 1, "pairs": 1, "max_tokens": 2},
    "generation": {"max_tokens": 2, "batch_size": 5, "backend": "transformers"},
}
tried = Counter()
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # the case that failed is printed; shrinking it takes hours


class Hang(BaseException):
    """No Exception: nobody may take it for a fault of the input."""


def outcome(kind, words, leaves=None):
    """(exit code, the line on stderr or ""). `leaves` is a path that a refused start must not leave behind."""

    def hang(signum, frame):
        raise Hang(f"{words} still runs after {SECONDS} s")

    tried[kind] += 1
    said, shown = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
            code = main([str(word) for word in words])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert code in (0, 2)
    said.getvalue().encode("utf-8")  # a terminal can show it
    lines = said.getvalue().splitlines()
    if code == 0:
        assert lines == []
        return 0, ""
    assert len(lines) == 1, lines
    assert lines[0].startswith("spinfast: ")
    assert len(lines[0]) <= 1200
    assert lines[0].isprintable()
    assert leaves is None or not leaves.exists()
    return 2, lines[0]


@pytest.fixture(scope="module", autouse=True)
def told():
    yield
    print(f"\nfuzzed inputs: {tried.total()}:", json.dumps(tried))


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    """A directory with config.yaml, train.jsonl, heldout.jsonl."""
    directory = tmp_path_factory.mktemp("fuzz")
    write_config(directory, tiny_model("llama"), **SMALL)
    return directory


@pytest.fixture(scope="module")
def played(place):
    assert main([str(place / "config.yaml"), "--run-dir", str(place / "played")]) == 0
    return place / "played"


# -- configs ----------------------------------------------------------------------------------------------------------

MINIMAL = "model: {name: /nowhere}\ndata: {source: nothing.jsonl}\n"
CONFIGS = {
    "empty": "",
    "null": "null",
    "a number": "7",
    "a list": "- model\n- data\n",
    "a string": "model",
    "not YAML": "model: {name: [",
    "a tab": "model:\n\tname: x\n",
    "duplicate document": MINIMAL + "---\n" + MINIMAL,
    "python object": "model: !!python/object/apply:os.system ['touch /tmp/spinfast-was-here']\ndata: {source: x}\n",
    "python name": MINIMAL + "seed: !!python/name:os.system\n",
    "unknown tag": MINIMAL + "seed: !seed 7\n",
    "binary": MINIMAL + "prompt: {template: {x: !!binary /w==}}\n",
    "a set": MINIMAL + "prompt: {template: {x: !!set {a, b}}}\n",
    "a date": MINIMAL + "prompt: {template: {x: 2024-01-01}}\n",
    "no such date": MINIMAL + "prompt: {template: {x: 2024-99-99}}\n",
    "a time": MINIMAL + "seed: 2024-01-01 10:00:00\n",
    "half a surrogate": MINIMAL + 'prompt: {system: "\\ud800"}\n',
    "half a surrogate as key": MINIMAL + '"\\udfff": 1\n',
    "half a surrogate as name": 'model: {name: "\\ud800"}\ndata: {source: x}\n',
    "half a surrogate as source": 'model: {name: /nowhere}\ndata: {source: "\\ud800.jsonl"}\n',
    "a null character": 'model: {name: "a\\0b"}\ndata: {source: x}\n',
    "an escape sequence": 'model: {name: "\\e[31mred"}\ndata: {source: x}\n',
    "line ends in a key": MINIMAL + '"a\\nb\\nspinfast: done": 1\n',
    "line ends in a name": 'model: {name: "a\\nb\\nspinfast: done"}\ndata: {source: x}\n',
    "right-to-left": MINIMAL + '"\\u202eelbat": 1\n',
    "a number as key": MINIMAL + "7: 1\n",
    "null as key": MINIMAL + "null: 1\n",
    "a list as key": MINIMAL + "? [a, b]\n: 1\n",
    "a number as inner key": "model: {name: x, 1: 2}\ndata: {source: x}\n",
    "a number as column": "model: {name: x}\ndata: {source: x, columns: {1: 2}}\n",
    "merge key": "model: {<<: {name: x}}\ndata: {source: x, <<: 7}\n",
    "a recursive alias": "model: &m {name: x, revision: *m}\ndata: {source: x}\n",
    "a recursive template": MINIMAL + "prompt: {template: &t {x: *t}}\n",
    "laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    + "model: {name: x, revision: *i}\ndata: {source: x}\n",
    "deep": "model: " + "[" * 5000 + "]" * 5000,
    "deep mapping": "model: " + "{a: " * 3000 + "1" + "}" * 3000,
    "a long integer": MINIMAL + f"seed: {'9' * 5000}\n",
    "a long float": MINIMAL + f"seed: {'9' * 5000}.0\n",
    "a huge seed": MINIMAL + "seed: 99999999999999999999999999\n",
    "a long key": MINIMAL + f"{'k' * 900}: 1\n",
    "a longer key": MINIMAL + f'"{"k" * 5000}": 1\n',
    "a long value": f"model: {{name: {'n' * 5000}}}\ndata: {{source: x}}\n",
    "a long path": f"model: {{name: {'n' * 300}/}}\ndata: {{source: x}}\n",
    "an unknown user's home": "model: {name: ~nobody-of-that-name/model}\ndata: {source: x}\n",
    "missing model": "data: {source: x}\n",
    "missing data": "model: {name: x}\n",
    "null sections": "model: null\ndata: null\n",
    "sections as lists": "model: [name]\ndata: [source]\n",
    "section as string": MINIMAL + "train: fast\n",
    "unknown section": MINIMAL + "training: {lr: 1}\n",
    "path as run directory": MINIMAL + "run_dir: ../../elsewhere\n",
    "output elsewhere": MINIMAL + "output: /etc\n",
    "trust": "model: {name: /nowhere, trust_remote_code: true}\ndata: {source: x}\n",
    "name with dots": "model: {name: ../../../../etc/passwd}\ndata: {source: x}\n",
    "package with dots": "model: {name: 'package:os/../../x.gguf'}\ndata: {source: x}\n",
    "a device file": "model: {name: /dev/zero}\ndata: {source: /dev/zero}\n",
    "a url": "model: {name: 'https://example.invalid/model'}\ndata: {source: x}\n",
    "byte order mark": "\ufeff" + MINIMAL,
}
RAW = {
    "invalid UTF-8": b"model: \xff\xfe",
    "UTF-16": MINIMAL.encode("utf-16"),
    "null bytes": b"\0" * 100,
    "gzip": b"\x1f\x8b\x08\0\0\0\0\0",
    "a pickle": pickle.dumps({"model": {"name": "x"}}),
    "control characters": bytes(range(32)),
    "a long line": b"#" * (1 << 20),
    "latin-1": "model: {name: é}".encode("latin-1"),
}


@pytest.mark.parametrize("content", [*CONFIGS.values(), *RAW.values()], ids=[*CONFIGS, *RAW])
def test_config_files(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    assert outcome("configs", [path])[0] == 2
    assert list(tmp_path.glob("runs/*")) == []


YAML_TEXT = st.text(st.sampled_from("model:data name{}[]\"'&*!|>-#%@`,?~\n\t 017.e\\u\0é😀"), max_size=60)
SECTIONS = {
    "model",
    "data",
    "heldout",
    "prompt",
    "adapter",
    "spin",
    "generation",
    "train",
    "sft",
    "grpo",
    "evaluate",
    "device",
}
VALUE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), -0.0, "", "auto", "1e400"]),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers() | st.text(max_size=5) | st.floats(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers() | st.none(), max_size=2),
)


@given(st.one_of(st.binary(max_size=100), YAML_TEXT.map(str.encode), VALUE.map(json.dumps).map(str.encode)))
@settings(max_examples=100, phases=PHASES)
def test_any_bytes_as_a_config(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("bytes") / "config.yaml"
    path.write_bytes(content)
    assert outcome("configs", [path, "--run-dir", path.parent / "run"], leaves=path.parent / "run")[0] == 2


def fields():
    return [
        (name, key)
        for name in sorted(SECTIONS)
        for key in section_of(Config.model_fields[name].annotation).model_fields
    ] + [("seed", None), ("report_to", None), ("unknown", None), ("train", "unknown")]


@given(st.sampled_from(fields()), VALUE)
@settings(max_examples=120, phases=PHASES)
def test_any_value_of_a_config(tmp_path_factory, field, value):
    """The model is nowhere, so that a config that is right is refused too, one step later."""
    tree = {"model": {"name": "/nowhere"}, "data": {"source": "nothing.jsonl"}}
    section, key = field
    if key is None:
        tree[section] = value
    else:
        tree.setdefault(section, {"source": "x"} if section == "heldout" else {})[key] = value
    if section in Config.methods():
        tree["method"] = section
    if field == ("model", "name"):
        tree["data"]["seed"] = -1  # "." is a directory
    path = tmp_path_factory.mktemp("value") / "config.yaml"
    path.write_text(json.dumps(tree))
    assert outcome("configs", [path, "--run-dir", path.parent / "run"], leaves=path.parent / "run")[0] == 2


OVERRIDES = [
    "=", "a=", "=1", ".=1", "..=1", "model.=1", ".name=1", "model.name.x=1", "seed.x=1", "spin.lr=[", "spin.lr={",
    "spin.lr=.nan", "spin.lr=.inf", "spin.lr=-1", "spin.lr=[]", "spin.lr=[1,x]", "seed=!!python/name:os.system",
    "seed=1e400", "seed=2024-99-99", f"seed={'9' * 5000}", "seed=" + "[" * 3000, "model=1", "model=null", "heldout=1",
    "heldout=[]", "prompt.template={x: !!binary /w==}", "report_to=mlflow", "report_to=[wandb, x]",
    'model.name="\\ud800"', "model.name=\udcff", "adapter.target_modules={}", "spin.beta=abc", "data.columns=[a]",
]  # fmt: skip


@pytest.mark.parametrize("word", OVERRIDES, ids=lambda word: ascii(word)[:30])
def test_overrides(place, tmp_path, word):
    assert outcome("configs", [place / "config.yaml", word, "--run-dir", tmp_path / "run"], tmp_path / "run")[0] == 2


@pytest.mark.parametrize("path", ["", ".", "/dev/null", "no/such", "a\0b", "x" * 300, "~nobody-here/x", "\udcff"])
def test_paths_of_configs(path, tmp_path):
    assert outcome("configs", [path, "--run-dir", tmp_path / "run"], tmp_path / "run")[0] == 2


@pytest.mark.parametrize("path", ["/dev/null", "/dev/null/x", "/proc/x", "a\0b", "{0}/" + "x" * 300, "\udcff"])
def test_run_directories(place, path, tmp_path):
    words = [place / "config.yaml", "--run-dir", path.format(tmp_path)]
    if path == "\udcff":  # not UTF-8, and a file system may well take it
        words[-1] = str(tmp_path / path)
    code, _ = outcome("configs", words)
    assert code == 2 or path == "\udcff"


PLAYED = [
    "seed=4294967295", "seed=18446744073709551616", "adapter.r=1", "adapter.r=64", "adapter.r=100000",
    "adapter.r=1000000000000",
    "adapter.alpha=1e-300", "adapter.alpha=1e300", "adapter.target_modules=nothing", "adapter.target_modules=[q_proj]",
    "adapter.target_modules='['", "adapter.target_modules=[]", "adapter.target_modules=''",
    "adapter.target_modules=[embed_tokens]",
    "adapter.target_modules=[lm_head]", "adapter.target_modules=[norm]",
    "spin.beta=0", "spin.beta=-1", "spin.beta=1e300", "spin.beta=[1e-300]", "spin.loss=exponential", "spin.loss=ipo",
    "generation.temperature=0", "generation.temperature=1e-300", "generation.temperature=1e300",
    "generation.top_p=1e-300", "generation.max_tokens=1000000000000", "generation.batch_size=1000000000000",
    "generation.kv_cache_gib=1e300", "spin.lr=1e300", "spin.lr=1e30", "spin.lr=1e-300", "spin.lr=0",
    "spin.weight_decay=1e300", "spin.warmup_ratio=0.999999", "spin.epochs=1000000000000",
    "method=[sft]", "spin.groups_per_step=1000000000000", "train.microbatch_tokens=1",
    "train.microbatch_tokens=0", "train.microbatch_tokens=-5", "train.microbatch_tokens=1000000000000",
    "spin.max_grad_norm=1e-300", "spin.max_grad_norm=1e300", "train.save_every_seconds=1e-300",
    "train.save_every_steps=1000000000000", "prompt.max_prompt_tokens=1", "prompt.max_prompt_tokens=1000000000000",
    "prompt.max_answer_tokens=1", "prompt.max_answer_tokens=1000000000000", "prompt.system=''",
    "prompt.system='<|im_end|>'", "prompt.template={tokenize: true}", "prompt.template={messages: []}",
    "prompt.template={add_generation_prompt: false}", "prompt.template={chat_template: 'x'}",
    "prompt.template={return_tensors: pt}", "prompt.template={x: .nan}", "prompt.template={tools: 7}",
    "data.size=1", "data.size=1000000000000", "data.source=/dev/null", "data.source=json", "data.source=pandas",
    "data.source=.", "data.source=..", "data.source=a/b", "data.source=reasoning_gym:x", "data.source=''",
    "data.source=~nobody-here/x.jsonl", "data.columns={question: answer}", "data.columns={x: y}",
    "evaluate.problems=1000000000000", "evaluate.max_tokens=1000000000000", "device.profile=h100",
    "device.dtype=float16", "device.dtype=bfloat16", "device.attention=xformers", "device.kernels=triton",
    "device.profile=''", "model.revision=x", "heldout.size=0", "heldout=null",
]  # fmt: skip


OF_METHODS = [
    ("method=sft", "sft.evaluate_every=1", "sft.patience=1", "sft.keep=best"),
    ("method=sft", "sft.lr=1e30", "sft.evaluate_every=1", "sft.keep=best"),
    ("method=dpo",),
    ("method=[sft, dpo]", "data.turns=all"),
    ("method=dpo", "dpo.loss={sigmoid: 1e6}"),
    ("method=dpo", "dpo.reference=/dev/null"),
    ("method=dpo", "dpo.loss={sigmoid: .nan}"),
    ("prompt.overlong=cut", "prompt.max_answer_tokens=1"),
    *(
        ("method=grpo", "grpo.steps=2", "grpo.samples=2", "grpo.prompts_per_step=2", *words)
        for words in (
            ("grpo.evaluate_every=1", "grpo.patience=1", "grpo.keep=best"),
            ("grpo.rewards=soft_overlong", "grpo.lr=1e30", "grpo.evaluate_every=1"),
            ("grpo.rewards=soft_overlong", "grpo.prompts_per_step=30"),
            ("grpo.rewards=nothing",),
            ("grpo.rewards={gsm8k: {weight: x}}",),
            ("grpo.rewards={gsm8k: .nan}",),
            ("grpo.rewards={gsm8k: {option: 1}}",),
            ("grpo.rewards=[]",),
            ("grpo.rewards=/dev/null:f",),
            ("grpo.rewards=nowhere.py:f",),
            ("grpo.rewards=[gsm8k, gsm8k]",),
            ("grpo.rewards={7: 1}",),
            ("grpo.beta=1e6", "grpo.rewards=soft_overlong"),
            ("grpo.epsilon=1e-300",),
            ("grpo.reward_timeout=1e-300",),
            ("generation.temperature=0",),
            ("generation.temperature=1e-300",),
            ("generation.top_p=1e-300",),
            ("data.columns={question: question, answer: question}",),
        )
    ),
]


@pytest.mark.parametrize("words", [*((word,) for word in PLAYED), *OF_METHODS], ids=lambda words: " ".join(words)[:50])
def test_extreme_settings_are_played_or_refused(place, tmp_path, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome("configs", [place / "config.yaml", *words, "--run-dir", tmp_path / "run"])
    assert not list(tmp_path.rglob("*.partial"))


# -- data -------------------------------------------------------------------------------------------------------------


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


GOOD = {"question": "a", "answer": "b"}
ROWS = {
    "null answer": {"question": "a", "answer": None},
    "empty answer": {"question": "a", "answer": ""},
    "spaces": {"question": " \n ", "answer": "b"},
    "a number": {"question": "a", "answer": 7},
    "a list": {"question": ["a"], "answer": "b"},
    "no-break spaces": {"question": "\u00a0\u3000", "answer": "b"},
    "null conversation": {"messages": None},
    "empty conversation": {"messages": []},
    "not a conversation": {"messages": "hello"},
    "a turn of text": {"messages": ["hello"]},
    "no assistant": chat(("user", "a")),
    "assistant first": chat(("assistant", "a"), ("user", "b")),
    "two users": chat(("user", "a"), ("user", "b"), ("assistant", "c")),
    "two assistants": chat(("user", "a"), ("assistant", "b"), ("assistant", "c")),
    "late system": chat(("user", "a"), ("system", "s"), ("assistant", "b")),
    "two systems": chat(("system", "a"), ("system", "s"), ("user", "b"), ("assistant", "c")),
    "unknown role": chat(("tool", "a"), ("assistant", "b")),
    "null role": chat((None, "a"), ("assistant", "b")),
    "a list as role": chat((["user"], "a"), ("assistant", "b")),
    "an object as role": chat(({}, "a"), ("assistant", "b")),
    "null content": chat(("user", None), ("assistant", "b")),
    "parts": chat(("user", [{"type": "text", "text": "a"}]), ("assistant", "b")),
    "only a system turn": chat(("system", "s")),
    "sharegpt with unknown": {"conversations": [{"from": "bing", "value": "a"}]},
    "half a surrogate": {"question": "\ud800", "answer": "b"},
    "null characters": {"question": "a\0b", "answer": "\0"},
    "control tokens": {"question": "<|im_end|>\n<|im_start|>assistant\n", "answer": "<|im_end|><|pad|>"},
    "markers": {"question": "q7SPINFAST07p", "answer": "q7SPINFAST17p"},
    "template language": {"question": "{{ 7 * 7 }}{% raw %}", "answer": "{{ messages }}"},
    "over the limit": {"question": "word " * 9000, "answer": "b"},
    "answer over the limit": {"question": "a", "answer": "word " * 9000},
    "one long word": {"question": "x" * 200_000, "answer": "b"},
    "combining marks": {"question": "a" + "\u0301" * 300, "answer": "\u202e"},
    "unknown columns": {"foo": 1},
    "no columns": {},
    "spin without generated": {"real": [{"role": "user", "content": "a"}], "generated": 7},
    "prompt of objects": {"prompt": [{"x": 1}], "completion": "b"},
    "completion of nothing": {"prompt": "a", "completion": []},
    "reference of objects": {"question": "a", "answer": "b", "reference": {"x": [1]}},
    "alpaca with a number": {"instruction": "a", "input": 7, "output": "b"},
    "deep": {"question": "a", "answer": "b", "x": [[[[[[[[[[1]]]]]]]]]]},
    "text of a number": {"text": 7},
    "text of a letter": {"text": "a"},
    "a pair": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "a pair of equals": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "a pair without a prompt": {"chosen": "b", "rejected": "c"},
    "a pair of conversations": {"chosen": chat(("user", "a"), ("assistant", "b"))["messages"], "rejected": "c"},
    "transcripts": {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"},
    "responses": {"prompt": "a", "responses": ["b", "c", "d"], "scores": [1, None, "x"]},
    "a label": {"prompt": "a", "completion": "b", "label": True},
    "a label of words": {"prompt": "a", "completion": "b", "label": "good"},
    "tools of text": {**chat(("user", "a"), ("assistant", "b")), "tools": "x", "chat_template_kwargs": [1]},
    "weights of words": {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": "x"}]
    },
}
METHODS = {  # the words of the command line
    "spin": (),
    "sft": ("method=sft", "data.turns=all", "heldout=null"),
    "dpo": ("method=dpo", "heldout=null"),
    "kto": ("method=dpo", "dpo.loss=kto", "heldout=null"),
}
FILES = {
    "empty": b"",
    "line ends": b"\n\n\n",
    "null": b"null\n",
    "a number": b"7\n",
    "a string": b'"x"\n',
    "an empty array": b"[]",
    "an array of numbers": b"[1, 2]",
    "an array cut off": b'[{"question": "a", "answer": "b"},',
    "a line cut off": b'{"question": "a", "answer": "b"}\n{"question": "a", "ans',
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "invalid UTF-8": b'{"question": "\xff", "answer": "b"}\n',
    "UTF-16": json.dumps(GOOD).encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
    "a gigantic line": b'{"question": "' + b"x" * (9 << 20) + b'", "answer": "b"}\n',
    "a long integer": b'{"question": "a", "answer": ' + b"9" * 5000 + b"}\n",
    "NaN": b'{"question": "a", "answer": NaN}\n',
    "null bytes": b"\0" * 5000,
    "a pickle": pickle.dumps([GOOD]),
    "gzip": b"\x1f\x8b\x08\0\0\0\0\0\0\3",
    "parquet's magic": b"PAR1PAR1",
    "parquet's magic, long": b"PAR1" + b"\xff" * 100 + b"PAR1",
    "carriage returns": b'{"question": "a", "answer": "b"}\r{"question": "a", "answer": "b"}\r',
    "a hundred duplicates": (json.dumps(GOOD) + "\n").encode() * 100,
    "csv": b"question,answer\na,b\n",
    "duplicate keys": b'{"question": "a", "question": null, "answer": "b"}\n',
}


def play_data(place, directory, name, content, *words):
    path = directory / name
    path.write_bytes(content)
    arguments = [place / "config.yaml", f"data.source={path}", *words, "--run-dir", directory / "run"]
    return outcome("data files", arguments, directory / "run")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place_in_file", ["alone", "second"])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_rows(place, tmp_path, row, place_in_file, method):
    rows = [row] if place_in_file == "alone" else [GOOD, row]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    play_data(place, tmp_path, "data.jsonl", content, *METHODS[method])


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_files(place, tmp_path, content, suffix):
    code, line = play_data(place, tmp_path, f"data{suffix}", content)
    assert code == 0 or f"data{suffix}" in line


TABLES = {
    "no rows": pa.table({"question": pa.array([], pa.string()), "answer": pa.array([], pa.string())}),
    "no columns": pa.table({}),
    "invalid UTF-8": pa.table({"question": pa.array([b"\xff"], pa.binary()).view(pa.string()), "answer": ["b"]}),
    "binary": pa.table({"question": [b"a"], "answer": [b"b"]}),
    "numbers": pa.table({"question": [1.5], "answer": [None]}),
    "nulls": pa.table({"question": pa.nulls(3), "answer": pa.nulls(3)}),
    "structs": pa.table({"messages": [{"role": "user", "content": "a"}]}),
    "maps": pa.table({"messages": pa.array([[("role", "user")]], pa.map_(pa.string(), pa.string()))}),
    "times": pa.table({"question": pa.array([10**18], pa.timestamp("ns")), "answer": ["b"]}),
    "bad times": pa.table({"question": ["a"], "answer": ["b"], "x": pa.array([2**62], pa.timestamp("us"))}),
    "twice a column": pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["question", "question"]),
    "dictionary": pa.table({"question": pa.array(["a", "b"]).dictionary_encode(), "answer": ["b", "c"]}),
    "large": pa.table({"question": pa.array(["a"], pa.large_string()), "answer": pa.array(["b"], pa.large_string())}),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_parquet_tables(place, tmp_path, table):
    pq.write_table(table, tmp_path / "made.parquet")
    play_data(place, tmp_path, "data.parquet", (tmp_path / "made.parquet").read_bytes())


@given(st.data())
@settings(max_examples=40, phases=PHASES)
def test_a_parquet_file_with_bytes_changed(place, tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("parquet")
    pq.write_table(pa.table({"question": ["a", "c"], "answer": ["b", "d"]}), directory / "made.parquet")
    content = bytearray((directory / "made.parquet").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    play_data(place, directory, "data.parquet", bytes(content))


TURN = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "x", None]),
                              "content": st.text(max_size=8) | st.none()})  # fmt: skip
ROW = st.one_of(
    st.fixed_dictionaries({"question": st.text(max_size=12), "answer": st.text(max_size=12)}),
    st.fixed_dictionaries({"messages": st.lists(TURN, max_size=4)}),
    st.fixed_dictionaries(
        {name: st.text(max_size=6) | st.lists(TURN, max_size=3) for name in ("chosen", "rejected", "prompt")}
    ),
    st.dictionaries(st.sampled_from(sorted(KNOWN)), VALUE, max_size=4),
)


@given(st.lists(ROW, min_size=1, max_size=3), st.booleans(), st.sampled_from([*METHODS]))
@settings(max_examples=160, phases=PHASES)
def test_any_rows(place, tmp_path_factory, rows, as_array, method):
    content = json.dumps(rows) if as_array else "".join(json.dumps(row) + "\n" for row in rows)
    name = "data.json" if as_array else "data.jsonl"
    play_data(place, tmp_path_factory.mktemp("rows"), name, content.encode(), *METHODS[method])


def test_heldout_rows_that_are_trained_on_are_told(place, tmp_path):
    run_dir = tmp_path / "run"
    words = [place / "config.yaml", f"heldout.source={place / 'train.jsonl'}", "--run-dir", run_dir]
    assert outcome("data files", words)[0] == 0
    assert "12 of 12 prompts are in the training data too" in (run_dir / "log.txt").read_text()


# -- adapters ---------------------------------------------------------------------------------------------------------


def score_with(place, tiny_model, adapter):
    (place / "task.jsonl").write_text(json.dumps(GOOD) + "\n")
    words = ["eval", "--model", tiny_model("llama"), "--tasks", place / "task.jsonl", "--max-length", "64"]
    output = adapter.parent / "scores"
    return outcome("adapters", [*words, "--adapter", adapter, "--output", output], output)


@pytest.fixture
def adapter(played, tmp_path):
    return shutil.copytree(played / "iter_000" / "adapter", tmp_path / "adapter")


def edit_config(adapter, **changes):
    path = adapter / "adapter_config.json"
    kept = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in kept.items() if value != "REMOVED"}))


def edit_tensors(adapter, change):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors, sorted(tensors)[0])
    save_file(tensors, path)


def replace(make):
    return lambda tensors, name: tensors.update({name: make(tensors[name]).contiguous()})


TENSORS = {
    "no tensors": lambda tensors, name: tensors.clear(),
    "one missing": lambda tensors, name: tensors.pop(name),
    "a stranger": lambda tensors, name: tensors.update(stranger=torch.zeros(1)),
    "renamed": lambda tensors, name: tensors.update({f"x.{name}": tensors.pop(name)}),
    "transposed": replace(lambda t: t.T),
    "another rank": replace(lambda t: torch.cat([t, t])),
    "flat": replace(torch.flatten),
    "a scalar": replace(lambda t: torch.tensor(1.0)),
    "empty": replace(lambda t: t[:0]),
    "NaN": replace(lambda t: t * float("nan")),
    "one inf": replace(lambda t: torch.full_like(t, float("inf"))),
    "integers": replace(lambda t: t.to(torch.int64)),
    "booleans": replace(lambda t: t > 0),
    "complex": replace(lambda t: t.to(torch.complex64)),
    "float64": replace(lambda t: t.double()),
    "bytes": replace(lambda t: t.to(torch.uint8)),
    "8-bit floats": replace(lambda t: t.to(torch.float8_e4m3fn)),
    "huge": replace(lambda t: torch.full_like(t, 3e38)),
}
SETTINGS = [
    {"peft_type": "IA3"}, {"peft_type": None}, {"r": 0}, {"r": -4}, {"r": 4.5}, {"r": "4"}, {"r": 10**12},
    {"r": "REMOVED"}, {"r": True}, {"r": 8}, {"r": 3}, {"lora_alpha": 0}, {"lora_alpha": "x"}, {"lora_alpha": None},
    {"lora_alpha": float("nan")}, {"lora_alpha": float("inf")}, {"lora_alpha": 10**400}, {"lora_alpha": 1e300},
    {"target_modules": []}, {"target_modules": None}, {"target_modules": ["nothing"]}, {"target_modules": "("},
    {"target_modules": [1]}, {"target_modules": "REMOVED"}, {"target_modules": {"q_proj": 1}},
    {"target_modules": ["embed_tokens"]}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]},
    {"rank_pattern": {"q_proj": 8}}, {"alpha_pattern": {"q_proj": 1}}, {"auto_mapping": {"parent_library": "os"}},
    {"base_model_name_or_path": "/elsewhere"}, {"revision": "0" * 64}, {"revision": 7}, {"bias": "all"},
    {"fan_in_fan_out": True}, {"init_lora_weights": "pissa"}, {"layers_to_transform": [0]}, {"lora_bias": True},
    {"task_type": "X"}, {"unknown": 1}, {"trainable_token_indices": [1]}, {"lora_dropout": 0.9},
]  # fmt: skip


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS)
def test_adapter_tensors(place, tiny_model, adapter, change):
    edit_tensors(adapter, change)
    code, line = score_with(place, tiny_model, adapter)
    assert code == 0 or "adapter" in line


@pytest.mark.parametrize("changes", SETTINGS, ids=lambda changes: str(changes)[:50])
def test_adapter_settings(place, tiny_model, adapter, changes):
    edit_config(adapter, **changes)
    score_with(place, tiny_model, adapter)


def test_an_adapter_of_another_base_is_refused(place, tiny_model, adapter):
    edit_config(adapter, revision="0" * 64)
    code, line = score_with(place, tiny_model, adapter)
    assert code == 2
    assert "use the base that it was trained on" in line


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(place, tiny_model, adapter, value):
    edit_tensors(adapter, replace(lambda t: torch.full_like(t, value)))
    code, line = score_with(place, tiny_model, adapter)
    assert code == 2
    assert "not finite" in line


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [*FILES.values(), None], ids=[*FILES, "removed"])
def test_adapter_files(place, tiny_model, adapter, name, content):
    (adapter / name).unlink()
    if content is not None:
        (adapter / name).write_bytes(content)
    assert score_with(place, tiny_model, adapter)[0] == 2


class Bomb:
    def __reduce__(self):
        return (open, ("/tmp/spinfast-was-here", "w"))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors", "adapter_config.json"])
def test_a_pickled_adapter_is_not_read(place, tiny_model, adapter, name, tmp_path):
    for path in adapter.glob("adapter_model*"):
        path.unlink()
    (adapter / name).write_bytes(pickle.dumps(Bomb()))
    assert score_with(place, tiny_model, adapter)[0] == 2


@pytest.mark.parametrize("source", ["pandas", "."])
def test_a_pickled_data_set_is_not_read(place, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.pkl").write_bytes(pickle.dumps(Bomb()))
    words = [place / "config.yaml", f"data.source={source}", "--run-dir", tmp_path / "run"]
    assert outcome("data files", words, tmp_path / "run")[0] == 2
    assert not Path("/tmp/spinfast-was-here").exists()


@given(st.data())
@settings(max_examples=60, phases=PHASES)
def test_an_adapter_with_bytes_changed_or_cut(place, tiny_model, played, tmp_path_factory, data):
    adapter = shutil.copytree(played / "iter_000" / "adapter", tmp_path_factory.mktemp("adapter") / "adapter")
    path = adapter / data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, min(len(content), 2000) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    score_with(place, tiny_model, adapter)


# -- tokenizers -------------------------------------------------------------------------------------------------------

TEMPLATES = {
    "none": None,
    "empty": "",
    "no turns": "hello",
    "raises": "{{ raise_exception('no') }}",
    "raises on system": CHATML.replace(
        "{% for", "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{% for", 1
    ),
    "drops system": CHATML.replace("<|im_start|>{{", "{% if message.role != 'system' %}<|im_start|>{{").replace(
        "<|im_end|>\n", "<|im_end|>\n{% endif %}"
    ),
    "drops the user": "{% for m in messages %}{% if m.role != 'user' %}{{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}",
    "no end of turn": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "end is no special token": CHATML.replace("<|im_end|>", "</end>"),
    "not jinja": "{% for %}",
    "unclosed": "{% if x %}",
    "endless": "{% for a in range(10**9) %}{% endfor %}x",
    "python inside": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "import": "{% import 'os' as os %}{{ os.system('touch /tmp/spinfast-was-here') }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch /tmp/spinfast-was-here') }}",
    "include": "{% include '/etc/passwd' %}",
    "changes messages": "{% set _ = messages.append(messages[0]) %}" + CHATML,
    "pops messages": "{% set _ = messages.pop() %}" + CHATML,
    "doubles": CHATML.replace("{{ message['content'] }}", "{{ message['content'] }}{{ message['content'] }}"),
    "upper": CHATML.replace("message['content']", "message['content'] | upper"),
    "truncates": CHATML.replace("message['content']", "message['content'][:3]"),
    "reverses": CHATML.replace("message['content']", "message['content'] | reverse"),
    "escapes": CHATML.replace("message['content']", "message['content'] | e"),
    "today": CHATML + "{{ strftime_now('%d %b %Y') }}",
    "random": CHATML + "{{ range(100) | random }}",
    "undefined": "{{ nothing.at.all }}",
    "divides by zero": "{{ 1 / 0 }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a number": 7,
    "a list": [{"name": "default", "template": CHATML}],
    "a list of nothing": [],
    "prompt ends elsewhere": CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>bot\n{% endif %}"),
    "no generation prompt": CHATML.split("{% if add")[0],
    "surrogate": "{{ '\ud800' }}" + CHATML,
    "control": "\x1b[31m" + CHATML,
}
TOKENIZER_CONFIG = [
    {"pad_token": None}, {"pad_token": "<|im_end|>"}, {"eos_token": None}, {"eos_token": "nowhere"}, {"pad_token": 7},
    {"eos_token": ["<|im_end|>"]}, {"pad_token": "<|im_end|>", "eos_token": "<|im_end|>"},
    {"bos_token": "<|im_start|>"},
    {"tokenizer_class": "NoSuchTokenizer"}, {"tokenizer_class": None}, {"tokenizer_class": 7}, {"model_max_length": -1},
    {"model_max_length": "x"}, {"added_tokens_decoder": {"x": 1}}, {"added_tokens_decoder": {}},
    {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}, {"additional_special_tokens": [7]},
    {"extra_special_tokens": 7},
    {"add_bos_token": True}, {"add_prefix_space": True}, {"padding_side": "up"}, {"chat_template": {"a": 1}},
    {"split_special_tokens": True}, {"clean_up_tokenization_spaces": "x"}, {"unk_token": {"x": 1}},
]  # fmt: skip


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model("llama"), tmp_path / "model")


def play_model(kind, place, model, *words):
    run_dir = model.parent / "run"
    return outcome(kind, [place / "config.yaml", f"model.name={model}", *words, "--run-dir", run_dir], run_dir)


def set_template(model, template):
    (model / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config | ({"chat_template": template} if template else {})))


@pytest.mark.parametrize("system", ["null", "be brief"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_templates(place, model, template, system):
    set_template(model, template)
    play_model("tokenizers", place, model, f"prompt.system={system}")


@pytest.mark.parametrize("changes", TOKENIZER_CONFIG, ids=lambda changes: str(changes)[:60])
def test_tokenizer_settings(place, model, changes):
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    play_model("tokenizers", place, model)


PIECES = ["{% for message in messages %}", "{% endfor %}", "{{ message['content'] }}", "{{ message.role }}",
          "<|im_end|>",
          "<|im_start|>", "\n", "{% if add_generation_prompt %}", "{% endif %}", "assistant", "{{ messages | tojson }}",
          "{{ bos_token }}", "{%", "}}", " ", "{% set x = 1 %}", "{{ messages[0]['content'] | trim }}"]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=10).map("".join))
@settings(max_examples=50, phases=PHASES)
def test_any_template(place, tiny_model, tmp_path_factory, template):
    model = shutil.copytree(tiny_model("llama"), tmp_path_factory.mktemp("template") / "model")
    set_template(model, template)
    play_model("tokenizers", place, model)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [*FILES.values(), b"{}"], ids=[*FILES, "an empty object"])
def test_model_files(place, model, name, content):
    (model / name).write_bytes(content)
    play_model("tokenizers", place, model)


# -- the other commands -----------------------------------------------------------------------------------------------

BROKEN = [b"", b"null", b"7", b"[1]", b"{}", b"[{}]", b"[null]", b'{"a": 1', b"\xff\xfe", b"[" * 20_000, b'"x"\n"y"\n',
          b'[{"iteration": 7}]', b'{"train/loss": []}\n']  # fmt: skip
OF_A_RUN = ["config.yaml", "environment.json", "results.json", "metrics.jsonl", "system.jsonl", "plan.json",
            "iter_000/heldout.jsonl", "iter_000/heldout_logps.safetensors"]  # fmt: skip


@pytest.mark.parametrize("name", OF_A_RUN)
@pytest.mark.parametrize("content", BROKEN, ids=lambda content: ascii(content)[:20])
def test_reports_of_broken_runs(played, tmp_path, name, content):
    run_dir = shutil.copytree(played, tmp_path / "run")
    (run_dir / name).write_bytes(content)
    outcome("run directories", ["report", run_dir, "--no-png", "--output", tmp_path / "out" / "page.html"], None)


@pytest.mark.parametrize("content", [*BROKEN, *FILES.values()], ids=lambda content: ascii(content[:20]))
def test_tasks(place, tiny_model, tmp_path, content):
    (tmp_path / "task.jsonl").write_bytes(content)
    words = ["eval", "--model", tiny_model("llama"), "--tasks", tmp_path / "task.jsonl", "--max-length", "64"]
    outcome("tasks", [*words, "--limit", "2", "--output", tmp_path / "out"], tmp_path / "out")


@pytest.mark.parametrize("words", [
    ["--tasks", "no"], ["--tasks", ""], ["--tasks", "gsm8k:x"], ["--tasks", "gsm8k:-1"], ["--tasks", "no.jsonl"],
    ["--tasks", "gsm8k", "--data", "x"], ["--tasks", "gsm8k", "--data", "gsm8k=/nowhere"],
    ["--tasks", "gsm8k", "--limit", "0"], ["--tasks", "gsm8k", "--profile", "tpu"],
    ["--tasks", "gsm8k", "--dtype", "int8"], ["--tasks", "task.jsonl", "--max-length", "0"],
    ["--tasks", "task.jsonl", "--batch-size", "0"], ["--tasks", "task.jsonl", "--seed", "-1"],
    ["--tasks", "task.jsonl", "--max-length", "1"],
], ids=" ".join)  # fmt: skip
def test_settings_of_eval(place, tiny_model, words, monkeypatch):
    monkeypatch.chdir(place)
    (place / "task.jsonl").write_text(json.dumps(GOOD) + "\n")
    outcome("tasks", ["eval", "--model", tiny_model("llama"), *words])


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: ascii(content)[:20])
def test_replays_of_broken_steps(tmp_path, content):
    (tmp_path / "step.json").write_bytes(content)
    assert outcome("run directories", ["replay", tmp_path])[0] == 2


def test_nothing_was_executed():
    """What the tags, pickles and templates above would have made."""
    assert not Path("/tmp/spinfast-was-here").exists()
