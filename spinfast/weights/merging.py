"""A recipe -> a model directory: tensor by tensor, whole or absent, with index, card, recipe and sums of its files."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from spinfast.errors import UserError
from spinfast.model_check import check_model, read_json
from spinfast.names import HUB_ID
from spinfast.store import files, room
from spinfast.weights.checkpoint import VOCABULARY, Checkpoint
from spinfast.weights.merge import METHODS, seed_of
from spinfast.weights.plan import Weight, layers_from, plan
from spinfast.weights.recipe import Recipe, Reference
from spinfast.weights.writer import SHARD, write_weights

if TYPE_CHECKING:
    from spinfast.progress import Display

log = logging.getLogger("spinfast")

RECIPE_FILE = "mergekit_config.yml"  # as mergekit names it
COPIED = (".json", ".jinja", ".model", ".txt")
NOT_COPIED = ("config.json", "model.safetensors.index.json", files.MANIFEST, "source.json")


def merge(recipe: Recipe, text: str, out: Path, display: Display, seed: int = 0, shard: int = SHARD) -> str:
    """Write the merged model under `out`, which must not be there, and say what it is. `text`: the recipe's own."""
    if out.exists():
        raise UserError(f"--out {out}: is there already; give another name")
    with ExitStack() as stack:
        checkpoints = {reference: Checkpoint(reference, stack) for reference in recipe.models_named}
        _compare_tokens(recipe, checkpoints)
        weights = plan(recipe, checkpoints)
        size = sum(weight.entry.bytes for weight in weights)
        room.check(out, size, "the merged model")
        files.write_directory(out, partial(_fill, recipe, text, checkpoints, weights, display, seed, shard))
    millions = sum(weight.entry.bytes // weight.entry.dtype.itemsize for weight in weights) / 1e6
    return f"{recipe.merge_method} of {len(checkpoints)} models, {millions:.1f} M parameters, {size / 2**20:.0f} MiB"


def _fill(
    recipe: Recipe,
    text: str,
    checkpoints: Mapping[Reference, Checkpoint],
    weights: Sequence[Weight],
    display: Display,
    seed: int,
    shard: int,
    out: Path,
) -> None:
    donor = checkpoints[recipe.donor]
    with display.phase("merge", len(weights), "tensors") as tick:

        def merged() -> Iterator[torch.Tensor]:
            for weight in weights:
                tensor = _computed(recipe, weight, donor, seed)
                tick.advance()
                yield tensor
                del tensor

        write_weights(out, [weight.entry for weight in weights], merged(), shard)
    for file in sorted(donor.base.path.iterdir()):
        if file.is_file() and file.suffix in COPIED and file.name not in NOT_COPIED:
            shutil.copyfile(file, out / file.name)
    (out / "config.json").write_text(json.dumps(_config(recipe, checkpoints, weights), indent=2) + "\n")
    if template := _template(recipe, checkpoints):
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")
        settings = read_json(out / "tokenizer_config.json")
        settings.pop("chat_template", None)
        (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    (out / RECIPE_FILE).write_text(text, encoding="utf-8")
    (out / "README.md").write_text(card(recipe, text, checkpoints), encoding="utf-8")
    check_model(out)


@torch.no_grad()
def _computed(recipe: Recipe, weight: Weight, donor: Checkpoint, seed: int) -> torch.Tensor:
    """A weight of the output, in its dtype."""
    rounded = getattr(torch, recipe.dtype) if recipe.dtype else None

    def read(model: Checkpoint, name: str) -> torch.Tensor:
        tensor = model.read(name, rounded)
        if recipe.vocabulary and weight.entry.name in VOCABULARY and model is not donor:
            return _aligned(tensor, model, donor, donor.read(name, rounded))
        return tensor

    base, name = weight.base and read(*weight.base), weight.entry.name
    own = seed_of(seed, name)
    found = METHODS[recipe.merge_method](base, [read(*each) for each in weight.inputs], weight.parameters, own)
    found = found.to(weight.entry.dtype)
    if not found.isfinite().all():
        raise UserError(
            f"{name}: what is merged is not finite in {weight.entry.dtype}; check the numbers, or out_dtype"
        )
    return found


# Vocabularies --------------------------------------------------------------------------------------------------


def _compare_tokens(recipe: Recipe, checkpoints: Mapping[Reference, Checkpoint]) -> None:
    """Rows of embeddings mean tokens: models with other ones are said, and aligned only if that is asked for."""
    donor = checkpoints[recipe.donor]
    for model in checkpoints.values():
        if model is donor or model.tokens == donor.tokens:
            continue
        if recipe.vocabulary and not (model.tokens and donor.tokens):
            raise UserError(f"tokenizer_source: {model.reference} or {donor.reference} has no tokenizer")
        if not recipe.vocabulary and model.tokens and donor.tokens:
            other = len(model.tokens.items() ^ donor.tokens.items())
            log.warning(
                "%s and %s differ in %d tokens: rows are merged by number and the tokenizer is the latter's; "
                "tokenizer_source: base merges them by token",
                *(model.reference, donor.reference, other),
            )


def _aligned(tensor: torch.Tensor, model: Checkpoint, donor: Checkpoint, into: torch.Tensor) -> torch.Tensor:
    """The donor's rows, where the model has the token the model's own."""
    if model.tokens == donor.tokens and tensor.shape == into.shape:
        return tensor
    shared = [(row, model.tokens[token]) for token, row in donor.tokens.items() if token in model.tokens]
    to, of = torch.tensor(shared).T
    return into.index_copy(0, to, tensor[of])


# Beside the weights --------------------------------------------------------------------------------------------


def _config(recipe: Recipe, checkpoints: Mapping[Reference, Checkpoint], weights: Sequence[Weight]) -> dict:
    """The donor's config.json as it holds for the output."""
    donor, layers = checkpoints[recipe.donor], layers_from(recipe, checkpoints)
    config = read_json(donor.base.path / "config.json") | {"num_hidden_layers": len(layers)}
    by_name = {weight.entry.name: weight.entry for weight in weights}
    config["tie_word_embeddings"] = VOCABULARY[1] not in by_name
    table = by_name[VOCABULARY[0]]
    config["vocab_size"] = table.shape[0]
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(table.dtype).removeprefix("torch.")
    if getattr(donor.config, "layer_types", None):
        config["layer_types"] = [model.config.layer_types[index] for model, index in layers]
    return config


def _template(recipe: Recipe, checkpoints: Mapping[Reference, Checkpoint]) -> str | None:
    """The chat template that is asked for; auto: the most frequent one, the first of equally frequent ones."""
    if recipe.chat_template != "auto":
        return recipe.chat_template
    found = [template for model in checkpoints.values() if (template := model.chat_template)]
    return max(found, key=found.count, default=None)


def card(recipe: Recipe, text: str, checkpoints: Mapping[Reference, Checkpoint]) -> str:
    """README.md: what was merged, how, of which revisions."""
    hub = [reference.name for reference in checkpoints if HUB_ID.fullmatch(reference.name)]
    front = {"library_name": "transformers", "tags": ["mergekit", "merge", "spinfast"]}
    front |= {"base_model": hub} if hub else {}
    rows = [f"| {reference} | {model.base.revision} |" for reference, model in checkpoints.items()]
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---",
            f"# A merge of {len(checkpoints)} models\n" if len(checkpoints) > 1 else "# A model with its adapter\n",
            f"Made by `spinfast merge`, method {recipe.merge_method}; config and tokenizer are {recipe.donor}'s.",
            "It was not evaluated: compare it with each of its parents before you use it.\n",
            "| model | revision |\n|---|---|",
            *rows,
            f"\n```yaml\n{text.strip()}\n```\n",
        ]
    )
