"""A run stopped in any phase goes on where it was, and ends as if nothing had happened."""

import json
import os
import shutil
import signal

import pytest
from test_run import fingerprints, play, train_rows, write_config

from spinfast.interrupt import EXIT_CODE
from spinfast.progress import Tick
from spinfast.run import main
from spinfast.store import files


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model):
    return fingerprints(play(tmp_path_factory.mktemp("undisturbed"), model, sft={"groups_per_step": 6}))


def differing(run_dir, expected):
    mine = fingerprints(run_dir)
    assert mine.keys() == expected.keys()
    return {name for name in mine if mine[name] != expected[name]} - {"config.yaml"}


@pytest.mark.parametrize(
    ("phase", "after"),
    [
        ("base evaluate", 4),
        ("sft train", 1),
        pytest.param("iter_000 generate", 1, marks=pytest.mark.slow),
        ("iter_000 generate", 7),
        ("iter_000 train", 2),
        pytest.param("iter_000 evaluate", 8, marks=pytest.mark.slow),
        pytest.param("iter_001 generate", 12, marks=pytest.mark.slow),
        ("iter_001 train", 5),
    ],
)
def test_sigterm_then_the_same_command(tmp_path, model, undisturbed, monkeypatch, phase, after):
    config = write_config(tmp_path, model, sft={"groups_per_step": 6})
    arguments = [str(config), "--run-dir", str(tmp_path / "run")]
    advance, count = Tick.advance, 0

    def advance_and_signal(tick, *args, **kwargs):
        nonlocal count
        advance(tick, *args, **kwargs)
        count += tick.name == phase
        if tick.name == phase and count == after:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Tick, "advance", advance_and_signal)
    assert main(arguments) == EXIT_CODE
    assert main(arguments) == 0
    # rows cut off in generation were batched differently, which may round the sampler's own log-probs
    assert {
        name for name in differing(tmp_path / "run", undisturbed) if not name.endswith("completions.jsonl")
    } == set()


def test_a_finished_run_is_left_as_it_is(tmp_path, model):
    run_dir = play(tmp_path, model)
    before = fingerprints(run_dir)
    assert play(tmp_path, model) == run_dir
    assert fingerprints(run_dir) == before
    assert len(train_rows(run_dir)) == 9


@pytest.mark.parametrize(
    "name",
    ["completions.jsonl", "pairs.parquet", "reference.parquet", "adapter/adapter_model.safetensors"],
)
def test_a_damaged_file_is_made_again(tmp_path, model, name):
    run_dir = play(tmp_path, model)
    expected = fingerprints(run_dir)
    harmed = run_dir / "iter_001" / name
    content = bytearray(harmed.read_bytes())
    content[len(content) // 2] ^= 4
    harmed.write_bytes(content)
    play(tmp_path, model)
    assert {n for n in differing(run_dir, expected) if not n.endswith("completions.jsonl")} == set()


def test_a_torn_line_of_completions_is_repaired(tmp_path, model):
    run_dir = play(tmp_path, model)
    expected = fingerprints(run_dir)
    shutil.rmtree(run_dir / "iter_001")
    (run_dir / "iter_001").mkdir()
    play(tmp_path, model)  # remakes iteration 1
    whole = (run_dir / "iter_001" / "completions.jsonl").read_text()
    shutil.rmtree(run_dir / "iter_001")
    (run_dir / "iter_001").mkdir()
    (run_dir / "iter_001" / "completions.jsonl").write_text(whole[: len(whole) // 2])
    play(tmp_path, model)
    assert {n for n in differing(run_dir, expected) if not n.endswith("completions.jsonl")} == set()


def test_checkpoints_fall_back_to_the_newest_whole_one(tmp_path, model, monkeypatch):
    config = write_config(tmp_path, model, train={"save_every_steps": 1}, spin={"iterations": 1})
    arguments = [str(config), "--run-dir", str(tmp_path / "run")]
    advance = Tick.advance

    def advance_and_signal(tick, *args, **kwargs):
        advance(tick, *args, **kwargs)
        if tick.name == "iter_000 train" and tick.done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Tick, "advance", advance_and_signal)
    assert main(arguments) == EXIT_CODE
    monkeypatch.setattr(Tick, "advance", advance)
    saves = sorted((tmp_path / "run" / "iter_000" / "checkpoints").iterdir())
    assert [path.name for path in saves] == ["step_000001", "step_000002"]
    (saves[-1] / "optimizer.safetensors").write_bytes(b"")
    assert files.damage(saves[-1])
    assert main(arguments) == 0
    assert "checkpoint passed over: step_000002" in (tmp_path / "run" / "log.txt").read_text()
    whole = play(tmp_path, model, name="whole", train={"save_every_steps": 1}, spin={"iterations": 1})
    assert fingerprints(tmp_path / "run") == fingerprints(whole)


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tmp_path, model, monkeypatch, capsys):
    """/dev/full answers every write with ENOSPC."""
    expected = fingerprints(play(tmp_path, model, name="whole", spin={"iterations": 1}))
    arguments = [str(tmp_path / "config.yaml"), "--run-dir", str(tmp_path / "run")]
    advance = Tick.advance

    def advance_and_fill(tick, *args, **kwargs):
        advance(tick, *args, **kwargs)
        if tick.name == "iter_000 train" and tick.done == 2:
            (tmp_path / "run" / "system.jsonl").unlink()
            (tmp_path / "run" / "system.jsonl").symlink_to("/dev/full")

    monkeypatch.setattr(Tick, "advance", advance_and_fill)
    assert main(arguments) == 2
    assert "no space left" in capsys.readouterr().err
    monkeypatch.setattr(Tick, "advance", advance)
    (tmp_path / "run" / "system.jsonl").unlink()
    assert main(arguments) == 0
    assert fingerprints(tmp_path / "run") == expected


def test_a_resumed_run_keeps_its_memory_plan(tmp_path, model):
    automatic = {"train": {"microbatch_tokens": "auto", "checkpointing": "auto"}, "spin": {"iterations": 1}}
    run_dir = play(tmp_path, model, **automatic)
    planned = files.read_sealed(run_dir / "plan.json", "plan")
    assert 600 != planned["microbatch_tokens"] > 0
    files.write_sealed(run_dir / "plan.json", planned | {"microbatch_tokens": 600}, "plan")
    shutil.rmtree(run_dir / "iter_000")
    play(tmp_path, model, **automatic)
    assert json.loads((run_dir / "plan.json").read_text())["microbatch_tokens"] == 600
