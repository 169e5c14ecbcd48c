"""One peer, one epoch, one process, from both sides: `run` starts it, `play` is it.

Nothing of the project is imported before it is needed: Unsloth's process must import Unsloth first.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ALL = ("spin", "dpo", "sft", "grpo")


class Peer(NamedTuple):
    play: str  # module of bench, function of (Work, Watch)
    packages: tuple[str, ...] = ()
    cuda_only: bool = False
    methods: tuple[str, ...] = ("spin", "dpo", "sft")
    whole: str | None = None  # what plays a whole step of grpo, sampling included


PEERS = {  # bare GEMMs are the floor
    "bare GEMMs": Peer("roofline:play", methods=ALL),
    "spinfast": Peer("peers.spinfast_loop:play", methods=ALL, whole="peers.spinfast_loop:whole"),
    "eager": Peer("peers.eager_loop:play", methods=ALL),
    "trl": Peer("peers.trl_trainers:plain", ("trl",), methods=ALL, whole="peers.trl_trainers:plain"),
    "trl-precomputed": Peer("peers.trl_trainers:precomputed", ("trl",), methods=("spin", "dpo")),
    "trl-padding-free": Peer("peers.trl_trainers:padding_free", ("trl",), methods=("sft",)),
    "trl-liger": Peer("peers.trl_trainers:liger", ("trl", "liger_kernel"), cuda_only=True),
    "unsloth": Peer("peers.trl_trainers:unsloth", ("unsloth", "trl"), cuda_only=True),
}


def run(name: str, work, trl: Path | None = None, *arguments: str) -> dict:
    """One peer's epoch in its own process."""
    environment = path_with(trl) if "trl" in PEERS[name].packages else {}
    said = finished([sys.executable, "-m", "bench.peers.child", name, work.scratch, *arguments], environment)
    return json.loads(said.splitlines()[-1])


def finished(command: list[str], environment: dict[str, str]) -> str:
    """What a process without a network said; an error ends the benchmark."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | environment
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def path_with(trl: Path | None) -> dict[str, str]:
    """Environment that puts the directory of another TRL, if one is named, before the installed one."""
    return {"PYTHONPATH": os.pathsep.join([str(trl), os.environ.get("PYTHONPATH", "")])} if trl else {}


def play(name: str, scratch: str, gradients: str | None = None) -> dict:
    """The epoch, in this process; the first step's gradients go to a file, if one is named."""
    if name == "unsloth":
        importlib.import_module("unsloth")  # before transformers, which it rewrites
    from bench.peers.watch import Watch
    from bench.peers.work import Work

    work = Work.load(Path(scratch))
    module, function = (PEERS[name].whole if work.whole else PEERS[name].play).split(":")
    epoch = getattr(importlib.import_module(f"bench.{module}"), function)
    if work.budget_gib:
        from spinfast.device import GIB, cap_memory

        cap_memory(int(work.budget_gib * GIB))
    watch = Watch(work.device, Path(gradients) if gradients else None)
    return epoch(work, watch) | watch.result()


if __name__ == "__main__":
    print(json.dumps(play(*sys.argv[1:])))
