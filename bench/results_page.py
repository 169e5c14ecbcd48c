"""`python -m bench results`: RESULTS.md and its plots from the rows in bench/results/, nothing by hand.

The newest row of each comparison counts; a column is a field of the rows. What no row says is "not measured". A row is
old if the code that its benchmark measures was committed to since.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from bench import plots, rows
from bench.peers.child import PEERS

ROOT = Path(__file__).parent.parent
PAGE, IMAGES = ROOT / "RESULTS.md", ROOT / "docs" / "images"
MISSING = "not measured"
CHANGED, OLDER, UNKNOWN = ", tree changed", ", older", ", age unknown"
TARGETS = [  # device, method, peer, what, target; the row's field and whether more is better
    ("cpu", "spin", "trl", "pairs/s, times TRL's", 6.0, "spinfast_speedup", True),
    ("cpu", "spin", "trl", "memory above the model, times TRL's", 0.35, "spinfast_memory_ratio", False),
    ("cpu", "dpo", "trl", "DPO: pairs/s, times TRL's", 5.0, "spinfast_speedup", True),
    ("cpu", "dpo", "trl", "DPO: memory above the model, times TRL's", 0.2, "spinfast_memory_ratio", False),
    ("cpu", "sft", "trl", "SFT: tokens/s, times TRL's", 3.0, "spinfast_speedup", True),
    ("cpu", "sft", "trl", "SFT: memory above the model, times TRL's", 0.2, "spinfast_memory_ratio", False),
    ("cpu", "grpo", "trl", "GRPO: training part, tokens/s, times TRL's", 4.0, "spinfast_speedup", True),
    ("cpu", "grpo", "trl", "GRPO: whole step, sampling included, times TRL's by transformers (its vLLM needs CUDA)",
     4.0, "spinfast_whole_speedup", True),
    ("cpu", "grpo", "trl", "GRPO: memory above the model, times TRL's", 0.2, "spinfast_memory_ratio", False),
    ("cpu", "spin", "spinfast", "share of the roofline, training and scoring", 0.5, "share_of_roofline", True),
    ("cuda", "spin", "trl", "tokens/s, times TRL's", 3.0, "spinfast_speedup", True),
    ("cuda", "spin", "trl-liger", "tokens/s, times TRL's with Liger", 2.0, "spinfast_speedup", True),
    ("cuda", "spin", "unsloth", "tokens/s, times Unsloth's", 1.5, "spinfast_speedup", True),
    ("cuda", "spin", "trl", "peak memory, times TRL's", 0.3, "spinfast_memory_ratio", False),
    ("cuda", "spin", "trl-liger", "peak memory, times TRL's with Liger", 0.6, "spinfast_memory_ratio", False),
    ("cuda", "spin", "unsloth", "peak memory, times Unsloth's", 0.6, "spinfast_memory_ratio", False),
    ("cuda", "spin", "spinfast", "share of the roofline, training and scoring", 0.4, "share_of_roofline", True),
    ("any", "spin", "TRL + vLLM", "end-to-end iteration, times the script's", 2.0, "spinfast_speedup", True),
]  # fmt: skip
KERNELS = ("kernels/spinfast_kernels", "spinfast/ops.py")
STEP = (*KERNELS, "spinfast/attention.py", "spinfast/objectives", "spinfast/packing.py", "spinfast/policy",
        "spinfast/scoring.py", "spinfast/sums.py", "spinfast/train.py")  # fmt: skip
MEASURED = {  # benchmark -> the files that its rows describe
    "export": ("spinfast/weights/gguf.py", "spinfast/weights/gguf_types.py"),
    "generation": (*KERNELS, "spinfast/attention.py", "spinfast/generation", "spinfast/policy"),
    "iteration": ("kernels/spinfast_kernels", "spinfast"),
    "kernels": (*KERNELS, "spinfast/attention.py", "spinfast/policy"),
    "memory": (*STEP, "spinfast/memory"),
    "merging": ("spinfast/weights",),
    "peers": STEP,
    "profile": STEP,
    "rehearse": (*STEP, "spinfast/generation/transformers.py", "spinfast/memory"),
    "roofline": ("bench/roofline.py",),
    "scaling": STEP,
    "studies": ("spinfast/studies", "spinfast/session.py", "spinfast/methods/run.py"),
}
UNITS = {"s": "s", "ms": "ms", "mib": "MiB", "gib": "GiB", "gflops": "GFLOP/s"}
TRAINING = (
    "peer p50_pairs_per_s p50_tokens_per_s p50_answer_tokens_per_s first_step_s steady_step_s above_model_mib "
    "spinfast_speedup spinfast_memory_ratio share_of_bare_gemms share_of_roofline scored_positions gate_cosine"
)
SECTIONS = [  # title; benchmark, and `what` of its rows; columns; what one row is kept of
    ("End to end: one iteration, processes and loading included", "peers", "end to end",
     "peer model pairs wall_s spinfast_speedup device", "peer device"),
    ("GRPO: whole steps, sampling and training; TRL samples by transformers on a CPU, its vLLM needs CUDA",
     "peers", "whole step",
     "peer model engine p50_answer_tokens_per_s generate_s train_s peak_rss_mib spinfast_whole_speedup "
     "prompt_tokens_cached threads device", "peer model device"),
    ("A whole run, phase by phase", "iteration", None,
     "config phases_s wall_s tokens_per_second peak_rss_mib device", "config device"),
    ("What fits", "peers", "limits",
     "peer model budget_gib kind gradient_checkpointing largest_batch longest_answer device",
     "peer model budget_gib kind gradient_checkpointing device"),
    ("Memory of a step and an iteration on a T4, simulated", "memory", None,
     "what model method adapter target tensors_gib with_reserve_gib peak_gib microbatch_tokens checkpointed_layers "
     "offload prompt_tokens_saved refused",
     "what model method adapter checkpointed_layers offload"),
    ("A T4's memory plan rehearsed on another card: simulated against its allocator", "rehearse", None,
     "what model predicted_mib measured_mib error device", "what model device"),
    ("Operators, a layer, a step", "kernels", None,
     "op what pass p50_ms times_floor tokens_per_s speed_up bytes_kept_per_token peak_extra_mib dtype device",
     "op what pass N T device"),
    ("Roofline of the device", "roofline", None,
     "device model dtype tokens threads best_gflops copy_gb_per_s", "device model dtype tokens threads"),
    ("Where the time goes", "profile", None, "peer model tokens dtype total_ms self_ms device", "peer model device"),
    ("Scaling", "scaling", None,
     "what model step_tokens answer_tokens pairs steady_step_ms step_tokens_per_s above_model_mib "
     "predicted_tensors_mib device", "device what model pairs_per_step answer_tokens pairs"),
    ("Generation", "generation", None, "side model adapter p50_tokens_per_s spinfast_vllm_ratio threads device",
     "side model adapter threads device"),
    ("A model as .gguf: sizes, speed by llama.cpp on one thread", "export", "SmolLM2-135M",
     "what type mb apart perplexity tokens_per_s prompt_tokens_per_s export_s load_1m device", "what type device"),
    ("Memory of an export to .gguf", "export", "Qwen2.5-0.5B's shape",
     "what type mb export_s start_mib peak_anon_mib load_1m device", "what type device"),
    ("Memory of a merge", "merging", None,
     "method models output_mib seconds start_mib peak_anon_mib load_1m device", "method models device"),
    ("A study's cells in one session, against a process for each", "studies", "cells of a study",
     "model cells study_s processes_s times_the_processes times_their_cpu cells_per_hour rss_mib threads load_1m "
     "device", "model cells threads device"),
    ("What a study's session holds after so many cells", "studies", "memory of a session",
     "model cells rss_mib objects tensors tensors_mib device", "model cells device"),
]  # fmt: skip
PICTURES = {"profile": "self time by class of operator", "scaling": "seconds and memory of a step against its size"}


# Rows --------------------------------------------------------------------------------------------------------------


def read(name: str) -> list[dict]:
    path = rows.RESULTS / f"{name}.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row | {"taken": taken(row)} for row in found]


def taken(row: dict) -> str:
    """Commit, state of the tree, and whether the row still describes today's code."""
    tree = {True: CHANGED, False: ""}.get(row["dirty"], ", tree unknown")
    return row["commit"][:7] + tree + age(row["commit"], MEASURED[row.get("bench", "peers")])


@cache
def age(commit: str, files: tuple[str, ...]) -> str:
    """Did the last commit to these files come after this one?"""
    paths = [f":/{name}" for name in files]
    last, then = (rows.git("log", "-1", "--format=%H", at, "--", *paths) for at in ("HEAD", commit))
    return UNKNOWN if not (last and then) else "" if last == then else OLDER


def kind(row: dict) -> str:
    """Where a row was taken: a CPU's name ends in its cores and instruction set."""
    return "cpu" if " cores, " in row["device"] else "cuda"


def newest(found: Iterable[dict], *keys: str) -> list[dict]:
    """The last row for each combination of the keys, in the order of first appearance."""
    return list({tuple(str(row.get(key)) for key in keys): row for row in found}.values())


# The page ----------------------------------------------------------------------------------------------------------


def title(field: str) -> str:
    """A field as a column has it: steady_step_ms is "steady step, ms", p50_tokens_per_s "tokens/s"."""
    name = field.removeprefix("p50_")
    name = f"{name[:-6]}/s" if name.endswith("_per_s") else name
    stem, _, unit = name.rpartition("_")
    return (f"{stem}, {UNITS[unit]}" if stem and unit in UNITS else name).replace("_", " ")


def table(columns: str, found: list[dict]) -> list[str]:
    if not found:
        return [MISSING, ""]
    fields = columns.split()
    lines = ["| " + " | ".join([*map(title, fields), "taken at"]) + " |", "|" + "---|" * (len(fields) + 1)]
    return [*lines, *(line(row.get(field) for field in [*fields, "taken"]) for row in found), ""]


def line(cells: Iterable) -> str:
    return "| " + " | ".join(map(shown, cells)) + " |"


def shown(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return "" if value is None else str(value)


def rows_of(name: str) -> list[dict]:
    """A section's rows, by the name of its benchmark."""
    return next(select(*section[1:]) for section in SECTIONS if section[1] == name)


def select(name: str, what: str | None, columns: str, keys: str) -> list[dict]:
    return newest((row for row in read(name) if what in (None, row.get("what"))), *keys.split())


def page() -> str:
    """RESULTS.md as the rows have it."""
    peers = read("peers")
    lines = [
        "# Results", "",
        "Written by `python -m bench results` from the rows in bench/results/; every row carries device, versions,",
        "commit and command. Ratios compare runs that took turns on one machine. Targets that are missed stay.",
        f"\"taken at\" is a row's commit; \"{CHANGED[2:]}\": its tree had changes that are in no commit;",
        f"\"{OLDER[2:]}\": the code that it measures was changed since; \"{UNKNOWN[2:]}\": no history here tells.", "",
        *targets_section(peers), *peers_section([row for row in peers if row["what"] == "training iteration"]),
    ]  # fmt: skip
    for heading, name, *selection in SECTIONS:
        lines += [f"## {heading}", ""]
        if name in PICTURES:
            lines += [f"![{PICTURES[name]}](docs/images/{name}.svg)", ""]
        lines += table(selection[1], select(name, *selection))
    return "\n".join(lines).rstrip() + "\n"


def targets_section(found: list[dict]) -> list[str]:
    lines = ["## Targets", ""]
    cards = sorted({row["device"] for row in found if kind(row) == "cuda"} - {"Tesla T4"})
    if cards:
        lines += [
            f"The cuda targets are meant for a T4. What stands there was measured on {' and '.join(cards)}:",
            "figures of that card, never a T4's.", "",
        ]  # fmt: skip
    lines += ["| on | what | target | measured | | device | taken at |", "|---|---|---|---|---|---|---|"]
    for device, method, peer, what, target, field, more in TARGETS:
        fits = [r for r in found if (r.get("peer"), r.get("method", "spin")) == (peer, method) and field in r]
        fits = [r for r in fits if device in ("any", kind(r))]
        cells: list = [MISSING, None, None, None]
        if fits:
            value = fits[-1][field]
            met = value >= target if more else value <= target
            cells = [value, "met" if met else "missed", fits[-1]["device"], fits[-1]["taken"]]
        lines.append(line([device, what, f"{'>=' if more else '<='} {target:g}", *cells]))
    return [*lines, ""]


def peers_section(found: list[dict]) -> list[str]:
    lines = ["## Side by side: an epoch of training, scoring of the reference included", ""]
    together = ("device", "model", "dtype", "command")
    for group in newest(found, *together):
        mine = newest((row for row in found if all(row[key] == group[key] for key in together)), "peer")
        versions = ", ".join(f"{n} {v}" for n, v in group["versions"].items() if n in ("torch", "transformers", "peft"))
        lines += [
            f"**{group.get('method', 'spin').upper()}, {group['model']}** on {group['device']}, {group['dtype']}, "
            f"{group['pairs']} {'prompts and their answers,' if group.get('method') == 'grpo' else 'pairs of'} "
            f"{group['tokens']:,} packed tokens, {group['config']['pairs_per_step']} to a step, {group['threads']} "
            f"threads, load {group['load_1m']}. {group['date'][:10]}, {versions}: `{group['command']}`", "",
            *table(TRAINING, sorted(mine, key=lambda row: [*PEERS].index(row["peer"]))),
        ]  # fmt: skip
    return lines if found else [*lines, MISSING, ""]


def main(argv: list[str]) -> int:
    if importlib.util.find_spec("matplotlib"):
        plots.profile(rows_of("profile"), IMAGES / "profile.svg")
        plots.scaling(rows_of("scaling"), IMAGES / "scaling.svg")
    else:
        print("matplotlib is not installed: the plots stay as they are", file=sys.stderr)
    PAGE.write_text(page())
    print(f"{PAGE.name} written")
    return 0
