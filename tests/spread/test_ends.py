"""Ranks that are stopped, killed or hang: all end within seconds, in one line, and the run goes on to the same end."""

import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress

import pytest
from ranks import wait_for
from warm import computed, differing, place

from spinfast.interrupt import EXIT_CODE

FIXED = "train.virtual_shards=3"
SOON = 20  # seconds


@pytest.fixture(scope="module")
def alone(games):
    return computed(games.play("fixed-1", 1, FIXED))


def ended(games, processes) -> list[int]:
    started = time.monotonic()
    codes = games.finish(processes)
    assert time.monotonic() - started < SOON
    return codes


def test_killed_on_two_ranks_and_on_one_it_is_finished_by_three(games, alone):
    """World size may change at every start; by fixed shares nothing of it is left in the run."""
    directory = games.runs.new("mortal")
    processes = games.start("mortal", 2, FIXED)
    wait_for(directory / "sft" / "checkpoints" / "step_000001", processes)
    processes[1].kill()
    assert ended(games, processes) == [EXIT_CODE, -signal.SIGKILL]
    (line,) = games.said()
    assert "rank 1 of 2 is gone or hangs" in line
    processes = games.start("mortal", 1, FIXED)
    wait_for(directory / "iter_000" / "completions.jsonl", processes)
    processes[0].kill()
    ended(games, processes)
    assert ended(games, games.start("mortal", 3, FIXED)) == [0] * 3
    assert differing(computed(directory), alone) == set()


@pytest.mark.parametrize("told", [(0,), (1,), (0, 1)], ids=["the first", "the second", "both"])
def test_a_signal_to_any_rank_ends_all(games, alone, told):
    directory = games.runs.new("stopped")
    processes = games.start("stopped", 2, FIXED)
    wait_for(directory / "iter_000" / "checkpoints" / "step_000001", processes)
    for rank in told:
        os.kill(processes[rank].pid, signal.SIGTERM)
    assert ended(games, processes) == [EXIT_CODE] * 2
    (line,) = games.said()
    assert "everything done is saved" in line
    if told == (0, 1):
        assert ended(games, games.start("stopped", 2, FIXED)) == [0, 0]
        assert differing(computed(directory), alone) == set()


def hang() -> None:
    """In a rank's process: it never comes to the training of the first round."""
    from spinfast.methods import spin

    spin.fit = lambda *_args: time.sleep(600)


def test_a_hanging_rank_is_named_when_time_is_out(games):
    games.runs.new("hanging")
    processes = games.start("hanging", 2, timeout=4, hooks={1: hang})
    processes[0].join(100)
    processes[1].kill()
    assert games.finish(processes) == [EXIT_CODE, -signal.SIGKILL]
    (line,) = games.said()
    assert "rank 1 of 2 is gone or hangs" in line


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["games", "preferences", "rollouts"])
def test_random_kills(request, kind, kills):
    """Of one rank, or of all, at any instant after they met; then on any number of ranks."""
    ranks, draw, places = request.getfixturevalue(kind), random.Random(os.environ.get("SPINFAST_SEED", "0")), Counter()
    expected = computed(ranks.play("expected", 1, FIXED))
    while places.total() < kills:
        directory, world = ranks.runs.new("killed"), draw.choice([1, 2, 3])
        processes = ranks.start("killed", world, FIXED)
        wait_for(directory / "log.txt", processes)  # before they have met, only torchrun knows of one that is gone
        time.sleep(draw.uniform(0, ranks.runs.seconds))
        how = draw.choice([signal.SIGKILL, signal.SIGTERM])
        for process in draw.choice([processes, [draw.choice(processes)]]):
            with suppress(ProcessLookupError):  # the run was faster
                os.kill(process.pid, how)
        codes = ended(ranks, processes)
        if codes == [0] * world:
            continue
        places[met := place(directory)] += 1
        assert set(codes) <= {0, EXIT_CODE, -signal.SIGKILL, -signal.SIGTERM}, (codes, met, ranks.runs.complaint())
        world = draw.choice([1, 2, 3])
        assert ranks.finish(ranks.start("killed", world, FIXED)) == [0] * world, (met, ranks.runs.complaint())
        ranks.runs.complaint()
        assert differing(computed(ranks.directory / "killed"), expected) == set(), met
    print(f"\nkilled and resumed {places.total()} of {kills}:", dict(sorted(places.items())))
