"""Many iterations in one process: memory flat after a warm-up; no thread, file, temporary file or tensor left behind.

SPINFAST_SOAK=200 gives the full figure (pytest -m "faults and slow" -s).
"""

import gc
import json
import os
import tempfile
import threading
from pathlib import Path

import psutil
import pytest
import torch
from test_run import write_config

from spinfast.methods import spin as loop
from spinfast.run import main

pytestmark = pytest.mark.faults


def live():
    """What a process must not collect."""
    gc.collect()
    process = psutil.Process()
    tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    return {
        "rss_mib": process.memory_info().rss / 2**20,
        "threads": process.num_threads(),
        "python threads": threading.active_count(),
        "files": process.num_fds(),
        "temporary": len(os.listdir(tempfile.gettempdir())),
        "tensors": len(tensors),
        "tensor_mib": sum(t.numel() * t.element_size() for t in tensors) / 2**20,
    }


def soak(directory, model, iterations, monkeypatch):
    """`live` after each iteration of one run."""
    config = write_config(
        directory,
        model,
        spin={"iterations": iterations, "lr": 1e-5},
        evaluate={"problems": 2, "pairs": 2, "max_tokens": 4},
        generation={"max_tokens": 4},
        train={"save_every_steps": 1},
    )
    seen, conclude = [], loop.conclude

    def watched(*args):
        row = conclude(*args)
        seen.append(live())
        return row

    monkeypatch.setattr(loop, "conclude", watched)
    scratch = directory / "tmp"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    assert main([str(config), "--run-dir", str(directory / "run")]) == 0
    return seen


def growth(values):
    """Least-squares slope times the length: what the values grew by, noise averaged."""
    n = len(values)
    mean = sum(values) / n
    slope = sum((i - (n - 1) / 2) * (v - mean) for i, v in enumerate(values)) / sum(
        (i - (n - 1) / 2) ** 2 for i in range(n)
    )
    return slope * n


def flat(seen, warm, mib):
    after = seen[warm:]
    figures = {
        "iterations": len(seen) - 1,
        "rss_mib": [round(after[0]["rss_mib"], 1), round(after[-1]["rss_mib"], 1)],
        "rss_growth_mib": round(growth([each["rss_mib"] for each in after]), 2),
        **{name: [after[0][name], after[-1][name]] for name in ("threads", "files", "temporary", "tensors")},
    }
    print("\n" + json.dumps(figures))
    for name in ("threads", "python threads", "files", "temporary", "tensors"):
        assert after[-1][name] <= after[0][name], name
    assert after[-1]["tensor_mib"] <= after[0]["tensor_mib"] * 1.01
    assert figures["rss_growth_mib"] < mib


def test_twenty_iterations(tmp_path, tiny_model, monkeypatch):
    flat(soak(tmp_path, tiny_model("llama"), 20, monkeypatch), warm=6, mib=8)


@pytest.mark.slow
def test_many_iterations(tmp_path, tiny_model, monkeypatch):
    iterations = int(os.environ.get("SPINFAST_SOAK", "200"))
    flat(soak(tmp_path, tiny_model("llama"), iterations, monkeypatch), warm=10, mib=16)


def test_runs_one_after_another_leave_nothing(tmp_path, tiny_model, monkeypatch):
    """As in a notebook: each run opens its own lock, log, trackers and model."""
    seen = []
    for number in range(6):
        (tmp_path / str(number)).mkdir()
        config = write_config(tmp_path / str(number), tiny_model("llama"), spin={"iterations": 1})
        assert main([str(config), "--run-dir", str(tmp_path / str(number) / "run")]) == 0
        seen.append(live())
    flat(seen, warm=2, mib=30)
    assert Path(tmp_path / "5" / "run" / "results.json").exists()
