"""`--dry-run`: what would run, on what, in how much memory and time, and two samples as the model will see them.

Data and tokenizer are loaded as in a run; weights are not. A GPU profile that is not there is planned from its
published figures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig

from spinfast import ops as operators
from spinfast.config import Config
from spinfast.data.renderer import Renderer
from spinfast.device import DeviceProfile, profile
from spinfast.memory import planner
from spinfast.memory.ledger import KINDS
from spinfast.memory.planner import Plan
from spinfast.models import load_tokenizer, resolve_model
from spinfast.packing import packed_length
from spinfast.session import choose_backend, load_data
from spinfast.types import Example, Group


def dry_run(config: Config, console: Console | None = None) -> Plan:
    """Print everything a run of this config would do, and the plan's refusal if it would not fit."""
    console = console or Console()
    device = profile(config.device.profile, config.device.dtype, config.device.attention, plan_only=True)
    model = resolve_model(config.model.name, config.model.revision)
    shape = AutoConfig.from_pretrained(model.path, local_files_only=True)
    renderer = Renderer(load_tokenizer(model.path), config.prompt.template)
    examples = load_data(config, renderer)["data"].examples
    ops, kernels = operators.choose(config.device.kernels, device.device)
    engine, why = choose_backend(config)

    console.rule("config")
    console.print(config.dump(), markup=False, highlight=False)
    console.rule("device")
    reasons = {**device.reasons, "kernels": kernels, "generation": f"{engine}: {why}"}
    for name, reason in {**reasons, "model": f"{model.name} at {model.revision}"}.items():
        console.print(f"{name}: {reason}", markup=False, highlight=False)
    lengths = [(len(example.prompt_ids), len(example.real_ids)) for example in examples]
    planned = planner.plan(config, device, shape, ops, engine, lengths)
    console.rule("plan")
    console.print(str(planned), markup=False, highlight=False)
    console.print(plan_table(planned))
    console.rule("steps")
    for line in step_lines(config, device, shape, planned, examples):
        console.print(line, markup=False, highlight=False)
    for example in examples[:2]:
        console.rule(f"sample {example.index}: trained tokens in green")
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


def step_lines(config: Config, device: DeviceProfile, shape, planned: Plan, examples: Sequence[Example]) -> list[str]:
    """Steps per iteration, and how long scoring and training them takes at the most."""
    groups = [Group(e.prompt_ids, (e.real_ids, (0,) * config.generation.max_tokens)) for e in examples]
    first = math.ceil(len(groups) / config.train.pairs_per_step) * config.train.epochs
    later = first * 2 if config.spin.mix_previous else first
    one_pass = planner.seconds(
        device, shape, groups, planned.microbatch_tokens, planned.checkpoint_layers, planned.offload
    )
    source = f"roofline of the {device.name}, sustained rates from published figures"
    if device.device.type == "cpu":
        rate = matmul_rate(device, shape.hidden_size, shape.intermediate_size)
        one_pass *= planner.CPU_RATE / rate
        source = f"a matrix product measured here, {rate / 1e9:.0f} GFLOP/s"
    # scoring is the forward with half of the head
    hours = one_pass * (config.train.epochs + 0.5) * (1 + (config.spin.iterations - 1) * later / first) / 3600
    return [
        f"{len(groups)} pairs of {sum(map(packed_length, groups)) / len(groups):.0f} packed tokens on average, "
        f"{config.train.pairs_per_step} a step",
        f"{first} steps in iteration 0, {later} in each later one, {config.spin.iterations} iterations",
        f"about {hours:.2f} h of scoring and training if every generated answer had {config.generation.max_tokens} "
        f"tokens, generation and evaluation not counted ({source})",
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
    """The rendered conversation; what the loss is computed on is green, the rest dim."""
    decode = renderer.tokenizer.decode
    return Text.assemble((decode(example.prompt_ids), "dim"), (decode(example.real_ids), "bold green"))
