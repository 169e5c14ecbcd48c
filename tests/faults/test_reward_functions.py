"""Reward functions that misbehave in a run's first rollout and in its third: one line, and once mended it goes on.

What is no fault, printing or changing what they are given, leaves the run as it is, to the byte.
"""

import json
import os
import signal
import time

import psutil
import pytest
import yaml
from test_grpo import grpo_config
from test_run import fingerprints, train_rows
from warm import Runs

from spinfast.run import main
from spinfast.store import files

SOUND = """
def own(completion_ids, **kwargs):
    return [ids[0] % 7 / 7 for ids in completion_ids]
"""
BROKEN = """
import os, sys, time
def own(completion_ids, prompts, completions, trainer_state, log_metric, **kwargs):
    found = [ids[0] % 7 / 7 for ids in completion_ids]
    if trainer_state.global_step == {step} and len(found) > 1:
        {fault}
    return found
"""
FAULTS = {  # the fault -> what is said of it
    "raise ValueError('no such thing')": "ValueError: no such thing",
    "while True: time.sleep(0.01)": "took longer than 0.5 s for 12 completions",
    "found[1] = float('nan')": "expected a finite number or None, got nan",
    "found.pop()": "expected 12 values, one per completion, got 11",
    "sys.exit(0)": "SystemExit: 0",
    "return None": "expected a list of 12 numbers, got None",
    "log_metric('x', float('inf'))": "expected a finite number",
    "log_metric('step', 7)": "the trainer has a metric of this name",
    "raise MemoryError": "MemoryError",
    "(lambda f: f(f))(lambda f: f(f))": "RecursionError",
}
NO_FAULTS = [
    "print('x' * 5_000_000); print('y' * 5_000_000, file=sys.stderr)",
    "prompts.clear(); completions[0] = None; completion_ids[1][:] = [0] * 9; kwargs['answer'].clear()",
    "os.chdir('/')",
    "os.fork()",
    "os.fork() or sys.exit(3)",
    "os.environ.clear()",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    """A directory with a config of four rollouts, and what its run computes with the sound function."""
    directory = tmp_path_factory.mktemp("rewards")
    config = grpo_config(
        directory,
        tiny_model("llama"),
        {"rewards": str(directory / "own.py") + ":own", "reward_timeout": 0.5},
        generation={"max_tokens": 3},
    )
    (directory / "own.py").write_text(SOUND)
    assert main([str(config), "--run-dir", str(directory / "sound")]) == 0
    return directory, fingerprints(directory / "sound")


def computed(run_dir):
    """All but the function's own fingerprint, which tells that it was mended."""
    return {name: digest for name, digest in fingerprints(run_dir).items() if name != "rewards.json"}


def one_line(capfd):
    said = capfd.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("spinfast: ")]
    return line


def fails_then_goes_on(place, tmp_path, capfd, fault, step):
    directory, expected = place
    arguments = [str(directory / "config.yaml"), "--run-dir", str(tmp_path / "run")]
    (directory / "own.py").write_text(BROKEN.format(step=step, fault=fault))
    assert main(arguments) == 2
    line = one_line(capfd)
    assert line.startswith("spinfast: reward own (own.py): ")
    assert FAULTS[fault] in line
    assert len(train_rows(tmp_path / "run") if step else []) == step
    saved = sorted(path.name for path in (tmp_path / "run" / "grpo").glob("checkpoints/step_*"))
    assert saved == [f"step_{step:06d}"] * bool(step)  # what was trained until then
    (directory / "own.py").write_text(SOUND)
    assert main(arguments) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "reward own: its file is not what the run went by so far" in log
    assert (f"training continues after step {step}" in log) == bool(step)
    assert computed(tmp_path / "run") == {n: digest for n, digest in expected.items() if n != "rewards.json"}


def test_a_function_that_raises_on_the_way_is_mended_and_the_run_goes_on(place, tmp_path, capfd):
    fails_then_goes_on(place, tmp_path, capfd, next(iter(FAULTS)), 2)


@pytest.mark.faults
@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[:20])
def test_a_fault_in_the_first_rollout_and_in_the_third(place, tmp_path, capfd, fault, step):
    fails_then_goes_on(place, tmp_path, capfd, fault, step)


@pytest.mark.faults
@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("deed", NO_FAULTS, ids=lambda deed: deed[:20])
def test_what_is_no_fault_changes_nothing(place, tmp_path, monkeypatch, capfd, deed, step):
    directory, expected = place
    monkeypatch.chdir(tmp_path)  # the run directory is relative
    monkeypatch.setenv("SPINFAST_TEST", "1")
    environment = dict(os.environ)
    (directory / "own.py").write_text(BROKEN.format(step=step, fault=deed))
    try:
        assert main([str(directory / "config.yaml"), "--run-dir", "run"]) == 0
    finally:
        os.environ.update(environment)
    assert "Traceback" not in capfd.readouterr().err
    assert os.getcwd() == str(tmp_path)
    found = computed(tmp_path / "run")
    assert {name for name in expected if name != "rewards.json" and found.get(name) != expected[name]} == set()


def test_only_a_change_of_the_file_is_told(place, tmp_path, capfd):
    """The file is not what a run is known by: a comment in it stops nobody, and is told once."""
    directory, _ = place
    (directory / "own.py").write_text(SOUND)
    arguments = [str(directory / "config.yaml"), "--run-dir", str(directory / "sound")]

    def told():
        (directory / "sound" / "log.txt").unlink()
        assert main(arguments) == 0
        return (directory / "sound" / "log.txt").read_text().count("its file is not what the run went by")

    assert told() == 0
    (directory / "own.py").write_text(SOUND + "# better\n")
    assert told() == 1
    assert told() == 0
    (directory / "own.py").write_text(SOUND)
    assert told() == 1


def test_a_longer_time_limit_goes_on_with_the_same_run(place):
    directory, expected = place
    tree = yaml.safe_load((directory / "config.yaml").read_text())
    tree["grpo"]["reward_timeout"] = 77
    (directory / "longer.yaml").write_text(yaml.safe_dump(tree))
    assert main([str(directory / "longer.yaml"), "--run-dir", str(directory / "sound")]) == 0
    found = fingerprints(directory / "sound")
    assert {name for name in found if found[name] != expected[name]} <= {"config.yaml"}


LINGERS = """
import multiprocessing, os, pathlib, time
def own(completion_ids, **kwargs):
    flag = pathlib.Path({flag!r})
    if not flag.exists():
        if not (worker := os.fork()):
            time.sleep(600)
        flag.write_text(str(worker))
        time.sleep(60)
    with multiprocessing.get_context("fork").Pool(1) as pool:  # which is terminated at its end
        pool.map(abs, [1])
    return [ids[0] % 7 / 7 for ids in completion_ids]
"""


@pytest.mark.faults
def test_processes_of_a_function_end_when_they_are_told_and_hold_no_run(place):
    """A worker that outlives a killed run does not hold its lock; one that is terminated ends."""
    directory, expected = place
    flag = directory / "worker"
    (directory / "own.py").write_text(SOUND)
    runs = Runs(directory, None)
    (directory / "own.py").write_text(LINGERS.format(flag=str(flag)))
    run_dir, long = runs.new("lingering"), "grpo.reward_timeout=60"
    process = runs.start("lingering", long)
    while not flag.exists() or not flag.read_text():
        assert process.exitcode is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    while psutil.pid_exists(process.pid):  # join would wait for the worker too
        time.sleep(0.01)
    try:
        assert runs.finish(runs.start("lingering", long)) == 0, runs.complaint()
    finally:
        os.kill(int(flag.read_text()), signal.SIGKILL)
    changed = {name for name in expected if computed(run_dir).get(name) != expected[name]}
    assert changed <= {"rewards.json", "config.yaml"}
    assert json.loads((run_dir / "results.json").read_text())
    assert files.damage(run_dir / "grpo" / "adapter") is None
