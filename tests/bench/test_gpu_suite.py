"""bench/gpu_suite.sh on a machine that cannot run it: what it says, and that its limits are what it promises."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import bench.__main__ as table
from bench.results_page import ROOT

SUITE = ROOT / "bench" / "gpu_suite.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHON": sys.executable, "BENCH_COMMIT": "0123456789ab"} | environment
    return subprocess.run(["bash", SUITE, *arguments], env=environment, capture_output=True, text=True)


def test_limits_add_up_to_25_minutes():
    steps = re.findall(r"^step (\d+) (\d+) ", SUITE.read_text(), re.MULTILINE)
    assert [int(number) for number, _ in steps] == list(range(1, len(steps) + 1))
    assert sum(int(seconds) for _, seconds in steps) <= 25 * 60


def test_missing_wheels_are_named_together(tmp_path):
    """A Python that has nothing of what is needed."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nexec {sys._base_executable} -I -S "$@"\n')
    fake.chmod(0o755)
    done = run(PYTHON=str(fake))
    assert done.returncode == 1
    names = ("numba", "hypothesis", "pydantic", "typing_inspection", "datasets")
    assert {*names} < {*done.stderr.partition("python -m bench wheels DIR ")[2].split()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU is told")
def test_without_a_gpu_nothing_runs():
    done = run("3")
    assert done.returncode == 1
    assert "no CUDA GPU" in done.stderr
    assert "===" not in done.stdout


class Understood(Exception):
    """The line was read to its end."""


@pytest.mark.slow
def test_every_line_of_it_is_understood(tmp_path, monkeypatch):
    """By today's commands: the benchmarks' options, the tests' paths; the whole runs are planned for a T4."""
    python, noted = tmp_path / "python", tmp_path / "lines"
    python.write_text(
        f"""#!{sys.executable}
import json, os, sys
words = sys.argv[1:]
if words[0] == "-m":
    open({str(noted)!r}, "a").write(json.dumps(words) + chr(10))
if words[:2] == ["-m", "spinfast.run"]:
    words.append("--dry-run")
elif words[0] == "-m" or "is_available()" in words[-1]:
    sys.exit()
os.execv({sys.executable!r}, [{sys.executable!r}, *words])
"""
    )
    python.chmod(0o755)
    done = run(PYTHON=str(python))
    ended = re.findall(r"=== (\d) .*: exit (\d+)", done.stdout)
    assert ended == [(str(number), "0") for number in range(1, len(ended) + 1)], done.stderr
    assert done.stdout.count("MiB at the fullest moment") == 2
    lines = [json.loads(line)[1:] for line in noted.read_text().splitlines()]
    (paths,) = ([word for word in words if word.startswith("tests/")] for name, *words in lines if name == "pytest")
    assert len(paths) > 3
    assert all((ROOT / path).exists() for path in paths)
    read = argparse.ArgumentParser.parse_args

    def only_read(parser, *given):
        read(parser, *given)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_read)
    benchmarks = [words for name, *words in lines if name == "bench" and words != ["results"]]  # which takes nothing
    assert len(benchmarks) == 7
    for words in benchmarks:
        with pytest.raises(Understood):
            table.main(words)
