"""LoRA-XS (arXiv 2405.17604): y = x W' + s x V R' (U S)', W ~ U S V' truncated to rank r, R (r, r) trained.

r^2 numbers a module, whatever its width. R starts at zero: its gradient (U S)' dW V is alive there.
"""

from __future__ import annotations

from operator import itemgetter

import torch

from spinfast.policy.adapters.framed import Framed


class LoraXs(Framed):
    @staticmethod
    def describe(settings) -> dict:
        return {"kind": "lora_xs", "r": settings.r, "scaling": settings.alpha / settings.r}

    @staticmethod
    def tensors(description):
        return {f"{module}.R": torch.zeros(description["r"], description["r"]) for module in description["modules"]}

    @staticmethod
    def recipes(description, device="cpu"):
        return [itemgetter(f"{module}.R") for module in description["modules"]]
