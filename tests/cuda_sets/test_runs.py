"""Whole runs on a card of shapes: each method with each kind of adapter, from the weights' files to the saved stages.

The policy's own module answers. Whatever the host reads of the card is 4 ln 2: summed over the four
groups of a step, the first loss of a game of pairs.
"""

import math

import pytest
import torch
from test_adapter_kinds import KINDS, LORA, METHODS, QLORA, configured
from test_run import train_rows

from spinfast.config import Calm
from spinfast.policy import transformers as policies
from spinfast.policy.adapters import files as adapters
from spinfast.run import main

NAMES = {"lora": LORA, "qlora": QLORA, "calm": None, **KINDS}  # calm reads a model that the fixture makes
CASES = [(method, "lora") for method in METHODS]
CASES += [(method, name) for method in ("dpo", "grpo") for name in NAMES if name not in ("lora", "structured")]


@pytest.fixture
def path(tiny_model, tmp_path, monkeypatch):
    """Made before there is a card."""
    monkeypatch.setenv("SPINFAST_CACHE", str(tmp_path / "frames"))
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a thread of its own would ask the driver
    augmenting = str(tiny_model("qwen2", True, 4, 32))
    monkeypatch.setitem(NAMES, "calm", Calm(kind="calm", augmenting=augmenting, connections=2))
    return tiny_model("llama")


def quantised_on_card(path, dtype, device, load_in_4bit, load_base=policies.load_base):
    """bitsandbytes quantises on the host, for its class of parameters can't be one of shapes; these go to the card."""
    with torch.utils._python_dispatch._disable_current_modes():
        base = load_base(path, dtype, torch.device("cpu"), load_in_4bit)
    moved = {}
    for module in base.modules():
        for name, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
            if tensor not in moved:
                moved[tensor] = torch.nn.Parameter(
                    tensor.data.as_subclass(torch.Tensor).to(device), requires_grad=False
                )
                if state := getattr(tensor, "quant_state", None):
                    state.to(device)
                vars(moved[tensor]).update(vars(tensor))
            module._parameters[name] = moved[tensor]
        for name, tensor in module.named_buffers(recurse=False):
            module._buffers[name] = tensor.to(device)
    return base


@pytest.mark.parametrize(("method", "name"), CASES)
@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_a_run_is_played(path, t4_in_use, tmp_path, monkeypatch, method, name):
    host, compiled = t4_in_use
    host.number = 4 * math.log(2)
    if name == "qlora":
        monkeypatch.setattr(policies, "load_base", quantised_on_card)
    config = configured(tmp_path, path, method, NAMES[name])
    device = ["device.profile=auto", "device.dtype=auto", f"model.load_in_4bit={str(name == 'qlora').lower()}"]
    assert main([config, *device, "--run-dir", str(tmp_path / "run")]) == 0
    rows = train_rows(tmp_path / "run")
    assert rows[-1]["train/overflows"] == 0
    stages = sorted((tmp_path / "run").glob("*/adapter"))
    assert len(stages) == 2 + (method == "spin")
    assert {adapters.load(stage).kind for stage in stages} == {NAMES[name].kind}
    assert compiled
