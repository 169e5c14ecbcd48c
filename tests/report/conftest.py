"""Two real runs of the whole loop on a tiny model, equal but for their seed; tests copy what they change."""

import json
import shutil

import pytest
import torch

from spinfast.config import load_config
from spinfast.run import play

CONFIG = """
model: {{name: {model}}}
data: {{source: {folder}/train.jsonl}}
heldout: {{source: {folder}/heldout.jsonl}}
method: [sft, spin]
spin: {{iterations: 2, groups_per_step: 4, lr: 1.0e-3}}
generation: {{max_tokens: 12, batch_size: 8, backend: transformers}}
train: {{microbatch_tokens: 512}}
evaluate: {{problems: 8, pairs: 8, max_tokens: 12}}
device: {{profile: cpu, dtype: float32}}
sft: {{groups_per_step: 4}}
"""


@pytest.fixture(scope="session")
def played(tmp_path_factory, tiny_model):
    """The directories of two finished runs; only read them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny products: threads cost more than they bring
    folder = tmp_path_factory.mktemp("played")
    for name, start, count in (("train", 0, 12), ("heldout", 50, 8)):
        rows = [
            {"question": f"What is {i} plus {i + 1}?", "answer": f"It is {2 * i + 1}.\n#### {2 * i + 1}"}
            for i in range(start, start + count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(model=tiny_model("llama"), folder=folder))
    for seed in (0, 1):
        assert play(load_config(path, [f"seed={seed}"]), folder / f"seed{seed}", "test") == 0
    torch.set_num_threads(threads)
    return [folder / "seed0", folder / "seed1"]


@pytest.fixture
def run_copy(played, tmp_path):
    """A run directory to change."""
    return shutil.copytree(played[0], tmp_path / "run")


@pytest.fixture
def judged(run_copy):
    """judged(stage, verdicts): rewrite verdicts on the held-out problems, strict alike or all 0, and the row."""

    def rewrite(stage: str, verdicts: list[float], strict: float = 1.0):
        path = run_copy / stage / "heldout.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [rows[i % len(rows)] | {"index": i} for i in range(len(verdicts))]
        for row, verdict in zip(rows, verdicts, strict=True):
            row["scores"] = {"exact_match,strict-match": strict * verdict, "exact_match,flexible-extract": verdict}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        results = json.loads((run_copy / "results.json").read_text())
        for row in results:
            if row["iteration"] == (int(stage[-3:]) if stage.startswith("iter_") else stage):
                mean = {"value": sum(verdicts) / len(verdicts), "stderr": 0.05, "n": len(verdicts)}
                strictly = mean | {"value": strict * mean["value"]}
                row["evaluation"] |= {"heldout/accuracy_strict": strictly, "heldout/accuracy_flexible": mean}
        (run_copy / "results.json").write_text(json.dumps(results))
        return run_copy

    return rewrite
