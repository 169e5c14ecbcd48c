"""A recipe whose models are adapters of one base -> one adapter, plain PEFT LoRA. Updates are merged, never A and B.

A weighted sum of updates B_i A_i is itself one of low rank, exact: A = [A_1; A_2; ...], B = [c_1 B_1, c_2 B_2, ...].
Brought down to a rank it is the best of that rank, from small matrices alone: B = Q_B R_B, A' = Q_A R_A, and the SVD of
R_B R_A' (r x r). Elections (ties, dare) are of the elements of the update: those are computed matrix by matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from spinfast.errors import UserError
from spinfast.models import resolve_model
from spinfast.policy.adapters import compact, expand
from spinfast.policy.adapters import files as adapters
from spinfast.policy.adapters.lora import plain_config
from spinfast.store import files
from spinfast.types import Adapter
from spinfast.weights.checkpoint import LAYER, with_base
from spinfast.weights.merge import METHODS, seed_of
from spinfast.weights.merging import RECIPE_FILE
from spinfast.weights.plan import check_effects, levels_above, parameters
from spinfast.weights.recipe import Recipe, Reference

if TYPE_CHECKING:
    from spinfast.progress import Display

SUMS = ("linear", "task_arithmetic")  # of low rank, whatever the weights
ELECTIONS = ("ties", "dare_linear", "dare_ties", "breadcrumbs")
Factors = tuple[Tensor, Tensor]  # B (out, r), A (r, in)


def of_adapters(recipe: Recipe) -> bool:
    """Whether the models that it names are adapters. Raises UserError if some of them are."""
    models = [each.model for each in recipe.body.models or ()]
    found = [reference for reference in models if _is_adapter(reference)]
    if found and len(found) < len(models):
        other = next(reference for reference in models if reference not in found)
        raise UserError(f"models: {found[0]} is an adapter, {other} is none; write the former as base+adapter")
    return bool(found)


def _is_adapter(reference: Reference) -> bool:
    directory = files.expanded(reference.name)
    if not directory.is_dir() or reference.adapter or reference.revision:
        return False
    found = adapters.find(directory)
    return (found / adapters.CONFIG_FILE).exists() or compact.kind_of(found) is not None


def merge(recipe: Recipe, text: str, out: Path, rank: int | None, display: Display, seed: int = 0) -> str:
    """Write the merged adapter under `out` and say what it is. `rank`: at most, None: as much as the sum needs."""
    if out.exists():
        raise UserError(f"--out {out}: is there already; give another name")
    if recipe.merge_method not in (*SUMS, *ELECTIONS):
        expected = ", ".join((*SUMS, *ELECTIONS))
        raise UserError(f"merge_method {recipe.merge_method}: adapters are merged by {expected}")
    if recipe.vocabulary or recipe.chat_template:
        raise UserError("tokenizer_source, chat_template: an adapter has neither; leave them out")
    inputs = recipe.body.models
    loaded, (name, revision) = _loaded(recipe)
    updates = [dict(adapters.updates(adapter)) for adapter in loaded]
    weights = [*dict.fromkeys(weight for update in updates for weight in update)]
    check_effects(recipe, weights)
    deepest = max((int(found[2]) for found in map(LAYER.fullmatch, weights) if found), default=0)
    above, made, lost, whole = levels_above(recipe, {}), {}, 0.0, 0.0
    with display.phase("merge", len(weights), "matrices") as tick:
        for weight in weights:
            layer = LAYER.fullmatch(weight)
            t = int(layer[2]) / deepest if layer and deepest else float(bool(layer))
            each = [(str(one.model), [one.parameters, *above], weight) for one in inputs]
            given = parameters(recipe.merge_method, above, each, weight, t)
            factors = [update.get(weight) for update in updates]
            made[weight], dropped, total = _merged(recipe.merge_method, weight, factors, given, rank, seed)
            lost, whole = lost + dropped, whole + total
            tick.advance()
    error = math.sqrt(lost / whole) if whole else 0.0
    r = max(1, *(len(A) for _, A in made.values()))
    dtype = getattr(torch, recipe.out_dtype or recipe.dtype or "float32")
    tensors = _named(made, r, dtype, {name for adapter in loaded for name in adapter.tensors})
    if wrong := adapters.not_finite(tensors):
        raise UserError(f"{wrong}: what is merged is not finite in {dtype}; check the weights, or out_dtype")
    modules = sorted(weight.removesuffix(".weight") for weight in made)
    merged = Adapter(plain_config(r, r, modules, name, revision), tensors)
    files.write_directory(out, partial(_fill, merged, text, f"{recipe.merge_method}, rank {r}, error {error:.2g}"))
    return f"{recipe.merge_method} of {len(loaded)} adapters, rank {r}, relative error {error:.2g}"


def _loaded(recipe: Recipe) -> tuple[list[Adapter], tuple[str, str | None]]:
    """The adapters as plain LoRA, and their one base's name and revision."""
    named = recipe.base_model and recipe.base_model.name
    found, base = [], None
    for one in recipe.body.models:
        directory = adapters.find(files.expanded(one.model.name))
        if compact.kind_of(directory) == "full":
            raise UserError(f"{one.model}: whole weights; merge the models, each as base+{one.model}")
        adapter = adapters.load(directory)
        base = base or (named or adapter.config.get("base_model_name_or_path"), adapter.config.get("revision"))
        adapters.check_base(directory, adapter.config, base[1], base[0])
        if adapter.kind != "lora":
            reference = with_base(directory, named)
            adapter = expand.as_lora(adapter, resolve_model(reference.name, reference.revision))
        found.append(adapter)
    return found, base


def _merged(
    method: str, weight: str, factors: Sequence[Factors | None], given: dict, rank: int | None, seed: int
) -> tuple[Factors, float, float]:
    """(B and A, the squared norm of what was left out, of all). An adapter that does not know the weight adds 0."""
    known = [pair for pair in factors if pair]
    if len({(len(B), A.shape[1]) for B, A in known}) > 1:
        raise UserError(f"{weight}: the adapters' matrices have other sizes; expected adapters of one base")
    ranks = sum(len(A) for _, A in known)
    if method in SUMS:  # linear in the updates: what it makes of unit vectors are the coefficients
        base, units = torch.zeros(len(factors)), [*torch.eye(len(factors))]
        coefficients = METHODS[method](base, units, given).tolist()
        B = torch.cat([pair[0] * c for pair, c in zip(factors, coefficients, strict=True) if pair], dim=1)
        A = torch.cat([A for _, A in known])
        if rank is None or rank >= ranks:
            return (B, A), 0.0, float(((B.T @ B) * (A @ A.T)).sum())
        return truncated(B, A, rank)
    dense = [pair[0] @ pair[1] if pair else None for pair in factors]
    base = torch.zeros_like(next(update for update in dense if update is not None))
    inputs = [base if each is None else each for each in dense]
    update = METHODS[method](base, inputs, given, seed_of(seed, weight))
    return _best(*torch.linalg.svd(update, full_matrices=False), rank or ranks)


def truncated(B: Tensor, A: Tensor, rank: int) -> tuple[Factors, float, float]:
    """The best B A of that rank, the squared Frobenius norms of what it lacks and of all. No matrix is (out, in)."""
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return _best(Q_B @ U, S, Vh @ Q_A.T, rank)


def _best(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> tuple[Factors, float, float]:
    root, squares = S[:rank].sqrt(), S.double().square()
    return (U[:, :rank] * root, root[:, None] * Vh[:rank]), float(squares[rank:].sum()), float(squares.sum())


def _named(made: dict[str, Factors], r: int, dtype: torch.dtype, known: set[str]) -> dict[str, Tensor]:
    """PEFT's tensors, all of rank r: zeros beside those of a lower one."""
    tensors = {}
    for weight, (B, A) in made.items():
        B, A = F.pad(B, (0, r - B.shape[1])).to(dtype), F.pad(A, (0, 0, 0, r - len(A))).to(dtype)
        stem = f"base_model.model.{weight.removesuffix('.weight')}.lora_"
        if f"{stem}embedding_A" in known:
            tensors |= {f"{stem}embedding_A": B.T.contiguous(), f"{stem}embedding_B": A.T.contiguous()}
        else:
            tensors |= {f"{stem}A.weight": A.contiguous(), f"{stem}B.weight": B.contiguous()}
    return tensors


def _fill(merged: Adapter, text: str, what: str, out: Path) -> None:
    adapters.save(merged, out)
    (out / RECIPE_FILE).write_text(text, encoding="utf-8")
    base = merged.config["base_model_name_or_path"]
    (out / "README.md").write_text(
        "---\nlibrary_name: peft\ntags: [merge, spinfast]\n---\n"
        f"# A merge of adapters\n\nMade by `spinfast merge`: {what}; its base is {base}.\n"
        "It was not evaluated: compare it with each of its parents before you use it.\n\n"
        f"```yaml\n{text.strip()}\n```\n",
        encoding="utf-8",
    )
