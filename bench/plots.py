"""The pictures of RESULTS.md and docs/: SVG without a date, so that equal rows draw equal files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def picture(path: Path, *grid: int, **options) -> Iterator[tuple]:
    """Figure and axes of a grid, written to the path."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "spinfast"
    figure, axes = plt.subplots(*grid, squeeze=False, layout="constrained", **options)
    yield figure, axes
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def alike(rows: list[dict], *keys: str) -> list[dict]:
    """Those that have the first one's device, model, ..."""
    return [row for row in rows if all(row[key] == rows[0][key] for key in keys)]


def profile(rows: list[dict], path: Path) -> None:
    """A bar per side, in seconds of self time, cut by class of operator."""
    found = alike(rows, "device", "model")
    with picture(path, 1, 1, figsize=(9, 1.6 + 0.8 * len(found))) as (figure, ((axis,),)):
        starts = [0.0] * len(found)
        for number, kind in enumerate(found[0]["self_ms"]):
            widths = [row["self_ms"].get(kind, 0) / 1e3 for row in found]
            axis.barh([row["peer"] for row in found], widths, left=starts, label=kind, color=f"C{number}")
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        axis.invert_yaxis()
        axis.set_xlabel("seconds of self time in one iteration's training")
        axis.set_title(f"{found[0]['tokens']} packed tokens, {found[0]['dtype']}, {found[0]['device']}", fontsize=10)
        figure.legend(fontsize=8, ncols=5, loc="outside lower center", frameon=False)


def scaling(rows: list[dict], path: Path) -> None:
    """Per axis the step's time, and its memory measured and simulated."""
    found = alike(rows, "device")
    along = {"tokens": "step_tokens", "length": "answer_tokens", "prompts": "pairs", "model": "model"}
    named = [name for name in along if any(row["what"] == name for row in found)]
    with picture(path, 2, len(named), figsize=(3.2 * len(named), 5), sharex="col") as (_, axes):
        for name, (above, below) in zip(named, axes.T, strict=True):
            mine = [row for row in found if row["what"] == name]
            whole = name == "prompts"
            time = "iteration_s" if whole else "steady_step_ms"
            for axis, field in ((above, time), (below, "above_model_mib"), (below, "predicted_tensors_mib")):
                label = "simulated" if "predicted" in field else "measured"
                axis.plot([row[along[name]] for row in mine], [row[field] for row in mine], marker="o", label=label)
                axis.axhline(0, color="black", linewidth=0.5)
            above.set_ylabel("iteration, s" if whole else "step, ms")
            below.set(ylabel="MiB above the model", xlabel=along[name].replace("_", " "))
            below.tick_params(axis="x", rotation=30)
        axes[1][0].legend(fontsize=8)
