"""A rollout on its way: killed and stopped at each place of it, harmed in the middle of its steps, put in another's."""

import os
import shutil
import signal
from functools import partial

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_run import train_rows
from warm import computed, differing

from spinfast import fit
from spinfast.generation.transformers import TransformersGenerator
from spinfast.interrupt import EXIT_CODE
from spinfast.methods import sampling
from spinfast.rewards import Rewards
from spinfast.store import rollouts
from spinfast.watch import Watch

pytestmark = pytest.mark.faults
PLACES = {  # name -> (owner, function) before whose call number n the signal comes
    "answering": (TransformersGenerator, "generate"),
    "rewarding": (Rewards, "__call__"),
    "scoring": (sampling, "token_logps"),
    "writing": (rollouts, "_seal"),
    "in the file": (pq, "write_table"),
    "looking": (Watch, "look"),
    "between steps": (fit, "on_the_way"),
}


def signalled(place, call, number):
    """In the child: the signal to itself; what is in the file by then is half of it."""
    owner, name = PLACES[place]
    function, calls = getattr(owner, name), 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            if place == "in the file" and number == signal.SIGKILL:
                function(*args, **kwargs)
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize(
    ("place", "call"),
    [
        *(("answering", call) for call in (1, 2, 3, 4, 5, 6)),  # base's evaluation, rollout, refill, look ...
        *(("rewarding", call) for call in (1, 2, 4, 5)),
        *(("scoring", call) for call in (1, 3, 5)),
        *((place, call) for place in ("writing", "in the file") for call in (1, 2)),
        *(("looking", call) for call in (1, 2, 3)),
        *(("between steps", call) for call in (1, 3, 4, 6)),
    ],
)
def test_a_signal_in_each_place_of_a_rollout(grpo_runs, place, call, number):
    run_dir = grpo_runs.new("stopped")
    process = grpo_runs.start("stopped", before=partial(signalled, place, call, number))
    code = grpo_runs.finish(process)
    assert code == (EXIT_CODE if number == signal.SIGTERM else -number), grpo_runs.complaint()
    assert grpo_runs.finish(grpo_runs.start("stopped")) == 0
    grpo_runs.complaint()
    assert differing(computed(run_dir), computed(grpo_runs.undisturbed)) == set()
    assert not list(run_dir.rglob("*.partial"))


def stopped_after(runs, step):
    """A run stopped after this step."""
    run_dir = runs.new("harmed")
    assert runs.finish(runs.start("harmed", before=partial(signalled, "between steps", step, signal.SIGTERM))) == 75
    return run_dir


def test_a_rollout_harmed_in_the_middle_of_its_steps_is_sampled_anew_by_the_policy_as_it_stands(grpo_runs):
    """What the steps before it saw is gone; what comes after is right for the policy that there is, and told."""
    run_dir = stopped_after(grpo_runs, 2)
    path = rollouts.path(run_dir / "grpo", 0)
    before = pq.read_table(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert grpo_runs.finish(grpo_runs.start("harmed")) == 0, grpo_runs.complaint()
    said = (run_dir / "log.txt").read_text()
    assert "000000.parquet is not as it was written; its prompts are answered again, by the policy as it stands" in said
    after = pq.read_table(path)
    assert after.schema.metadata[b"adapter"] != before.schema.metadata[b"adapter"]
    rows, expected = train_rows(run_dir), train_rows(grpo_runs.undisturbed)
    assert rows[:2] == expected[:2]
    assert rows[2]["clip_ratio/region_mean"] == 0
    assert rows[2]["sampling/sampling_logp_difference/max"] < 1e-4
    shutil.rmtree(run_dir / "grpo" / "adapter")  # all is trained again, from the start: by another policy than its file
    assert grpo_runs.finish(grpo_runs.start("harmed")) == 0, grpo_runs.complaint()
    assert "000000.parquet is by another policy than this step's" in (run_dir / "log.txt").read_text()
    assert differing(computed(run_dir), computed(grpo_runs.undisturbed)) == set()


def test_a_rollout_of_another_run_is_not_taken(grpo_runs):
    run_dir = stopped_after(grpo_runs, 2)
    other = grpo_runs.directory / "other seed"
    shutil.rmtree(other, ignore_errors=True)
    assert grpo_runs.finish(grpo_runs.start("other seed", "seed=1")) == 0
    for number in (0, 1):
        shutil.copy(rollouts.path(other / "grpo", number), rollouts.path(run_dir / "grpo", number))
    shutil.rmtree(run_dir / "grpo" / "checkpoints")
    assert grpo_runs.finish(grpo_runs.start("harmed")) == 0, grpo_runs.complaint()
    assert (run_dir / "log.txt").read_text().count("parquet is not as it was written") == 2
    assert differing(computed(run_dir), computed(grpo_runs.undisturbed)) == set()


ROWS = [
    {
        **{"group": i // 2, "sample": i % 2, "index": i // 2, "prompt": "a", "prompt_ids": [1, 2], "completion": "b"},
        **{"completion_ids": [3 + i], "finish_reason": "stop", "sampler_logps": [-0.5], "old_logps": None},
        **{"reference_logps": [-0.25], "reward": 1.0, "advantage": 0.5 - i, "active": 1.0, "extra": "{}"},
        "rewards/even": None if i else 1.0,
    }
    for i in range(4)
]


@given(st.data())
@settings(max_examples=400)
def test_a_rollouts_file_with_bits_flipped_is_as_written_or_not_taken(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("bits") / "rollouts" / "000000.parquet"
    written = rollouts.write(path, rollouts.Rollout(ROWS, "adapter", {"reward": 1.0}), "owner")
    content = bytearray(path.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) * 8 - 1), min_size=1, max_size=3)):
        content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)
    assert rollouts.read(path, "owner") in (None, written)
    assert rollouts.read(path, "another") is None
