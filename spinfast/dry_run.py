"""`--dry-run`: what would run, on what, in how much memory and time, and two samples as the model will see them.

Data and tokenizer are loaded as in a run; weights are not. A GPU profile that is not there is planned from its
published figures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spinfast.config import Config
from spinfast.data import load_data
from spinfast.data.renderer import Renderer
from spinfast.device import DeviceProfile
from spinfast.evaluate.rewarded import load_rewards
from spinfast.memory import planner
from spinfast.memory.ledger import KINDS
from spinfast.memory.planner import Load, Plan
from spinfast.methods.run import generates, loads
from spinfast.packing import packed_length
from spinfast.progress import open_console
from spinfast.session import check_rows, choose_backend, look
from spinfast.types import Example


def dry_run(config: Config, console: Console | None = None) -> Plan:
    """Print everything a run of this config would do, and the plan's refusal if it would not fit."""
    console = console or open_console()
    machine = look(config, plan_only=True)
    device, model, renderer = machine.device, machine.model, machine.renderer
    data = load_data(config, renderer)
    examples, heldout = (data[name].examples if name in data else [] for name in ("data", "heldout"))
    work = loads(config, examples)
    check_rows(machine, work)
    load_rewards(config, examples, heldout)
    engine, why = choose_backend(config, generates(config, work, heldout))

    console.rule("config")
    console.print(config.dump(), markup=False, highlight=False)
    console.rule("device")
    reasons = {**device.reasons, "kernels": machine.kernels, "generation": f"{engine}: {why}"}
    for name, reason in {**reasons, "model": f"{model.name} at {model.revision}"}.items():
        console.print(f"{name}: {reason}", markup=False, highlight=False)
    planned = planner.plan(config, device, machine.shape, machine.ops, work, engine)
    console.rule("plan")
    console.print(str(planned), markup=False, highlight=False)
    console.print(plan_table(planned))
    console.rule("steps")
    for line in step_lines(config, device, machine.shape, planned, work):
        console.print(line, markup=False, highlight=False)
    for example in examples[:2]:
        console.rule(f"sample {example.index}: what is learnt in green, what is worse in red")
        console.print(sample_text(renderer, example))
    return planned


def plan_table(planned: Plan) -> Table:
    """The predicted peak of each phase by kind, in MiB, against the budget."""
    phases = planned.phases.values()
    lines = {kind: [usage.by_kind.get(kind, 0) for usage in phases] for kind in KINDS}
    lines = {kind: sizes for kind, sizes in lines.items() if any(sizes)}
    constant = planned.kv_cache_bytes + planned.reserve
    lines |= {
        "engine's cache": [planned.kv_cache_bytes] * len(phases),
        "reserve": [planned.reserve] * len(phases),
        "total": [usage.peak + constant for usage in phases],
        "budget": [planned.budget] * len(phases),
    }
    table = Table("MiB at the fullest moment", *planned.phases)
    for name, sizes in lines.items():
        table.add_row(name, *(f"{size / 2**20:,.0f}" for size in sizes), end_section=name == "reserve")
    return table


def step_lines(config: Config, device: DeviceProfile, shape, planned: Plan, loads: Sequence[Load]) -> list[str]:
    """Steps of each method's rounds, and how long scoring and training them takes at the most."""
    to_rate, source = 1.0, f"roofline of the {device.name}, sustained rates from published figures"
    if device.device.type == "cpu":
        rate = matmul_rate(device, shape.hidden_size, shape.intermediate_size)
        to_rate = planner.CPU_RATE / rate
        source = f"a matrix product measured here, {rate / 1e9:.0f} GFLOP/s"
    lines, seconds = [], 0.0
    for load in loads:
        cut = load.objective.cut(load.everything, planned.microbatch_tokens)
        one_pass = planner.seconds(
            device, shape, cut, planned.microbatch_tokens, planned.checkpoint_layers, planned.offload
        )
        first, *later = load.rounds
        passes = load.groups_per_step * sum(load.rounds) / len(load.everything)
        seconds += to_rate * one_pass * passes * (1 + 0.5 * load.scoring)  # a forward with half of the head
        tokens = sum(map(packed_length, load.everything)) / len(load.everything)
        rounds = f", {later[0]} in each of {len(later)} later rounds" if later else ""
        lines.append(
            f"{load.method}: {len(load.everything)} groups of {tokens:.0f} packed tokens on average, "
            f"{load.groups_per_step} a step: {first} steps{rounds}"
        )
    limit = config.generation.max_tokens
    generated = f" if every generated answer had {limit} tokens" if any(load.answers for load in loads) else ""
    return [
        *lines,
        f"about {seconds / 3600:.2f} h of scoring and training{generated}, generation and evaluation not counted "
        f"({source})",
    ]


def matmul_rate(device: DeviceProfile, width: int, inner: int) -> float:
    """FLOP/s of a product of the model's own shape, the best of three."""
    x, w = torch.randn(1024, width, dtype=device.dtype), torch.randn(width, inner, dtype=device.dtype)
    best = math.inf
    for _ in range(3):
        started = time.perf_counter()
        torch.mm(x, w)
        best = min(best, time.perf_counter() - started)
    return 2 * 1024 * width * inner / best


def sample_text(renderer: Renderer, example: Example) -> Text:
    """The rendered conversation; what is learnt is green, answers that are worse red, the rest dim."""
    decode = renderer.tokenizer.decode
    flags = example.scored or (True,) * len(example.real_ids)
    spans = groupby(zip(flags, example.real_ids, strict=True), key=itemgetter(0))
    parts = [(decode([token for _, token in span]), "bold green" if learnt else "dim") for learnt, span in spans]
    worse = [("\n" + decode(answer), "red") for answer in example.others]
    return Text.assemble((decode(example.prompt_ids), "dim"), *parts, *worse)
