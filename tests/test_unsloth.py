"""The Unsloth-patched policy against the stock one, each case in a process that imports Unsloth.

The CPU cases load as a run does; the gpu cases run the forwards that Unsloth uses on CUDA, its Triton kernels
interpreted (bfloat16 is left out there: the interpreter's bf16 norm returns NaN).
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_run import play, train_rows, write_config

from spinfast.config import parse_config
from spinfast.errors import UserError
from spinfast.policy import import_unsloth
from spinfast.session import choose_backend
from spinfast.store.files import read_jsonl

PROBE = Path(__file__).parent / "unsloth_probe.py"
slow = pytest.mark.slow
needs_unsloth = pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="Unsloth is not installed")
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="Unsloth's CPU backend is for machines without a GPU")


INTERPRETED = {"UNSLOTH_ALLOW_CPU": "1", "TRITON_INTERPRET": "1"}


def in_own_process(*arguments, cwd, **more) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in INTERPRETED} | more
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_log_probs_of_unsloths_engine_are_those_of_temperature_1():
    sections = {"method": "grpo", "model": {"backend": "unsloth"}}
    with pytest.raises(UserError, match=r"generation.temperature: .* got 0.7"):
        choose_backend(config(**sections, generation={"backend": "vllm", "temperature": 0.7}))


@needs_unsloth
@cpu_only
@pytest.mark.parametrize(
    ("flavour", "arch", "dtype"),
    [
        ("gpu", "qwen2", "float16"),  # the T4's dtype; biases in q, k, v
        pytest.param("cpu", "qwen2", "float32", marks=slow),
        pytest.param("cpu", "qwen3", "bfloat16", marks=slow),  # norms of q and k
        pytest.param("cpu", "llama", "float32", marks=slow),
        pytest.param("gpu", "qwen2", "float32", marks=slow),
    ],
)
def test_same_log_probs_and_gradients_as_the_stock_policy(tiny_model, tmp_path, flavour, arch, dtype):
    more = INTERPRETED if flavour == "gpu" else {}
    stdout = in_own_process(PROBE, flavour, tiny_model(arch), dtype, tmp_path / "out", cwd=tmp_path, **more)
    found, tensors = json.loads(stdout.splitlines()[-1]), load_file(tmp_path / "out")
    bound = {"float32": 1e-5, "float16": 0.02, "bfloat16": 0.1}[dtype]
    names = [name.removeprefix("stock/") for name in tensors if name.startswith("stock/")]
    assert len(names) == 1 + 2 * 7 * 2  # A and B of seven projections in two layers
    for side in ("unsloth", "recomputed"):
        for name in names:
            stock, other = tensors[f"stock/{name}"], tensors[f"{side}/{name}"]
            assert stock.norm() > 0, name
            assert (other - stock).norm() <= bound * stock.norm(), (side, name)
    assert found["seams"] == ["spinfast.policy.unsloth"]
    assert found["left"] == []
    assert found["layer"].startswith("Llama" if flavour == "gpu" else arch.capitalize())
    assert found["names"]
    assert found["dtypes"] == ["torch.float32"]


@needs_unsloth
@cpu_only
def test_a_run_is_the_run_of_the_stock_policy(tiny_model, tmp_path):
    """The same answers, the same losses, ln 2 first; nothing of Unsloth's own is left in the working directory."""
    stock = play(tmp_path, tiny_model("qwen2"), "stock", spin={"iterations": 1})
    config, run_dir = (
        write_config(tmp_path, tiny_model("qwen2"), spin={"iterations": 1}),
        tmp_path / "run",
    )
    command = ["-m", "spinfast.run", config, "model.backend=unsloth", "--run-dir", run_dir]
    in_own_process(*command, cwd=tmp_path)
    losses = [[row["train/loss"] for row in train_rows(run)] for run in (stock, run_dir)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[1][0] == pytest.approx(0.693147, abs=1e-5)
    answers = [
        [row["token_ids"] for row in read_jsonl(run / "iter_000" / "completions.jsonl")] for run in (stock, run_dir)
    ]
    assert answers[0] == answers[1]
    assert "generation: transformers" in (run_dir / "log.txt").read_text()
    assert not (tmp_path / "unsloth_compiled_cache").exists()


def config(**sections):
    return parse_config({"model": {"name": "none"} | sections.pop("model", {}), "data": {"source": "none"}} | sections)


@cpu_only
@pytest.mark.parametrize(
    ("model", "generation", "expected"),
    [
        ({"backend": "unsloth"}, {}, "transformers"),
        ({"backend": "unsloth"}, {"backend": "vllm"}, "vllm"),
        ({"load_in_4bit": True}, {}, "transformers"),
        ({"backend": "unsloth", "load_in_4bit": True}, {"backend": "vllm"}, "vllm"),
    ],
)
def test_who_generates(model, generation, expected):
    assert choose_backend(config(model=model, generation=generation))[0] == expected


def test_four_bit_weights_are_not_shared_without_unsloth():
    with pytest.raises(UserError, match=r"vllm shares 4-bit weights only with model.backend unsloth"):
        choose_backend(config(model={"load_in_4bit": True}, generation={"backend": "vllm"}))


@needs_unsloth
@cpu_only
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generation.backend=vllm", "unsloth shares weights with vLLM on CUDA only"),
        ("model.load_in_4bit=true", "needs a CUDA GPU"),
    ],
)
@slow
def test_what_unsloth_cannot_do_here_is_one_line(tiny_model, tmp_path, override, message):
    path = write_config(tmp_path, tiny_model("qwen2"))
    command = [
        sys.executable,
        "-m",
        "spinfast.run",
        path,
        "model.backend=unsloth",
        override,
        "--run-dir",
        tmp_path / "r",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


def test_unsloth_that_is_missing_or_broken_is_a_user_error(monkeypatch):
    monkeypatch.setattr("spinfast.policy.find_spec", lambda name: None)
    with pytest.raises(UserError, match="unsloth is not installed"):
        import_unsloth()
    monkeypatch.setattr("spinfast.policy.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "unsloth", None)  # importing it raises ImportError
    with pytest.raises(UserError, match=r"unsloth cannot run here \(import of unsloth halted.*\); use transformers"):
        import_unsloth()
