"""Ray Train with two workers on this machine, of which one is killed: all start again, and the run ends as always."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from ranks import wait_for
from warm import computed, differing

FIXED = "train.virtual_shards=3"
SECONDS = 300


def rank_one(parent: int) -> psutil.Process | None:
    """The process that plays rank 1, wherever under this one Ray put it."""
    for process in psutil.Process(parent).children(recursive=True):
        try:
            if "spinfast.run" in process.cmdline() and process.environ().get("RANK") == "1":
                return process
        except psutil.Error:
            continue
    return None


@pytest.mark.slow
def test_a_worker_that_is_killed_starts_again(games, tmp_path):
    pytest.importorskip("ray")
    expected, directory = computed(games.play("fixed-1", 1, FIXED)), games.runs.new("on-ray")
    words = [str(games.runs.config), "--run-dir", str(directory), FIXED]
    command = [sys.executable, "-m", "spinfast.on_ray", "--workers", "2", *words]
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        process.exitcode = None
        wait_for(directory / "iter_000" / "checkpoints" / "step_000001", [process])
        killed = rank_one(process.pid)
        assert killed is not None, (tmp_path / "output.txt").read_text()[-4000:]
        killed.send_signal(signal.SIGKILL)
        until = time.monotonic() + SECONDS
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.2)
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, (tmp_path / "output.txt").read_text()[-4000:]
    assert differing(computed(directory), expected) == set()
    assert (directory / "log.txt").read_text().count("ranks: 2") == 2
