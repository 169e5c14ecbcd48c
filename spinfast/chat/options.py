"""The options of `spinfast chat` and `spinfast serve`, which are read before anything large is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from spinfast.opening import add_options
from spinfast.terminal import Parser

BACKENDS = ("auto", "transformers", "vllm", "llama.cpp")
LONGEST = 8192  # tokens of a context that nobody asked for
RULES = {  # of what can be set -> (its type, is it one, in words)
    "temperature": (float, lambda v: 0 <= v <= 10, "a number from 0 (always the likeliest token) to 10"),
    "top_p": (float, lambda v: 0 < v <= 1, "a number above 0, 1 at most"),
    "max_tokens": (int, lambda v: v >= 1, "a whole number, 1 or more"),
    "seed": (int, lambda v: 0 <= v < 2**63, "a whole number, 0 or more"),
}


def parse_chat(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="spinfast chat",
        description="Talk to a model, a run's best adapter, or a .gguf file; base and adapter side by side. A question "
        "on the line or by a pipe is answered on stdout, and nothing else is written there. /help lists the commands.",
    )
    _of_speaker(parser)
    parser.add_argument("question", nargs="?", help="answer it and end; what a pipe brings stands below it")
    parser.add_argument("--compare", action="store_true", help="base and adapter answer, side by side")
    for name, (_, _, expected) in RULES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="N", help=expected)
    return parser.parse(argv)


def parse_serve(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="spinfast serve",
        description="OpenAI's /v1/chat/completions, /v1/completions and /v1/models on 127.0.0.1: the base under its "
        "own name and each adapter under its.",
    )
    _of_speaker(parser)
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default: 8000)")
    parser.add_argument("--batch-size", type=int, default=32, help="answers written at once; more wait")
    return parser.parse(argv)


def _of_speaker(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN | MODEL | ADAPTER | FILE.gguf", help="of a run its best adapter")
    parser.add_argument(
        *("--adapter", "-a"), action="append", default=[], metavar="[NAME=]DIR", help="another one, on the same base"
    )
    parser.add_argument("--model", help="the adapter's base, where its own name for it does not lead there")
    parser.add_argument("--backend", default="auto", help=f"{', '.join(BACKENDS)} (auto: llama.cpp for .gguf files)")
    parser.add_argument("--context", type=int, help=f"tokens of a prompt with its answer (default: {LONGEST} at most)")
    add_options(parser)
