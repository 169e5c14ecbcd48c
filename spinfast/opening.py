"""A model, with or without adapters, opened as a run plays it: for `spinfast eval`, `chat` and `serve`.

An adapter that lies in a run directory brings the run's model, system prompt, template variables and dtype, wherever no
option says otherwise; any other brings the base that its own config names.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spinfast.errors import UserError

if TYPE_CHECKING:
    from spinfast.scoring import Budget
    from spinfast.session import Session
    from spinfast.types import Adapter

log = logging.getLogger("spinfast")
SHORTEST = 16  # tokens of a context that holds a prompt's end and an answer
DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Played:
    """An open session and the adapters as its policy takes them; the first one is the live one."""

    session: Session
    adapters: tuple[Adapter, ...]
    length: int  # tokens of the context
    budget: Budget  # of a packed batch that is scored


def add_options(parser: argparse.ArgumentParser) -> None:
    """What decides over how a model is played."""
    parser.add_argument("--revision", help="commit of a hub model")
    parser.add_argument("--profile", default="auto", help="device.profile, as in a config")
    parser.add_argument("--dtype", help="device.dtype, as in a config (default: the run's, or auto)")
    parser.add_argument("--attention", default="auto", help="device.attention, as in a config")
    parser.add_argument(
        "--load-in-4bit", action=argparse.BooleanOptionalAction, help="model.load_in_4bit (default: the run's, or no)"
    )
    parser.add_argument(
        "--system", help="system turn before every chat prompt (default: the run's, or none); '' is none"
    )
    parser.add_argument(
        "--template", action="append", default=[], metavar="NAME=VALUE", help="template variables, beside the run's own"
    )


def settings(arguments: argparse.Namespace, adapter: Path | None = None) -> dict:
    """The options given, else those of the run that the adapter lies in, else a config's defaults.

    Keys: model, revision, load_in_4bit, system, template, dtype. Raises UserError where nothing names a model.
    """
    from spinfast.config import load_config

    if arguments.dtype not in (None, *DTYPES):
        raise UserError(f"--dtype: expected one of {', '.join(DTYPES)}, got {arguments.dtype!r}")
    found = {"revision": None, "load_in_4bit": False, "system": None, "template": {}, "dtype": "auto"}
    if adapter and (run := run_of(adapter)):
        c = load_config(run / "config.yaml")
        found = {"model": c.model.name, "revision": c.model.revision, "load_in_4bit": c.model.load_in_4bit}
        found |= {"system": c.prompt.system, "template": c.prompt.template, "dtype": c.device.dtype}
        log.info("settings of the run %s, where no option says otherwise: %s", run, found)
    elif adapter and not arguments.model:
        from spinfast.policy.adapters import files as adapters

        config = adapters.load(adapter).config
        if not config.get("base_model_name_or_path"):
            raise UserError(f"adapter {adapter}: names no base; give it by --model")
        found |= {"model": config["base_model_name_or_path"], "revision": config.get("revision")}
    given = {name: getattr(arguments, name) for name in ("model", "revision", "load_in_4bit", "system", "dtype")}
    if arguments.model:
        found["revision"] = None  # it is another model's
    found |= {name: value for name, value in given.items() if value is not None}
    if "model" not in found:
        raise UserError("--model: expected a model, or an --adapter that names its own")
    return found | {
        "system": found["system"] or None,
        "template": found["template"] | template_variables(arguments.template),
    }


def run_of(adapter: Path) -> Path | None:
    """The run directory that an adapter lies in."""
    marks = "config.yaml", "inputs.json"
    return next((p for p in adapter.resolve().parents if all((p / mark).is_file() for mark in marks)), None)


def into_whole_weights(adapter: Path) -> None:
    """Warns of an adapter whose run had its base in 4 bits, before it is added to weights that are not."""
    from spinfast.config import load_config

    if (run := run_of(adapter)) and load_config(run / "config.yaml").model.load_in_4bit:
        log.warning(
            "adapter %s was trained on the base in 4 bits; with whole weights it answers otherwise than the run did: "
            "evaluate what is made",
            adapter,
        )


@contextmanager
def open_played(
    found: Mapping,
    paths: Sequence[Path],
    arguments: argparse.Namespace,
    *,
    backend: str,
    length: int | None,
    longest: int,
    batch_size: int,
) -> Iterator[Played]:
    """Model, adapters and generator for the duration of the block, opened as a run opens them.

    found: from `settings`; paths: of the adapters. The context is `length` tokens, else the model's, `longest` at most.
    """
    from transformers import AutoConfig

    from spinfast.config import parse_config
    from spinfast.memory.planner import StepPlan
    from spinfast.model_check import window
    from spinfast.models import resolve_model
    from spinfast.policy.adapters import files as adapters
    from spinfast.policy.calm import augmenting_of
    from spinfast.scoring import Budget
    from spinfast.session import look, open_session

    model = resolve_model(found["model"], found["revision"])
    loaded = [adapters.uniform(adapters.load(path, model.revision, name=model.name)) for path in paths]
    if len(loaded) > 1:
        loaded = [_as_lora(adapter, path, model) for adapter, path in zip(loaded, paths, strict=True)]
    room = _room(loaded) if loaded else {}
    shapes = [AutoConfig.from_pretrained(model.path, local_files_only=True)]
    shapes += [augmenting_of(room)[1]] if "augmenting" in room else []
    most = min(min(s.max_position_embeddings, window(s) or s.max_position_embeddings) for s in shapes)
    if (length := length or min(longest, most)) > most:
        raise UserError(f"{length} tokens were asked for, but {model.name} has a context of {most}; lower it")
    answer = SHORTEST // 2
    tree = {
        "model": {"name": found["model"], "revision": found["revision"], "load_in_4bit": found["load_in_4bit"]},
        "data": {"source": "another's"},
        "prompt": {
            "max_prompt_tokens": length - answer,
            "max_answer_tokens": answer,
            "system": found["system"],
            "template": found["template"],
        },
        "generation": {"backend": backend, "batch_size": batch_size, "max_tokens": answer},
        "evaluate": {"max_tokens": answer},
        "device": {"profile": arguments.profile, "dtype": found["dtype"], "attention": arguments.attention},
    }
    if loaded:
        tree["adapter"] = room
    config = parse_config(tree, "options")
    machine = look(config, model=model)
    budget = Budget(max(4096, 2 * length), machine.device.attention)
    with open_session(config, machine, StepPlan(budget.microbatch_tokens)) as session:
        if len(loaded) > 1:
            idle = session.policy.adapter()
            loaded = [_grown(session, adapter, idle, path) for adapter, path in zip(loaded, paths, strict=True)]
        if loaded:
            session.policy.load_adapter(loaded[0])
            session.check_generator(_canary_prompt(machine.renderer), loaded[0])
        yield Played(session, tuple(loaded), length, budget)


def _grown(session: Session, adapter: Adapter, idle: Adapter, path: Path) -> Adapter:
    """The adapter in `idle`'s place, which has room for its rank and modules: only another base leaves it none."""
    try:
        return session.policy.grown(adapter, idle)
    except UserError:
        raise UserError(
            f"adapter {path}: does not fit {session.machine.model.name}, it was made for another base; open it alone, "
            "or with adapters of its own"
        ) from None


def _room(loaded: Sequence[Adapter]) -> dict:
    """The config's adapter section in which each of them has a place: the largest rank, all modules."""
    from spinfast.policy.adapters import files as adapters

    sections = [adapters.settings(adapter) for adapter in loaded]
    if len(sections) == 1:
        return sections[0]
    modules = sorted({module for section in sections for module in section["target_modules"]})
    return max(sections, key=lambda section: section["r"]) | {"target_modules": modules}


def _as_lora(adapter: Adapter, path: Path, model) -> Adapter:
    from spinfast.policy.adapters.expand import as_lora

    if adapter.kind == "full":
        raise UserError(
            f"adapter {path}: trains whole weights, which stand alone beside the base; leave the others out"
        )
    return as_lora(adapter, model)


def template_variables(items: Sequence[str]) -> dict:
    """NAME=VALUE, the value in JSON where it is JSON: enable_thinking=false is no text."""
    found = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise UserError(f"--template {item}: expected NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _canary_prompt(renderer) -> tuple[int, ...]:
    from spinfast.data.renderer import plain_ids

    question = "What is the sum of twelve and thirty?"
    if not renderer.has_template:
        return plain_ids(renderer.tokenizer, question)
    return renderer.prompt_ids([{"role": "user", "content": question}])
