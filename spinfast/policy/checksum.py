"""The frozen base must stay what it was, to the bit: a sum over its tensors that a run compares round by round."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

CHUNK = 1 << 20  # words of a step: 8 MiB


@torch.no_grad()
def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """16 hex digits that change with any bit of any tensor, computed where the tensors are.

    Per tensor: the sum of its bytes, taken as 64-bit words where they divide so, times odd position weights, modulo
    2^64. An odd weight is invertible, so a change within one word cannot cancel.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().reshape(-1)
        raw = tensor.view(torch.uint8)
        raw = raw.clone() if raw.storage_offset() % 8 else raw  # a view may start between words
        words = raw.view(torch.int64) if len(raw) % 8 == 0 else raw
        odd = torch.arange(min(CHUNK, len(words)), device=words.device).mul_(2).add_(1)
        sums = [int((part * odd[: len(part)]).sum()) for part in words.split(CHUNK)]
        digest.update(f"{name} {tuple(tensors[name].shape)} {tensor.dtype} {sums}".encode())
    return digest.hexdigest()[:16]
