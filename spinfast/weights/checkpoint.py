"""A model as merging reads it: tensors by name, one at a time, an adapter's update added as they are read."""

from __future__ import annotations

import logging
import re
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from spinfast.errors import UserError
from spinfast.model_check import HEAD, RECOMPUTED, TABLE, open_weights, read_json
from spinfast.models import at_hub, from_hub, load_tokenizer, resolve_model
from spinfast.opening import into_whole_weights
from spinfast.policy.adapters import compact, files
from spinfast.policy.adapters.expand import as_lora
from spinfast.store.files import expanded
from spinfast.weights.recipe import Reference

log = logging.getLogger("spinfast")

VOCABULARY = (TABLE, HEAD)  # weights of a row per token
LAYER = re.compile(r"(model\.layers\.)(\d+)(\..+)")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


class Checkpoint:
    """Its weights stay in their files, open as long as `stack`; of a LoRA the factors are in memory.

    Raises UserError for a model that `resolve_model` refuses, or an adapter that is not this model's.
    """

    def __init__(self, reference: Reference, stack: ExitStack):
        for name, revision in (
            (reference.name, reference.revision),
            (reference.adapter, reference.adapter_revision),
        ):
            if revision and not at_hub(name):
                raise UserError(f"model {reference}: only what is on the hub has a revision; leave @{revision} out")
        self.reference, self.base = reference, resolve_model(reference.name, reference.revision)
        self.config = AutoConfig.from_pretrained(self.base.path, local_files_only=True)
        self._slices = open_weights(self.base.path, stack)
        if self.config.tie_word_embeddings:
            self._slices.pop(HEAD, None)
        self._factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._trained: torch.dtype | None = None
        if reference.adapter:
            self._add(adapter_directory(reference), stack)

    def _add(self, directory: Path, stack: ExitStack) -> None:
        if compact.kind_of(directory) == "full":
            config, file = read_json(directory / "full.json"), directory / "full.safetensors"
            files.check_base(directory, config, self.base.revision, self.base.name)
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"adapter {file}: cannot be read ({error})") from None
            trained = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            if trained.keys() != {f"{module}.weight" for module in config.get("modules", ())}:
                raise UserError(f"adapter {directory}: full.json does not name what is in {file.name}; it was changed")
            self._trained = DTYPES[next(iter(trained.values())).get_dtype()]
            self._fits(directory, {name: of.get_shape() for name, of in trained.items()})
            self._slices |= trained
            return
        adapter = as_lora(files.load(directory, self.base.revision, name=self.base.name), self.base)
        into_whole_weights(directory)
        if files.idle(adapter):
            log.warning("adapter %s changes nothing: its B is zero", directory)
        self._factors = dict(files.updates(adapter))
        self._fits(directory, {name: [len(B), A.shape[1]] for name, (B, A) in self._factors.items()})

    def _fits(self, directory: Path, shapes: dict[str, list[int]]) -> None:
        for name, shape in shapes.items():
            own = self.shape(name) if name in self._slices else "no such weight"
            if own != shape:
                raise UserError(f"adapter {directory}: for {name} {shape}, the model {self.base.name} has {own}")

    @cached_property
    def names(self) -> list[str]:
        """Of its weights, embedding first, then layers in order; a head that is the embedding is none."""
        found = [name for name in self._slices if not RECOMPUTED.fullmatch(name)]
        return sorted(found, key=lambda name: [int(part) if part.isdigit() else part for part in name.split(".")])

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    @cached_property
    def tokenizer(self):
        """None if there is none."""
        there = any((self.base.path / name).exists() for name in TOKENIZERS)
        return load_tokenizer(self.base.path) if there else None

    @cached_property
    def tokens(self) -> dict[str, int]:
        return self.tokenizer.get_vocab() if self.tokenizer else {}

    def _slice(self, name: str):
        return self._slices[TABLE if name == HEAD and HEAD not in self._slices else name]

    def shape(self, name: str) -> list[int]:
        return self._slice(name).get_shape()

    def dtype(self, name: str) -> torch.dtype:
        """As it lies in its file; where weights were trained all are as these: another dtype may round updates away."""
        return self._trained or DTYPES[self._slice(name).get_dtype()]

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """In fp32, rounded to `dtype` first if there is one; it may be the file's own memory, not to be written to.

        Raises UserError if it is not finite.
        """
        tensor = self._slice(name)[:].float()
        factors = self._factors.get(TABLE if name == HEAD and HEAD not in self._slices else name)
        if factors:
            tensor = torch.addmm(tensor, *factors)
        if not tensor.isfinite().all():
            raise UserError(
                f"model {self.reference}: {name} is not finite; a damaged or diverged model cannot be merged"
            )
        return tensor if dtype is None else tensor.to(dtype).float()


def adapter_directory(reference: Reference) -> Path:
    """Of a local adapter, a finished run's best, or one on the hub."""
    if at_hub(reference.adapter):
        return from_hub(reference.adapter, reference.adapter_revision, "adapter")[0]
    return files.find(expanded(reference.adapter))


def with_base(directory: Path, model: str | None = None) -> Reference:
    """The base of the adapter, or of a run's best one, with it. `model`: the base, where its name leads nowhere."""
    found = files.find(directory)
    file = found / (f"{kind}.json" if (kind := compact.kind_of(found)) else files.CONFIG_FILE)
    if not file.exists():
        raise UserError(f"{directory}: expected a recipe (.yaml), an adapter, or a finished run with best.json")
    config = read_json(file)
    name = model or config.get("base_model_name_or_path")
    if not isinstance(name, str):
        raise UserError(f"adapter {found}: names no base; give it by --model")
    revision = config.get("revision") if not model and at_hub(name) else None
    return Reference(name, revision, str(found))
