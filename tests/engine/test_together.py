"""A study's adapters in one engine: the answers are those of each alone (test_vllm.py: another's does not pass)."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fixtures import tiny_model_dir
from test_run import write_config

TASKS = {"plus": ("What is {} plus {}?", int.__add__), "times": ("Say {} times {} now.", int.__mul__)}


def write_study(directory):
    """Two tasks, learnt by heart: their items are their training rows."""
    sft = {"lr": 1e-2, "epochs": 30, "groups_per_step": 4, "evaluate_every": 0, "keep": "last"}
    model = tiny_model_dir(directory, "qwen3")  # its heads are as wide as vLLM has them on a CPU
    path = write_config(directory, model, sft=sft, adapter={"r": 8, "alpha": 16}, heldout=None)
    tree = yaml.safe_load(path.read_text()) | {"method": ["sft"]}
    del tree["spin"]
    path.write_text(yaml.safe_dump(tree))
    for name, (question, result) in TASKS.items():
        pairs = [(n, n + 2) for n in range(3, 8)]
        rows = [{"question": question.format(*of), "answer": f"#### {result(*of)}"} for of in pairs]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {name: str(directory / f"{name}.jsonl") for name in TASKS}
    learning = {name: {"source": source[name], "split": "train", "exact": True, "max_tokens": 12} for name in TASKS}
    study = {
        "base": "config.yaml",
        "axes": {"task": {name: {"data.source": source[name]} for name in TASKS}},
        "seeds": 2,
        "learning": learning,
        "forgetting": {"own": 0},
        "together": True,
    }
    (directory / "study.yaml").write_text(yaml.safe_dump(study))


def play(directory) -> str:
    command = [sys.executable, "-m", "spinfast.run", "study", "study.yaml", "--dir", "out"]
    tests = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{tests}:{tests}/kernels", "SPINFAST_CACHE": str(directory / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return " ".join((done.stdout + done.stderr).split())


@pytest.mark.slow
def test_each_adapter_lifts_its_own_task_also_where_all_answer_together(tmp_path):
    write_study(tmp_path)
    said, out = play(tmp_path), tmp_path / "out"
    assert "All 4 adapters answered in one vLLM: 40 of 40 verdicts are those of each alone" in said
    cells = [f"{task}.{seed}" for task in TASKS for seed in (0, 1)]
    for cell in cells:
        alone, together = (
            json.loads((out / "cells" / cell / f"{name}.json").read_text()) for name in ("outcomes", "together")
        )
        del together["seal"]
        assert {*together} == {f"{task}/{reading}" for task in TASKS for reading in ("exact", "ended", "length")}
        assert together == {name: alone[name] for name in together}
    rows = list(csv.DictReader((out / "lift.csv").open()))
    lifts = {(row["reading"], row["task"], row["setting"]): float(row["lift"]) for row in rows}
    assert len(lifts) == len(rows) == 8
    for row in rows:
        assert int(row["own"]) == (row["task"] == row["setting"])
        assert float(row["ci_low"]) <= float(row["lift"]) <= float(row["ci_high"])
    for task, other in (("plus", "times"), ("times", "plus")):
        assert lifts["exact", task, task] > 0.9 > 0.5 > lifts["exact", task, other]
        assert lifts["worked", task, task] > lifts["worked", task, other]
    assert "the own adapter lifts 2 of 2 tasks more" in said
    page = (out / "index.html").read_text()
    assert page.count("<b>+") >= 4
    index = {row["name"]: row["task"] for row in json.loads((out / "index.json").read_text())}
    assert index == {cell: cell.partition(".")[0] for cell in cells}
    before = {path: path.stat().st_mtime_ns for path in out.rglob("together.json")}
    assert len(before) == 5
    (out / "lift.csv").unlink()
    assert "40 of 40 verdicts" in play(tmp_path)  # what is there is not asked again
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (out / "lift.csv").exists()
