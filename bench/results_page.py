"""`python -m bench results`: RESULTS.md and its plots from the rows in bench/results/, nothing by hand.

The newest row of each comparison counts. What no row says is written as "not measured".
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from bench.rows import RESULTS

ROOT = Path(__file__).parent.parent
PAGE, IMAGES = ROOT / "RESULTS.md", ROOT / "docs" / "images"
MISSING = "not measured"
PEERS = ("bare GEMMs", "spinfast", "eager", "trl", "trl-precomputed", "trl-liger", "unsloth")
TARGETS = [  # device, peer, what, target; the row's field and whether more is better
    ("cpu", "trl", "pairs/s, times TRL's", 6.0, "spinfast_speedup", True),
    ("cpu", "trl", "memory above the model, times TRL's", 0.35, "spinfast_memory_ratio", False),
    ("cpu", "spinfast", "share of the roofline, training and scoring", 0.5, "share_of_roofline", True),
    ("cuda", "trl", "tokens/s, times TRL's", 3.0, "spinfast_speedup", True),
    ("cuda", "trl-liger", "tokens/s, times TRL's with Liger", 2.0, "spinfast_speedup", True),
    ("cuda", "unsloth", "tokens/s, times Unsloth's", 1.5, "spinfast_speedup", True),
    ("cuda", "trl", "peak memory, times TRL's", 0.3, "spinfast_memory_ratio", False),
    ("cuda", "trl-liger", "peak memory, times TRL's with Liger", 0.6, "spinfast_memory_ratio", False),
    ("cuda", "unsloth", "peak memory, times Unsloth's", 0.6, "spinfast_memory_ratio", False),
    ("cuda", "spinfast", "share of the roofline, training and scoring", 0.4, "share_of_roofline", True),
    ("any", "TRL + vLLM", "end-to-end iteration, times the script's", 2.0, "spinfast_speedup", True),
]


def read(name: str) -> list[dict]:
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kind(row: dict) -> str:
    """Where a row was taken: a CPU's name ends in its cores and instruction set."""
    return "cpu" if " cores, " in row["device"] else "cuda"


def newest(found: Iterable[dict], *keys: str) -> list[dict]:
    """The last row for each combination of the keys, in the order of first appearance."""
    return list({tuple(str(row.get(key)) for key in keys): row for row in found}.values())


def table(header: dict[str, str], found: list[dict]) -> list[str]:
    """Markdown; header maps a column's title to the row's field."""
    if not found:
        return [MISSING, ""]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(shown(row.get(f)) for f in header.values()) + " |" for row in found), ""]


def shown(value) -> str:
    if value is None:
        return ""
    return f"{value:,.3g}" if isinstance(value, float) and abs(value) < 100 else (
        f"{value:,.0f}" if isinstance(value, float) else str(value)
    )  # fmt: skip


def birth(row: dict) -> str:
    versions = ", ".join(f"{n} {v}" for n, v in row["versions"].items() if n in ("torch", "transformers", "peft"))
    dirty = ", working tree changed" if row["dirty"] else ""
    return f"{row['date'][:10]}, {row['device']}, commit {row['commit']}{dirty}, {versions}: `{row['command']}`"


def peers_section(found: list[dict]) -> list[str]:
    lines = ["## Side by side: one iteration's training, opponent scoring included", ""]
    training = [row for row in found if row["what"] == "training iteration"]
    if not training:
        return [*lines, MISSING, ""]
    for group in newest(training, "device", "model", "dtype", "command"):
        mine = [row for row in training if all(row[k] == group[k] for k in ("device", "model", "dtype", "command"))]
        mine = sorted(newest(mine, "peer"), key=lambda row: PEERS.index(row["peer"]))
        lines += [
            f"**{group['model']}**, {group['dtype']}, {group['pairs']} pairs of {group['tokens']:,} packed tokens, "
            f"{group['config']['pairs_per_step']} to a step, {group['threads']} threads, load {group['load_1m']}.",
            "", birth(group), "",
        ]  # fmt: skip
        columns = {
            "": "peer", "pairs/s": "p50_pairs_per_s", "tokens/s": "p50_tokens_per_s", "first step, s": "first_step_s",
            "steady step, s": "steady_step_s", "MiB above the model": "above_model_mib",
            "spinfast is faster by": "spinfast_speedup", "and holds": "spinfast_memory_ratio",
            "share of bare GEMMs": "share_of_bare_gemms", "share of roofline": "share_of_roofline",
            "gradient cosine": "gate_cosine",
        }  # fmt: skip
        lines += table(columns, mine)
    return lines


def targets_section(found: list[dict]) -> list[str]:
    lines = ["## Targets", "", "| on | what | target | measured | |", "|---|---|---|---|---|"]
    for device, peer, what, target, field, more in TARGETS:
        fits = [r for r in found if r.get("peer") == peer and device in ("any", kind(r)) and field in r]
        value = fits[-1][field] if fits else None
        sign, met = (">=", value and value >= target) if more else ("<=", value and value <= target)
        verdict = "" if value is None else "met" if met else "missed"
        measured = MISSING if value is None else shown(value)
        lines.append(f"| {device} | {what} | {sign} {target:g} | {measured} | {verdict} |")
    return [*lines, ""]


def page() -> str:
    """RESULTS.md as the rows have it."""
    peers = read("peers")
    lines = [
        "# Results", "",
        "Written by `python -m bench results` from the rows in bench/results/; every row carries device, versions,",
        "commit and command. Ratios compare runs that took turns on one machine. Targets that are missed stay.", "",
        *targets_section(peers), *peers_section(peers),
        "## End to end: one iteration, processes and loading included", "",
        *table(
            {"": "peer", "model": "model", "pairs": "pairs", "seconds": "wall_s",
             "spinfast is faster by": "spinfast_speedup", "device": "device", "date": "date"},
            [row for row in peers if row["what"] == "end to end"][-2:],
        ),
        "## What fits", "",
        *table(
            {"": "peer", "model": "model", "GiB": "budget_gib", "how": "kind",
             "checkpointed": "gradient_checkpointing", "pairs in a batch": "largest_batch",
             "longest answers": "longest_answer", "device": "device"},
            newest((row for row in peers if row["what"] == "limits"),
                   "peer", "model", "budget_gib", "kind", "gradient_checkpointing"),
        ),
        "## Roofline of the device", "",
        *table(
            {"device": "device", "model": "model", "dtype": "dtype", "tokens": "tokens", "threads": "threads",
             "best GFLOP/s": "best_gflops", "copy, GB/s": "copy_gb_per_s"},
            newest(read("roofline"), "device", "model", "dtype", "tokens", "threads"),
        ),
        "## Where the time goes", "",
        *picture("profile", "self time by class of operator"),
        "## Scaling", "",
        *picture("scaling", "seconds and memory of a step against its size"),
        *table(
            {"axis": "what", "model": "model", "tokens of a step": "step_tokens", "answer": "answer_tokens",
             "pairs": "pairs", "step, ms": "steady_step_ms", "tokens/s": "step_tokens_per_s",
             "MiB above the model": "above_model_mib", "MiB of tensors, simulated": "predicted_tensors_mib"},
            scaling_rows(),
        ),
        "## Generation", "",
        *table(
            {"": "side", "model": "model", "adapter": "adapter", "tokens/s": "p50_tokens_per_s",
             "spinfast's vLLM is faster by": "spinfast_vllm_ratio", "threads": "threads", "device": "device"},
            newest((r for r in read("generation") if "p50_tokens_per_s" in r), "side", "model", "adapter", "threads"),
        ),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def picture(name: str, caption: str) -> list[str]:
    return [f"![{caption}](docs/images/{name}.svg)", ""] if read(name) else [MISSING, ""]


def scaling_rows() -> list[dict]:
    keys = ("what", "model", "pairs_per_step", "answer_tokens", "pairs")
    return sorted(newest(read("scaling"), "device", *keys), key=lambda row: row["what"])


def draw() -> None:
    """docs/images/scaling.svg: per axis the step's time, and its memory measured and simulated."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    found = scaling_rows()
    if not found:
        return
    plt.rcParams["svg.hashsalt"] = "spinfast"
    along = {"tokens": "step_tokens", "length": "answer_tokens", "prompts": "pairs", "model": "model"}
    axes_named = [name for name in along if any(row["what"] == name for row in found)]
    figure, axes = plt.subplots(2, len(axes_named), figsize=(3.2 * len(axes_named), 5), squeeze=False, sharex="col")
    for column, name in enumerate(axes_named):
        mine = [row for row in found if row["what"] == name]
        where = [row[along[name]] for row in mine]
        time = "iteration_s" if name == "prompts" else "steady_step_ms"
        axes[0][column].plot(where, [row[time] for row in mine], marker="o")
        axes[0][column].set_ylabel("iteration, s" if name == "prompts" else "step, ms")
        axes[1][column].plot(where, [row["above_model_mib"] for row in mine], marker="o", label="measured")
        axes[1][column].plot(where, [row["predicted_tensors_mib"] for row in mine], marker=".", label="simulated")
        axes[1][column].set(ylabel="MiB above the model", xlabel=along[name].replace("_", " "))
        axes[1][column].tick_params(axis="x", rotation=30)
        for axis in axes[:, column]:
            axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    axes[1][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(IMAGES / "scaling.svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def main(argv: list[str]) -> int:
    draw()
    PAGE.write_text(page())
    print(f"{PAGE.name} written")
    return 0
