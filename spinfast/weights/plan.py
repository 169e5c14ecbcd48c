"""A recipe and the models it names -> every weight of the output: from which weights, with which numbers, how large.

Layers count per slice: t is a layer's place in its slice, from 0 to 1, and 1 in a slice of one layer. Embedding, final
norm and head have t = 0: the first is of the first slice, the others are of the last.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from spinfast.errors import UserError
from spinfast.model_check import HEAD, TABLE
from spinfast.weights.checkpoint import LAYER, VOCABULARY, Checkpoint
from spinfast.weights.merge import METHODS, REQUIRED
from spinfast.weights.recipe import Recipe, Reference, Settings, Slice, resolved
from spinfast.weights.writer import Entry

log = logging.getLogger("spinfast")

Checkpoints = Mapping[Reference, Checkpoint]
SAME = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters")


@dataclass(frozen=True)
class Weight:
    """A weight of the output. `inputs` and `base`: a model and its weight's name; `parameters`: of the method."""

    entry: Entry
    inputs: tuple[tuple[Checkpoint, str], ...]
    base: tuple[Checkpoint, str] | None
    parameters: Mapping[str, object]


def plan(recipe: Recipe, checkpoints: Checkpoints, rows: int | None = None) -> list[Weight]:
    """In the order of a model. `rows` of embedding and head, where they are brought to one vocabulary.

    Raises UserError for models that do not fit together, or a number that is missing.
    """
    _check_alike(checkpoints)
    places = [*_places(recipe, checkpoints)]
    check_effects(recipe, [name for _, _, name, _ in places])
    return [_weight(recipe, checkpoints, rows, *place) for place in places]


def layers_from(recipe: Recipe, checkpoints: Checkpoints) -> list[tuple[Checkpoint, int]]:
    """Of each layer of the output the first source's model and layer."""
    return [
        (checkpoints[part.sources[0].model], index)
        for part in recipe.laid_out(lambda reference: checkpoints[reference].layers)
        for index in range(*part.sources[0].layer_range)
    ]


def _places(recipe: Recipe, checkpoints: Checkpoints) -> Iterator[tuple[Slice, float, str, list[str]]]:
    """(slice, t, the output's name, each source's name of it) of every weight."""
    slices = recipe.laid_out(lambda reference: checkpoints[reference].layers)
    for part in slices:
        _check_slice(recipe, part, checkpoints)
    yield slices[0], 0.0, TABLE, [TABLE] * len(slices[0].sources)
    number = 0
    for part in slices:
        first, count = part.sources[0], part.sources[0].layer_range[1] - part.sources[0].layer_range[0]
        for index in range(count):
            t = index / (count - 1) if count > 1 else 1.0
            at = [source.layer_range[0] + index for source in part.sources]
            for found in filter(None, map(LAYER.fullmatch, checkpoints[first.model].names)):
                if int(found[2]) == at[0]:
                    yield part, t, f"{found[1]}{number}{found[3]}", [f"{found[1]}{place}{found[3]}" for place in at]
            number += 1
    last = [checkpoints[source.model] for source in slices[-1].sources]
    ends = [name for name in last[0].names if not LAYER.fullmatch(name) and name not in VOCABULARY]
    for name in [*ends, *([HEAD] if any(HEAD in model.names for model in last) else [])]:
        yield slices[-1], 0.0, name, [name] * len(last)


def _weight(
    recipe: Recipe, checkpoints: Checkpoints, rows: int | None, part: Slice, t: float, name: str, names: list[str]
) -> Weight:
    method, base = METHODS[recipe.merge_method], base_of(recipe, part)
    sources = [*zip(part.sources, names, strict=True)]
    models = [(checkpoints[source.model], own) for source, own in sources]
    apart = next((n for n, (source, _) in enumerate(sources) if source.model == base and method.base != "among"), None)
    above = levels_above(recipe, part.parameters)
    inputs = [each for n, each in enumerate(models) if n != apart]
    each = [
        (str(source.model), [source.parameters, *above], own) for n, (source, own) in enumerate(sources) if n != apart
    ]
    return Weight(
        Entry(name, _dtype(recipe, models), _shape(models, name, rows)),
        tuple(inputs),
        None if apart is None else models[apart],
        parameters(recipe.merge_method, above, each, name, t),
    )


def base_of(recipe: Recipe, part: Slice) -> Reference | None:
    return part.base_model or recipe.base_model


def levels_above(recipe: Recipe, part: Settings) -> list[Settings]:
    """What holds for all sources of a slice, strongest first."""
    return [part, recipe.body.parameters, recipe.parameters]


def parameters(
    name: str, above: Sequence[Settings], each: Sequence[tuple[str, Sequence[Settings], str]], tensor: str, t: float
) -> dict[str, object]:
    """What the method `name` needs for a tensor; `each`: of every input its name, its levels, its tensor's name."""
    method, found = METHODS[name], {}
    for parameter, default in method.shared.items():
        found[parameter] = _or_default(resolved(parameter, above, tensor, t), default, name, parameter, tensor)
    for parameter, default in method.each.items():
        found[parameter] = [
            _or_default(resolved(parameter, levels, own, t), default, name, parameter, f"{own} of {model}")
            for model, levels, own in each
        ]
    return found


def _or_default(value, default, method: str, parameter: str, where: str):
    if value is None and default is REQUIRED:
        raise UserError(f"merge_method {method}: no {parameter} for {where}; give one under parameters")
    value = default if value is None else value
    return int(value) if type(default) is int else value


def _dtype(recipe: Recipe, models: Sequence[tuple[Checkpoint, str]]) -> torch.dtype:
    if named := recipe.out_dtype or recipe.dtype:
        return getattr(torch, named)
    return reduce(torch.promote_types, [model.dtype(name) for model, name in models])


def _shape(models: Sequence[tuple[Checkpoint, str]], name: str, rows: int | None) -> tuple[int, ...]:
    shapes = [model.shape(own) for model, own in models]
    if name in VOCABULARY and rows:
        shapes = [[rows, *shape[1:]] for shape in shapes]
    if strange := next((n for n, shape in enumerate(shapes) if shape != shapes[0]), None):
        aligned = "tokenizer_source: base brings them to one vocabulary"
        hint = aligned if name in VOCABULARY and not rows else "merge models of a size"
        raise UserError(
            f"{name} is {shapes[0]} in {models[0][0].reference}, {shapes[strange]} in {models[strange][0].reference}; "
            + hint
        )
    return tuple(shapes[0])


# Checks --------------------------------------------------------------------------------------------------------


def _check_alike(checkpoints: Checkpoints) -> None:
    first, *others = checkpoints.values()
    for other in others:
        for what, told in (("is", lambda model: model.base.architecture), ("has", lambda model: len(_kinds(model)))):
            if told(first) != told(other):
                raise UserError(
                    f"models: {first.reference} {what} {told(first)}, {other.reference} {told(other)}"
                    + ("" if what == "is" else " kinds of weights")
                    + "; expected one architecture"
                )
        for key in SAME:
            values = [getattr(model.config, key, None) for model in (first, other)]
            if values[0] != values[1]:
                log.warning(
                    "%s has %s %s, %s has %s: the output computes with the former",
                    *(first.reference, key, values[0], other.reference, values[1]),
                )


def _kinds(model: Checkpoint) -> set[str]:
    return {LAYER.sub(r"\1*\3", name) for name in model.names} - {HEAD}


def _check_slice(recipe: Recipe, part: Slice, checkpoints: Checkpoints) -> None:
    """The method takes so many models and this base; each source has these layers."""
    method, base, named = METHODS[recipe.merge_method], base_of(recipe, part), [s.model for s in part.sources]
    where = f"merge_method {recipe.merge_method}"
    if method.base == "apart" and named.count(base) != 1:
        if base is None:
            raise UserError(f"{where}: needs a base_model")
        raise UserError(f"{where}: base_model {base} is {named.count(base)} times among the models, expected once")
    count = len(named) - (method.base != "among" and base in named)
    low, high = method.count
    if not low <= count <= high:
        expected = f"{low}" if low == high else f"at least {low}"
        beside = "" if method.base == "among" else " beside the base"
        raise UserError(f"{where}: expected {expected} models{beside}, got {count}")
    for source in part.sources:
        if source.layer_range[1] > checkpoints[source.model].layers:
            raise UserError(
                f"layer_range {[*source.layer_range]}: {source.model} has {checkpoints[source.model].layers} layers"
            )


def check_effects(recipe: Recipe, names: Sequence[str]) -> None:
    """What a recipe says and nothing comes of is told."""
    method, said = METHODS[recipe.merge_method], set()
    for parameter, setting in recipe.all_settings():
        if parameter not in (*method.each, *method.shared):
            said.add(f"{parameter} has no effect on {recipe.merge_method}")
        if not any(map(setting.holds, names)):
            said.add(f"filter {setting.filter}: no weight's name holds it")
    for source in [*(recipe.body.models or ()), *(s for part in recipe.body.slices or () for s in part.sources)]:
        for parameter in source.parameters.keys() & method.shared.keys():
            raise UserError(
                f"{parameter} of {source.model}: it is one for all models; give it to the recipe or a slice"
            )
        if source.parameters and method.base == "apart" and source.model == recipe.base_model:
            said.add(f"parameters of {source.model} have no effect: it is the base")
    for sentence in sorted(said):
        log.warning("%s", sentence)
