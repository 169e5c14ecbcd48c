"""One run on one rank and on two, a core and a thread each: what each phase gains, what goes over the wire.

    python -m bench scale [--size 128] [--tokens 40] [--per-step 32] [--config CONFIG.yaml]
    python -m bench scale --predict

A run of SmolLM2-135M (a round of self-play) is played by N ranks; seconds are its phases', so that starting does not
count. Bytes are those of the loopback interface between the phases "score" and "train", so nothing else may use it.
Two runs of one rank at once, which do not wait for each other, show what the machine itself leaves: the ceiling.

The model beside them: T(N) = T(1) / N * (1 + u) + steps * (2 (N - 1) / N * bytes / bandwidth), with u the tokens of the
largest share over the mean share. --predict asks it for cards: a step's time is the planner's roofline, bandwidths are
published figures times a guess of what is left of them. Rows of kind "predicted" are measured by nobody.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

from safetensors import safe_open

from bench import rows, shapes
from spinfast.config import load_config
from spinfast.data.pairs import read_pairs
from spinfast.device import profile
from spinfast.memory import planner
from spinfast.memory.planner import limits
from spinfast.methods.phases import epochs
from spinfast.packing import packed_length
from spinfast.params import SETTINGS, count

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "smollm2-135m-sums-cpu.yaml"
STAGE = "iter_000"
PHASES = ("generate", "score", "train")
CARDS = {  # cards -> profile, bytes per second that a ring's neighbours get (published, times 0.7)
    2: ("t4", 0.7 * 8e9),  # PCIe 3.0 x16 through host memory, both directions at once
    8: ("a100", 0.7 * 300e9),  # NVLink 3
}
PREDICTED = "Qwen2.5-0.5B"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench scale")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--size", type=int, default=128, help="problems")
    parser.add_argument("--tokens", type=int, default=40, help="of an answer, at the most")
    parser.add_argument("--per-step", type=int, default=32, help="pairs; full microbatches on both ranks")
    parser.add_argument("--predict", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.predict:
        for cards in CARDS:
            rows.write("scale", prediction(cards))
        return 0
    words = [f"data.size={arguments.size}", f"generation.max_tokens={arguments.tokens}", "spin.iterations=1"]
    words += [f"spin.groups_per_step={arguments.per_step}"]
    words += ["heldout=null", "evaluate.problems=0", "evaluate.pairs=0"]
    command = [str(arguments.config), *words]
    with tempfile.TemporaryDirectory(prefix="spinfast-scale-") as scratch:
        one, two = (measured(ranks, command, Path(scratch)) for ranks in (1, 2))
        apart = two_apart(command, Path(scratch))
    for row in (one, two, apart):
        rows.write("scale", row)
    for what, beside, work in (("speedup", two, 1), ("ceiling", apart, 2)):
        gains = {f"{phase}_speedup": round(work * one[f"{phase}_s"] / beside[f"{phase}_s"], 3) for phase in PHASES}
        rows.write("scale", {"what": what, "ranks": 2} | gains)
    return 0


def started(ranks: int, command: list[str], run_dir: Path, cores: Sequence[int]) -> subprocess.Popen:
    """A run of ranks with a thread each, on these cores."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    with run_dir.with_suffix(".txt").open("w") as output:
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", "spinfast.run", *command, "--run-dir", str(run_dir)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | dict.fromkeys(threads, "1"),
            preexec_fn=partial(os.sched_setaffinity, 0, cores),
        )


def ended(process: subprocess.Popen, run_dir: Path) -> None:
    if process.wait():
        raise RuntimeError(run_dir.with_suffix(".txt").read_text()[-2000:])


def two_apart(command: list[str], scratch: Path) -> dict:
    """Two runs of one rank that know nothing of each other, at once: what the cores and their memory leave."""
    runs = {scratch / f"apart-{core}": core for core in sorted(os.sched_getaffinity(0))[:2]}
    processes = {run_dir: started(1, command, run_dir, [core]) for run_dir, core in runs.items()}
    for run_dir, process in processes.items():
        ended(process, run_dir)
    return {"what": "two runs apart", "kind": "measured", "ranks": 1} | {
        f"{phase}_s": round(fmean(phases(run_dir)[phase]["seconds"] for run_dir in runs), 3) for phase in PHASES
    }


def measured(ranks: int, command: list[str], scratch: Path) -> dict:
    """One run; each rank has a core of its own."""
    run_dir, cores = scratch / str(ranks), sorted(os.sched_getaffinity(0))[:ranks]
    process, counted = started(ranks, command, run_dir, cores), {}
    while process.poll() is None:
        for phase in ("score", "train"):
            if phase not in counted and phase in phases(run_dir):
                counted[phase] = loopback()
        time.sleep(0.05)
    ended(process, run_dir)
    seconds = {phase: entry["seconds"] for phase, entry in phases(run_dir).items()}
    groups = [pair.group for pair in read_pairs(run_dir / STAGE / "pairs.parquet")]
    answers = [json.loads(line) for line in (run_dir / STAGE / "completions.jsonl").open()]
    steps = json.loads((run_dir / STAGE / "train.json").read_text())["steps"]
    config = load_config(run_dir / "config.yaml")
    packed, written = sum(map(packed_length, groups)), sum(len(row["token_ids"]) for row in answers)
    return {
        "what": "ranks", "kind": "measured", "ranks": ranks, "threads_per_rank": 1, "cores": len(cores),
        **{f"{phase}_s": seconds[phase] for phase in PHASES},
        "generated_tokens_per_s": round(written / seconds["generate"], 1),
        "trained_tokens_per_s": round(packed * config.spin.epochs / seconds["train"], 1),
        "steps": steps, "groups_per_step": config.spin.groups_per_step,
        "largest_share": round(largest_share(groups, config, ranks), 4),
        "wire_bytes_per_step": round((counted["train"] - counted["score"]) / steps),
        "computed_bytes_per_step": ring_bytes(trained(run_dir), ranks) * ranks,
    }  # fmt: skip


def phases(run_dir: Path) -> dict:
    path = run_dir / STAGE / "phases.json"
    return (
        {name: entry for name, entry in json.loads(path.read_text()).items() if name != "seal"} if path.exists() else {}
    )


def loopback() -> int:
    """Bytes that the loopback interface has received."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def trained(run_dir: Path) -> int:
    with safe_open(run_dir / STAGE / "adapter" / "adapter_model.safetensors", "np") as file:
        return sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118 - no dictionary


def ring_bytes(numbers: int, ranks: int) -> int:
    """What a rank sends in one sum of so many fp32 numbers over a ring."""
    return round(2 * (ranks - 1) / ranks * 4 * numbers)


def largest_share(groups, config, ranks: int) -> float:
    """Packed tokens of the largest share of a step over the mean share; the mean over the steps."""
    found = []
    for step in epochs(SimpleNamespace(config=config), groups, config.spin, 1).rows:
        tokens = [sum(packed_length(groups[row]) for row in step[rank::ranks]) for rank in range(ranks)]
        found.append(max(tokens) * ranks / sum(tokens))
    return fmean(found)


def prediction(cards: int) -> dict:
    """The T4 config's training step on so many cards."""
    name, bandwidth = CARDS[cards]
    config, shape = load_config(ROOT / "configs" / "qwen2.5-0.5b-t4.yaml"), shapes.shape(PREDICTED)
    device = profile(name, plan_only=True)
    groups = limits(config, 2, config.spin.groups_per_step)
    tokens = sum(map(packed_length, groups)) // cards
    step = planner.seconds(device, shape, groups, tokens, 0, False)
    numbers = count(shape, config.adapter).trained
    wire = ring_bytes(numbers, cards) / bandwidth
    by_kind = {kind: ring_bytes(count(shape, adapter).trained, cards) for kind, (adapter, _) in SETTINGS.items()}
    return {
        "what": "prediction", "kind": "predicted", "cards": cards, "profile": name, "model": PREDICTED,
        "groups_per_step": len(groups), "step_ms_1": round(1e3 * step, 1), "wire_ms": round(1e3 * wire, 2),
        "step_ms": round(1e3 * (step / cards + wire), 1), "speedup": round(step / (step / cards + wire), 2),
        "bytes_per_step": by_kind,
    }  # fmt: skip
