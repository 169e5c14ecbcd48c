"""SIGKILL at random instants, then the same command: the result is the undisturbed run's, byte for byte."""

import json
import os
import random
import signal
import time
from collections import Counter

import pytest
from warm import computed, differing, place


def killed_at(runs, name, seconds):
    """Where the kill met the run; None if the run was faster."""
    run_dir = runs.new(name)
    process = runs.start(name)
    time.sleep(seconds)
    process.kill()
    process.join()
    return place(run_dir) if process.exitcode == -signal.SIGKILL else None


def kill_and_resume(runs, count, seed):
    """Kill `count` runs, go on with each; the places the kills met."""
    expected, draw, places = computed(runs.undisturbed), random.Random(seed), Counter()
    while places.total() < count:
        met = killed_at(runs, "killed", draw.uniform(0, runs.seconds))
        if met is None:
            continue
        places[met] += 1
        assert runs.finish(runs.start("killed")) == 0, (met, runs.complaint())
        runs.complaint()
        assert differing(computed(runs.directory / "killed"), expected) == set(), met
    return places


def test_two_kills(runs):
    assert kill_and_resume(runs, 2, seed=1).total() == 2


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["runs", "preference_runs", "grpo_runs"])
def test_random_kills(request, kind, kills):
    places = kill_and_resume(request.getfixturevalue(kind), kills, seed=int(os.environ.get("SPINFAST_SEED", "0")))
    print(f"\nkilled and resumed {places.total()} of {kills}:", json.dumps(dict(sorted(places.items()))))


@pytest.mark.faults
def test_one_run_killed_again_and_again(runs):
    """A free GPU that never lasts: each process is killed when it has done a little more than the one before."""
    run_dir, killed = runs.new("mortal"), 0
    for reached in (
        "base/adapter",
        "sft/checkpoints",
        "iter_000/completions.jsonl",
        "iter_000/checkpoints",
        "iter_001",
    ):
        process = runs.start("mortal")
        while not (run_dir / reached).exists() and process.exitcode is None:
            time.sleep(0.002)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed == 5  # each was met alive: it does not depend on how fast the machine is
    assert runs.finish(runs.start("mortal")) == 0, runs.complaint()
    assert differing(computed(run_dir), computed(runs.undisturbed)) == set()
