"""A result is a JSON line with its birth certificate: what was measured, on what, from which commit."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from spinfast.environment import installed_versions

RESULTS = Path(__file__).parent / "results"
WRITTEN = (":(top,exclude)bench/results", ":(top,exclude)docs/images")  # what measuring itself changes


def device_name(device: str = "cpu") -> str:
    """The device as a row names it: the GPU's name, or the CPU model with its core count."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
    flags = next((line for line in lines if line.startswith("flags")), "")
    extra = "AMX" if "amx_bf16" in flags else "AVX512-BF16" if "avx512_bf16" in flags else platform.machine()
    return f"{model}, {os.cpu_count()} cores, {extra}"


def git(*args: str) -> str | None:
    """What git says of this checkout; None where there is no git, no history, or no such commit."""
    try:
        done = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def certificate(device: str = "cpu") -> dict:
    """Device, its threads and load, versions, commit, dirty flag, command, date; dirty is None where nobody knows.

    BENCH_COMMIT names the commit of a clean tree that travelled to the machine without its history.
    """
    carried = os.environ.get("BENCH_COMMIT", "")[:12]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *WRITTEN)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "python": platform.python_version(),
        "versions": installed_versions(),
        "threads": torch.get_num_threads(),
        "load_1m": round(os.getloadavg()[0], 2),
        "commit": carried or git("rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": False if carried else None if changed is None else bool(changed),
        "command": "python -m bench " + " ".join(sys.argv[1:]),
    }


def write(name: str, row: dict, device: str = "cpu") -> dict:
    """Append one row to bench/results/NAME.jsonl and print it as the last line a script can parse."""
    row = {"bench": name} | certificate(device) | row
    RESULTS.mkdir(exist_ok=True)
    line = json.dumps(row)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)
    return row


def percentiles(samples: list[float], unit: str) -> dict[str, float]:
    """{"p20_UNIT", "p50_UNIT", "p80_UNIT"} of the samples."""
    if len(samples) < 2:
        return {f"p{p}_{unit}": samples[0] for p in (20, 50, 80)}
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return {f"p20_{unit}": cuts[1], f"p50_{unit}": cuts[4], f"p80_{unit}": cuts[7]}
