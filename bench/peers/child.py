"""One peer, one iteration, one process, from both sides: `run` starts it, `play` is it.

Nothing of the project is imported before it is needed: Unsloth's process must import Unsloth first.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

PEERS = {  # name -> (function, packages it needs, CUDA only); bare GEMMs are the floor
    "bare GEMMs": ("roofline:play", (), False),
    "spinfast": ("peers.spinfast_loop:play", (), False),
    "eager": ("peers.eager_loop:play", (), False),
    "trl": ("peers.trl_dpo:plain", ("trl", "datasets"), False),
    "trl-precomputed": ("peers.trl_dpo:precomputed", ("trl", "datasets"), False),
    "trl-liger": ("peers.trl_dpo:liger", ("trl", "datasets", "liger_kernel"), True),
    "unsloth": ("peers.trl_dpo:unsloth", ("unsloth", "trl", "datasets"), True),
}


def run(name: str, work, trl: Path | None = None, *arguments: str) -> dict:
    """One peer's iteration in its own process."""
    environment = path_with(trl) if "trl" in PEERS[name][1] else {}
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
    """The iteration, in this process; nothing if only the first step's gradients are wanted."""
    if name == "unsloth":
        importlib.import_module("unsloth")  # before transformers, which it rewrites
    from bench.peers.watch import GradientsTaken, Watch
    from bench.peers.work import Work

    module, function = PEERS[name][0].split(":")
    iteration = getattr(importlib.import_module(f"bench.{module}"), function)
    work = Work.load(Path(scratch))
    if work.budget_gib:
        from spinfast.device import GIB, cap_memory

        cap_memory(int(work.budget_gib * GIB))
    watch = Watch(work.device, Path(gradients) if gradients else None)
    try:
        found = iteration(work, watch) or {}
    except GradientsTaken:
        return {}
    version = {"trl": sys.modules["trl"].__version__} if "trl" in PEERS[name][1] else {}
    return watch.result() | found | version


if __name__ == "__main__":
    print(json.dumps(play(*sys.argv[1:])))
