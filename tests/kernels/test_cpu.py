"""What the CPU kernels share: bf16 in Numba, the exponential, and the threads, which are torch's."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numba import prange
from spinfast_kernels.cpu import compiled, exp, launch, narrow, widen

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled for CPUs")


@compiled
def rounded(x_N, y_N):
    for n in prange(len(x_N)):
        y_N[n] = narrow(widen(x_N[n]), y_N[n])


@compiled
def exponential(x_N, y_N):
    for n in prange(len(x_N)):
        y_N[n] = exp(x_N[n])


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
@example([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1.00390625, 1.01171875, 3.4e38, 1e-45])
def test_bf16_is_rounded_as_torch_does(numbers):
    odd_nan = torch.tensor([0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    x = torch.cat((torch.tensor(numbers), odd_nan))
    for source in (x, x.bfloat16()):
        found = torch.empty(len(x), dtype=torch.bfloat16)
        launch(rounded, source, found)
        torch.testing.assert_close(found, source.bfloat16(), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found.signbit() | found.isnan(), source.bfloat16().signbit() | found.isnan())


def test_exponential():
    x = torch.cat((torch.linspace(-87.3, 88.0, 200_001), torch.tensor([0.0, -1e-30])))
    found = torch.empty_like(x)
    launch(exponential, x, found)
    truth = x.double().exp()
    assert ((found - truth).abs() / truth).max() < 2.5e-7  # two units in the last place
    ends = torch.tensor([float("-inf"), -3.4e38, -90.0])
    launch(exponential, ends, found[:3])
    assert found[:3].tolist() == [0.0, 0.0, 0.0]


def test_a_meta_tensor_is_left_alone():
    launch(rounded, torch.empty(3, device="meta"), torch.empty(3, device="meta"))


THREADS = """
import ctypes, os, scipy.linalg, torch  # Numba loads scipy's BLAS, which has a sleeping thread
from pathlib import Path
torch.set_num_threads(2)
torch.ones(3000, 3000).exp()
before = len(os.listdir("/proc/self/task"))
from spinfast_kernels import cpu_layer
x = torch.randn(400, 512)
cpu_layer.swiglu(x, x)
runtimes = [ctypes.CDLL(str(p)) for p in (Path(torch.__file__).parent / "lib").glob("libgomp*")]
new = len(os.listdir("/proc/self/task")) - before
print(torch.get_num_threads(), new, *{r.omp_get_max_active_levels() for r in runtimes})
"""


def test_kernels_run_on_torchs_threads():
    """No second pool, torch's number of threads as it was, and no nested teams (MKL inside torch's loops)."""
    ended = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["2", "0", "1"]


def test_without_the_systems_libgomp_a_kernel_has_one_thread():
    """Numba's OpenMP layer does not load, its other pool would compete with torch's."""
    hidden = "import sys; sys.modules['numba.np.ufunc.omppool'] = None\n"
    ended = subprocess.run([sys.executable, "-c", hidden + THREADS], capture_output=True, text=True, check=True)
    assert ended.stdout.split()[0] == "2"
    check = "x = torch.randn(50, 8); print(torch.allclose(cpu_layer.swiglu(x, x), torch.nn.functional.silu(x) * x))"
    layer = "import numba; print(numba.threading_layer(), numba.get_num_threads())"
    script = f"{hidden}import torch\nfrom spinfast_kernels import cpu_layer\n{check}\n{layer}"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["True", "workqueue", "1"]


def test_results_do_not_depend_on_the_number_of_threads():
    from spinfast_kernels import cpu_layer

    x, weight = torch.randn(301, 96).bfloat16(), torch.rand(96).bfloat16()
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(cpu_layer.rms_norm(x, weight, 1e-6))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    assert np.isfinite(found[0].float().numpy()).all()
