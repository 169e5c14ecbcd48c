"""The files of adapters that are smaller than their description: a JSON that says what the numbers mean, and them.

    lora_xs.json    lora_xs.safetensors    R of every module
    full.json       full.safetensors       the weights that were trained, in the model's dtype
    tiny_lora.json  tiny_lora.bf16         v and nothing else, little-endian: 2 bytes a number, or 4 in tiny_lora.f32

The JSON names the base by the sha256 of its weights, and carries a probe of the update (frames.py), so that another
machine knows whether it rebuilt the same one.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from spinfast.errors import UserError
from spinfast.types import Adapter

KINDS = ("lora_xs", "tiny_lora", "full")
DTYPES = {"bfloat16": (torch.bfloat16, "bf16"), "float32": (torch.float32, "f32")}
SUFFIXES = {f".{suffix}" for _, suffix in DTYPES.values()}
OF_THE_FILE = {"base_model_name_or_path", "revision", "base_sha256", "version", "probe", "scaling", "modules"}


def kind_of(directory: Path) -> str | None:
    """The kind whose files the directory holds, None if none of these."""
    return next((kind for kind in KINDS if (directory / f"{kind}.json").is_file()), None)


def save(adapter: Adapter, directory: Path) -> None:
    if adapter.kind == "tiny_lora":
        dtype, suffix = DTYPES[adapter.config["payload"]]
        numbers = adapter.tensors["v"].to(dtype).view(torch.uint8).numpy()
        (directory / f"tiny_lora.{suffix}").write_bytes(numbers.tobytes())
    else:
        save_file(adapter.tensors, directory / f"{adapter.kind}.safetensors")
    (directory / f"{adapter.kind}.json").write_text(json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")


def load(directory: Path) -> Adapter:
    """Raises UserError for whatever is missing or torn."""
    kind = kind_of(directory)
    try:
        config = json.loads((directory / f"{kind}.json").read_text(encoding="utf-8"))
        if config["kind"] != kind or not config["modules"]:
            raise ValueError(f"kind {config['kind']} of {len(config['modules'])} modules")
        if kind != "tiny_lora":
            return Adapter(config, load_file(directory / f"{kind}.safetensors"))
        dtype, suffix = DTYPES[config["payload"]]
        numbers = torch.frombuffer(bytearray((directory / f"{kind}.{suffix}").read_bytes()), dtype=dtype)
        return Adapter(config, {"v": numbers.view(-1, config["u"]).float()})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError, SafetensorError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"adapter {directory}: {kind}.json or what it names cannot be read ({said})") from None


def settings(adapter: Adapter) -> dict:
    """The config's adapter section that it fits: the modules by their full names."""
    own = {key: value for key, value in adapter.config.items() if key not in OF_THE_FILE}
    alpha = {"alpha": adapter.config["scaling"] * adapter.config["r"]} if adapter.kind == "lora_xs" else {}
    return own | alpha | {"target_modules": adapter.config["modules"]} | _tables(adapter)


def _tables(adapter: Adapter) -> dict:
    """Embeddings and head are no target_modules."""
    if adapter.kind != "full":
        return {}
    named = {"model.embed_tokens", "lm_head"} & {*adapter.config["modules"]}
    modules = [module for module in adapter.config["modules"] if module not in named]
    return {"target_modules": modules, "embeddings": bool(named)}
