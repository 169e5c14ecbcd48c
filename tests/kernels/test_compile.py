"""The kernels compile for a T4, an A100 and an H100 on a machine that has none of them, and stay in their limits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command):
    """In a process of its own: this one imported Triton with the interpreter on."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("model", ["Qwen2.5-0.5B", pytest.param("Qwen3-0.6B", marks=pytest.mark.slow)])
def test_every_kernel_fits_every_target(model):
    done = run("-m", "bench", "compile", model)
    assert done.returncode == 0, done.stderr
    seen = {tuple(line.split(" | ")[:2]) for line in done.stdout.replace("| sm_", "sm_").splitlines()[2:]}
    kernels = {
        "linear_logps._row_kernel", "linear_logps._unit_kernel", "pairwise._pair_kernel", "rms_norm._forward_kernel",
        "rms_norm._backward_kernel", "swiglu._forward_kernel", "swiglu._backward_kernel", "rope._rope_kernel",
    }  # fmt: skip
    assert seen == {(target, kernel) for target in ("sm_75", "sm_80", "sm_90") for kernel in kernels}


@pytest.mark.slow
def test_planted_faults_are_found():
    """tl.dot is scalar on sm_75 and tensor cores on sm_80; 24 registers are too few for a 64 x 64 sum."""
    done = run("tests/kernels/planted_faults.py")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert any("scalar FMA" in problem for problem in found["sm_75 product"])
    assert not any("scalar FMA" in problem for problem in found["sm_80 product"])
    assert any("spills" in problem for problem in found["sm_75 plain_sum"])
    assert found["65536 bytes on sm_75"] == []
    assert found["65537 bytes on sm_75"] == ["needs 65537 bytes of shared memory, 65536 fit"]
    assert found["65537 bytes on sm_80"] == []
