"""SIGTERM and SIGINT in every phase: saved and gone within a step and a save, exit code 75, resumed byte for byte."""

import json
import os
import signal
import time

import pytest
from warm import computed, differing

from spinfast.interrupt import EXIT_CODE
from spinfast.store import checkpoint

pytestmark = pytest.mark.faults
REACHED = {  # phase -> the file whose existence says that it has begun
    "loading": "log.txt",
    "base evaluate": "base/adapter",
    "sft train": "sft/checkpoints",
    "generate": "iter_000/completions.jsonl",
    "score": "iter_000/pairs.parquet",
    "train": "iter_000/checkpoints",
    "evaluate": "iter_000/train.json",
    "next generate": "iter_001/completions.jsonl",
    "next train": "iter_001/checkpoints",
}

PREFERENCES = {
    "sft train": "sft/checkpoints",
    "score": "dpo/stage.json",
    "score heldout": "dpo/reference.parquet",
    "dpo train": "dpo/checkpoints",
    "evaluate": "dpo/train.json",
}
GRPO = {
    "first rollout": "grpo/stage.json",
    "train on it": "grpo/rollouts/000000.parquet",
    "grpo train": "grpo/checkpoints/step_000002",
    "train on the next": "grpo/rollouts/000001.parquet",
    "evaluate": "grpo/train.json",
}
PHASES = [("runs", name, path) for name, path in REACHED.items()]
PHASES += [("preference_runs", name, path) for name, path in PREFERENCES.items()]
PHASES += [("grpo_runs", name, path) for name, path in GRPO.items()]


def wait_for(path, process):
    while not path.exists():
        assert process.exitcode is None, f"the run ended before {path} was there"
        time.sleep(0.002)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize(("kind", "phase", "reached"), PHASES)
def test_a_signal_in_each_phase(request, kind, phase, reached, number):
    runs = request.getfixturevalue(kind)
    run_dir = runs.new("stopped")
    process = runs.start("stopped")
    wait_for(run_dir / reached, process)
    asked = time.monotonic()
    os.kill(process.pid, number)
    code = runs.finish(process)
    took = time.monotonic() - asked
    assert code == EXIT_CODE, runs.complaint()
    assert "stopped by a signal" in runs.complaint()
    steps = (
        [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        if (run_dir / "metrics.jsonl").exists()
        else []
    )
    last = steps[-1]["stage"] if steps else None
    if phase.endswith("train") and not (run_dir / last / "train.json").exists():
        saved = max(int(path.name.split("_")[1]) for path in (run_dir / last / "checkpoints").glob("step_*"))
        assert saved == steps[-1]["step"]  # the step that was under way is saved
    assert took < runs.seconds  # far below it on an idle machine; the whole run's own time allows for a busy one
    assert runs.finish(runs.start("stopped")) == 0
    assert differing(computed(run_dir), computed(runs.undisturbed)) == set()


def slow_save():
    save = checkpoint.save

    def slow(*args):
        time.sleep(60)
        return save(*args)

    checkpoint.save = slow


def test_a_second_signal_leaves_at_once(runs):
    run_dir = runs.new("twice")
    process = runs.start("twice", before=slow_save)
    wait_for(run_dir / "metrics.jsonl", process)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.5)
    assert process.exitcode is None  # it is finishing its save
    os.kill(process.pid, signal.SIGTERM)
    assert runs.finish(process) == 128 + signal.SIGTERM
    assert runs.finish(runs.start("twice")) == 0
    assert differing(computed(run_dir), computed(runs.undisturbed)) == set()


def test_two_processes_on_one_run_directory(runs):
    run_dir = runs.new("shared")
    first = runs.start("shared")
    wait_for(run_dir / "sft", first)
    assert runs.finish(runs.start("shared")) == 2
    assert "another process is running in it" in runs.complaint()
    assert runs.finish(first) == 0, runs.complaint()
    assert differing(computed(run_dir), computed(runs.undisturbed)) == set()


def test_many_processes_started_at_once(runs):
    run_dir = runs.new("rush")
    processes = [runs.start("rush") for _ in range(4)]
    codes = sorted(runs.finish(process) for process in processes)
    assert codes in ([0, 2, 2, 2], [0, 0, 2, 2]), runs.complaint()  # one may come after the first is done
    assert differing(computed(run_dir), computed(runs.undisturbed)) == set()


def test_a_resumed_run_needs_no_more_memory(runs):
    def peak(name):
        lines = [json.loads(line) for line in (runs.directory / name / "system.jsonl").read_text().splitlines()]
        return max(line["memory/rss_mib"] for line in lines)

    run_dir = runs.new("measured")
    process = runs.start("measured")
    wait_for(run_dir / "iter_000" / "checkpoints", process)
    process.kill()
    process.join()
    (run_dir / "system.jsonl").unlink()
    assert runs.finish(runs.start("measured")) == 0
    assert peak("measured") <= peak("undisturbed") * 1.05
