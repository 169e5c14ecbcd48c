"""The device: xformers is tried, not looked up, as it may not load beside this torch; a CPU's caches are bounded."""

import importlib.util
import os
import subprocess
import sys
import warnings

import pytest
import torch

from spinfast.device import GIB, GPUS, profile
from spinfast.errors import UserError
from spinfast.generation import vllm_compat
from spinfast.policy import unsloth_environment
from spinfast.policy.adapters.lora import _seeded

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="plans a card that is not there")

NAMES = ("xformers", "xformers._cpp_lib", "xformers.ops", "xformers.ops.fmha")


@pytest.fixture
def xformers(tmp_path, monkeypatch):
    """xformers(code of its fmha.cutlass.FwOp.is_available, code run on import, did its C++ part load?): puts such a
    package on the path."""

    def install(available: str, on_import: str = "", built: bool = True):
        package = tmp_path / "xformers" / "ops"
        package.mkdir(parents=True)
        (package.parent / "__init__.py").write_text("")
        (package.parent / "_cpp_lib.py").write_text(f"_built_with_cuda = {built}\n")
        (package / "__init__.py").write_text(on_import)
        (package / "fmha.py").write_text(
            f"class cutlass:\n    class FwOp:\n        is_available = staticmethod(lambda: {available})\n"
        )
        for name in NAMES:
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    for name in NAMES:
        sys.modules.pop(name, None)


def t4(attention="auto"):
    return profile("t4", attention=attention, plan_only=True)


def test_xformers_that_loads_is_taken(xformers):
    xformers("True")
    assert t4().attention == "xformers"
    assert t4("aten_efficient").reasons["attention"] == "aten_efficient: asked for"


@pytest.mark.parametrize(
    ("available", "on_import", "built", "reason"),
    [
        ("True", "raise ImportError('libcudart.so.12: cannot open shared object file')", True, "libcudart.so.12"),
        ("True", "raise OSError('undefined symbol: _ZN3c10\\nmore')", True, "undefined symbol: _ZN3c10)"),
        ("False", "", True, "has no cutlass kernel that loads beside this torch"),
        ("True", "", False, "has no cutlass kernel that loads beside this torch"),
    ],
)
def test_xformers_that_does_not_load_is_not_taken(xformers, available, on_import, built, reason):
    xformers(available, on_import, built)
    found = t4()
    assert found.attention == "aten_efficient"
    assert reason in found.reasons["attention"]
    with pytest.raises(UserError, match=r"xformers .*; use aten_efficient, the same kernel"):
        t4("xformers")


@pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="xformers is installed")
def test_no_xformers():
    assert t4().reasons["attention"].endswith("as xformers, which is not installed")


@pytest.fixture
def card(monkeypatch):
    """card(name, capability, total, free, own): the machine has this card; GiB in all, free, and this process's."""

    def install(name, capability, total, free, own=0.0):
        answers = {
            "is_available": True,
            "get_device_name": name,
            "get_device_capability": capability,
            "mem_get_info": (int(free * GIB), int(total * GIB)),
            "memory_reserved": int(own * GIB),
        }
        for query, answer in answers.items():
            monkeypatch.setattr(torch.cuda, query, lambda *_, answer=answer: answer)

    return install


@pytest.mark.parametrize(
    ("free", "own", "memory"),
    [
        pytest.param(14.3, 0.0, 14.74, id="idle: all of it, though the context has been made"),
        pytest.param(6.0, 0.0, 6.5, id="another notebook holds a model"),
        pytest.param(6.0, 2.0, 8.5, id="part of it is this process's own"),
    ],
)
def test_a_cards_memory_is_what_is_free(card, free, own, memory):
    card("Tesla T4", (7, 5), 14.74, free, own)
    found = profile()
    assert found.memory == pytest.approx(memory * GIB, abs=1)
    assert found.reasons["device"] == f"Tesla T4, capability 7.5, {memory:.1f} of 14.7 GiB free"


def test_a_rehearsal_needs_the_smaller_cards_memory_free(card):
    card("NVIDIA H100 80GB HBM3", (9, 0), 79.2, 20.0)
    found = profile("t4")
    assert (found.memory, found.rehearsal) == (GPUS["t4"].memory, True)
    assert "memory capped at 14.7 GiB, 20.5 of 79.2 GiB free" in found.reasons["device"]
    card("NVIDIA H100 80GB HBM3", (9, 0), 79.2, 10.0)
    with pytest.raises(UserError, match=r"a NVIDIA H100 80GB HBM3 \(10.5 of 79.2 GiB free\) cannot rehearse a t4"):
        profile("t4")


@pytest.mark.parametrize("forked", [vllm_compat.undisturbed, lambda: _seeded(0)], ids=["engine", "adapter"])
def test_the_seed_of_a_ranks_card_comes_back_without_a_warning(monkeypatch, forked):
    """The other card is another rank's: asking for its state would put a context there."""
    states, host = {1: torch.tensor([2])}, torch.get_rng_state()
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device: state}))
    with warnings.catch_warnings(action="error"):
        with forked():
            torch.rand(1)
            states[1] = torch.tensor([4])
    assert states == {1: torch.tensor([2])}
    assert torch.equal(torch.get_rng_state(), host)


GROWTH = """
import psutil, torch
{before}
x, w = torch.randn(800, 576).bfloat16(), torch.randn(1536, 576).bfloat16()
torch.mm(x, w.T)
start = psutil.Process().memory_info().rss
for tokens in range(64, 364):
    torch.mm(x[:tokens], w.T)
print((psutil.Process().memory_info().rss - start) / 2**20)
"""


@pytest.mark.skipif(profile("cpu").dtype != torch.bfloat16, reason="this CPU multiplies fp32, which needs no compiling")
def test_shapes_do_not_pile_up():
    """Without the bound every token count leaves a megabyte behind."""

    def grown(before):
        command = [sys.executable, "-c", GROWTH.format(before=before)]
        environment = {k: v for k, v in os.environ.items() if not k.endswith("CACHE_CAPACITY")}
        return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)

    bounded = grown("from spinfast.device import profile; profile('cpu')")
    assert bounded < 0.6 * grown("")


def test_a_cpus_bf16_is_found_by_any_torch(monkeypatch):
    """torch.cpu.get_capabilities came with 2.11: a T4 set without its GPU died of it instead of saying so."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for found, chosen in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=found: found)
        assert profile("cpu").dtype == chosen


def test_an_old_card_is_kept_from_flashinfer_under_unsloth(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, told in (((7, 5), "1"), ((9, 0), "0")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert unsloth_environment()["UNSLOTH_VLLM_NO_FLASHINFER"] == told
