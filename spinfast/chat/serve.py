"""`spinfast serve RUN | MODEL | ADAPTER | FILE.gguf`: OpenAI's API on the loopback address, for programs and trials.

One process, one model, no keys and no encryption: it listens on 127.0.0.1 alone and prints the line that serves the
same by vLLM, for more than that.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import shlex
import signal
import socket
import sys
from pathlib import Path

from spinfast.chat.speaker import Speaker, open_speaker
from spinfast.errors import UserError
from spinfast.generation.vllm import served_rank
from spinfast.policy.adapters.compact import kind_of
from spinfast.progress import heard, open_console
from spinfast.run import quiet_libraries

log = logging.getLogger("spinfast")
HOST = "127.0.0.1"
GRACE = 5  # seconds for the answers in progress once it is told to end


def main(arguments: argparse.Namespace) -> int:
    """0 once a signal ended it; UserError where it cannot start."""
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size: expected at least 1, got {arguments.batch_size}")
    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise UserError(f"serve needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    quiet_libraries()
    with listening(arguments.port) as door, heard(open_console(sys.stderr)):
        return serve(arguments, door)


def listening(port: int) -> socket.socket:
    """The open door, before the model is loaded: clients that come early wait."""
    try:
        return socket.create_server((HOST, port), backlog=2048)
    except OverflowError:
        raise UserError(f"--port {port}: expected 0 to 65535") from None
    except OSError as error:
        raise UserError(f"--port {port}: {os.strerror(error.errno)}; give another, or 0 for any free one") from None


def serve(arguments: argparse.Namespace, door: socket.socket) -> int:
    import uvicorn

    ends = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: sys.exit(0)) for number in ends}
    try:
        with open_speaker(arguments, arguments.batch_size) as speaker:
            from spinfast.chat.server import application
            from spinfast.chat.worker import Worker

            for number in ends:  # uvicorn's own take their place, and hand the signal on when all is over
                signal.signal(number, lambda *_: None)
            address = f"http://{HOST}:{door.getsockname()[1]}/v1"
            for line in lines(speaker, address):
                log.info(line)
            with Worker(speaker.voices) as worker:
                config = uvicorn.Config(
                    application(speaker, worker),
                    log_config=None,
                    log_level="critical",  # the application says what goes wrong
                    access_log=False,
                    lifespan="off",
                    timeout_graceful_shutdown=GRACE,
                )
                uvicorn.Server(config).run(sockets=[door])
        log.info("ended")
        return 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def lines(speaker: Speaker, address: str) -> list[str]:
    """What a person needs to know once it serves."""
    from spinfast.chat.api import models

    names = [*models(speaker)]
    body = json.dumps({"model": names[0], "messages": [{"role": "user", "content": "Hello"}]})
    return [
        f"{', '.join(names)} at {address} ({speaker.backend}, context {speaker.context}); Ctrl-C ends it",
        f"curl {address}/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}",
        *(
            f"for many users: {' && '.join(map(shlex.join, commands))}"
            for commands in [production(speaker)]
            if commands
        ),
    ]


def production(speaker: Speaker) -> list[list[str]]:
    """The commands that serve the same by an engine that is made for it, which knows PEFT's LoRA and no other kind.

    None for two models that answer together.
    """
    if speaker.backend == "llama.cpp":
        return [["llama-server", "-m", str(speaker.path), *(f"--lora={path}" for path in speaker.adapters.values())]]
    path, first, modules = speaker.path, [], []
    for name, place in speaker.adapters.items():
        made = f"{name}-for-vllm"
        if (kind := kind_of(place)) == "calm":
            return []
        if kind == "full":
            first.append(["spinfast", "merge", str(place), "--out", made])
            path = Path(made)
            continue
        if kind:
            first.append(["spinfast", "expand", str(place), "--out", made])
        modules.append(f"{name}={made if kind else place}")
    words = ["vllm", "serve", str(path), "--served-model-name", speaker.model, "--max-model-len", str(speaker.context)]
    if modules:
        words += ["--enable-lora", "--max-lora-rank", str(served_rank(speaker.rank)), "--lora-modules", *modules]
    return [*first, words]
