"""A base of 4-bit weights (QLoRA, arXiv 2305.14314): bitsandbytes' NF4 with double quantisation, on a GPU or a CPU.

Its linear layers hold codes and scales; a weight is made dense where it is used, or for the length of `dense`. Their
own forward is never called: on CPUs with bf16 instructions it packs the weight anew, in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

import torch

from spinfast.errors import UserError


def nf4(dtype: torch.dtype):
    """What transformers is told to load them; they become dense in `dtype`."""
    if find_spec("bitsandbytes") is None:
        raise UserError("model.load_in_4bit: bitsandbytes is not installed; pip install the set of requirements/")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )


def weight(linear: torch.nn.Linear) -> torch.Tensor | Callable[[], torch.Tensor]:
    """The dense weight, or for 4-bit parameters a function that makes it."""
    if (held := getattr(linear, "dense", None)) is not None:
        return held
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        return linear.weight
    from bitsandbytes.functional import dequantize_4bit

    return partial(dequantize_4bit, linear.weight.data, state)


@contextmanager
def dense(layers: Iterable[torch.nn.Module]) -> Iterator[None]:
    """The 4-bit weights of these layers are made dense once for the block, not at every use."""
    linears = [m for layer in layers for m in layer.modules() if isinstance(m, torch.nn.Linear) and callable(weight(m))]
    try:
        for linear in linears:
            linear.dense = weight(linear)()
        yield
    finally:
        for linear in linears:
            vars(linear).pop("dense", None)


def states(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By name what 4-bit parameters are beside their codes: scales, the scales' scales and offset, both tables."""
    found = {}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            found |= {f"{name}.{key}": value for key, value in vars(state).items() if isinstance(value, torch.Tensor)}
            name, state = f"{name}.nested", state.state2
    return found
