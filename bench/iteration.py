"""One whole run, phase by phase: seconds, tokens/s, peak memory. `python -m bench iteration [CONFIG] [key=value ...]`

Plays the config's iterations in a temporary directory, or reports the finished run in --run-dir. Start-up (imports,
data, model, engine) is what the wall time of a fresh run has beyond its phases.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from bench import rows
from spinfast.config import load_config
from spinfast.errors import UserError
from spinfast.run import default_config, parse, play


def main(argv: list[str]) -> int:
    path, overrides, run_dir, dry_run, controls, _ = parse(argv)
    if dry_run or controls:
        raise UserError("--dry-run and --controls are no iteration to measure; run `python -m spinfast.run` for them")
    path = path or default_config()[0]
    config = load_config(path, overrides)
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = run_dir or Path(scratch) / "run"
        fresh, started = not run_dir.exists(), time.monotonic()
        if code := play(config, run_dir, str(path)):
            return code
        wall = time.monotonic() - started
        results = json.loads((run_dir / "results.json").read_text())
        clocks = [json.loads(line) for line in (run_dir / "system.jsonl").read_text().splitlines()]
        tokens = phase_tokens(run_dir, results)
    phases = {f"{row['iteration']}.{name}": s for row in results for name, s in row["seconds"].items()}
    for name, seconds in phases.items():
        rate = f"  {tokens[name] / seconds:10,.0f} tok/s" if name in tokens else ""
        print(f"{name:24} {seconds:8.1f} s{rate}")
    if fresh:
        print(f"{'start-up':24} {wall - sum(phases.values()):8.1f} s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    row = {
        "config": path.stem, "overrides": overrides, "wall_s": round(wall, 1) if fresh else None,
        "phases_s": round(sum(phases.values()), 1), "phase_s": phases,
        "tokens_per_second": {name: round(tokens[name] / phases[name], 1) for name in tokens},
        "peak_rss_mib": max(row["memory/rss_mib"] for row in clocks),
    }  # fmt: skip
    if device == "cuda":
        row["peak_allocated_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    rows.write("iteration", row, device)
    return 0


def phase_tokens(run_dir: Path, results: list[dict]) -> dict[str, int]:
    """Tokens that generation wrote and training computed, by iteration and phase."""
    labels = {row["stage"]: row["iteration"] for row in results}
    counted: Counter[str] = Counter()
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        counted[f"{labels[row['stage']]}.train"] += row["train/tokens"]
    for path in run_dir.glob("*/completions.jsonl"):
        lengths = [len(json.loads(line)["token_ids"]) for line in path.read_text().splitlines()]
        counted[f"{labels[path.parent.name]}.generate"] += sum(lengths)
    return counted
