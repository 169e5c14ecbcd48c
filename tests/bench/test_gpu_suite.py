"""bench/gpu_suite.sh on a machine that cannot run it: what it says, and that its limits are what it promises."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

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
    assert all(f" {name} " in done.stderr for name in names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU is told")
def test_without_a_gpu_nothing_runs():
    done = run("3")
    assert done.returncode == 1
    assert "no CUDA GPU" in done.stderr
    assert "===" not in done.stdout
