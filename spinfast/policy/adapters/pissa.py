"""PiSSA (arXiv 2404.02948) beside a base that stays as it is: y = x W' + s x (B A - B0 A0)', from A = A0, B = B0.

s B0 A0 is the weight W ~ U S V' truncated to rank r, A0 = (S / s)^1/2 V' and B0 = U (S / s)^1/2 as PEFT has them. PEFT
takes that out of the base and rounds the rest to its dtype; here dA = A - A0 and dB = B - B0 are trained, from zero:

    B A - B0 A0 = dB (A0 + dA) + B0 dA = [dB B0] [A0 + dA; dA]

This is plain LoRA of rank 2r, which is what the blocks, the engine and the files get. While nothing is trained, each of
its products has a zero in it, so it adds exactly nothing in any dtype; B A - B0 A0 would leave its roundings.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from spinfast.errors import UserError
from spinfast.policy.adapters import files
from spinfast.policy.adapters.framed import SAME_UPDATE, Framed, framed
from spinfast.policy.adapters.frames import Frame
from spinfast.policy.adapters.lora import PlainForm, check_fits, check_mergeable, plain_config
from spinfast.types import Adapter

NAMES = "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"
TINY = 1e-30  # beside any singular value that is none of rounding


class PissaLayer(torch.nn.Module):
    """A linear layer of the base with A0 (r, D), B0 (O, r) and dA, dB, the two that are trained, all in fp32."""

    def __init__(self, base_layer: torch.nn.Linear, start: Frame, scaling: float):
        super().__init__()
        self.base_layer, self.scaling, self.on = base_layer, scaling, True
        self.register_buffer("A0", start[0], persistent=False)
        self.register_buffer("B0", start[1], persistent=False)
        self.lora_dA, self.lora_dB = (torch.nn.Parameter(torch.zeros_like(factor)) for factor in start)

    def get_base_layer(self) -> torch.nn.Linear:
        return self.base_layer

    def factors(self) -> Frame:
        """A (2r, D) and B (O, 2r) of plain LoRA, differentiable."""
        return torch.cat([self.A0 + self.lora_dA, self.lora_dA]), torch.cat([self.lora_dB, self.B0], 1)


class Pissa(PlainForm, Framed):
    """Implements spinfast.policy.adapters.AdapterKind, switched as Framed's are."""

    LAYER = PissaLayer

    def __init__(self, base: PreTrainedModel, settings, name: str, revision: str | None, path: Path | None):
        layers, self.frames = framed(base, settings, settings.trained_rank, revision, path)
        if settings.init == "merge":
            check_mergeable(layer.weight for layer in layers.values())
        patterns = {key: dict(getattr(settings, key)) for key in ("rank_pattern", "alpha_pattern")}
        half = plain_config(settings.r, settings.alpha, [*layers], name, revision) | patterns
        half["use_rslora"] = settings.use_rslora
        self.model, self.config, self.layers = base, half | files.times(half, 2), []
        self.names = {module: tuple(side.format(module) for side in NAMES) for module in layers}
        for module, layer in layers.items():
            start = tuple(factor.to(base.device) for factor in self._start(module))
            self.layers.append(PissaLayer(layer, start, files.scale(self.config, self.names[module][0])[1]))
            base.set_submodule(module, self.layers[-1])

    def _start(self, module: str) -> Frame:
        """A0 and B0 on the host."""
        rank, scaling = files.scale(self.config, self.names[module][0])
        A_RD, B_OR = self.frames.by_module[module]
        V_rD, US_Or = A_RD[: rank // 2], B_OR[:, : rank // 2]
        root_r = (US_Or.norm(dim=0) / scaling).sqrt()
        return V_rD * root_r[:, None], US_Or / (scaling * root_r).clamp(min=TINY)

    @staticmethod
    def added(layer: PissaLayer) -> dict:
        if not layer.on:
            return {}
        A_KD, B_OK = layer.factors()
        return {"lora_A": A_KD, "lora_B": B_OK, "scaling": layer.scaling}

    # Its values ------------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {
            f"{module}.{name}": parameter
            for module, layer in zip(self.names, self.layers, strict=True)
            for name, parameter in (("lora_dA", layer.lora_dA), ("lora_dB", layer.lora_dB))
        }

    @torch.no_grad()
    def adapter(self) -> Adapter:
        tensors = {}
        for names, layer in zip(self.names.values(), self.layers, strict=True):
            tensors |= {name: factor.cpu() for name, factor in zip(names, layer.factors(), strict=True)}
        return Adapter(self.config, tensors)

    @torch.no_grad()
    def load(self, adapter: Adapter) -> None:
        """Any LoRA of these ranks can be played; of one to train on (`grown`) A0 is this base's own, to the bit."""
        check_fits(adapter.tensors, self.adapter().tensors)
        for (module, names), layer in zip(self.names.items(), self.layers, strict=True):
            upper, dA, dB, B0 = _parts(adapter, names)
            A0 = self._start(module)[0]
            layer.A0.copy_(A0 if torch.equal(A0 + dA, upper) else upper - dA)
            for own, value in ((layer.lora_dA, dA), (layer.lora_dB, dB), (layer.B0, B0)):
                own.copy_(value)

    def grown(self, start: Adapter, own: Adapter) -> Adapter:
        if not self._began_here(start, own):
            raise UserError(
                "adapter.init_lora_weights: pissa goes on from an adapter that began at this base's principal "
                "components too, of the same r, alpha and modules; give such a one, or kaiming, which goes on from any"
            )
        return start

    def _began_here(self, start: Adapter, own: Adapter) -> bool:
        if {n: t.shape for n, t in start.tensors.items()} != {n: t.shape for n, t in own.tensors.items()}:
            return False
        for module, names in self.names.items():
            upper, dA, _, B0 = _parts(start, names)
            for found, expected in zip((upper - dA, B0), self._start(module), strict=True):
                if not (found - expected).norm() <= SAME_UPDATE * expected.norm():
                    return False
        return True

    @torch.no_grad()
    def restart(self, seed: int) -> None:
        """Nothing of it is drawn."""
        for module, layer in zip(self.names, self.layers, strict=True):
            for own, value in zip((layer.A0, layer.B0), self._start(module), strict=True):
                own.copy_(value)
            layer.lora_dA.zero_()
            layer.lora_dB.zero_()

    renew = restart  # after a merge too, from the components of the base as it was loaded

    @torch.no_grad()
    def deltas(self) -> Iterator[torch.Tensor]:
        for layer in self.layers:
            A_KD, B_OK = layer.factors()
            yield layer.scaling * B_OK @ A_KD


def _parts(adapter: Adapter, names: tuple[str, str]) -> tuple[torch.Tensor, ...]:
    """A0 + dA, dA, dB and B0 of a module's plain LoRA."""
    A_KD, B_OK = (adapter.tensors[name].float() for name in names)
    return *A_KD.chunk(2), *B_OK.chunk(2, dim=1)
