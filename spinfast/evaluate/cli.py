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
from spinfast.opening import SHORTEST, add_options, open_played, settings
from spinfast.store import files
from spinfast.terminal import Parser

if TYPE_CHECKING:
    from spinfast.evaluate.benchmark import Engine

log = logging.getLogger("spinfast")
COMMIT = re.compile("[0-9a-f]{7,40}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="spinfast eval",
        description="Score a model, with or without an adapter, on benchmark tasks.",
        epilog=f"tasks: {', '.join(TASKS)}, leaderboard (= {','.join(LEADERBOARD)}), FILE.jsonl; NAME:5 is 5-shot",
    )
    parser.add_argument("--model", help="hub id, directory or .gguf, as in a config's model.name (default: the run's)")
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
    parser.add_argument("--backend", default="transformers", help="generation.backend, as in a config; auto: vLLM")
    add_options(parser)
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
    """What a benchmark needs of the model, for the duration of the block."""
    from spinfast.evaluate.benchmark import Engine
    from spinfast.policy.adapters import files as adapters
    from spinfast.scoring import sequence_logps

    paths = [adapters.find(files.expanded(str(arguments.adapter)))] if arguments.adapter else []
    found = settings(arguments, *paths)
    options = {"backend": arguments.backend, "length": arguments.max_length, "longest": 2048}
    with open_played(found, paths, arguments, **options, batch_size=arguments.batch_size) as played:
        session, renderer = played.session, played.session.machine.renderer
        adapter = next(iter(played.adapters), None)
        yield Engine(
            tokenizer=renderer.tokenizer,
            render=renderer.prompt_ids,
            generate=lambda requests, sampling: session.generator.generate(requests, sampling, adapter),
            sequence_logps=lambda groups: sequence_logps(session.policy, groups, played.budget),
            stop_ids=renderer.stop_ids,
            max_length=played.length,
            seed=arguments.seed,
            settings=found,
        )


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
