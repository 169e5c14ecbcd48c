"""spinfast beside its peers: one epoch of SPIN, DPO, SFT or GRPO on identical work.

Same base weights, pairs (as token ids), adapter, precision, pairs per optimizer step and order, same AdamW; each peer
in a process of its own, in turn, for some rounds (A B C, A B C: what drifts, drifts for all). The gate first: on a
small random model in fp32 every peer's first loss is TRL's (of pairs: ln 2) and its adapter gradients point where
TRL's do, cosine >= 0.999; a red gate is an error and no row is written. "bare GEMMs" is the floor: the base's products.

    python -m bench peers [--method spin|dpo|sft|grpo] [--device cpu|cuda] [--model MODEL|random:SHAPE]
                          [--only spinfast,eager,trl,...] [--rounds 2] [--trl DIR] [--checkpointing]

spin, dpo: the sigmoid loss, scoring of the reference included; one work for the peers. sft: the answers' likelihood.
grpo: the training part on one rollout that all are given; then whole steps that sample --samples answers of
--max-tokens each, on a CPU spinfast by vLLM and TRL by transformers, for TRL's vLLM needs CUDA.
TRL 1.15's head runs on GPUs only; 1.16's in plain torch too, where it scores every position, prompt and padding
included, which rows say (scored_positions). `--trl DIR` names a directory with another TRL than the installed one:
pip install --no-deps --target DIR trl==1.16.0
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import load_file

from bench import rows, shapes
from bench.peers import child
from bench.peers import work as given
from bench.peers.child import PEERS
from spinfast.errors import UserError

FLOOR, REFERENCE = "bare GEMMs", "trl"
LEAST_COSINE, LOSS_BOUND = 0.999, 1e-5
PHASES = ("score", "train")  # of a training iteration


def parser(name: str) -> argparse.ArgumentParser:
    """What work is given and to whom; other commands put the same work to other questions."""
    parser = argparse.ArgumentParser(f"python -m bench {name}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default=shapes.SMOLLM2, help="a model, or random:SHAPE")
    parser.add_argument("--count", type=int, default=32, help="pairs of the epoch")
    parser.add_argument("--pairs-per-step", type=int, default=4)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, for every peer")
    parser.add_argument("--only", help=f"of {','.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trl", type=Path, help="directory of another TRL than the installed one")
    parser.add_argument("--samples", type=int, default=8, help="grpo: answers of a prompt")
    parser.add_argument("--max-tokens", type=int, default=128, help="grpo: of an answer")
    engine = "vllm" if importlib.util.find_spec("vllm") else "transformers"
    parser.add_argument("--engine", choices=("vllm", "transformers"), default=engine, help="grpo: spinfast's sampler")
    parser.set_defaults(method="spin")
    return parser


def main(argv: list[str]) -> int:
    reader = parser("peers")
    reader.add_argument("--method", choices=child.ALL)
    arguments = reader.parse_args(argv)
    names = contestants(arguments)
    with tempfile.TemporaryDirectory(prefix="spinfast-peers-") as scratch:
        cosines = gate([n for n in names if n != FLOOR], arguments, Path(scratch) / "gate")
        work = prepare(arguments, Path(scratch) / "work")
        results = played(names, work, arguments)
        common = described(work, arguments)
        for row in table(results, given.facts(work.groups())):
            row |= {"gate_cosine": cosines[row["peer"]]} if row["peer"] in cosines else {}
            rows.write("peers", {"what": "training iteration"} | row | common, arguments.device)
        if whole := [name for name in names if work.method == "grpo" and PEERS[name].whole]:
            work = prepare(arguments, Path(scratch) / "whole", whole=True)
            for row in whole_steps(played(whole, work, arguments), given.facts(work.groups())):
                rows.write("peers", {"what": "whole step"} | row | common, arguments.device)
    return 0


def played(names: list[str], work: given.Work, arguments) -> dict[str, list[dict]]:
    """The results of each peer, in turn, for some rounds."""
    results: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name in names:
            results[name].append(child.run(name, work, arguments.trl))
            shown = {k: round(v, 2) for k, v in results[name][-1]["seconds"].items()}
            print(f"{name:16} {shown} s, {results[name][-1]['above_model_mib']:.0f} MiB above", flush=True)
    return results


def described(work: given.Work, arguments) -> dict:
    """What all rows of a comparison say of the work."""
    names = ["pairs_per_step", "lr", "beta", "gradient_checkpointing"]
    if work.method == "grpo":
        names += ["samples", "max_tokens"]
    config = {name: getattr(work, name) for name in names} | {"lora_r": 16, "lora_alpha": 32}
    common = {"method": work.method, "model": arguments.model, "dtype": work.dtype, "rounds": arguments.rounds}
    return common | {"config": config}


def prepare(arguments, scratch: Path, whole: bool = False) -> given.Work:
    recipe = {
        "samples": arguments.samples, "max_tokens": arguments.max_tokens, "whole": whole,
        "engine": arguments.engine,
        "device": arguments.device, "method": arguments.method, "pairs_per_step": arguments.pairs_per_step,
        "dtype": str(shapes.device(arguments.device, arguments.dtype).dtype).removeprefix("torch."),
        "gradient_checkpointing": arguments.checkpointing,
    }  # fmt: skip
    return given.prepare(scratch, arguments.model, arguments.count, **recipe)


def contestants(arguments) -> list[str]:
    """The peers that can run here; those that cannot are named with the reason."""
    asked = arguments.only.split(",") if arguments.only else [n for n in PEERS if arguments.method in PEERS[n].methods]
    if strangers := [name for name in asked if name not in PEERS]:
        raise UserError(f"--only: expected names of {', '.join(PEERS)}, got {', '.join(strangers)}")
    obstacles = {name: obstacle(name, arguments) for name in asked}
    for name, reason in obstacles.items():
        if reason:
            print(f"{name}: not measured, {reason}", file=sys.stderr)
    if arguments.only and any(obstacles.values()):
        raise UserError("--only: a peer that was asked for cannot run here")
    return [name for name, reason in obstacles.items() if not reason]


def obstacle(name: str, arguments) -> str | None:
    peer = PEERS[name]
    if arguments.method not in peer.methods:
        return f"it has no part in --method {arguments.method}"
    if peer.cuda_only and arguments.device != "cuda":
        return "it needs a CUDA GPU"
    needed = [package for package in peer.packages if not (package == "trl" and arguments.trl)]
    if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
        return f"not installed: {', '.join(missing)}"
    if "trl" in needed and arguments.device == "cpu" and metadata.version("trl").startswith("1.15."):
        return "TRL 1.15's head runs on GPUs only; name another with --trl"
    return None


# The gate ----------------------------------------------------------------------------------------------------------


def gate(names: list[str], arguments, scratch: Path) -> dict[str, float]:
    """Cosine of each peer's adapter gradients with TRL's (without it, the eager loop's); raises where it disagrees."""
    recipe = {"device": arguments.device, "method": arguments.method, "dtype": "float32", "max_grad_norm": 1e9}
    work = given.prepare(scratch, "random:tiny", 4, pairs_per_step=4, **recipe)
    reference = REFERENCE if REFERENCE in names else "eager"
    losses, found = {}, {}
    for name in dict.fromkeys([reference, *names]):
        path = scratch / f"{name}.safetensors"
        losses[name] = child.run(name, work, arguments.trl, str(path))["losses"][0]
        found[name] = load_file(path)
    cosines = {name: cosine(gradients, found[reference]) for name, gradients in found.items()}
    check_gate(cosines, losses, math.log(2) if work.method in ("spin", "dpo") else losses[reference])
    print(f"gate: cosines with {reference} {cosines}, first losses {losses}", flush=True)
    return cosines


def check_gate(cosines: dict[str, float], losses: dict[str, float], expected: float) -> None:
    wrong = [f"{name}: gradient cosine {value:.6f}" for name, value in cosines.items() if not value >= LEAST_COSINE]
    wrong += [f"{n}: first loss {v:.6f}" for n, v in losses.items() if not abs(v - expected) <= LOSS_BOUND]
    if wrong:
        raise SystemExit(
            f"bench peers: the gate is red ({'; '.join(wrong)}); expected cosine >= {LEAST_COSINE} and first loss "
            f"{expected:.6f}; no number without a green gate"
        )


def cosine(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Of all tensors as one vector; they must have the same names."""
    if a.keys() != b.keys():
        raise SystemExit(f"bench peers: gradients of different parameters: {sorted(a.keys() ^ b.keys())[:4]}")
    flat = [torch.cat([t[name].flatten() for name in sorted(a)]).double() for t in (a, b)]
    return torch.nn.functional.cosine_similarity(*flat, dim=0).item()


# The table ---------------------------------------------------------------------------------------------------------


def table(results: dict[str, list[dict]], facts: dict) -> list[dict]:
    """A row per peer: rates of the whole epoch, memory above the model, spinfast's ratios to it round by round."""
    seconds = {name: [sum(r["seconds"].get(p, 0.0) for p in PHASES) for r in runs] for name, runs in results.items()}
    lines = []
    for name, runs in results.items():
        rate = rows.percentiles([facts["pairs"] / s for s in seconds[name]], "pairs_per_s")
        row = {
            "peer": name, **facts, **{k: round(v, 4) for k, v in rate.items()},
            "p50_tokens_per_s": round(facts["tokens"] / statistics.median(seconds[name]), 1),
            "p50_answer_tokens_per_s": round(facts["answer_tokens"] / statistics.median(seconds[name]), 1),
            "score_s": [round(r["seconds"].get("score", 0.0), 2) for r in runs],
            "train_s": [round(r["seconds"]["train"], 2) for r in runs],
            "threads": runs[0]["threads"],
        }  # fmt: skip
        if name != FLOOR:
            row |= {k: round(statistics.median(r[k] for r in runs), 1) for k in runs[0] if k.endswith("_mib")}
        row |= {key: runs[0][key] for key in ("trl", "scored_positions") if key in runs[0]}
        if runs[0]["steps_s"]:
            row["first_step_s"] = round(statistics.median(r["steps_s"][0] for r in runs), 3)
            row["steady_step_s"] = round(statistics.median(s for r in runs for s in r["steps_s"][1:]), 3)
            row["losses"] = [round(loss, 5) for loss in runs[0]["losses"]]
        if "spinfast" in results and name not in ("spinfast", FLOOR):
            above = [[r["above_model_mib"] for r in side] for side in (results["spinfast"], runs)]
            row["spinfast_speedup"] = _median_ratio(seconds[name], seconds["spinfast"])
            row["spinfast_memory_ratio"] = _median_ratio(*above)
        if FLOOR in results and name != FLOOR:
            row["share_of_bare_gemms"] = _median_ratio(seconds[FLOOR], seconds[name])
            row["share_of_roofline"] = _median_ratio([roofline_s(r) for r in results[FLOOR]], seconds[name])
        if name == FLOOR:
            row["roofline_pairs_per_s"] = round(facts["pairs"] / statistics.median(map(roofline_s, runs)), 3)
            row |= {key: runs[0][key] for key in ("work", "gemm_gflops", "copy_gb_per_s")}
        lines.append(row)
    return lines


def whole_steps(results: dict[str, list[dict]], facts: dict) -> list[dict]:
    """A row per peer that samples for itself: tokens of completions per second of sampling and training."""
    seconds = {
        name: [sum(r["seconds"][p] for p in ("generate", "train")) for r in runs] for name, runs in results.items()
    }
    lines = []
    for name, runs in results.items():
        rate = rows.percentiles([facts["answer_tokens"] / s for s in seconds[name]], "answer_tokens_per_s")
        row = {"peer": name, **facts, **{k: round(v, 1) for k, v in rate.items()}, "threads": runs[0]["threads"]}
        row |= {f"{phase}_s": [round(r["seconds"][phase], 2) for r in runs] for phase in ("generate", "train")}
        row |= {key: runs[0][key] for key in ("trl", "engine", "prompt_tokens_cached") if key in runs[0]}
        row |= {k: round(statistics.median(r[k] for r in runs), 1) for k in runs[0] if k.startswith("peak_")}
        if "spinfast" in results and name != "spinfast":
            row["spinfast_whole_speedup"] = _median_ratio(seconds[name], seconds["spinfast"])
        lines.append(row)
    return lines


def roofline_s(floor: dict) -> float:
    """Seconds below which no iteration can be, by this run's own best GEMM rate and bandwidth."""
    best, bandwidth = max(floor["gemm_gflops"].values()) * 1e9, floor["copy_gb_per_s"] * 1e9
    return sum(max(phase["flop"] / best, phase["bytes"] / bandwidth) for phase in floor["work"].values())


def _median_ratio(above: list[float], below: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)
