"""The T4 notebook, executed cell by cell on a CPU with a tiny model: only its parameters are others."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from test_grpo import grpo_config
from test_run import write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
NOTEBOOK = json.loads((ROOT / "notebooks" / "spinfast_t4.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def parameters(cell) -> set[str]:
    return {target.id for line in ast.parse("".join(cell["source"])).body for target in line.targets}


def test_notebook_is_clean():
    """Nothing of an earlier execution is left in it, and one cell holds all that is to be chosen."""
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)
    assert [cell for cell in CODE if "parameters" in cell["metadata"].get("tags", [])] == CODE[:1]


def test_its_files_and_overrides_exist(tmp_path):
    """What the parameters name is in the repository, and the overrides fit the config."""
    from spinfast.config import load_config

    chosen = {}
    exec("".join(CODE[0]["source"]), chosen)
    assert (ROOT / chosen["REQUIREMENTS"]).is_file()
    config = load_config(ROOT / chosen["CONFIG"], chosen["OVERRIDES"])
    assert len(config.spin.beta) in (1, config.spin.iterations)
    assert len(config.spin.lr) in (1, config.spin.iterations)
    assert load_config(ROOT / chosen["GRPO_CONFIG"], chosen["GRPO_OVERRIDES"]).method == ("grpo",)


def run_cell(cell, names):
    """As IPython does, the one magic that the notebook has included."""
    source = "".join(cell["source"])
    magic, _, rest = source.partition("\n")
    if magic.startswith("%%writefile "):
        Path(magic.removeprefix("%%writefile ").format(**names)).write_text(rest)
    else:
        exec(compile(source, f"<cell {cell['id']}>", "exec"), names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its last cells would use the GPU in fp16")
def test_every_cell_runs(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "notebooks")
    (tmp_path / "grpo").mkdir()
    changed = {
        "REPOSITORY": "",
        "REQUIREMENTS": "",
        "CONFIG": str(write_config(tmp_path, tiny_model("qwen2"))),
        "OVERRIDES": ["spin.iterations=1", "evaluate.problems=0", "evaluate.pairs=0"],
        "RUN": str(tmp_path / "run"),
        "EXPORT": str(tmp_path / "export"),
        "QUESTION": "What is 2 plus 3?",
        "GRPO_CONFIG": str(grpo_config(tmp_path / "grpo", tiny_model("qwen2"), {"steps": 2})),
        "GRPO_OVERRIDES": [],
        "GRPO_RUN": str(tmp_path / "rewarded"),
        "REWARDS": str(tmp_path / "my_rewards.py"),
    }
    assert parameters(CODE[0]) == changed.keys()
    names = {}
    for cell in CODE:
        run_cell(cell, names)
        names |= changed
    out = capsys.readouterr().out
    assert re.search(r"\| yes \| config .*config.yaml +\| can run here", out)
    assert "MiB at the fullest moment" in out
    assert "round base:" in out
    assert "round 0:" in out
    assert (tmp_path / "run" / "report" / "index.html").is_file()
    assert "short: " in out
    assert re.search(r"group +sample +rewards/gsm8k +rewards/format +rewards/short +reward +advantage", out)
    assert (tmp_path / "rewarded" / "report" / "index.html").is_file()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    prompt = AutoTokenizer.from_pretrained(tmp_path / "export")("What is 2 plus 3?", return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained(tiny_model("qwen2"))
    with torch.no_grad():
        moved = (exported(**prompt).logits - base(**prompt).logits).abs().max()
    assert moved > 1e-3, "the exported model is the base"
