"""Kernel tests run on the GPU where there is one, else on the CPU with the Triton interpreter."""

from __future__ import annotations

import pytest
import torch
from bounds import TABLES


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty is filled with NaN, so scratch that is read before it is written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=TABLES)
def ops(request):
    """The functions under test: the eager twins, the Triton kernels, and on a CPU the compiled ones."""
    return TABLES[request.param]


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"
