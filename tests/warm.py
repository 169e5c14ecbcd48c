"""Runs as processes of their own, to be killed for real: forked from a server that has torch and spinfast imported.

A cold start costs seconds of imports; a child of the warm server starts at `spinfast.run.main` in milliseconds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from test_run import fingerprints, write_config

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    [
        "spinfast.run",
        "spinfast.methods",
        "spinfast.methods.controls",
        "spinfast.environment",
        "spinfast.generation.transformers",
        "spinfast.weights.adapter_merge",
        "spinfast.weights.gguf",
        "torch.utils.tensorboard",
        "torch._dynamo",
        "transformers.models.llama.modeling_llama",
    ]
)
SECONDS = 120  # no run here takes so long: it hangs


def child(argv: list[str], output: str, before: Callable[[], None] | None) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    from spinfast.run import main

    torch.set_num_threads(1)
    if before:
        before()
    sys.exit(main(argv))


class Runs:
    """Runs of one tiny config (SFT, two iterations, a checkpoint at every step), each in a directory of its own.

    Or of the directory's own config.yaml, where it has one.
    """

    def __init__(self, directory: Path, model: Path, **sections):
        self.directory, self.config = directory, directory / "config.yaml"
        if not self.config.exists():
            always = {"sft": {"groups_per_step": 6}, "train": {"save_every_steps": 1}}
            write_config(directory, model, **(always | sections))
        self.output = directory / "output.txt"
        self.undisturbed = directory / "undisturbed"
        assert self.finish(self.start("warm-up", "no.such.key=1")) == 2  # the server has imported everything now
        started = time.monotonic()
        assert self.finish(self.start("undisturbed")) == 0, self.output.read_text()
        self.seconds = time.monotonic() - started

    def start(self, name: str, *words: str, before: Callable[[], None] | None = None):
        """A process that plays, or goes on playing, the run `name`."""
        arguments = [str(self.config), "--run-dir", str(self.directory / name), *words]
        process = FORK.Process(target=child, args=(arguments, str(self.output), before))
        process.start()
        return process

    def finish(self, process) -> int:
        """Its exit code, negative for a signal."""
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"still running after {SECONDS} s; {self.output.read_text()[-2000:]}")
        code = process.exitcode
        process.close()
        return code

    def new(self, name: str) -> Path:
        shutil.rmtree(self.directory / name, ignore_errors=True)
        self.output.write_text("")
        return self.directory / name

    def complaint(self) -> str:
        """What the processes said since `new`, which must be no traceback."""
        said = self.output.read_text(errors="replace")
        assert "Traceback" not in said, said[-4000:]
        return said


def computed(run_dir: Path) -> dict[str, object]:
    """All that a run computes, byte for byte; of completions all but the sampler's own log-prob.

    Answers cut off by a kill are written in other batches later, which may round that cross-check differently.
    """
    found: dict[str, object] = dict(fingerprints(run_dir))
    for path in run_dir.glob("iter_*/completions.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(run_dir))] = [
            {name: value for name, value in row.items() if name not in ("logp", "seal")} for row in rows
        ]
    results = json.loads((run_dir / "results.json").read_text())
    found["results.json"] = [{name: value for name, value in row.items() if name != "seconds"} for row in results]
    found["config.yaml"] = yaml.safe_load((run_dir / "config.yaml").read_text())
    return found


def differing(mine: dict[str, object], other: dict[str, object]) -> set[str]:
    return {name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name)}


def place(run_dir: Path) -> str:
    """The phase a run was in when it ended: what comes after the last one that it finished."""
    order = ["save", "generate", "pair", "score", "score heldout", "train", "evaluate"]
    stages = [name for name in ("base", "sft", "iter_000", "iter_001", "dpo", "grpo") if (run_dir / name).is_dir()]
    if not stages:
        return "start"
    path = run_dir / stages[-1] / "phases.json"
    finished = [name for name in order if path.exists() and name in json.loads(path.read_text())]
    return f"{stages[-1]} after {finished[-1]}" if finished else f"{stages[-1]} begun"


def fill(place, left=0):
    """Take all room but `left` bytes."""
    free = shutil.disk_usage(place).free - left
    with (place / "filler").open("wb") as file:
        try:
            while free > 0:
                free -= file.write(b"\0" * min(free, 1 << 16))
            file.flush()
        except OSError:
            pass


def one_line(capsys):
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("spinfast: ")]
    return line
