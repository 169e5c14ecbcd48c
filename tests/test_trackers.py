"""What TensorBoard, wandb and trackio are shown: the record's figures, once each, resumed or not."""

import importlib.util
import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_run import play

from spinfast.config import parse_config
from spinfast.errors import UserError
from spinfast.store.record import RunDir
from spinfast.store.trackers import Service


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_model):
    return play(tmp_path_factory.mktemp("tracked"), tiny_model("llama"))


def events(run_dir):
    reader = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return {name: [(event.step, event.value) for event in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def check_against_the_record(run_dir):
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    shown = events(run_dir)
    assert shown["train/loss"] == [(i, pytest.approx(step["train/loss"])) for i, step in enumerate(steps, 1)]
    rows = json.loads((run_dir / "results.json").read_text())
    expected = [row["evaluation"]["heldout/perplexity"]["value"] for row in rows]
    assert shown["heldout/perplexity"] == [
        (step, pytest.approx(value)) for step, value in zip((0, 3, 9), expected, strict=True)
    ]


def test_tensorboard_shows_the_record(run_dir):
    check_against_the_record(run_dir)


def test_a_resumed_run_shows_everything_once(run_dir, tmp_path):
    import shutil

    import yaml

    copy = shutil.copytree(run_dir, tmp_path / "run")
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows = json.loads((copy / "results.json").read_text())
    (copy / "metrics.jsonl").write_text("".join(lines[:-2]))
    (copy / "results.json").write_text(json.dumps(rows[:-1]))
    record = RunDir(copy, parse_config(yaml.safe_load((copy / "config.yaml").read_text())))
    for line in map(json.loads, lines[-2:]):
        values = {name: value for name, value in line.items() if "/" in name}
        record.metrics(line["stage"], line["phase"], line["step"], values)
    for row in rows:
        record.result(row)
    record.close()
    check_against_the_record(copy)


def test_a_missing_service_is_told_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = parse_config({"model": {"name": "m"}, "data": {"source": "d"}, "report_to": ["wandb"]})
    with pytest.raises(UserError, match="pip install wandb"):
        RunDir(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_services_take_and_resume_a_run(package, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at import
    pytest.importorskip(package)
    for step in (1, 2):
        service = Service(package, tmp_path, {"seed": 0})
        service.log({"train/loss": 1 / step}, step)
        service.close()
    kept = {"wandb": tmp_path / "wandb", "trackio": tmp_path / "trackio" / "spinfast.db"}[package]
    assert kept.exists()
