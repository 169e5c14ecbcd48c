"""What answers, for a terminal and a server alike: the base and its adapters by name, tokens in, tokens out.

A .gguf file is computed by llama.cpp where xllamacpp is installed, everything else by the policy's own generator or, on
demand, by vLLM. Prompts are token ids of the project's renderer in every case.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from spinfast.chat.options import BACKENDS, LONGEST
from spinfast.data.renderer import Renderer
from spinfast.errors import UserError
from spinfast.generation import Voices
from spinfast.models import gguf_file
from spinfast.opening import SHORTEST, open_played, settings
from spinfast.store.files import expanded

log = logging.getLogger("spinfast")
BASE = "base"
TEMPERATURE, TOP_P = 0.7, 0.95  # where the model's generation_config.json says nothing


@dataclass(frozen=True)
class Speaker:
    """An open model. `voices` answers under each of its names: BASE and the adapters'."""

    model: str  # the base's name
    path: Path  # its files, or its .gguf file
    voices: Voices
    adapters: Mapping[str, Path]  # where they lie, by name, the target's own first
    renderer: Renderer
    context: int  # tokens of a prompt with its answer
    system: str | None
    temperature: float
    top_p: float
    backend: str
    rank: int = 0  # the largest of its adapters'

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.voices.adapters)

    @property
    def own(self) -> str:
        """Who answers unless another is asked for."""
        return next(iter(self.adapters), BASE)


@contextmanager
def open_speaker(arguments: argparse.Namespace, batch_size: int) -> Iterator[Speaker]:
    """The target with its adapters for the duration of the block. `batch_size`: answers written at once."""
    if arguments.context is not None and arguments.context < SHORTEST:
        raise UserError(f"--context: expected at least {SHORTEST} tokens, got {arguments.context}")
    if arguments.backend not in BACKENDS:
        raise UserError(f"--backend {arguments.backend}: expected {', '.join(BACKENDS)}")
    file = gguf_file(arguments.target)
    if chosen_backend(arguments.backend, file) == "llama.cpp":
        with _open_gguf(arguments, file, batch_size) as speaker:
            yield speaker
        return
    from spinfast.policy.adapters.files import find

    own = find_adapter(arguments.target)
    if not own and arguments.model:
        raise UserError(f"--model {arguments.model}: is the base of an adapter; {arguments.target} is a model itself")
    asked = argparse.Namespace(**vars(arguments) | {"model": arguments.model if own else arguments.target})
    own_items = [f"{name_of(arguments.target)}={own}"] if own else []
    places = {name: find(path) for name, path in named([*own_items, *arguments.adapter]).items()}
    options = {"backend": "vllm" if arguments.backend == "vllm" else "transformers", "batch_size": batch_size}
    with open_played(
        settings(asked, own), list(places.values()), asked, **options, length=arguments.context, longest=LONGEST
    ) as played:
        session, machine = played.session, played.session.machine
        session.policy.model.eval()
        temperature, top_p = sampling_defaults(machine.model.path)
        yield Speaker(
            model=machine.model.name,
            path=machine.model.path,
            voices=Voices(session.generator, {BASE: None, **dict(zip(places, played.adapters, strict=True))}),
            adapters=places,
            renderer=machine.renderer,
            context=played.length,
            system=session.config.prompt.system,
            temperature=temperature,
            top_p=top_p,
            backend=session.generator.name,
            rank=session.config.adapter.largest_rank,
        )


@contextmanager
def _open_gguf(arguments: argparse.Namespace, file: Path, slots: int) -> Iterator[Speaker]:
    """A .gguf file by llama.cpp; its tokenizer and template by the project's renderer, as for any model."""
    import torch

    from spinfast.generation.llama_cpp import LlamaCpp
    from spinfast.models import check_gguf, read_gguf_tokenizer, reading_gguf
    from spinfast.opening import template_variables

    for option in ("model", "revision", "dtype", "load_in_4bit", "profile", "attention"):
        if getattr(arguments, option) not in (None, False, "auto"):
            raise UserError(f"--{option.replace('_', '-')}: a .gguf file is played as it is; leave it out")
    loras = named(arguments.adapter)
    if wrong := [str(path) for path in loras.values() if path.suffix != ".gguf" or not path.is_file()]:
        raise UserError(
            f"--adapter {wrong[0]}: expected a LoRA as a .gguf file (spinfast export gguf ADAPTER --adapter-only)"
        )
    check_gguf(file, arguments.target)
    with reading_gguf(file):
        tokenizer, fields = read_gguf_tokenizer(file)
    trained = fields[f"{fields['general.architecture']}.context_length"]
    context = arguments.context or min(LONGEST, trained)
    if context > trained:
        raise UserError(f"--context {context}: {file.name} has a context of {trained}; lower it")
    said = {key: fields.get(f"general.sampling.{key}") for key in ("temp", "top_p")}
    with LlamaCpp(file, [*loras.values()], context, slots, torch.get_num_threads()) as engine:
        yield Speaker(
            model=file.name.removesuffix(".gguf"),
            path=file,
            voices=Voices(engine, {BASE: None, **{name: i for i, name in enumerate(loras)}}),
            adapters=loras,
            renderer=Renderer(tokenizer, template_variables(arguments.template)),
            context=context,
            system=arguments.system or None,
            temperature=said["temp"] or TEMPERATURE,
            top_p=said["top_p"] or TOP_P,
            backend=engine.name,
        )


def chosen_backend(asked: str, file: Path | None) -> str:
    """`asked`, or who plays this .gguf file (None: the target is none), which is said."""
    installed = importlib.util.find_spec("xllamacpp") is not None
    if asked == "llama.cpp" and file is None:
        raise UserError("--backend llama.cpp: plays .gguf files; make one with spinfast export gguf")
    if asked == "llama.cpp" and not installed:
        raise UserError("--backend llama.cpp: xllamacpp is not installed; pip install xllamacpp")
    if asked != "auto" or file is None:
        return asked
    if not installed:
        log.info("%s: xllamacpp is not installed (pip install xllamacpp), so transformers plays it", file.name)
    return "llama.cpp" if installed else "transformers"


def find_adapter(target: str) -> Path | None:
    """The adapter's directory that the target means; None where it is a model."""
    from spinfast.policy.adapters.files import find

    directory = expanded(target)
    return find(directory) if directory.is_dir() and not (directory / "config.json").exists() else None


def named(items: Sequence[str]) -> dict[str, Path]:
    """[NAME=]DIR -> path by name; without one it is the directory's, of a run's stage the stage's."""
    places: dict[str, Path] = {}
    for item in items:
        name, equals, where = item.partition("=")
        if not equals or expanded(item).exists():
            name, where = name_of(item), item
        if not name or not where or name == BASE or any(c.isspace() or not c.isprintable() for c in name):
            raise UserError(f"adapter {item}: expected DIR or NAME=DIR, the name without blanks and not {BASE!r}")
        if name in places:
            raise UserError(f"adapter {item}: there is one named {name!r} already; give it a name, NAME=DIR")
        places[name] = expanded(where)
    return places


def name_of(path: str) -> str:
    """runs/NAME, runs/NAME/iter_000/adapter, runs/NAME/base/adapter -> NAME, iter_000, NAME-base: what tells most."""
    *above, name = [part for part in expanded(path).absolute().parts if part != "adapter"]
    name = f"{above[-1]}-{name}" if name == BASE else name
    return "-".join(name.removesuffix(".gguf").split())


def sampling_defaults(path: Path) -> tuple[float, float]:
    """Temperature and top_p by the model's generation_config.json, as transformers and vLLM take them."""
    from spinfast.model_check import read_json

    file = path / "generation_config.json"
    said = read_json(file) if file.is_file() else {}
    temperature, top_p = said.get("temperature") or TEMPERATURE, said.get("top_p") or TOP_P
    if not all(
        isinstance(value, (int, float)) and 0 < value <= most for value, most in ((temperature, 10), (top_p, 1))
    ):
        log.warning("%s: temperature %r, top_p %r are no such numbers; not used", file, temperature, top_p)
        return TEMPERATURE, TOP_P
    return float(temperature), float(top_p)
