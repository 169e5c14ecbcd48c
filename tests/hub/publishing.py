"""What tests of publishing share: the command, its one-line errors, the environment of a process of its own."""

import os
import re

import yaml
from hub_server import TOKEN

from spinfast.run import main

PARQUET = "data/train-00000-of-00001.parquet"
REPOS = [(kind, f"me/sums-iter{number}") for number in (0, 1) for kind in ("datasets", "models")]
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def publish(run, *options, to="me/sums"):
    return main(["publish", str(run), "--to", to, *options])


def front(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def refused(capsys):
    """The one line that an error is."""
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if "warning:" not in line]
    assert len(lines) == 1, err
    return lines[0]


def environment(hub, tmp_path):
    own = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return os.environ | own
