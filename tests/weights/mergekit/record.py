"""What mergekit makes of tensors and of models: run by hand with mergekit on the path, as README.md says."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
import yaml
from fixtures import tiny_model_dir
from merged_models import TABLE, make
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods.api import merge_tensors
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

HERE = Path(__file__).parent
SHAPES = [(12, 7), (13,), (1, 5)]
WEIGHT, DENSITY = {"weight": [0.3, 0.9, -0.2]}, {"density": [0.3, 0.55, 1.0]}
CASES = [  # method, has a base, models beside it, of each, of all
    ("linear", False, 3, WEIGHT, {}),
    ("linear", False, 3, WEIGHT, {"normalize": False}),
    ("slerp", True, 1, {}, {"t": 0.3}),
    ("slerp", True, 1, {}, {"t": 1.0}),
    *(("nuslerp", base, 2, {"weight": [0.4, 1.1]}, {}) for base in (True, False)),
    *(("nuslerp", b, 2, {"weight": [1, 2]}, {"nuslerp_flatten": False}) for b in (True, False)),
    *(
        ("nuslerp", b, 2, {"weight": [1, 2]}, {"nuslerp_flatten": False, "nuslerp_row_wise": True})
        for b in (True, False)
    ),
    ("task_arithmetic", True, 3, WEIGHT, {"lambda": 0.7}),
    ("task_arithmetic", True, 3, WEIGHT, {"normalize": True}),
    ("ties", True, 3, WEIGHT | DENSITY, {}),
    ("ties", True, 3, WEIGHT | DENSITY, {"normalize": False, "rescale": True, "lambda": 1.3}),
    ("ties", True, 2, {"weight": [1, 1], "density": [0.01, 0.0]}, {}),
    ("dare_linear", True, 3, WEIGHT | DENSITY, {}),
    ("dare_linear", True, 3, WEIGHT | DENSITY, {"rescale": False, "normalize": True}),
    ("dare_ties", True, 3, WEIGHT | DENSITY, {}),
    ("dare_ties", True, 3, WEIGHT | DENSITY, {"normalize": True, "lambda": 0.5}),
    ("breadcrumbs", True, 3, WEIGHT | DENSITY | {"gamma": [0.1, 0.3, 0.8]}, {}),
    ("model_stock", True, 3, {}, {}),
    ("model_stock", True, 2, {}, {"filter_wise": True}),
    ("karcher", False, 3, {}, {}),
    ("karcher", False, 2, {}, {"max_iter": 1}),
    ("passthrough", False, 1, {"scale": [0.5]}, {}),
]


def tensors() -> None:
    draw, cases, saved = torch.Generator().manual_seed(0), [], {}
    for number, (method, based, count, each, shared) in enumerate(case for case in CASES for _ in SHAPES):
        shape = SHAPES[number % len(SHAPES)]
        first = torch.randn(shape, generator=draw)
        models = [first + torch.randn(shape, generator=draw) * 0.3 for _ in range(count)]
        inputs = [*([first] if based else []), *models]
        by_input = {name: dict(enumerate(values, int(based))) for name, values in each.items()}
        torch.manual_seed(number)
        merged = merge_tensors(inputs, method, parameters=by_input | shared, base_index=0 if based else None)
        cases.append({"method": method, "base": based, "each": each, "shared": shared, "count": count})
        saved |= {f"{number}.{n}": model for n, model in enumerate(models)} | {f"{number}.merged": merged.contiguous()}
        saved |= {f"{number}.base": first} if based else {}
    (HERE / "cases.json").write_text("[\n" + ",\n".join(map(json.dumps, cases)) + "\n]\n")
    save_file(saved, HERE / "cases.safetensors")


def drawn() -> dict[str, torch.Tensor]:
    """The weights of A, B and C, once drawn: torch does not promise the same numbers in other versions."""
    file = HERE / "models.safetensors"
    if not file.exists():
        saved = {}
        with tempfile.TemporaryDirectory() as scratch:
            for seed, letter in enumerate("ABC"):
                path = tiny_model_dir(Path(scratch) / letter, "llama", True, 6, 8)
                draw = torch.Generator().manual_seed(seed)
                for name, tensor in load_file(path / "model.safetensors").items():
                    saved[f"{letter}.{name}"] = tensor + 0.2 * torch.randn(tensor.shape, generator=draw)
        save_file(saved, file)
    return load_file(file)


def models() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch), drawn())
        os.chdir(scratch)
        for recipe in sorted(HERE.glob("*.yaml")):
            config = MergeConfiguration.model_validate(yaml.safe_load(recipe.read_text()))
            run_merge(config, recipe.stem, MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True))
            made = [load_file(file) for file in Path(recipe.stem).glob("*.safetensors")]
            found, told = {k: v for part in made for k, v in part.items()}, None
            if "vocabulary" in recipe.stem:  # rows in another order: the table alone, with its tokens
                vocab = AutoTokenizer.from_pretrained(recipe.stem).get_vocab()
                found, told = {TABLE: found[TABLE]}, {"tokens": json.dumps(sorted(vocab, key=vocab.get))}
            save_file(found, HERE / f"{recipe.stem}.safetensors", metadata=told)


if __name__ == "__main__":
    tensors()
    models()
