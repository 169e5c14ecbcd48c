"""One peer, one iteration, one process: `python -m bench.peers.child NAME SCRATCH [--gradients FILE]`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

PEERS = {  # name -> (function, packages it needs, CUDA only); bare GEMMs are the floor
    "bare GEMMs": ("bare_gemms:play", (), False),
    "spinfast": ("spinfast_loop:play", (), False),
    "eager": ("eager_loop:play", (), False),
    "trl": ("trl_dpo:plain", ("trl", "datasets"), False),
    "trl-precomputed": ("trl_dpo:precomputed", ("trl", "datasets"), False),
    "trl-liger": ("trl_dpo:liger", ("trl", "datasets", "liger_kernel"), True),
    "unsloth": ("trl_dpo:unsloth", ("unsloth", "trl", "datasets"), True),
}


def main(name: str, scratch: str, gradients: str | None = None) -> None:
    if name == "unsloth":
        importlib.import_module("unsloth")  # before transformers, which it rewrites
    from bench.peers.watch import GradientsTaken, Watch
    from bench.peers.work import Work

    module, function = PEERS[name][0].split(":")
    play = getattr(importlib.import_module(f"bench.peers.{module}"), function)
    work = Work.load(Path(scratch))
    if work.budget_gib:
        from spinfast.device import GIB, cap_memory

        cap_memory(int(work.budget_gib * GIB))
    watch = Watch(work.device, Path(gradients) if gradients else None)
    try:
        found = play(work, watch) or {}
    except GradientsTaken:
        return
    if "trl" in sys.modules:
        found["trl"] = sys.modules["trl"].__version__
    print(json.dumps(watch.result() | found))


if __name__ == "__main__":
    main(*sys.argv[1:])
