"""A frozen base, loaded from its files."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from spinfast import attention
from spinfast.policy.quantised import nf4


def load_base(path: Path, dtype: torch.dtype, device: torch.device, load_in_4bit: bool = False) -> PreTrainedModel:
    """With spinfast's attention, weights in `dtype` on `device`."""
    return AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation=attention.NAME,
        device_map={"": device},
        local_files_only=True,
        quantization_config=nf4(dtype) if load_in_4bit else None,
    )
