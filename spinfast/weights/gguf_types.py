"""Which type each tensor of a .gguf file has, by the word for the whole, and numbers in that type.

The rules are llama-quantize's (b10605) for models below 70 B; tests compare the bytes. Norms, biases and all of one
dimension are F32. Below 8 bits the head, or the embedding where that is the head, has more bits. A K-quant takes rows
in blocks of 256: where they do not divide a row, the next larger type of blocks of 32 is taken, and F16 after that.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q
from gguf import LlamaFileType as File

Rule = Callable[[int, int], bool]  # of a layer and how many there are
PART = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
BY_LIBGGUF = (Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K, Q.IQ4_NL)
FALLBACK = {Q.Q3_K: Q.IQ4_NL, Q.Q4_K: Q.Q5_0, Q.Q5_K: Q.Q5_1, Q.Q6_K: Q.Q8_0}


class More(NamedTuple):
    """More bits for the layers where `where` holds."""

    where: Rule
    type: Q


def _spread(layer: int, layers: int) -> bool:
    """The first and the last eighth, and every third layer between them."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _all(layer: int, layers: int) -> bool:
    return True


SIXTH = More(_spread, Q.Q6_K)


@dataclass(frozen=True)
class Kind:
    """`limit`: the largest relative difference (root of mean squares, whole file) that is the type's own rounding."""

    file: File
    type: Q
    limit: float
    head: Q | None = None  # None: as the others
    parts: dict[str, tuple[More, ...]] = field(default_factory=dict)  # of a layer; the first that holds


KINDS = {
    "f32": Kind(File.ALL_F32, Q.F32, 0.0),
    "f16": Kind(File.MOSTLY_F16, Q.F16, 0.001),
    "bf16": Kind(File.MOSTLY_BF16, Q.BF16, 0.005),
    "q8_0": Kind(File.MOSTLY_Q8_0, Q.Q8_0, 0.02),
    "q6_k": Kind(File.MOSTLY_Q6_K, Q.Q6_K, 0.05),
    "q5_k_m": Kind(File.MOSTLY_Q5_K_M, Q.Q5_K, 0.10, Q.Q6_K, {"attn_v": (SIXTH,), "ffn_down": (SIXTH,)}),
    "q5_k_s": Kind(File.MOSTLY_Q5_K_S, Q.Q5_K, 0.10, Q.Q6_K),
    "q5_1": Kind(File.MOSTLY_Q5_1, Q.Q5_1, 0.10, Q.Q8_0),
    "q5_0": Kind(File.MOSTLY_Q5_0, Q.Q5_0, 0.10, Q.Q8_0),
    "q4_k_m": Kind(File.MOSTLY_Q4_K_M, Q.Q4_K, 0.20, Q.Q6_K, {"attn_v": (SIXTH,), "ffn_down": (SIXTH,)}),
    "q4_k_s": Kind(
        File.MOSTLY_Q4_K_S,
        Q.Q4_K,
        0.20,
        Q.Q6_K,
        {
            "attn_v": (More(lambda layer, _: layer < 4, Q.Q5_K),),
            "ffn_down": (More(lambda layer, layers: layer < layers // 8, Q.Q5_K),),
        },
    ),
    "q4_1": Kind(File.MOSTLY_Q4_1, Q.Q4_1, 0.20, Q.Q8_0),
    "q4_0": Kind(File.MOSTLY_Q4_0, Q.Q4_0, 0.20, Q.Q8_0),
    "q3_k_m": Kind(
        File.MOSTLY_Q3_K_M,
        Q.Q3_K,
        0.35,
        Q.Q6_K,
        {
            "attn_v": (More(lambda layer, _: layer < 2, Q.Q5_K), More(_all, Q.Q4_K)),
            "ffn_down": (More(lambda layer, layers: layer < layers // 16, Q.Q5_K), More(_all, Q.Q4_K)),
            "attn_output": (More(_all, Q.Q4_K),),
        },
    ),
}


def type_of(kind: Kind, name: str, shape: tuple[int, ...], layers: int, is_head: bool) -> Q:
    """The type of a tensor, `name` as llama.cpp has it."""
    if len(shape) < 2 or name.endswith("_norm.weight"):
        return Q.F32
    found, wanted = PART.fullmatch(name), kind.type
    if is_head:
        wanted = kind.head or wanted
    elif found:
        more = kind.parts.get(found[2], ())
        wanted = next((each.type for each in more if each.where(int(found[1]), layers)), wanted)
    return fitting(wanted, shape[-1])


def fitting(wanted: Q, length: int) -> Q:
    """The type, or the next one whose blocks divide a row of that length."""
    for type_ in (wanted, FALLBACK.get(wanted, wanted)):
        if length % gguf.GGML_QUANT_SIZES[type_][0] == 0:
            return type_
    return Q.F16


def quantised(rows: np.ndarray, type_: Q) -> np.ndarray:
    """Rows of fp32 as the file holds them: by the gguf package, K-quants by libgguf (llama.cpp's reference code)."""
    if type_ in BY_LIBGGUF:
        import libgguf

        return libgguf.quantize_rows(rows, int(type_))
    return gguf.quantize(rows, type_)
