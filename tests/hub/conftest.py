"""Runs to publish, each played once; a hub on loopback; huggingface_hub's own client turned to it."""

import shutil
from types import SimpleNamespace

import pytest
from hub_server import TOKEN, Hub
from huggingface_hub import constants
from huggingface_hub.utils import _http
from test_run import play


@pytest.fixture(scope="session")
def played(tmp_path_factory, tiny_model):
    """Two iterations of self-play; only read it."""
    return play(tmp_path_factory.mktemp("published"), tiny_model("llama"))


@pytest.fixture(scope="session")
def small(tmp_path_factory, tiny_model):
    """One iteration that trained LoRA-XS; only read it."""
    sections = {"adapter": {"kind": "lora_xs"}, "spin": {"iterations": 1}}
    return play(tmp_path_factory.mktemp("published_small"), tiny_model("llama"), **sections)


@pytest.fixture
def run(played, tmp_path):
    return shutil.copytree(played, tmp_path / "run")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The client speaks to this hub, as `me`, by LFS; it does not wait before it tries again."""
    server = Hub()
    changed = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
    }
    for name, value in changed.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
