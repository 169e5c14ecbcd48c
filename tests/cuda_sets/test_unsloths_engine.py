"""Unsloth's own vLLM engine on a T4: asked for as a run asks for it, it plays with our single adapter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures import tiny_model_dir

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(driver, tmp_path_factory):
    path = tiny_model_dir(tmp_path_factory.mktemp("model"), "qwen2", hidden=128)
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, HERE / "unsloths_engine.py", path],
        env=os.environ | {"LD_PRELOAD": str(driver), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_it_plays_with_dense_adapters(found):
    assert found["adapters"] == "spinfast.generation.vllm_compat.dense_adapters"
    assert (found["slots"], found["rank"]) == (1, 16)
    assert found["dtypes"] == ["torch.float16", "torch.float16"]


def test_it_attends_by_triton(found):
    assert found["attention"] == "TRITON_ATTN"
