"""Whole runs on a card of shapes: each method with each kind of adapter, from the weights' files to the saved stages.

The policy's own module answers. Whatever the host reads of the card is ln 2, the first loss of a game of pairs.
"""

import math

import pytest
from test_adapter_kinds import KINDS, LORA, METHODS, QLORA, configured
from test_run import train_rows

from spinfast.policy.adapters import files as adapters
from spinfast.run import main

NAMES = {"lora": LORA, "qlora": QLORA, **KINDS}


@pytest.fixture
def path(tiny_model, tmp_path, monkeypatch):
    """Made before there is a card."""
    monkeypatch.setenv("SPINFAST_CACHE", str(tmp_path / "frames"))
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a thread of its own would ask the driver
    return tiny_model("llama")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_every_kind(path, t4_in_use, tmp_path, method, name):
    host, compiled = t4_in_use
    host.number = math.log(2)
    config = configured(tmp_path, path, method, NAMES[name])
    device = ["device.profile=auto", "device.dtype=auto", f"model.load_in_4bit={str(name == 'qlora').lower()}"]
    assert main([config, *device, "--run-dir", str(tmp_path / "run")]) == 0
    rows = train_rows(tmp_path / "run")
    assert rows[-1]["train/overflows"] == 0
    stages = sorted((tmp_path / "run").glob("*/adapter"))
    assert len(stages) == 2 + (method == "spin")
    assert {adapters.load(stage).kind for stage in stages} == {NAMES[name].kind}
    assert compiled
