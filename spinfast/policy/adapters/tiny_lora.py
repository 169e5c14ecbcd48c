"""TinyLoRA (arXiv 2602.04118, Eq. 3): R = sum_i v_i P_i in LoRA-XS's frame, v in R^u shared by `tie` modules, P fixed.

With u = 13 and all modules tied the whole adapter is 13 numbers. P_i ~ N(0, 1/r), each module its own, of a stream that
never changes. Which modules share a v: tiled, neighbours in the model's order; structured, neighbours among those of
one type (the q_proj of adjacent layers). The paper says of neither how the last, incomplete group is made: it is one.
"""

from __future__ import annotations

import numpy as np
import torch

from spinfast.policy.adapters import compact
from spinfast.policy.adapters.framed import Framed
from spinfast.types import Adapter


class TinyLora(Framed):
    @staticmethod
    def describe(settings) -> dict:
        keys = ("kind", "r", "u", "tie", "sharing", "projection_seed")
        return {key: getattr(settings, key) for key in keys} | {"scaling": 1.0, "payload": "float32"}

    @staticmethod
    def tensors(description):
        return {"v": torch.zeros(compact.vectors(description), description["u"])}

    @staticmethod
    def recipes(description, device="cpu"):
        def recipe(number: int, group: int):
            P_urr = projection(description, number).to(device)
            return lambda tensors: torch.einsum("u,uij->ij", tensors["v"][group], P_urr)

        return [recipe(*each) for each in enumerate(groups(description))]

    @torch.no_grad()
    def saved(self, adapter):
        """Rounded to its payload first; what is trained becomes what was saved."""
        payload = self.settings.payload
        rounded = {"v": adapter.tensors["v"].to(compact.DTYPES[payload][0]).float()}
        self.values["v"].copy_(rounded["v"])
        return super().saved(Adapter(adapter.config | {"payload": payload}, rounded))


def groups(description: dict) -> list[int]:
    """Which v each module has."""
    modules, tie = description["modules"], compact.tied(description)
    order = list(range(len(modules)))
    if description["sharing"] == "structured":
        types = list(dict.fromkeys(map(_type, modules)))
        order.sort(key=lambda number: types.index(_type(modules[number])))
    place = {number: i for i, number in enumerate(order)}
    return [place[number] // tie for number in range(len(modules))]


def _type(module: str) -> str:
    return module.rpartition(".")[2]


def projection(description: dict, number: int) -> torch.Tensor:
    """P (u, r, r) in fp32 of the module of this number."""
    u, r = description["u"], description["r"]
    draw = np.random.RandomState([description["projection_seed"], number])
    return torch.from_numpy(draw.standard_normal((u, r, r)) / np.sqrt(r)).float()
