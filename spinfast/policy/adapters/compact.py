"""The files of adapters that are smaller than their description: a JSON that says what the numbers mean, and them.

    lora_xs.json    lora_xs.safetensors    R of every module
    full.json       full.safetensors       the weights that were trained, in the model's dtype
    calm.json       calm.safetensors       the connections of two models, in fp32
    tiny_lora.json  tiny_lora.bf16         v and nothing else, little-endian: 2 bytes a number, or 4 in tiny_lora.f32

The JSON names the base by the sha256 of its weights, and carries a probe of the update (frames.py), so that another
machine knows whether it rebuilt the same one.
"""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from spinfast.errors import UserError
from spinfast.types import Adapter

KINDS = ("lora_xs", "tiny_lora", "full", "calm")
DTYPES = {"bfloat16": (torch.bfloat16, "bf16"), "float32": (torch.float32, "f32")}
SUFFIXES = {f".{suffix}" for _, suffix in DTYPES.values()}
VERSION = 1  # of frames and projections: raise it when either comes out otherwise
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
    """Raises UserError for whatever is missing, torn, or not what these files hold."""
    kind = kind_of(directory)
    try:
        written = json.loads((directory / f"{kind}.json").read_text(encoding="utf-8"))
        config = DESCRIPTIONS[kind].model_validate(written).model_dump(exclude_unset=True)
        if kind != "tiny_lora":
            adapter = Adapter(config, load_file(directory / f"{kind}.safetensors"))
        else:
            dtype, suffix = DTYPES[config["payload"]]
            numbers = (directory / f"{kind}.{suffix}").read_bytes()
            v = torch.frombuffer(bytearray(numbers), dtype=dtype) if numbers else torch.empty(0)
            adapter = Adapter(config, {"v": v.view(-1, config["u"]).float()})
        _check_tensors(adapter)
    except ValidationError as error:
        first = error.errors()[0]
        place, got = ".".join(map(str, first["loc"])), reprlib.repr(first["input"])
        raise UserError(f"adapter {directory}: {kind}.json: {place}: {first['msg']}, got {got}") from None
    except (OSError, ValueError, RuntimeError, RecursionError, SafetensorError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"adapter {directory}: {kind}.json or what it names cannot be read ({said})") from None
    return adapter


def _check_tensors(adapter: Adapter) -> None:
    """Raises ValueError where the numbers are not those of the description."""
    config, r = adapter.config, adapter.config.get("r")
    if adapter.kind == "tiny_lora":
        expected = {"v": (vectors(config), config["u"])}
    elif adapter.kind == "lora_xs":
        expected = {f"{module}.R": (r, r) for module in config["modules"]}
    elif adapter.kind == "calm":
        expected = {f"{reads}-{layer}.{part}": None for reads, layer in config["connections"] for part in "fqkvo"}
    else:
        expected = {f"{module}.weight": None for module in config["modules"]}
    odd = sorted(expected.keys() ^ adapter.tensors.keys())
    if odd:
        raise ValueError(f"{len(odd)} tensors are too many or missing, first {odd[0]}")
    for name, tensor in adapter.tensors.items():
        shape = expected[name] or tuple(tensor.shape)
        if tuple(tensor.shape) != shape or len(shape) != 2 or not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected floating point {shape}")


def tied(config: dict) -> int:
    """How many modules of a TinyLoRA share a v."""
    return len(config["modules"]) if config["tie"] == "all" else config["tie"]


def vectors(config: dict) -> int:
    """How many v it has; the last may be of fewer modules."""
    return -(-len(config["modules"]) // tied(config))


class _Description(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    kind: str
    base_model_name_or_path: str
    revision: str | None


class _OfModules(_Description):
    modules: Annotated[list[str], Field(min_length=1)]

    @field_validator("modules")
    @classmethod
    def _each_once(cls, modules: list[str]) -> list[str]:
        if len({*modules}) < len(modules):
            raise ValueError("a module is named twice")
        return modules


class _Framed(_OfModules):
    version: Literal[VERSION]
    base_sha256: Annotated[str, Field(pattern="[0-9a-f]{64}")]
    r: Annotated[int, Field(gt=0)]
    scaling: Annotated[float, Field(gt=0)]
    probe: Annotated[list[float], Field(min_length=8, max_length=8)] = []


class _LoraXs(_Framed):
    kind: Literal["lora_xs"]


class _TinyLora(_Framed):
    kind: Literal["tiny_lora"]
    u: Annotated[int, Field(gt=0)]
    tie: Annotated[int, Field(gt=0)] | Literal["all"]
    sharing: Literal["tiled", "structured"]
    projection_seed: Annotated[int, Field(ge=0, lt=2**32)]
    payload: Literal["float32", "bfloat16"]


class _Full(_OfModules):
    kind: Literal["full"]


_Layer = Annotated[int, Field(ge=0)]


class _Calm(_Description):
    kind: Literal["calm"]
    augmenting: str
    augmenting_revision: str | None
    connections: Annotated[list[Annotated[list[_Layer], Field(min_length=2, max_length=2)]], Field(min_length=1)]
    norm: bool
    rope: bool


DESCRIPTIONS = {"lora_xs": _LoraXs, "tiny_lora": _TinyLora, "full": _Full, "calm": _Calm}


def settings(adapter: Adapter) -> dict:
    """The config's adapter section that it fits: modules by their full names, connections by their layers."""
    own = {key: value for key, value in adapter.config.items() if key not in OF_THE_FILE}
    alpha = {"alpha": adapter.config["scaling"] * adapter.config["r"]} if adapter.kind == "lora_xs" else {}
    modules = {"target_modules": adapter.config["modules"]} if "modules" in adapter.config else {}
    return own | alpha | modules | _tables(adapter)


def _tables(adapter: Adapter) -> dict:
    """Embeddings and head are no target_modules."""
    if adapter.kind != "full":
        return {}
    named = {"model.embed_tokens", "lm_head"} & {*adapter.config["modules"]}
    modules = [module for module in adapter.config["modules"] if module not in named]
    return {"target_modules": modules, "embeddings": bool(named)}
