"""The first second: help, a wrong line and a wrong config are told before anything large is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spinfast.commands import COMMANDS

ROOT = Path(__file__).parents[1]
LARGE = {"torch", "transformers", "peft", "datasets", "vllm", "numba", "triton", "sklearn", "pyarrow", "matplotlib"}
CONFIG = ROOT / "configs" / "smollm2-135m-sums-cpu.yaml"
CALL = (
    "import sys\nfrom spinfast.run import {0}\ntry:\n    code = {0}()\nexcept SystemExit as end:\n    code = end.code\n"
    "print('IMPORTED', *{{name.partition('.')[0] for name in sys.modules}})\nsys.exit(code)"
)


def spinfast(*words, entry="main"):
    """(exit code, stdout, stderr, modules imported) of a process of its own."""
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "COLUMNS": "80", "PATH": "", "HOME": "/tmp"}
    command = [sys.executable, "-c", CALL.format(entry), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    out, _, imported = done.stdout.rpartition("IMPORTED ")
    return done.returncode, out, done.stderr, {*imported.split()}


@pytest.mark.parametrize(
    "words", [["--help"], ["run", "--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_help_imports_nothing_large(words):
    code, out, err, imported = spinfast(*words)
    assert (code, err) == (0, "")
    name = "run" if words[0] == "--help" else words[0]
    assert out.startswith(f"usage: spinfast {name} ")
    assert max(map(len, out.splitlines())) <= 80
    assert imported & LARGE == set()
    assert "spinfast" in imported


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((CONFIG, "spin.nonsense=1"), "unknown key 'spin.nonsense'"),
        ((CONFIG, "spin.lr=fast"), "spin.lr"),
        ((CONFIG, "--dry-run", "spin.iterations=0"), "spin.iterations"),
        (("no-such.yaml",), "no such file"),
        (("evl", "--tasks", "x"), "unknown command evl: did you mean eval?"),
        (("xyzzy",), f"unknown command xyzzy: expected {', '.join(COMMANDS)} or a CONFIG.yaml"),
        (("replay",), "the following arguments are required: RUN/failed_step"),
        (("doctor", "a.yaml", "b.yaml"), "expected one config file, got a.yaml, b.yaml"),
    ],
    ids=lambda value: None if isinstance(value, tuple) else value[:30],
)
def test_what_is_wrong_is_told_in_one_line_before_anything_large_is_imported(words, said):
    code, out, err, imported = spinfast(*words)
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("spinfast: ")
    assert err.count("\n") == 1
    assert imported & LARGE == set()


@pytest.mark.parametrize("words", [[], ["--help"]], ids=["alone", "help"])
def test_spinfast_alone_lists_the_commands(words):
    code, out, err, imported = spinfast(*words, entry="command")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    named = [line.split()[:2] for line in lines if line.startswith("  ")]
    assert named == [["spinfast", name] for name in COMMANDS]
    assert max(map(len, lines)) <= 80
    assert imported & LARGE == set()


def test_no_library_takes_code_from_the_hub_as_it_is_imported(tmp_path):
    """With a package `kernels` there, as Hugging Face's would be."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*_, **__):\n    raise SystemExit('asked the hub')\n")
    words = "from spinfast.run import main; main(['run', 'nothing.yaml']); import peft"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", words],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "nothing.yaml: no such file" in done.stderr
    assert "gemm_4bit" not in done.stderr
