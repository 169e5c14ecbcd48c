"""The models of the recorded merges: A, B and C of one vocabulary, B+ and C+ with other tokens in other rows."""

import json
import shutil

import torch
from fixtures import tiny_model_dir
from safetensors.torch import load_file, save_file

TABLE = "model.embed_tokens.weight"


def make(room, weights):
    """Directories A, B, C, B-more and C-more under `room`; `weights`: as models.safetensors has them."""
    for letter in "ABC":
        made = tiny_model_dir(room / f"made-{letter}", "llama", True, 6, 8).rename(room / letter)
        own = {name[2:]: tensor for name, tensor in weights.items() if name[0] == letter}
        save_file(own, made / "model.safetensors", metadata={"format": "pt"})
    more(room / "B", room / "B-more", ["<|x|>", "<|y|>"], (300, 310))
    more(room / "C", room / "C-more", ["<|y|>", "<|z|>"], (310, 320))


def more(model, path, tokens, swapped):
    """A copy with special tokens added, and two tokens in each other's row."""
    shutil.copytree(model, path)
    weights, tokenizer = load_file(path / "model.safetensors"), json.loads((path / "tokenizer.json").read_text())
    vocab, table = tokenizer["model"]["vocab"], weights[TABLE]
    one, two = (next(token for token, row in vocab.items() if row == number) for number in swapped)
    vocab[one], vocab[two] = reversed(swapped)
    table[list(swapped)] = table[list(reversed(swapped))]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    tokenizer["added_tokens"] += [{"id": row, "content": token} | flags for row, token in enumerate(tokens, len(table))]
    rows = torch.arange(len(tokens) * table.shape[1]).view(len(tokens), -1) / 10 + swapped[0] / 100
    weights[TABLE] = torch.cat([table, rows])
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": len(weights[TABLE])}))
