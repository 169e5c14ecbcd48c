"""`python -m bench results`: RESULTS.md and its plots from the rows in bench/results/, nothing by hand.

The newest row of each comparison counts. What no row says is written as "not measured". A row is old if the code that
its benchmark measures was committed to since.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from bench import rows

ROOT = Path(__file__).parent.parent
PAGE, IMAGES = ROOT / "RESULTS.md", ROOT / "docs" / "images"
MISSING = "not measured"
CHANGED, OLDER, UNKNOWN = ", tree changed", ", older", ", age unknown"
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
KERNELS = ("kernels/spinfast_kernels", "spinfast/ops.py")
STEP = (*KERNELS, "spinfast/attention.py", "spinfast/objectives.py", "spinfast/packing.py", "spinfast/policy",
        "spinfast/sums.py", "spinfast/train.py")  # fmt: skip
MEASURED = {  # benchmark -> the files that its rows describe
    "generation": (*KERNELS, "spinfast/attention.py", "spinfast/generation", "spinfast/policy"),
    "iteration": ("kernels/spinfast_kernels", "spinfast"),
    "kernels": (*KERNELS, "spinfast/attention.py", "spinfast/policy"),
    "memory": (*STEP, "spinfast/memory"),
    "peers": STEP,
    "profile": STEP,
    "rehearse": (*STEP, "spinfast/generation/transformers.py", "spinfast/memory"),
    "roofline": ("bench/roofline.py",),
    "scaling": STEP,
}


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


def table(header: dict[str, str], found: list[dict]) -> list[str]:
    """Markdown; header maps a column's title to the row's field."""
    if not found:
        return [MISSING, ""]
    header = header | {"taken at": "taken"}
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(shown(row.get(f)) for f in header.values()) + " |" for row in found), ""]


def shown(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return "" if value is None else str(value)


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
    for title, picture, header, found in sections(peers):
        lines += [f"## {title}", ""]
        if picture:
            lines += [f"![{picture[1]}](docs/images/{picture[0]}.svg)", ""]
        lines += table(header, found)
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
    for device, peer, what, target, field, more in TARGETS:
        fits = [r for r in found if r.get("peer") == peer and device in ("any", kind(r)) and field in r]
        sign = ">=" if more else "<="
        if not fits:
            lines.append(f"| {device} | {what} | {sign} {target:g} | {MISSING} |  |  |  |")
            continue
        row, value = fits[-1], fits[-1][field]
        verdict = "met" if (value >= target if more else value <= target) else "missed"
        cells = (device, what, f"{sign} {target:g}", shown(value), verdict, row["device"], row["taken"])
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def peers_section(found: list[dict]) -> list[str]:
    lines = ["## Side by side: one iteration's training, opponent scoring included", ""]
    together = ("device", "model", "dtype", "command")
    columns = {
        "": "peer", "pairs/s": "p50_pairs_per_s", "tokens/s": "p50_tokens_per_s", "first step, s": "first_step_s",
        "steady step, s": "steady_step_s", "MiB above the model": "above_model_mib",
        "spinfast is faster by": "spinfast_speedup", "and holds": "spinfast_memory_ratio",
        "share of bare GEMMs": "share_of_bare_gemms", "share of roofline": "share_of_roofline",
        "gradient cosine": "gate_cosine",
    }  # fmt: skip
    for group in newest(found, *together):
        mine = newest((row for row in found if all(row[key] == group[key] for key in together)), "peer")
        versions = ", ".join(f"{n} {v}" for n, v in group["versions"].items() if n in ("torch", "transformers", "peft"))
        lines += [
            f"**{group['model']}** on {group['device']}, {group['dtype']}, {group['pairs']} pairs of "
            f"{group['tokens']:,} packed tokens, {group['config']['pairs_per_step']} to a step, {group['threads']} "
            f"threads, load {group['load_1m']}. {group['date'][:10]}, {versions}: `{group['command']}`", "",
            *table(columns, sorted(mine, key=lambda row: PEERS.index(row["peer"]))),
        ]  # fmt: skip
    return lines if found else [*lines, MISSING, ""]


def sections(peers: list[dict]) -> list[tuple]:
    """(title, (picture, caption) or None, columns, rows) of all the rest."""
    device, model = {"device": "device"}, {"model": "model"}
    return [
        ("End to end: one iteration, processes and loading included", None,
         {"": "peer", **model, "pairs": "pairs", "seconds": "wall_s", "spinfast is faster by": "spinfast_speedup",
          **device}, newest((row for row in peers if row["what"] == "end to end"), "peer", "device")),
        ("A whole run, phase by phase", None,
         {"config": "config", "s in phases": "phases_s", "s in all": "wall_s", "tokens/s": "tokens_per_second",
          "peak RSS, MiB": "peak_rss_mib", **device}, newest(read("iteration"), "config", "device")),
        ("What fits", None,
         {"": "peer", **model, "GiB": "budget_gib", "how": "kind", "checkpointed": "gradient_checkpointing",
          "pairs in a batch": "largest_batch", "longest answers": "longest_answer", **device},
         newest((row for row in peers if row["what"] == "limits"),
                "peer", "model", "budget_gib", "kind", "gradient_checkpointing", "device")),
        ("Memory of a step and an iteration on a T4, simulated", None,
         {"": "what", **model, "target": "target", "tensors, GiB": "tensors_gib", "with reserve": "with_reserve_gib",
          "peak, GiB": "peak_gib", "microbatch, tokens": "microbatch_tokens", "checkpointed": "checkpointed_layers",
          "offload": "offload"}, newest(read("memory"), "what", "model", "checkpointed_layers", "offload")),
        ("A T4's memory plan rehearsed on another card: simulated against its allocator", None,
         {"phase": "what", **model, "predicted, MiB": "predicted_mib", "measured, MiB": "measured_mib",
          "error": "error", **device}, newest(read("rehearse"), "what", "model", "device")),
        ("Operators, a layer, a step", None,
         {"": "op", "by": "what", "pass": "pass", "ms": "p50_ms", "times the floor": "times_floor",
          "tokens/s": "tokens_per_s", "times PEFT's": "speed_up", "bytes kept a token": "bytes_kept_per_token",
          "MiB beside the data": "peak_extra_mib", "dtype": "dtype", **device},
         newest(read("kernels"), "op", "what", "pass", "N", "T", "device")),
        ("Roofline of the device", None,
         {**device, **model, "dtype": "dtype", "tokens": "tokens", "threads": "threads",
          "best GFLOP/s": "best_gflops", "copy, GB/s": "copy_gb_per_s"},
         newest(read("roofline"), "device", "model", "dtype", "tokens", "threads")),
        ("Where the time goes", ("profile", "self time by class of operator"),
         {"": "peer", **model, "tokens": "tokens", "dtype": "dtype", "ms in all": "total_ms", "ms by class": "self_ms",
          **device}, newest(read("profile"), "peer", "model", "device")),
        ("Scaling", ("scaling", "seconds and memory of a step against its size"),
         {"axis": "what", **model, "tokens of a step": "step_tokens", "answer": "answer_tokens", "pairs": "pairs",
          "step, ms": "steady_step_ms", "tokens/s": "step_tokens_per_s", "MiB above the model": "above_model_mib",
          "MiB of tensors, simulated": "predicted_tensors_mib", **device}, scaling_rows()),
        ("Generation", None,
         {"": "side", **model, "adapter": "adapter", "tokens/s": "p50_tokens_per_s",
          "spinfast's vLLM is faster by": "spinfast_vllm_ratio", "threads": "threads", **device},
         newest((row for row in read("generation") if "p50_tokens_per_s" in row),
                "side", "model", "adapter", "threads", "device")),
    ]  # fmt: skip


def scaling_rows() -> list[dict]:
    keys = ("what", "model", "pairs_per_step", "answer_tokens", "pairs")
    return sorted(newest(read("scaling"), "device", *keys), key=lambda row: (row["device"], row["what"]))


def draw() -> None:
    """docs/images/scaling.svg: per axis the step's time, and its memory measured and simulated; one device's rows."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    found = scaling_rows()
    if not found:
        return
    plt.rcParams["svg.hashsalt"] = "spinfast"
    found = [row for row in found if row["device"] == found[0]["device"]]
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
