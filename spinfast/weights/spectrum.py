"""Spectrum: which weight matrices are worth training, by how much of each is signal (arXiv 2406.06623).

A matrix of pure noise has singular values up to an edge that Marchenko and Pastur found; what lies above it is signal.
Per layer type the matrices with the best ratio are trained whole, the others stay frozen.

    S = svdvals(W)                                W (n, m) in fp32
    edge = (q75(S) - q25(S)) / 1.349 * (1 + sqrt(min(n, m) / max(n, m)))
    score = sum(S > edge) / sum(S <= edge) / S[0]

Lists are read as Spectrum, Axolotl (`unfrozen_parameters:`) and scripts for TRL write them, and written in that form.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml

from spinfast.errors import UserError
from spinfast.model_check import HEAD, TABLE, first_line, open_weights
from spinfast.models import default_cache
from spinfast.store import files

if TYPE_CHECKING:
    import torch

    from spinfast.progress import Display

log = logging.getLogger("spinfast")

METHOD = 1  # raise when a score is computed otherwise, and the cached ones are computed again
LISTS = (".yaml", ".yml", ".json")
EMBEDDINGS = (f"^{HEAD}$", f"^{TABLE}$")
ROWS = re.compile(r"\[(\d*:\d*|\d+)\]$")
WILD_DOT = re.compile(r"(?<!\\)\.(?![*+?{])")


class Score(NamedTuple):
    score: float
    type: str


Scores = dict[str, Score]  # by module name; of a type in the order of its layers


# Scores --------------------------------------------------------------------------------------------------------


def snr(weight: torch.Tensor) -> float:
    """The score of a matrix (n, m), or of a vector (n,) as 1 x n, on the CPU: CUDA has no such kernels for a T4.

    As Spectrum computes it (0ed1756): what has no singular value below the edge has a noise of 1, so that a vector
    scores 1; noise of exactly 0 scores infinity. But zeros are no signal: 0, where Spectrum has infinity.
    """
    import torch

    matrix = torch.atleast_2d(weight.detach().to("cpu", torch.float32))
    s = torch.linalg.svdvals(matrix).double()
    if not s[0]:
        return 0.0
    low, high = torch.quantile(s, torch.tensor([0.25, 0.75], dtype=s.dtype))
    edge = (high - low) / 1.349 * (1 + math.sqrt(min(matrix.shape) / max(matrix.shape)))
    below = s[s <= edge]
    noise = below.sum() if len(below) else torch.ones_like(edge)
    return float(s[s > edge].sum() / noise / s[0])


def digest(weight: torch.Tensor) -> str:
    """sha256 of dtype, shape and bytes."""
    import torch

    found = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode())
    found.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def cached_snr(weight: torch.Tensor, cache_dir: Path | None = None) -> float:
    """`snr`, kept in CACHE/spectrum/ by the weight's hash."""
    name = digest(weight)
    path, owner = (cache_dir or default_cache()) / "spectrum" / f"{name}.json", f"{name} {METHOD}"
    known = files.read_sealed(path, owner)
    if known is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        known = {"score": snr(weight)}
        files.write_sealed(path, known, owner)
    return known["score"]


def layer_type(module: str) -> str:
    """What follows the layer's index: mlp.down_proj of model.layers.3.mlp.down_proj; all of a name without one."""
    parts = module.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[index + 1 :])


def shapes_of(directory: Path) -> dict[str, list[int]]:
    """The parameters of a resolved model by name, read from the headers; a head that is the embedding is none."""
    from transformers import AutoConfig

    tied = AutoConfig.from_pretrained(directory, local_files_only=True).tie_word_embeddings
    with ExitStack() as stack:
        shapes = {name: weight.get_shape() for name, weight in open_weights(directory, stack).items()}
    return {name: shape for name, shape in shapes.items() if name != HEAD or not tied}


def scan(directory: Path, display: Display, cache_dir: Path | None = None) -> Scores:
    """Score every matrix of the decoder's layers, types by name; one weight is in memory at a time.

    Embeddings and head are not scored: a type of one is never among the best p < 100 % of its own.
    Raises UserError for a weight that is not finite.
    """
    table = {}
    with ExitStack() as stack:
        weights = open_weights(directory, stack)
        modules = [
            name.removesuffix(".weight")
            for name, weight in weights.items()
            if len(weight.get_shape()) == 2 and layer_type(name) != name
        ]
        modules.sort(key=lambda module: (layer_type(module), [int(n) for n in re.findall(r"\d+", module)]))
        with display.phase("spectrum", len(modules), "matrices") as tick:
            for module in modules:
                weight = weights[f"{module}.weight"][:]
                if not weight.isfinite().all():
                    raise UserError(f"model {directory}: {module}.weight is not finite; download the model again")
                table[module] = Score(cached_snr(weight, cache_dir), layer_type(module))
                tick.advance()
    return table


def check_top(top: float) -> None:
    if not 0 < top <= 100:
        raise UserError(f"--top: expected per cent of each layer type, above 0 and up to 100, got {top:g}")


def select(table: Scores, top: float) -> dict[str, list[str]]:
    """Of each type the best int(count * top / 100) modules, best first, equals in the table's order.

    Raises UserError for a `top` that is no per cent, or by which nothing is chosen.
    """
    check_top(top)
    types: dict[str, list[str]] = {}
    for module, score in table.items():
        types.setdefault(score.type, []).append(module)
    chosen = {
        kind: sorted(modules, key=lambda module: table[module].score, reverse=True)[: int(len(modules) * top / 100)]
        for kind, modules in types.items()
    }
    if not any(chosen.values()):
        most = max(map(len, types.values()))
        raise UserError(
            f"--top {top:g}: of at most {most} matrices per layer type it chooses none; "
            f"give {math.ceil(100 / most)} or more"
        )
    return chosen


# Files ---------------------------------------------------------------------------------------------------------


def as_yaml(chosen: Mapping[str, Sequence[str]], note: str = "", embeddings: bool = False) -> str:
    """The list as Spectrum writes it, `note` as a comment before it; its two lines of embeddings only if asked for."""
    lines = [*(f"# {line}" for line in note.splitlines()), "unfrozen_parameters:"]
    lines += [f"- {pattern}" for pattern in EMBEDDINGS if embeddings]
    for kind, modules in chosen.items():
        lines += [f"# {kind} layers", *(f"- {module}" for module in modules)]
    return "\n".join(lines) + "\n"


def read_scores(file: Path) -> Scores:
    """Spectrum's results: {module: {"snr": s, "type": t}}, or {type: {module: s}} as it writes them sorted."""
    try:
        value = json.loads(_text(file))
        if not all("snr" in given for given in value.values()):
            value = {m: {"snr": s, "type": kind} for kind, given in value.items() for m, s in given.items()}
        table = {module: Score(given["snr"], given["type"]) for module, given in value.items()}
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise UserError(
            f"{file}: expected Spectrum's results, {{module: {{snr, type}}}} or {{type: {{module: snr}}}}, "
            f"got something else ({type(error).__name__}: {first_line(error)})"
        ) from None
    for module, (score, kind) in table.items():
        if type(score) not in (int, float) or math.isnan(score) or not isinstance(kind, str):
            raise UserError(f"{file}: {module} has snr {score!r} and type {kind!r}, expected a number and a name; scan")
    if not table:
        raise UserError(f"{file}: holds no scores; scan the model: spinfast spectrum MODEL")
    return table


def read_list(file: Path, top: float | None = None) -> tuple[str, ...]:
    """Patterns of names from a .yaml or, with the best `top` per cent to be chosen, a .json of Spectrum's results.

    A YAML file is a list, or has one under `unfrozen_parameters` (an Axolotl config, what else is in it is not read).
    Raises UserError where it is anything else or empty.
    """
    if file.suffix == ".json":
        if top is None:
            raise UserError(f"{file}: holds scores, no list: spinfast spectrum MODEL --from {file} --top 25 makes one")
        return tuple(module for modules in select(read_scores(file), top).values() for module in modules)
    if top is not None:
        raise UserError(f"--top: goes with a scan or Spectrum's .json; {file} is a list and is taken as it is")
    text = _text(file)
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid YAML: {first_line(error)}") from None
    if isinstance(found, dict):
        if "unfrozen_parameters" not in found:
            raise UserError(f"{file}: expected a list under unfrozen_parameters, got {', '.join(map(str, found))}")
        found = found["unfrozen_parameters"]
    if not isinstance(found, list) or not found or not all(isinstance(each, str) and each for each in found):
        raise UserError(f"{file}: expected a list of names of weights, got {str(found)[:80]}")
    return tuple(found)


def _text(file: Path) -> str:
    if not file.is_file():
        raise UserError(f"{file}: no such file; spinfast spectrum MODEL writes a list")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is no text: {error}") from None


# Names ---------------------------------------------------------------------------------------------------------


def matched(shapes: Mapping[str, Sequence[int]], patterns: Iterable[str], embeddings: bool = False) -> tuple[str, ...]:
    """The names of the matrices that a list chooses of a model's parameters {name: shape}, in their order.

    A pattern is a regular expression for the beginning of a name, as in Axolotl; a dot is a dot, but before * + ? {.
    Vectors are left out: norms with a warning, a bias stays frozen beside its matrix. So are embeddings and head unless
    `embeddings`, with a warning: Spectrum's lists always name them, and of a small model they are the largest part.
    Where the head is the embedding, either name is it.
    Raises UserError for a list that chooses no matrix, a pattern that matches nothing, or one that asks for rows.
    """
    patterns, names = list(patterns), [*shapes]
    if TABLE in shapes and HEAD not in shapes:
        names.append(HEAD)
    hits = {pattern: [*filter(_regex(pattern).match, names)] for pattern in patterns}
    if strangers := [pattern for pattern, each in hits.items() if not each]:
        bare, modules = re.sub(r"[\^$\\]", "", strangers[0]), [name.removesuffix(".weight") for name in shapes]
        near = difflib.get_close_matches(bare, [*modules, *shapes], n=1, cutoff=0)
        raise UserError(
            f"{len(strangers)} of the list's {len(patterns)} names match nothing in the model, first {strangers[0]}; "
            f"the nearest is {near[0]}. Is the list another model's?"
        )
    found = {name if name in shapes else TABLE for each in hits.values() for name in each}
    vectors = {name for name in found if len(shapes[name]) != 2}
    spared = set() if embeddings else found & {HEAD, TABLE}
    if alone := [pattern for pattern, each in hits.items() if vectors.issuperset(each)]:
        log.warning("%d names of the list are vectors (first %s): left out, matrices are trained", len(alone), alone[0])
    if spared:
        log.warning(
            "the list names %s: left out; asked for, they are %.1f M parameters more",
            " and ".join(sorted(spared)),
            _millions(shapes, spared),
        )
    chosen = tuple(name for name in shapes if name in found - vectors - spared)
    if not chosen:
        raise UserError(f"the list ({len(patterns)} names) chooses no weight matrix of the decoder's layers")
    matrices = {name for name, shape in shapes.items() if len(shape) == 2} - ({HEAD, TABLE} - set(chosen))
    kinds = Counter(layer_type(name.removesuffix(".weight")) for name in chosen)
    log.info(
        "%d of %d matrices, %.1f M of %.1f M parameters: %s",
        len(chosen),
        len(matrices),
        _millions(shapes, chosen),
        _millions(shapes, matrices),
        ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())),
    )
    return chosen


def _millions(shapes: Mapping[str, Sequence[int]], names: Iterable[str]) -> float:
    return sum(math.prod(shapes[name]) for name in names) / 1e6


def _regex(pattern: str) -> re.Pattern:
    if ROWS.search(pattern):
        raise UserError(
            f"{pattern}: rows of a matrix are not trained alone, that would spare none of its memory; "
            "name the matrix without its last [...], or leave it out"
        )
    try:
        return re.compile(WILD_DOT.sub(r"\\.", pattern))
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{pattern}: not a regular expression: {error}") from None
