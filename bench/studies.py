"""`python -m bench studies [cells]`: a study's cells in one session against a process for each, which loads the base.

SmolLM2-135M, SFT on 24 sums, r 4 and 8 in turn. Both sides train a cell and measure its outcomes; the base's own are
measured by the study alone, its processes are given them. `rss_mib` is what the study's process held after each cell.

`python -m bench studies --memory [cells]`: what a session holds on to. 100 cells of a tiny model in this process, of
LoRA and LoRA-XS and of full weights in turn, and after some of them its resident memory, live Python objects and
tensors with their bytes.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from bench import rows, shapes
from bench.peers import child
from spinfast.progress import Display
from spinfast.store.record import memory_now
from spinfast.studies.design import cells_of, load_design
from spinfast.studies.play import BASE, OUTCOMES, play

BASE_CONFIG = "smollm2-135m-sft-cpu.yaml"
KEYS = {
    "heldout": None,
    "data.size": 24,
    "sft.epochs": 1,
    "sft.groups_per_step": 8,
    "sft.evaluate_every": 0,
    "sft.keep": "last",
}


ADAPTERS = {
    "lora": {"adapter": {"kind": "lora", "r": 4, "alpha": 8}},
    "lora, again": {"adapter": {"kind": "lora", "r": 4, "alpha": 8}, "sft.lr": 1e-4},
    "wide": {"adapter": {"kind": "lora", "r": 8, "alpha": 16}},
    "xs": {"adapter": {"kind": "lora_xs", "r": 4, "alpha": 8}},
    "full": {"adapter": {"kind": "full", "target_modules": ["q_proj"]}},
}
LOOKED_AT = (1, 5, 10, 25, 50, 75, 100)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench studies")
    parser.add_argument("--memory", action="store_true", help="of one session, instead of its time")
    parser.add_argument("cells", type=int, nargs="?", help="6; of --memory 100")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="spinfast-studies-") as scratch:
        measure = memory if arguments.memory else throughput
        rows.write("studies", measure(Path(scratch), arguments.cells or (100 if arguments.memory else 6)))
    return 0


def study(scratch: Path, base: str, keys: dict, axes: dict, seeds: int | list[int]) -> Path:
    tree = {
        "base": base,
        "set": keys,
        "axes": axes,
        "seeds": seeds,
        "learning": {"sums": {"source": "reasoning_gym:chain_sum", "size": 8}},
        "forgetting": {"own": 0},
    }
    path = scratch / "study.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def timed(path: Path, out: Path) -> tuple[float, float]:
    """Seconds by the clock, and of processors, of a process that plays a study."""

    def now() -> tuple[float, float]:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.perf_counter(), used.ru_utime + used.ru_stime

    start = now()
    child.finished([sys.executable, "-m", "spinfast.run", "study", str(path), "--dir", str(out)], {})
    return tuple(after - before for after, before in zip(now(), start, strict=True))


def throughput(scratch: Path, count: int) -> dict:
    path = study(scratch, BASE_CONFIG, KEYS, {"adapter.r": [4, 8]}, count // 2)
    out = scratch / "out"
    together, together_cpu = timed(path, out)
    cells = cells_of(load_design(path), path.parent)
    held = [_held(out / "cells" / cell.name / "system.jsonl") for cell in cells]
    apart = apart_cpu = 0.0
    for cell in cells:
        alone = scratch / cell.name
        alone.mkdir()
        shutil.copy(out / BASE, alone)
        one = study(alone, BASE_CONFIG, KEYS, {"adapter.r": [int(cell.levels[0])]}, [cell.seed])
        seconds, cpu = timed(one, alone)
        apart, apart_cpu = apart + seconds, apart_cpu + cpu
        found, same = ((of / "cells" / cell.name / OUTCOMES).read_bytes() for of in (alone, out))
        if found != same:
            raise RuntimeError(f"{cell.name}: its outcomes in a process of its own are not those in the study")
    return {
        "what": "cells of a study",
        "model": shapes.SMOLLM2,
        "cells": len(cells),
        "study_s": round(together, 1),
        "processes_s": round(apart, 1),
        "study_cpu_s": round(together_cpu, 1),
        "processes_cpu_s": round(apart_cpu, 1),
        "times_their_cpu": round(apart_cpu / together_cpu, 2),
        "cells_per_hour": round(3600 * len(cells) / together),
        "times_the_processes": round(apart / together, 2),
        "rss_mib": held,
    }


def memory(scratch: Path, count: int) -> dict:
    model = shapes.random_model(scratch / "model", shapes.shape("tiny"))
    keys = KEYS | {"model.name": str(model), "device.profile": "cpu", "device.dtype": "float32", "data.size": 8}
    seeds = -(-count // len(ADAPTERS))
    path = study(scratch, BASE_CONFIG, keys, {"adapter": ADAPTERS}, seeds)
    design = load_design(path)
    cells, found = cells_of(design, path.parent)[:count], {}  # figure -> cells that were played -> its value
    (scratch / "out").mkdir()
    for number, _ in enumerate(play(design, cells, scratch / "out", Display()), 1):
        if number in LOOKED_AT or number == len(cells):
            for name, value in held().items():
                found.setdefault(name, {})[str(number)] = value
    return {"what": "memory of a session", "model": "random:tiny", "cells": len(cells), **found}


def held() -> dict:
    """What lives in this process once no garbage is found: what autograd's nodes held is seen a pass later.

    Tensors are those with memory of their own: how many objects look at one is chance, and said with the objects.
    """
    while gc.collect():
        pass
    objects = gc.get_objects()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of what is only looked at
        tensors = [each for each in objects if issubclass(type(each), torch.Tensor)]
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return {
        "rss_mib": memory_now()["memory/rss_mib"],
        "objects": len(objects),
        "tensors": len(storages),
        "tensors_mib": round(sum(storages.values()) / 2**20, 2),
    }


def _held(path: Path) -> float:
    return json.loads(path.read_text().splitlines()[-1])["memory/rss_mib"]
