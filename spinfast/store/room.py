"""Room on the disk, asked for before it is used: a full disk is told before the work, not in the middle of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from spinfast.errors import UserError

MARGIN = 1 << 20  # for names, manifests and logs
TOKEN_BYTES = 32  # of an answer's token in completions, pairs and held-out files, as id and as text


def of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors as safetensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def check(directory: Path, needed: int, what: str) -> None:
    """Raise UserError unless the file system of `directory`, or of its nearest parent, has `needed` bytes free."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + MARGIN:
        raise UserError(
            f"no space left for {what} in {directory}: needs {(needed + MARGIN) / 2**20:.0f} MiB, "
            f"{free / 2**20:.0f} MiB are free; make room and run the same command again to go on"
        )


def of_run(config, loads, trained_bytes: int) -> int:
    """Bytes that a whole run may leave: its adapters, three checkpoints at a time, its answers at their longest."""
    rounds = sum(len(load.rounds) for load in loads)
    grown = rounds * (rounds + 1) // 2 if config.adapter.init == "merge" else rounds
    moments = max(2 if load.settings.optimizer.startswith("adamw") else 1 for load in loads)
    tokens = sum(load.answers for load in loads) * (2 * config.generation.max_tokens + config.prompt.max_prompt_tokens)
    adapters = (1 + grown + 3) * config.adapter.saved_per_trained
    return trained_bytes * (adapters + 3 * moments) + tokens * TOKEN_BYTES


def taken(directory: Path) -> int:
    """Bytes that are in the directory already."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
