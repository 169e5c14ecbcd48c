"""`spinfast eval --model NAME [--adapter DIR] --tasks gsm8k_chat,boolq,mine.jsonl [--limit N]`

An adapter that lies in a run directory is played as the run played it: its model, system prompt, template variables and
dtype are the run's wherever no option says otherwise, and `spinfast eval --adapter RUN --tasks ...` is enough.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from spinfast.errors import UserError
from spinfast.evaluate.answers import SCORERS
from spinfast.evaluate.tasks import LEADERBOARD, TASKS, find_task, hopeless, load_rows
from spinfast.store import files
from spinfast.terminal import Parser

if TYPE_CHECKING:
    from spinfast.evaluate.benchmark import Engine

log = logging.getLogger("spinfast")
SHORTEST = 16  # tokens of a context that holds a prompt's end and an answer
COMMIT = re.compile("[0-9a-f]{7,40}")
DTYPES = ("auto", "float32", "float16", "bfloat16")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="spinfast eval",
        description="Score a model, with or without an adapter, on benchmark tasks.",
        epilog=f"tasks: {', '.join(TASKS)}, leaderboard (= {','.join(LEADERBOARD)}), FILE.jsonl; NAME:5 is 5-shot",
    )
    parser.add_argument("--model", help="hub id, directory or .gguf, as in a config's model.name (default: the run's)")
    parser.add_argument("--revision", help="commit of a hub model")
    parser.add_argument("--adapter", type=Path, help="directory of a LoRA adapter, or a run: its best; default: none")
    parser.add_argument("--tasks", required=True, type=lambda text: text.split(","), help="comma-separated")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="TASK=WHERE",
        help="FOLDER with SPLIT.jsonl files, or the commit of the hub's data set",
    )
    parser.add_argument("--scorer", default="text", choices=sorted(SCORERS), help="verdict on FILE.jsonl tasks")
    parser.add_argument("--limit", type=int, help="only the first N rows of each task")
    parser.add_argument("--output", type=Path, help="folder for results.json and samples_TASK.jsonl")
    parser.add_argument("--harness", action="store_true", help="the tasks are lm_eval's, run by lm_eval (if installed)")
    parser.add_argument("--chat-template", action="store_true", help="with --harness: prompts as the user's turn")
    parser.add_argument("--max-length", type=int, help="tokens of the context (default: the model's, 2048 at most)")
    parser.add_argument("--batch-size", type=int, default=64, help="answers written at once")
    parser.add_argument("--profile", default="auto", help="device.profile, as in a config")
    parser.add_argument("--dtype", help="device.dtype, as in a config (default: the run's, or auto)")
    parser.add_argument("--attention", default="auto", help="device.attention, as in a config")
    parser.add_argument("--backend", default="transformers", help="generation.backend, as in a config; auto: vLLM")
    parser.add_argument(
        "--load-in-4bit", action=argparse.BooleanOptionalAction, help="model.load_in_4bit (default: the run's, or no)"
    )
    parser.add_argument(
        "--system", help="system turn before every chat prompt (default: the run's, or none); '' is none"
    )
    parser.add_argument(
        "--template", action="append", default=[], metavar="NAME=VALUE", help="template variables, beside the run's own"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampled answers (avg@k)")
    return parser.parse(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, print a table, write results; UserError for what the user can mend."""
    arguments = parse(argv)
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit: expected at least 1, got {arguments.limit}")
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size: expected at least 1, got {arguments.batch_size}")
    if arguments.max_length is not None and arguments.max_length < SHORTEST:
        raise UserError(f"--max-length: expected at least {SHORTEST}, got {arguments.max_length}")
    if arguments.dtype not in (None, *DTYPES):
        raise UserError(f"--dtype: expected one of {', '.join(DTYPES)}, got {arguments.dtype!r}")
    if arguments.chat_template and not arguments.harness:
        raise UserError("--chat-template: goes with --harness; without it the _chat tasks are the chat ones")
    if arguments.harness and find_spec("lm_eval") is None:
        raise UserError("--harness: lm_eval is not installed; pip install lm_eval==0.4.13")
    names = [name for asked in arguments.tasks for name in (LEADERBOARD if asked == "leaderboard" else (asked,))]
    tasks = [] if arguments.harness else [find_task(name, arguments.scorer) for name in names]
    places = dict(_place(item) for item in arguments.data)

    from spinfast.evaluate.benchmark import evaluate, report
    from spinfast.progress import open_console, show

    with open_engine(arguments) as engine:
        if arguments.harness:
            from spinfast.evaluate.harness import run

            found = run(engine, names, limit=arguments.limit, apply_chat_template=arguments.chat_template)
            outcome = {key: found[key] for key in ("results", "n-shot", "n-samples", "versions")}
            samples = found["samples"]
        else:
            results = []
            for task in tasks:
                place = places.get(task.name)
                if place is None and not task.source.endswith(".jsonl"):
                    log.warning(
                        "%s: %s as the hub has it today; pin it: --data %s=COMMIT", task.name, task.source, task.name
                    )
                rows = load_rows(task, task.split, place)[: arguments.limit]
                pool = load_rows(task, task.shot_split, place) if task.shots else []
                log.info("%s: %d rows, %d-shot", task.name, len(rows), task.shots)
                if warning := hopeless(task, rows):
                    log.warning("%s: %s", task.name, warning)
                results.append(evaluate(task, engine, rows, pool))
            adapter = arguments.adapter and str(arguments.adapter)
            config = {"adapter": adapter, "limit": arguments.limit, **engine.settings}
            outcome = report(results, config | {"data": {name: str(place) for name, place in places.items()}})
            samples = {result.task.name: result.samples for result in results}
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        files.write_json(arguments.output / "results.json", outcome)
        for name, rows in samples.items():
            text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
            files.write_text(arguments.output / f"samples_{name}.jsonl", text)
    show(open_console(), None, ("task", "metric", "shots", "items", "value"), _lines(outcome), keys=2)
    return 0


@contextmanager
def open_engine(arguments: argparse.Namespace) -> Iterator[Engine]:
    """Model, adapter and generator for the duration of the block, opened as a run opens them."""
    from transformers import AutoConfig

    from spinfast.config import parse_config
    from spinfast.evaluate.benchmark import Engine
    from spinfast.memory.planner import StepPlan
    from spinfast.model_check import window
    from spinfast.models import resolve_model
    from spinfast.policy.adapters import files as adapters
    from spinfast.session import look, open_session
    from spinfast.train import Budget, sequence_logps

    path = adapters.find(files.expanded(str(arguments.adapter))) if arguments.adapter else None
    settings = _settings(arguments, _run_of(path) if path else None)
    model = resolve_model(settings["model"], settings["revision"])
    shape = AutoConfig.from_pretrained(model.path, local_files_only=True)
    length = arguments.max_length or min(2048, shape.max_position_embeddings, window(shape) or 2048)
    answer = SHORTEST // 2
    tree = {
        "model": {
            "name": settings["model"],
            "revision": settings["revision"],
            "load_in_4bit": settings["load_in_4bit"],
        },
        "data": {"source": "the tasks'"},
        "prompt": {
            "max_prompt_tokens": length - answer,
            "max_answer_tokens": answer,
            "system": settings["system"],
            "template": settings["template"],
        },
        "generation": {"backend": arguments.backend, "batch_size": arguments.batch_size, "max_tokens": answer},
        "evaluate": {"max_tokens": answer},
        "device": {"profile": arguments.profile, "dtype": settings["dtype"], "attention": arguments.attention},
    }
    adapter = None
    if path:
        adapter = adapters.uniform(adapters.load(path, model.revision, name=model.name))
        tree["adapter"] = adapters.settings(adapter)
    config = parse_config(tree, "eval")
    machine = look(config, model=model)
    budget = Budget(max(4096, 2 * length), machine.device.attention)
    with open_session(config, machine, StepPlan(budget.microbatch_tokens)) as session:
        if adapter:
            session.policy.load_adapter(adapter)
            session.check_generator(_canary_prompt(machine.renderer), adapter)
        yield Engine(
            tokenizer=machine.renderer.tokenizer,
            render=machine.renderer.prompt_ids,
            generate=lambda requests, sampling: session.generator.generate(requests, sampling, adapter),
            sequence_logps=lambda groups: sequence_logps(session.policy, groups, budget),
            stop_ids=machine.renderer.stop_ids,
            max_length=length,
            seed=arguments.seed,
            settings=settings,
        )


def _run_of(adapter: Path) -> Path | None:
    """The run directory that an adapter lies in."""
    marks = "config.yaml", "inputs.json"
    return next((p for p in adapter.resolve().parents if all((p / mark).is_file() for mark in marks)), None)


def _settings(arguments: argparse.Namespace, run: Path | None) -> dict:
    """What decides over the answers: the options given, else the run's own, else a config's defaults."""
    from spinfast.config import load_config

    found = {"revision": None, "load_in_4bit": False, "system": None, "template": {}, "dtype": "auto"}
    if run:
        c = load_config(run / "config.yaml")
        found = {"model": c.model.name, "revision": c.model.revision, "load_in_4bit": c.model.load_in_4bit}
        found |= {"system": c.prompt.system, "template": c.prompt.template, "dtype": c.device.dtype}
        log.info("settings of the run %s, where no option says otherwise: %s", run, found)
    given = {name: getattr(arguments, name) for name in ("model", "revision", "load_in_4bit", "system", "dtype")}
    if arguments.model:
        found["revision"] = None  # it is another model's
    found |= {name: value for name, value in given.items() if value is not None}
    if "model" not in found:
        raise UserError("--model: expected a model, or an --adapter that lies in a run directory")
    return found | {"system": found["system"] or None, "template": found["template"] | _template(arguments.template)}


def _template(items: Sequence[str]) -> dict:
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
    return tuple(renderer.prompt_ids([{"role": "user", "content": "What is the sum of twelve and thirty?"}]))


def _place(item: str) -> tuple[str, Path | str]:
    name, found, where = item.partition("=")
    if found and Path(where).is_dir():
        return name, Path(where)
    if found and COMMIT.fullmatch(where):
        return name, where
    raise UserError(f"--data {item}: expected TASK=FOLDER with an existing folder, or TASK=COMMIT")


def _lines(outcome: dict) -> Iterator[tuple[str, ...]]:
    for name, entry in outcome["results"].items():
        for metric, value in entry.items():
            base, comma, filtered = metric.partition(",")
            if not comma or base.endswith("_stderr"):
                continue
            stderr = entry[f"{base}_stderr,{filtered}"]
            shots = outcome["n-shot"].get(name, "")
            items = outcome["n-samples"].get(name, {}).get("effective", "")
            error = "" if isinstance(stderr, str) else f" ± {stderr:.4f}"
            yield name, metric, str(shots), str(items), f"{value:.4f}{error}"
