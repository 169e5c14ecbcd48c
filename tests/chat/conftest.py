"""A tiny model with two adapters of different shapes, opened once in this process and served once by another."""

import sys
from pathlib import Path

import pytest
from process import Spinfast

from spinfast.chat.options import parse_chat as parse
from spinfast.chat.speaker import open_speaker

sys.path.append(str(Path(__file__).parents[1] / "weights" / "gguf"))
from lora import tiny_lora

CPU = ("--profile", "cpu", "--dtype", "float32")


@pytest.fixture(scope="session")
def adapters(tiny_model, tmp_path_factory):
    """name -> directory: `all` of rank 4 on every layer, `few` of rank 6 on two kinds of them."""
    place = tmp_path_factory.mktemp("adapters")
    few = {"target_modules": ["q_proj", "down_proj"], "r": 6, "use_rslora": True}
    return {
        "all": tiny_lora(tiny_model("llama"), place / "all"),
        "few": tiny_lora(tiny_model("llama"), place / "few", **few),
    }


@pytest.fixture(scope="session")
def speaker(tiny_model, adapters):
    words = [str(tiny_model("llama")), *CPU, "--context", "512"]
    with open_speaker(parse([*words, *(f"--adapter={n}={path}" for n, path in adapters.items())]), 8) as opened:
        yield opened


@pytest.fixture(scope="session")
def served(tiny_model, adapters):
    """(address, process) of a server of the tiny model and its adapters."""
    named = [f"--adapter={name}={path}" for name, path in adapters.items()]
    words = ["serve", tiny_model("llama"), *named, *CPU, "--context", "512", "--port", "0", "--batch-size", "8"]
    server = Spinfast(*words)
    address = server.wait(r" at (http://127\.0\.0\.1:\d+)/v1 ")[1]
    yield address, server
    if server.process.poll() is None:
        server.process.kill()
