"""The real launcher: its environment, its exit, and its own death."""

import os
import signal
import subprocess
import sys
import time

import pytest
from ranks import wait_for
from test_run import train_rows, write_config
from warm import computed, differing

SECONDS = 180


class Launch(subprocess.Popen):
    """torchrun, as a process whose group are the launcher and nobody else; its ranks are in sessions of their own."""

    exitcode = property(subprocess.Popen.poll)


def torchrun(config, run_dir, *words, ranks=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    output = (run_dir.parent / "output.txt").open("w")
    words = ["-m", "spinfast.run", str(config), "--run-dir", str(run_dir), *words]
    return Launch([*command, *words], stdout=output, stderr=subprocess.STDOUT)


def said(run_dir) -> list[str]:
    text = (run_dir.parent / "output.txt").read_text()
    return [line for line in text.splitlines() if line.startswith("spinfast: ")]


FIXED = "train.virtual_shards=2"


@pytest.fixture(scope="module")
def played(tmp_path_factory, tiny_model):
    directory = tmp_path_factory.mktemp("torchrun")
    config = write_config(directory, tiny_model("llama"), spin={"iterations": 1}, train={"save_every_steps": 1})
    launch = torchrun(config, directory / "run", FIXED)
    assert launch.wait(SECONDS) == 0, (directory / "output.txt").read_text()[-4000:]
    return directory


def test_torchrun_plays_a_run(played):
    assert len(train_rows(played / "run")) == 3
    assert "ranks: 2" in (played / "run" / "log.txt").read_text()
    assert (played / "output.txt").read_text().count("config: ") == 1  # rank 0 alone speaks


@pytest.mark.faults
def test_what_a_user_can_mend_is_one_line(played):
    launch = torchrun(played / "config.yaml", played / "wrong", "spin.no_such_key=1")
    assert launch.wait(SECONDS) != 0
    (line,) = said(played / "wrong")
    assert "no_such_key" in line
    assert "exitcode  : 2" in (played / "output.txt").read_text()  # of the ranks; torchrun's own is 1


@pytest.mark.faults
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_launcher_ends_and_its_ranks_with_it(played, how):
    run_dir = played / f"launched-{how}"
    launch = torchrun(played / "config.yaml", run_dir, FIXED)
    wait_for(run_dir / "iter_000" / "checkpoints" / "step_000001", [launch])
    os.kill(launch.pid, how)
    launch.wait(SECONDS)
    (line,) = _eventually(lambda: said(run_dir))
    assert "everything done is saved" in line
    again = torchrun(played / "config.yaml", run_dir, FIXED, ranks=1)  # the lock is free: the ranks are gone
    assert again.wait(SECONDS) == 0, (played / "output.txt").read_text()[-4000:]
    assert differing(computed(run_dir), computed(played / "run")) == set()


def _eventually(ask):
    until = time.monotonic() + 30
    while not (found := ask()) and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(3)  # who has not ended by now would hold the lock
    return found
