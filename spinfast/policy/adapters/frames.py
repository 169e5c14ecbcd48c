"""The frame that a frozen weight gives its adapter (LoRA-XS, arXiv 2405.17604): W ~ B A, B = U S, A = V', of rank r.

It must be the same on every machine, for R or v are saved without it. Singular vectors are defined up to their signs,
those of equal singular values up to a rotation, and LAPACK chooses. So the basis of each group of (nearly) equal
values is made from what is well defined, the projection onto their subspace: fixed random vectors, projected and
made orthonormal; of a single vector that chooses the sign. All is fp64, from the weights of the checkpoint's files,
whatever dtype a device computes in.

Shapes: O outputs, D inputs, n the smaller of both, r rank.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from spinfast.errors import UserError
from spinfast.models import default_cache
from spinfast.policy.adapters.compact import VERSION
from spinfast.store import files

log = logging.getLogger("spinfast")
NOTHING = 1e-6  # singular values this small beside the largest are rounding: nothing is added along their vectors
EQUAL = 1e-8  # squared singular values this close, relative to the largest, are one
Frame = tuple[torch.Tensor, torch.Tensor]  # A (r, D), B (O, r) in fp32


def frame(weight_OD: torch.Tensor, r: int) -> Frame:
    """The canonical truncated SVD; r is at most n."""
    W = weight_OD.detach().to("cpu", torch.float64)
    if r > min(W.shape):
        raise UserError(f"adapter: rank {r} is more than a weight of {tuple(W.shape)} has")
    if not W.isfinite().all():
        raise UserError("adapter: a weight of the base holds NaN or inf, it has no SVD; get the model again")
    wide = W if W.shape[0] <= W.shape[1] else W.t()
    values, vectors = torch.linalg.eigh(wide @ wide.t())
    squared_n, Q_nn = values.flip(0).clamp(min=0), vectors.flip(1)
    near_nr, singular_r = _canonical(squared_n, Q_nn, r)
    singular_r = singular_r.where(singular_r > NOTHING * singular_r[0], 0.0)
    far_rm = torch.where(singular_r[:, None] > 0, near_nr.t() @ wide / singular_r[:, None], 0.0)
    U_Or, V_rD = (near_nr, far_rm) if wide is W else (far_rm.t(), near_nr.t())
    return V_rD.float().contiguous(), (U_Or * singular_r).float().contiguous()


def _canonical(squared_n: torch.Tensor, Q_nn: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first r vectors and singular values, by the rule above; squared values in descending order."""
    apart = (squared_n[:-1] - squared_n[1:]) > EQUAL * squared_n[0]
    borders = [0, *(apart.nonzero()[:, 0] + 1).tolist(), len(squared_n)]
    draw, bases, singular, made = np.random.RandomState(0), [], [], 0  # RandomState: its stream never changes
    for start, stop in pairwise(borders):
        Q_nk = Q_nn[:, start:stop]
        wanted = min(r - made, stop - start)
        fixed_nk = torch.from_numpy(draw.standard_normal((len(Q_nk), wanted)))
        basis_nk, triangle_kk = torch.linalg.qr(Q_nk @ (Q_nk.t() @ fixed_nk))
        bases.append(basis_nk * triangle_kk.diagonal().sign())
        singular.append(squared_n[start:stop].mean().sqrt().expand(wanted))
        made += wanted
        if made == r:
            break
    return torch.cat(bases, 1), torch.cat(singular)


@dataclass(frozen=True)
class Frames:
    """Frames of a model's weights, and the sha256 of those weights, which names the base whatever it is called."""

    by_module: Mapping[str, Frame]
    base: str


def of_model(path: Path, revision: str, modules: list[str], r: int, tick: Callable[[], None] = lambda: None) -> Frames:
    """Of these linear layers of the safetensors under `path`; made once, kept in the cache by `revision`."""
    key = hashlib.sha256("\n".join([revision, str(r), *modules]).encode()).hexdigest()[:32]
    kept = default_cache() / "frames" / f"{key}-v{VERSION}.safetensors"
    ends = "".join(_digest(*found) for found in _weights(path, [modules[0], modules[-1]]))  # if the name should lie
    if (found := _kept(kept, ends, modules)) is not None:
        return found
    log.info("adapter: the SVD of %d weights, once for this model, rank and choice of modules", len(modules))
    digest, tensors = hashlib.sha256(), {}
    for module, weight in _weights(path, modules):
        digest.update(_digest(module, weight).encode())
        tensors[f"{module}.A"], tensors[f"{module}.B"] = frame(weight, r)
        tick()
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(kept) as temporary:
            save_file(tensors, temporary, metadata={"base": digest.hexdigest(), "ends": ends})
    except OSError as error:
        log.warning("adapter: the SVD cannot be kept for the next run (%s); see SPINFAST_CACHE", error)
    return Frames(_pairs(tensors, modules), digest.hexdigest())


def _kept(path: Path, ends: str, modules: list[str]) -> Frames | None:
    """What the cache has, if it is whole and of these weights."""
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
        if told.get("ends") == ends:
            return Frames(_pairs(load_file(path), modules), told["base"])
    except (OSError, SafetensorError, KeyError) as error:
        if path.exists():
            log.warning("adapter: the cache's %s is damaged (%s) and made again", path.name, error)
    return None


def _digest(module: str, weight: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{module}{tuple(weight.shape)}{weight.dtype}".encode())
    digest.update(weight.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _pairs(tensors: Mapping[str, torch.Tensor], modules: list[str]) -> dict[str, Frame]:
    return {module: (tensors[f"{module}.A"], tensors[f"{module}.B"]) for module in modules}


def _weights(path: Path, modules: list[str]):
    """(module, weight) in the order of `modules`, read one at a time."""
    where = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            where |= dict.fromkeys(opened.keys(), file)
    for module in modules:
        name = f"{module}.weight"
        if name not in where:
            raise UserError(f"adapter: {path} has no {name}, whose SVD it needs; use kind: lora")
        with safe_open(where[name], "pt") as opened:
            weight = opened.get_tensor(name)
        if not weight.is_floating_point():
            raise UserError(f"adapter: {name} is {weight.dtype}, quantised in its file; its SVD needs 16 or 32 bits")
        yield module, weight


def probe(by_module: Mapping[str, Frame], smalls: Mapping[str, torch.Tensor], scaling: float) -> list[float]:
    """Eight numbers that tell an update, the sum of s B R A over all modules, between fixed random vectors, in fp64.

    Another frame, order of modules, projection or scaling gives others. `smalls`: R of each module, (r, r).
    """
    draw, found = np.random.RandomState(1), np.zeros(8)
    for module, (A_rD, B_Or) in by_module.items():
        left_8O, right_D8 = draw.standard_normal((8, len(B_Or))), draw.standard_normal((A_rD.shape[1], 8))
        inner_8r = (left_8O @ B_Or.double().numpy()) @ smalls[module].detach().cpu().double().numpy()
        found += (inner_8r * (A_rD.double().numpy() @ right_D8).T).sum(1)
    return (scaling * found).tolist()
