"""What all tests share: no network, the Triton interpreter where there is no GPU, tiny models made once."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from fixtures import tiny_model_dir
from hypothesis import settings

torch.set_num_threads(1)  # tiny models on several threads mostly wait for one another
settings.register_profile("shared-machine", deadline=None)  # a busy machine is no failure
settings.load_profile("shared-machine")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """tiny_model(arch="qwen2", tied=True, layers=2, hidden=64) -> a saved model's directory; only read it."""
    made = {}

    def make(arch: str = "qwen2", tied: bool = True, layers: int = 2, hidden: int = 64):
        key = (arch, tied, layers, hidden)
        if key not in made:
            made[key] = tiny_model_dir(tmp_path_factory.mktemp("models"), *key)
        return made[key]

    return make


@pytest.fixture(scope="session")
def backends():
    """The doctor's findings about every backend, each imported in a process of its own: once for all tests."""
    from spinfast.doctor import backend_findings

    return backend_findings()
