"""`--dry-run`: what would run, on what, in how much memory and time, and two samples as the model will see them.

Data and tokenizer are loaded as in a run; weights are not. Reward functions rate the data's own answers. A GPU
profile that is not there is planned from its published figures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PretrainedConfig

from spinfast import spread
from spinfast.config import Config
from spinfast.data import load_data
from spinfast.data.renderer import Renderer
from spinfast.device import DeviceProfile
from spinfast.evaluate.rewarded import load_rewards, tried
from spinfast.memory import planner
from spinfast.memory.ledger import KINDS
from spinfast.memory.planner import Load, Plan
from spinfast.methods.run import generates, loads
from spinfast.packing import packed_length
from spinfast.params import count
from spinfast.progress import open_console
from spinfast.session import check_rows, choose_backend, look
from spinfast.types import Example

TIMED = 1000  # groups, of all at even distances, that stand for them where a step's time is reckoned


def dry_run(config: Config, console: Console | None = None) -> Plan:
    """Print everything a run of this config would do, and the plan's refusal if it would not fit."""
    console = console or open_console()
    machine = look(config, plan_only=True)
    device, model, renderer = machine.device, machine.model, machine.renderer
    data = load_data(config, renderer)
    examples, heldout = (data[name].examples if name in data else [] for name in ("data", "heldout"))
    work = loads(config, examples)
    check_rows(machine, work)
    rewards = load_rewards(config, examples, heldout)
    rated = tried(config, renderer, rewards, examples) if rewards else None
    engine, why = choose_backend(config, generates(config, work, heldout))

    planned = planner.plan(config, device, machine.shape, machine.ops, work, engine)

    def tell(title: str, *lines: str) -> None:
        console.rule(title)
        for line in lines:
            console.print(line, markup=False, highlight=False)

    tell("data", *(data_line(name, loaded.examples) for name, loaded in data.items()))
    tell("steps", *step_lines(config, device, machine.shape, planned, work), *rollout_lines(config, examples))
    tell("memory", str(planned))
    console.print(plan_table(planned))
    if (ranks := spread.ranks_here()) > 1:
        tell(f"{ranks} ranks", *rank_lines(config, machine.shape, work, ranks))
    tell("settings that are not the defaults (--show-config prints all)", config.dump(changed=True).rstrip())
    reasons = {**device.reasons, "kernels": machine.kernels, "generation": f"{engine}: {why}"}
    reasons |= {"model": f"{model.name} at {model.revision}"}
    if other := machine.augmenting:
        reasons |= {"augmenting": f"{other.name} at {other.revision}"}
    tell("device", *(f"{name}: {reason}" for name, reason in reasons.items()))
    for example in examples[:2]:
        console.rule(f"sample: row {example.index + 1} as the model sees it")
        console.print(sample_text(renderer, example, config.method))
    if rated:
        scores, what = rated
        shown = {
            name: ", ".join("does not apply" if value is None else f"{value:g}" for value in given)
            for name, given in scores.values.items()
        }
        tell(f"rewards, of {what}", *(f"{n}: {text} (weight {rewards.weights[n]:g})" for n, text in shown.items()))
    return planned


def rank_lines(config: Config, shape: PretrainedConfig, loads: Sequence[Load], ranks: int) -> list[str]:
    """What each card does where several take part, and what they tell one another."""
    numbers = count(shape, config.adapter).trained
    shares = config.train.virtual_shards or ranks
    lines = [
        f"{spread.LINE.format(ranks)}: a whole model and an engine of its own on each, in the memory above",
        *(
            f"{load.method}: of {load.groups_per_step} groups a step each takes "
            f"{load.groups_per_step / ranks:.3g} on average, and 1 of {ranks} prompts to be answered"
            for load in loads
        ),
        f"a step's gradient is {numbers:,} numbers, of which a rank sends "
        f"{megabytes_sent(numbers, ranks, config.train.virtual_shards):.3g} MB, and less than 10 kB besides",
    ]
    if shares % ranks:
        lines.append(f"train.virtual_shards: {shares} shares are dealt unevenly to {ranks} ranks; some wait for others")
    if config.train.virtual_shards == 0:
        lines.append("another number of ranks plays the same run to rounding; to the bit with train.virtual_shards")
    return lines


def megabytes_sent(numbers: int, ranks: int, fixed: int) -> float:
    """MB that a rank sends in a step: a ring's sum of fp32 numbers, or its shares as they are to all others."""
    sent = 2 * (ranks - 1) / ranks if not fixed else math.ceil(fixed / ranks) * (ranks - 1)
    return sent * 4e-6 * numbers


def data_line(name: str, examples: Sequence[Example]) -> str:
    """How many examples there are, and how long."""
    answers = [answer for e in examples for answer in (e.real_ids, *e.others) if answer]
    lengths = {"prompts": [len(e.prompt_ids) for e in examples], "answers": list(map(len, answers))}
    said = [
        f"{what} of {min(sizes)} to {max(sizes)} tokens (median {median(sizes):.0f})"
        for what, sizes in lengths.items()
        if any(sizes)
    ]
    return f"{name}: {len(examples)} examples; {'; '.join(said)}"


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
        some = load.everything[:: max(1, len(load.everything) // TIMED)]
        pass_ = planner.seconds(
            device,
            shape,
            load.objective.cut(some, planned.microbatch_tokens),
            planned.microbatch_tokens,
            planned.checkpoint_layers,
            planned.offload,
        )
        first, *later = load.rounds
        step = to_rate * pass_ * load.groups_per_step / len(some)
        step *= 1 + 0.5 * load.scoring  # a forward with half of the head
        seconds += step * sum(load.rounds)
        tokens = sum(map(packed_length, load.everything)) / len(load.everything)
        rounds = f", {later[0]} in each of {len(later)} later rounds" if later else ""
        lines.append(
            f"{load.method}: {len(load.everything)} groups of {tokens:.0f} packed tokens on average, "
            f"{load.groups_per_step} a step: {first} steps{rounds}, about {step:.1f} s each"
        )
    limit = config.generation.max_tokens
    generated = f" if every generated answer had {limit} tokens" if any(load.answers for load in loads) else ""
    return [
        *lines,
        f"about {seconds / 3600:.2f} h of scoring and training{generated}, generation and evaluation not counted "
        f"({source})",
    ]


def rollout_lines(config: Config, examples: Sequence[Example]) -> list[str]:
    """What grpo draws, samples and trains on; nothing without that method."""
    if "grpo" not in config.method:
        return []
    c, limit, data = config.grpo, config.generation.max_tokens, sum(bool(example.messages) for example in examples)
    rollouts, prompts = math.ceil(c.steps / c.steps_per_rollout), c.steps_per_generation * c.prompts_per_step
    drawn, answers = rollouts * prompts, rollouts * prompts * c.samples
    dead = [f"{p**c.samples + (1 - p) ** c.samples:.0%} at {p:.0%}" for p in (0.1, 0.3, 0.5, 0.9)]
    refilled = f"; up to {c.refill} times fresh prompts, not counted here, take their place" if c.refill else ""
    return [
        f"grpo: {c.prompts_per_step} prompts x {c.samples} answers = {c.prompts_per_step * c.samples} answers a step; "
        f"a rollout of {prompts} prompts feeds {c.steps_per_rollout} steps "
        f"({c.steps_per_generation} parts, gone through {c.num_iterations} times)",
        f"{rollouts} rollouts: {drawn:,} prompts = {drawn / data:.2f} times the data's {data:,}; {answers:,} answers, "
        f"{answers * limit:,} tokens to generate at the most ({limit} each)",
        f"groups whose rewards are all equal are not trained on: of answers that are right or wrong "
        f"{', '.join(dead)} right{refilled}",
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


def sample_text(renderer: Renderer, example: Example, method: Sequence[str]) -> Text:
    """The rendered conversation, part by part under what it is: learnt ones green, worse ones red, the rest dim."""
    decode = renderer.tokenizer.decode
    learnt, worse = "learnt", "compared with it" if "dpo" in method else "not used"
    if method == ("grpo",):
        learnt = "an answer of the data's, which the model does not see"
    elif example.desirable is False:
        learnt = "labelled undesirable" if "dpo" in method else "not used, labelled undesirable"
    flags = example.scored or (True,) * len(example.real_ids)
    spans = groupby(zip(flags, example.real_ids, strict=True), key=itemgetter(0))
    parts = [("prompt", "dim", example.prompt_ids)] * bool(example.prompt_ids)
    for scored, span in spans:
        name, look = (learnt, "bold green") if scored else ("not learnt", "dim")
        parts.append((name, look, [token for _, token in span]))
    parts += [(worse, "red", answer) for answer in example.others]
    return Text("\n").join(
        Text.assemble((f"[{name}]\n", "italic"), (decode(ids).rstrip("\n"), look)) for name, look, ids in parts
    )
