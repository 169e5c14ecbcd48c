"""Files by which clouds start a run: what they name is there, and SkyPilot, where it is installed, takes its own."""

from pathlib import Path

import pytest
import yaml

from spinfast.commands import split

ROOT = Path(__file__).parents[2]
TASK = yaml.safe_load((ROOT / "configs" / "cloud" / "skypilot.yaml").read_text())


def test_what_skypilot_runs_is_there():
    assert (ROOT / TASK["envs"]["CONFIG"]).is_file()
    setup = TASK["setup"].split()
    assert all((ROOT / word).is_file() for word in setup if word.startswith("requirements/"))
    words = TASK["run"].split("-m spinfast.run")[1].split()
    assert split(words) == ("run", ["$CONFIG", "--run-dir", "/runs/$RUN"])
    assert "/runs" in TASK["file_mounts"]


def test_skypilot_takes_it():
    schemas = pytest.importorskip("sky.utils.schemas")
    from jsonschema import validate

    validate(TASK, schemas.get_task_schema())
    validate(TASK["resources"], schemas.get_resources_schema())
    for mount in TASK["file_mounts"].values():
        validate(mount, schemas.get_storage_schema())
