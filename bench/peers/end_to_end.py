"""A whole iteration, generation to saved adapter, against the usual script of vLLM and TRL; processes included.

The script: one process loads vLLM with the last adapter and writes answers as text, a second loads TRL and trains on
them (chat template applied again, as TRL does it), and saves. spinfast: `python -m spinfast.run` for one iteration
without evaluation. Both start from the same model and prompts, make answers of at most as many tokens, train one
epoch in steps of as many pairs with the same learning rate.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from transformers import AutoConfig

from bench import rows, shapes
from bench.peers import child, compare
from bench.peers.work import Work

PROMPTS_SEED, MAX_TOKENS = 1, 192


def main(argv: list[str]) -> int:
    """Both sides in turn, `--rounds` times."""
    arguments = compare.parser("end_to_end").parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="spinfast-end-to-end-") as directory:
        scratch = Path(directory)
        work = write_work(arguments, scratch)
        seconds: dict[str, list[float]] = {"TRL + vLLM": [], "spinfast": []}
        for turn in range(arguments.rounds):
            seconds["TRL + vLLM"].append(script(work, arguments.trl))
            seconds["spinfast"].append(own_run(arguments, work, scratch / f"run-{turn}"))
            print({name: round(times[-1], 1) for name, times in seconds.items()}, flush=True)
    ratios = [a / b for a, b in zip(seconds["TRL + vLLM"], seconds["spinfast"], strict=True)]
    for name, times in seconds.items():
        row = {
            "what": "end to end", "peer": name, "model": arguments.model, "pairs": arguments.count,
            "max_tokens": MAX_TOKENS, "pairs_per_step": arguments.pairs_per_step, "rounds": arguments.rounds,
            "wall_s": round(rows.percentiles(times, "s")["p50_s"], 1),
        }  # fmt: skip
        if name != "spinfast":
            row["spinfast_speedup"] = round(rows.percentiles(ratios, "x")["p50_x"], 3)
        rows.write("peers", row, arguments.device)
    return 0


def write_work(arguments, scratch: Path) -> dict:
    """The prompts as text, and an adapter that changes nothing, as before the first iteration."""
    path = shapes.resolve(arguments.model, scratch)
    examples, _ = shapes.problems(path, arguments.count)
    dtype = str(shapes.device(arguments.device, arguments.dtype).dtype).removeprefix("torch.")
    base = Work(str(scratch), str(path), arguments.device, dtype, arguments.pairs_per_step)
    base.policy().save_adapter(base.adapter)
    work = {
        "scratch": str(scratch), "model": str(path), "dtype": dtype, "device": arguments.device,
        "pairs_per_step": arguments.pairs_per_step, "max_tokens": MAX_TOKENS,
        "context": min(1024, AutoConfig.from_pretrained(path).max_position_embeddings),
        "rows": [{"messages": list(e.messages), "answer": e.answer} for e in examples],
    }  # fmt: skip
    (scratch / "script.json").write_text(json.dumps(work))
    return work


def script(work: dict, trl: Path | None) -> float:
    """Seconds of `generate`, then `train`."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    start = time.perf_counter()
    for part in ("generate", "train"):
        command = [sys.executable, "-m", "bench.peers.script", part, work["scratch"]]
        child.finished(command, environment | (child.path_with(trl) if part == "train" else {}))
    return time.perf_counter() - start


def own_run(arguments, work: dict, run_dir: Path) -> float:
    """Seconds of spinfast's process for the same iteration."""
    overrides = [
        f"data.size={arguments.count}", f"data.seed={PROMPTS_SEED}", "heldout=null", "spin.iterations=1",
        f"generation.max_tokens={MAX_TOKENS}", f"spin.groups_per_step={arguments.pairs_per_step}",
        "spin.lr=5.0e-5", "spin.schedule=constant", "spin.warmup_ratio=0", f"device.dtype={work['dtype']}",
        f"model.name={work['model']}", "prompt.max_prompt_tokens=1024", "prompt.max_answer_tokens=1024",
    ]  # fmt: skip
    config = Path(__file__).parents[2] / "configs" / "smollm2-135m-gsm-cpu.yaml"
    start = time.perf_counter()
    child.finished([sys.executable, "-m", "spinfast.run", str(config), *overrides, "--run-dir", str(run_dir)], {})
    return time.perf_counter() - start
