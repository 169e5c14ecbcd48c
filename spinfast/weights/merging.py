"""A recipe -> a model directory: tensor by tensor, whole or absent, with index, card, recipe and sums of its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from spinfast.errors import UserError
from spinfast.model_check import HEAD, TABLE, check_model, read_json
from spinfast.names import HUB_ID
from spinfast.store import files, room
from spinfast.weights.checkpoint import VOCABULARY, Checkpoint
from spinfast.weights.merge import METHODS, seed_of
from spinfast.weights.plan import Weight, layers_from, plan
from spinfast.weights.recipe import Recipe
from spinfast.weights.vocabulary import vocabulary_of
from spinfast.weights.writer import SHARD, write_weights

if TYPE_CHECKING:
    from spinfast.progress import Display

RECIPE_FILE = "mergekit_config.yml"  # as mergekit names it
COPIED = (".json", ".jinja", ".model", ".txt")
NOT_COPIED = ("config.json", "model.safetensors.index.json", files.MANIFEST, "source.json")


def merge(recipe: Recipe, text: str, out: Path, display: Display, seed: int = 0, shard: int = SHARD) -> str:
    """Write the merged model under `out`, which must not be there, and say what it is. `text`: the recipe's own."""
    if out.exists():
        raise UserError(f"--out {out}: is there already; give another name")
    with ExitStack() as stack:
        opened = Merge(recipe, text, seed, stack)
        size = sum(weight.entry.bytes for weight in opened.weights)
        room.check(out, size, "the merged model")
        files.write_directory(out, partial(opened.fill, display, shard))
    millions = sum(weight.entry.bytes // weight.entry.dtype.itemsize for weight in opened.weights) / 1e6
    count = len(opened.checkpoints)
    return f"{recipe.merge_method} of {count} models, {millions:.1f} M parameters, {size / 2**20:.0f} MiB"


class Merge:
    """A recipe and the models that it names, open as long as `stack`; every weight of the output is planned.

    Raises UserError for models that do not fit together, or a recipe that does not fit them.
    """

    def __init__(self, recipe: Recipe, text: str, seed: int, stack: ExitStack):
        self.recipe, self.text, self.seed = recipe, text, seed
        self.checkpoints = {reference: Checkpoint(reference, stack) for reference in recipe.models_named}
        self.donor = self.checkpoints[recipe.donor]
        self.vocabulary = vocabulary_of(recipe, self.checkpoints)
        self.tokens_of = self.vocabulary.owner if self.vocabulary else self.donor
        self.template = self._template()
        self.weights = plan(recipe, self.checkpoints, self.vocabulary and self.vocabulary.rows)

    def fill(self, display: Display, shard: int, out: Path) -> None:
        with display.phase("merge", len(self.weights), "tensors") as tick:

            def merged() -> Iterator[torch.Tensor]:
                for weight in self.weights:
                    tensor = self.computed(weight)
                    tick.advance()
                    yield tensor
                    del tensor

            write_weights(out, [weight.entry for weight in self.weights], merged(), shard)
        for file in sorted(self.tokens_of.base.path.iterdir()):
            if file.is_file() and file.suffix in COPIED and file.name not in NOT_COPIED:
                shutil.copyfile(file, out / file.name)
        if self.vocabulary:
            self.vocabulary.save(out)
        (out / "config.json").write_text(json.dumps(self._config(), indent=2) + "\n")
        if self.template:
            (out / "chat_template.jinja").write_text(self.template, encoding="utf-8")
            settings = read_json(out / "tokenizer_config.json")
            settings.pop("chat_template", None)
            (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        (out / RECIPE_FILE).write_text(self.text, encoding="utf-8")
        (out / "README.md").write_text(self.card(), encoding="utf-8")
        check_model(out)

    @torch.no_grad()
    def computed(self, weight: Weight) -> torch.Tensor:
        """A weight of the output, in its dtype."""
        rounded = getattr(torch, self.recipe.dtype) if self.recipe.dtype else None
        inputs = [*weight.inputs, *([weight.base] if weight.base else [])]
        name = weight.entry.name
        if self.vocabulary and name in VOCABULARY:
            base = weight.base[0] if weight.base else self.checkpoints.get(self.recipe.base_model)
            tables = {model: model.read(own, rounded) for model, own in inputs}
            tables = self.vocabulary.aligned(tables, base)
            read = [tables[model] for model, _ in inputs]
        else:
            read = [model.read(own, rounded) for model, own in inputs]
        base = read.pop() if weight.base else None
        found = METHODS[self.recipe.merge_method](base, read, weight.parameters, seed_of(self.seed, name))
        found = found.to(weight.entry.dtype)
        if not found.isfinite().all():
            raise UserError(
                f"{name}: what is merged is not finite in {weight.entry.dtype}; check the numbers, or out_dtype"
            )
        return found

    def _config(self) -> dict:
        """The donor's config.json as it holds for the output."""
        layers = layers_from(self.recipe, self.checkpoints)
        config = read_json(self.donor.base.path / "config.json") | {"num_hidden_layers": len(layers)}
        own = read_json(self.tokens_of.base.path / "config.json")
        config |= {key: value for key, value in own.items() if key.endswith("_token_id")}
        by_name = {weight.entry.name: weight.entry for weight in self.weights}
        config["tie_word_embeddings"] = HEAD not in by_name
        table = by_name[TABLE]
        config["vocab_size"] = table.shape[0]
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(table.dtype).removeprefix("torch.")
        if getattr(self.donor.config, "layer_types", None):
            config["layer_types"] = [model.config.layer_types[index] for model, index in layers]
        return config

    def _template(self) -> str | None:
        """The chat template asked for; auto: the most frequent one, the first of equally frequent ones."""
        template = self.recipe.chat_template
        if template == "auto":
            found = [of.chat_template for model in self.checkpoints.values() if (of := model.tokenizer)]
            found = [*filter(None, found)]
            template = max(found, key=found.count, default=None)
        if template and not self.tokens_of.tokens:
            raise UserError(f"chat_template: {self.tokens_of.reference} has no tokenizer to have it; leave it out")
        return template

    def card(self) -> str:
        """README.md: what was merged, how, of which revisions."""
        hub = [reference.name for reference in self.checkpoints if HUB_ID.fullmatch(reference.name)]
        front = {"library_name": "transformers", "tags": ["mergekit", "merge", "spinfast"]}
        front |= {"base_model": hub} if hub else {}
        rows = [f"| {reference} | {model.base.revision} |" for reference, model in self.checkpoints.items()]
        more = ", with the tokens of the others" * bool(self.vocabulary and self.vocabulary.united)
        title = f"# A merge of {len(rows)} models\n" if len(rows) > 1 else "# A model with its adapter\n"
        return "\n".join(
            [
                f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---",
                title,
                f"Made by `spinfast merge`, method {self.recipe.merge_method}; config of {self.donor.reference}, "
                f"tokenizer of {self.tokens_of.reference}{more}.",
                "It was not evaluated: compare it with each of its parents before you use it.\n",
                "| model | revision |\n|---|---|",
                *rows,
                f"\n```yaml\n{self.text.strip()}\n```\n",
            ]
        )
