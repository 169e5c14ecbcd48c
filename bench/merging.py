"""`python -m bench merging [method] [models]`: time and memory of a merge of models of Qwen2.5-0.5B's shape, in bf16.

The weights are random. `peak_anon_mib` is the most that the process held beside the files that it reads (RssAnon),
`start_mib` what it held before; the largest tensor is the embedding, 519 MiB in fp32.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from pathlib import Path

import torch

from bench import rows
from spinfast.progress import heard, open_console
from spinfast.weights import merging
from spinfast.weights.recipe import Recipe
from spinfast.weights.writer import Entry, write_weights

SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def model(directory: Path, seed: int) -> str:
    from transformers import AutoModelForCausalLM, Qwen2Config

    directory.mkdir()
    config = Qwen2Config(**SHAPE, architectures=["Qwen2ForCausalLM"])
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    draw = torch.Generator().manual_seed(seed)
    entries = [Entry(name, torch.bfloat16, tuple(p.shape)) for name, p in shapes.items()]
    write_weights(directory, entries, (torch.randn(e.shape, generator=draw).bfloat16() for e in entries))
    return str(directory)


def anonymous() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


class Peak(threading.Thread):
    """The most anonymous memory of this process while the block runs: `start_mib`, `peak_anon_mib`."""

    def __enter__(self) -> Peak:
        self.start_mib = self.peak_anon_mib = anonymous()
        self.done = threading.Event()
        self.start()
        return self

    def run(self) -> None:
        while not self.done.wait(0.005):
            self.peak_anon_mib = max(self.peak_anon_mib, anonymous())

    def __exit__(self, *_) -> None:
        self.done.set()
        self.join()

    def fields(self) -> dict[str, int]:
        return {"start_mib": round(self.start_mib), "peak_anon_mib": round(self.peak_anon_mib)}


def main(argv: list[str]) -> int:
    method, count = argv[0] if argv else "slerp", int(argv[1]) if len(argv) > 1 else 2
    with tempfile.TemporaryDirectory() as scratch:
        names = [model(Path(scratch) / str(seed), seed) for seed in range(count)]
        tree = {"merge_method": method, "base_model": names[0], "models": [{"model": name} for name in names]}
        given = {"t": 0.4} if method == "slerp" else {"weight": 0.5, "density": 0.5}
        recipe = Recipe.model_validate(tree | {"parameters": given})
        begun = time.perf_counter()
        with heard(open_console()) as display, Peak() as peak:
            merging.merge(recipe, json.dumps(tree), Path(scratch) / "out", display)
        seconds = time.perf_counter() - begun
        size = sum(file.stat().st_size for file in (Path(scratch) / "out").glob("*.safetensors"))
    row = {"method": method, "models": count, "output_mib": round(size / 2**20), "seconds": round(seconds, 1)}
    rows.write("merging", row | peak.fields())
    return 0
