"""Ranks of one run, or of a function, as processes that know of one another what torchrun would tell them."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from warm import FORK, SECONDS, Runs

EXIT = 90  # of a rank whose function failed


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def become(rank: int, world: int, port: int, timeout: float, then: Callable[[], None] | None = None) -> None:
    """In a rank's process, before its work."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(number) for name, number in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SPINFAST_RANK_TIMEOUT": str(timeout)}
    if then:
        then()


class Ranks:
    """Runs (warm.py) that several ranks play. `hooks`: rank -> what happens in its process before it plays."""

    def __init__(self, runs: Runs):
        self.runs, self.directory = runs, runs.directory

    def start(self, name: str, world: int, *words: str, timeout: float = SECONDS, hooks=()) -> list:
        if world == 1:
            return [self.runs.start(name, *words)]
        port, hooks = free_port(), dict(hooks)
        return [
            self.runs.start(name, *words, before=partial(become, rank, world, port, timeout, hooks.get(rank)))
            for rank in range(world)
        ]

    def finish(self, processes: Sequence) -> list[int]:
        return [self.runs.finish(process) for process in processes]

    def play(self, name: str, world: int, *words: str, **options) -> Path:
        """A whole new run."""
        directory = self.runs.new(name)
        codes = self.finish(self.start(name, world, *words, **options))
        assert codes == [0] * world, self.runs.output.read_text()[-4000:]
        return directory

    def said(self) -> list[str]:
        """The lines by which processes say that they failed."""
        return [line for line in self.runs.complaint().splitlines() if line.startswith("spinfast: ")]


def together(
    function: Callable[[], None], world: int, output: Path, timeout: float = 30, ending: Sequence[int] = ()
) -> list[int]:
    """The exit codes of so many ranks that each call the function: 0, or EXIT where it raised.

    Those that do not end, if `ending` names others, are killed when those have.
    """
    port = free_port()
    processes = [
        FORK.Process(target=_call, args=(function, rank, world, port, timeout, output)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for rank in ending or range(world):
        processes[rank].join(SECONDS)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _call(function: Callable[[], None], rank: int, world: int, port: int, timeout: float, output: Path) -> None:
    import torch

    from spinfast import spread

    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    torch.set_num_threads(1)
    become(rank, world, port, timeout)
    try:
        with spread.opened():
            function()
    except BaseException:
        traceback.print_exc()
        os._exit(EXIT)


def wait_for(path: Path, processes: Sequence) -> None:
    """Until the path is there, or the processes ended."""
    until = time.monotonic() + SECONDS
    while not path.exists() and any(p.exitcode is None for p in processes) and time.monotonic() < until:
        time.sleep(0.002)
