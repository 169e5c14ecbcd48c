"""A model's weights as safetensors, written tensor by tensor: the header tells sizes first, so that none is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from spinfast.store import files

SHARD = 5_000_000_000  # bytes of the largest file, as transformers and mergekit cut them
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Entry(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(
    directory: Path, entries: Sequence[Entry], tensors: Iterable[torch.Tensor], shard: int = SHARD
) -> list[str]:
    """Write model.safetensors, or shards and their index, into `directory`; the names of the files.

    `tensors` are those of the entries, in their order, and are asked for one by one.
    """
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(each.bytes for each in shards[-1]) + entry.bytes > shard:
            shards.append([])
        shards[-1].append(entry)
    count, source, weight_map = len(shards), iter(tensors), {}
    for number, part in enumerate(shards, 1):
        name = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
        weight_map |= {entry.name: name for entry in part}
        with (directory / name).open("wb") as file:
            file.write(_header(part))
            for entry in part:
                tensor = next(source)
                assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry
                file.write(tensor.contiguous().view(torch.uint8).numpy())
                del tensor
    if count > 1:
        total = sum(entry.bytes for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files.write_json(directory / "model.safetensors.index.json", index)
    return [*dict.fromkeys(weight_map.values())]


def _header(entries: Sequence[Entry]) -> bytes:
    """8 bytes of length, then JSON: names, dtypes, shapes, where in the bytes that follow (safetensors' format)."""
    told, end = {"__metadata__": {"format": "pt"}}, 0
    for entry in entries:
        start, end = end, end + entry.bytes
        told[entry.name] = {"dtype": NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
