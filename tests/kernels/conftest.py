"""Kernel tests run on the GPU where there is one, else on the CPU with the Triton interpreter."""

from __future__ import annotations

import pytest
import torch
from spinfast_kernels import reference, triton_ops


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty is filled with NaN, so scratch that is read before it is written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "triton"])
def ops(request):
    """The functions under test: the eager twins, and the Triton kernels."""
    return {"reference": reference, "triton": triton_ops}[request.param]


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"
