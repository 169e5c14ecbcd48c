"""The line that starts `spinfast`: which commands there are and how they are read. What they do is imported late."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from spinfast import spread
from spinfast.errors import UserError
from spinfast.interrupt import catching_signals
from spinfast.terminal import Parser

PURPOSE = "SFT, self-play (SPIN), DPO and GRPO of small language models, in little memory"


class ConfigParser(Parser):
    """Of a command about a config: `path`, None where none is named, and `overrides`, of all that is parsed."""

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        self.add_argument("config", nargs="*", metavar="CONFIG.yaml | section.key=value")
        arguments = super().parse(argv)
        if apart := [word for word in arguments.config if word.startswith("=") or word.endswith("=")]:
            self.error(f"{apart[0]!r}: expected section.key=value in one word, without spaces around the =")
        paths = [Path(word) for word in arguments.config if "=" not in word]
        if len(paths) > 1:
            self.error(f"expected one config file, got {', '.join(map(str, paths))}")
        arguments.path = paths[0] if paths else None
        arguments.overrides = [word for word in arguments.config if "=" in word]
        return arguments


def run(argv: Sequence[str]) -> int:
    from spinfast.run import parse, run

    words = parse(argv)
    with catching_signals(), spread.opened():
        return run(*words)


def evaluate(argv: Sequence[str]) -> int:
    return import_module("spinfast.evaluate.cli").main(argv)


def report(argv: Sequence[str]) -> int:
    return import_module("spinfast.report.cli").main(argv)


def doctor(argv: Sequence[str]) -> int:
    parser = ConfigParser(
        prog="spinfast doctor",
        description="What this machine can run, and why not: one Markdown table to paste into an issue. Exit code 0: "
        "the config, the default one if none is named, can run; 2: it cannot.",
    )
    parser.add_argument("--run-dir", type=Path, default=Path(), help="where runs would go: is there room on that disk?")
    arguments = parser.parse(argv)
    from spinfast.doctor import examine

    return examine(arguments.path, arguments.overrides, arguments.run_dir)


def params(argv: Sequence[str]) -> int:
    parser = ConfigParser(
        prog="spinfast params",
        description="What each kind of adapter trains on the config's model: numbers, bytes, and who published it.",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.parse(argv)
    from spinfast.config import load_config
    from spinfast.models import resolve_model
    from spinfast.params import main
    from spinfast.run import default_config

    config = load_config(arguments.path or default_config()[0], arguments.overrides)
    main(resolve_model(config.model.name, config.model.revision).path, config.adapter, arguments.json)
    return 0


def expand(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="spinfast expand",
        description="Make plain PEFT LoRA of a LoRA-XS or TinyLoRA adapter. A whole model: spinfast merge.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="the adapter's, or a run's: its best")
    parser.add_argument("--out", type=Path, required=True, help="where it goes; must not be there")
    parser.add_argument("--model", help="its base, where the adapter's own name for it does not lead there")
    arguments = parser.parse(argv)
    from spinfast.policy.adapters.expand import expand

    print(f"{arguments.out}: {expand(arguments.directory, arguments.out, arguments.model)}")
    return 0


def merge(argv: Sequence[str]) -> int:
    return import_module("spinfast.weights.merge_cli").main(argv)


def study(argv: Sequence[str]) -> int:
    return import_module("spinfast.studies.cli").study(argv)


def rate(argv: Sequence[str]) -> int:
    return import_module("spinfast.studies.cli").rate(argv)


def spectrum(argv: Sequence[str]) -> int:
    return import_module("spinfast.weights.cli").main(argv)


def export(argv: Sequence[str]) -> int:
    return import_module("spinfast.weights.export").main(argv)


def publish(argv: Sequence[str]) -> int:
    return import_module("spinfast.hub.cli").main(argv)


def chat(argv: Sequence[str]) -> int:
    arguments = import_module("spinfast.chat.options").parse_chat(argv)
    import_module("spinfast.run").spare_imports()
    return import_module("spinfast.chat.cli").main(arguments)


def serve(argv: Sequence[str]) -> int:
    arguments = import_module("spinfast.chat.options").parse_serve(argv)
    import_module("spinfast.run").spare_imports()
    return import_module("spinfast.chat.serve").main(arguments)


def replay(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="spinfast replay", description="Make the step that stopped a run again, and say what is not finite."
    )
    parser.add_argument("directory", type=Path, metavar="RUN/failed_step")
    directory = parser.parse(argv).directory
    from spinfast.store.failed_step import replay

    for line in replay(directory):
        print(line)
    return 0


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "run": (run, "play CONFIG.yaml; without one, a config for this machine"),
    "report": (report, "one HTML file about a run, or about several side by side"),
    "eval": (evaluate, "score a model, with or without an adapter, on tasks"),
    "doctor": (doctor, "what this machine can run, and why not"),
    "params": (params, "what each kind of adapter trains, in numbers and bytes"),
    "expand": (expand, "plain LoRA of a LoRA-XS or TinyLoRA adapter"),
    "chat": (chat, "talk to a model, a run or a .gguf file"),
    "serve": (serve, "the same over HTTP, as OpenAI's API has it"),
    "merge": (merge, "one model of several, or of a run and its base"),
    "export": (export, "one .gguf file for llama.cpp, Ollama and phones"),
    "publish": (publish, "a run's data sets and adapters to the Hugging Face hub"),
    "study": (study, "a grid of short runs on one base, compared with statistics"),
    "rate": (rate, "what training on each of several texts does to reasoning"),
    "spectrum": (spectrum, "which weight matrices are worth training whole"),
    "replay": (replay, "make the step that stopped a run again"),
}


def overview() -> str:
    lines = [f"  spinfast {name:10}{does}" for name, (_, does) in COMMANDS.items()]
    return "\n".join([f"{PURPOSE}.", "", *lines, "", "`spinfast COMMAND --help` says more."])


def split(argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    """(command, its words). A line that begins with an option, a config or a key is a run."""
    word = argv[0] if argv else ""
    if word in COMMANDS:
        return word, argv[1:]
    if not word.isidentifier() or Path(word).exists():
        return "run", argv
    nearest = difflib.get_close_matches(word, COMMANDS, n=1)
    expected = f"did you mean {nearest[0]}?" if nearest else f"expected {', '.join(COMMANDS)} or a CONFIG.yaml"
    raise UserError(f"unknown command {word}: {expected}")
