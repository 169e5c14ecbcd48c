"""Rows of embeddings mean tokens: models of several vocabularies are brought to one (mergekit's tokenizer_source).

base: the base's tokenizer, else that of the model named first; a model's name: that one's; union: the base's, with the
tokens of the others added to it. A model's row of a token is its own where it has it; else the base's; else the mean
of those who have it. Rows without a token are told apart by their number in the same way; of rows that are in no model
the mean of all others is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from spinfast.errors import UserError
from spinfast.weights.checkpoint import Checkpoint
from spinfast.weights.recipe import Recipe, Reference

log = logging.getLogger("spinfast")


@dataclass(frozen=True)
class Vocabulary:
    owner: Checkpoint  # of the tokenizer's files
    tokens: Mapping[str, int]
    rows: int  # of the output's embedding
    united: Tokenizer | None = None  # takes the place of the owner's tokenizer.json
    _places: dict[Checkpoint, Tensor] = field(default_factory=dict)

    def save(self, out: Path) -> None:
        if self.united:
            self.united.save(str(out / "tokenizer.json"))

    def aligned(self, tables: Mapping[Checkpoint, Tensor], base: Checkpoint | None) -> Mapping[Checkpoint, Tensor]:
        """Each model's table (rows, D) with the output's rows."""
        if all(model.tokens == self.tokens and len(table) == self.rows for model, table in tables.items()):
            return tables
        places = {model: self._rows(model, len(table)) for model, table in tables.items()}
        owners = sum(place >= 0 for place in places.values())
        stand_in = sum(_taken(table, places[model]) for model, table in tables.items()) / owners.clamp(min=1)[:, None]
        if base in tables:
            stand_in = torch.where((places[base] >= 0)[:, None], _taken(tables[base], places[base]), stand_in)
        filling, named = owners == 0, [*self.tokens.values()]
        if lost := int(filling[named].sum()):
            log.warning("%d tokens are in none of the models whose embeddings are merged: their rows are zero", lost)
        filling[named] = False
        found = {}
        for model, table in tables.items():
            own = torch.where((places[model] >= 0)[:, None], _taken(table, places[model]), stand_in)
            if filling.any():
                own[filling] = own[~filling].mean(0)
            found[model] = own
        return found

    def _rows(self, model: Checkpoint, count: int) -> Tensor:
        """Of each row of the output the model's, -1 where it has none."""
        if model not in self._places:
            place = torch.arange(self.rows)
            place[count:] = -1
            place[[row for row in model.tokens.values() if row < self.rows]] = -1
            ours = [*self.tokens.values()]
            place[ours] = torch.tensor([model.tokens.get(token, -1) for token in self.tokens])
            self._places[model] = place
        return self._places[model]


def _taken(table: Tensor, place: Tensor) -> Tensor:
    """The table's rows at these places, zeros for -1."""
    return table[place.clamp(min=0)].mul_((place >= 0)[:, None])


def vocabulary_of(recipe: Recipe, checkpoints: Mapping[Reference, Checkpoint]) -> Vocabulary | None:
    """The one that the recipe asks for; None: rows stay as they are, and models with other tokens are said."""
    donor = checkpoints[recipe.donor]
    if recipe.vocabulary is None:
        _compare(donor, checkpoints)
        return None
    for model in checkpoints.values():
        if not model.tokens:
            raise UserError(f"tokenizer_source: {model.reference} has no tokenizer; leave tokenizer_source out")
    owner, united = donor, None
    if recipe.vocabulary == "union":
        united, tokens = _union(donor, checkpoints)
    else:
        owner = donor if recipe.vocabulary == "base" else checkpoints[Reference.parse(recipe.vocabulary)]
        tokens = owner.tokens
    multiple = recipe.tokenizer.pad_to_multiple_of if recipe.tokenizer else None
    rows = max(owner.config.vocab_size, max(tokens.values()) + 1)
    return Vocabulary(owner, tokens, -(-rows // multiple) * multiple if multiple else rows, united)


def _union(donor: Checkpoint, checkpoints: Mapping[Reference, Checkpoint]) -> tuple[Tokenizer, dict[str, int]]:
    """The donor's tokenizer, to which tokens are added that only others have, in their order there."""
    file = donor.base.path / "tokenizer.json"
    if not file.exists():
        raise UserError(f"tokenizer_source: union needs {file}; use base, or save that tokenizer again")
    united, seen = Tokenizer.from_file(str(file)), {}
    for model in checkpoints.values():
        added = {str(token): token for token in model.tokenizer.added_tokens_decoder.values()}
        for token in sorted(model.tokens, key=model.tokens.get):
            seen.setdefault(token, added.get(token))
    before = united.get_vocab(with_added_tokens=True)
    new = [known or AddedToken(token) for token, known in seen.items() if token not in before]
    united.add_tokens(new)
    if plain := sum(seen[token] is None for token in seen.keys() - before.keys()):
        log.warning(
            "tokenizer_source: union makes %d ordinary tokens of other models into added ones, which are matched "
            "before any merge is: text is split otherwise than by any of the models",
            plain,
        )
    return united, united.get_vocab(with_added_tokens=True)


def _compare(donor: Checkpoint, checkpoints: Mapping[Reference, Checkpoint]) -> None:
    for model in checkpoints.values():
        if model is not donor and model.tokens and donor.tokens and model.tokens != donor.tokens:
            other = len(model.tokens.items() ^ donor.tokens.items())
            log.warning(
                "%s and %s differ in %d tokens: rows are merged by number and the tokenizer is the latter's; "
                "tokenizer_source: base merges them by token",
                *(model.reference, donor.reference, other),
            )
