"""The fastest way through a step that fits the device: microbatch, checkpointed layers, head's chunk; or a refusal.

    seconds = FLOPs / rate * (1 + half/T) + host copies,    FLOPs = tokens * W * (4 + 2 c/L) + answers * 4 V D

for T tokens a microbatch, c of L layers checkpointed and W linear weights (the base gets no gradient). `half` is a
rule of thumb for how many tokens a GEMM of this size needs to run at half its rate. Two simulations place all
candidates (bytes grow in proportion to T, fall in proportion to c); the one that is chosen has been simulated in
full. Among plans within 2 % of the fastest the one with the least memory wins; it gets the largest chunk of the head
that still fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from transformers import PretrainedConfig

from spinfast.config import Config, Optimisation, Passes
from spinfast.device import CONTEXT, GIB, GPUS, DeviceProfile
from spinfast.errors import UserError
from spinfast.memory.ledger import Usage, apply_checkpointing, apply_head_chunk
from spinfast.memory.simulation import Phases, Simulation
from spinfast.objectives import Objective
from spinfast.ops import Ops
from spinfast.packing import bins, packed_length
from spinfast.types import Group

FRAGMENTATION = 0.05  # of the peak
HALF_RATE_TOKENS = {"cpu": 32, "cuda": 256}
CPU_RATE = 2e11  # FLOP/s where nothing was measured; only ratios matter to the choice
HOST_COPY = 6e9  # bytes/s to pinned memory, PCIe 3.0 x16 with half to spare
LARGEST_MICROBATCH = 16384
HEAD_CHUNKS = (1024, 512, 256, 128)  # tokens; beyond, no GEMM gets faster


@dataclass(frozen=True)
class Load:
    """What a method asks of machine and disk: all groups of its first round, and what is done with them.

    rounds: optimizer steps of each of its stages. scoring: passes without a gradient beside each pass of training.
    answers: how many that are generated are kept.
    """

    method: str
    everything: Sequence[Group]
    objective: Objective
    settings: Optimisation
    groups_per_step: int
    rounds: tuple[int, ...]
    scoring: float = 0.0
    answers: int = 0

    @property
    def groups(self) -> list[Group]:
        """Those of the fullest step that a shuffle could bring."""
        return sorted(self.everything, key=_content, reverse=True)[: self.groups_per_step]

    @property
    def longest(self) -> int:
        """Packed tokens of the longest group, cut as small as the objective allows."""
        return max(map(packed_length, self.objective.cut(self.groups, 0)))


@dataclass(frozen=True)
class StepPlan:
    """How a step is made; head_chunk None is the kernel's own. dense_layers: whose 4-bit weights answers hold dense."""

    microbatch_tokens: int
    checkpoint_layers: int = 0
    offload: bool = False
    head_chunk: int | None = None
    dense_layers: int = 0
    predicted_mib: dict[str, int] = field(default_factory=dict)  # by phase


@dataclass(frozen=True)
class Plan:
    """What the run will do, and the bytes that it was predicted to need."""

    microbatch_tokens: int
    checkpoint_layers: int
    layers: int
    offload: bool
    head_chunk: int
    kv_cache_bytes: int  # the engine's, resident through all phases; 0 where the cache goes with its phase
    phases: dict[str, Usage]
    reserve: int
    budget: int
    step_seconds: float
    dense_layers: int = 0  # whose 4-bit weights the generator holds dense

    @property
    def step(self) -> StepPlan:
        predicted = {name: round(usage.peak / 2**20) for name, usage in self.phases.items()}
        return StepPlan(
            self.microbatch_tokens, self.checkpoint_layers, self.offload, self.head_chunk, self.dense_layers, predicted
        )

    @property
    def peak(self) -> int:
        """The fullest phase, cache and reserve included."""
        return max(usage.peak for usage in self.phases.values()) + self.kv_cache_bytes + self.reserve

    def __str__(self) -> str:
        layers = f"{self.checkpoint_layers} of {self.layers} layers checkpointed" + ", offloaded" * self.offload
        return (
            f"microbatches of {self.microbatch_tokens} tokens, {layers}, head in chunks of {self.head_chunk}; "
            f"peak {self.peak / GIB:.2f} GiB predicted, {self.budget / GIB:.2f} GiB available"
        )


@dataclass(frozen=True)
class Candidate:
    tokens: int
    layers: int
    offload: bool
    seconds: float
    estimate: int = 0


def plan(
    config: Config,
    profile: DeviceProfile,
    model: PretrainedConfig,
    ops: Ops,
    loads: Sequence[Load],
    engine: str = "transformers",
) -> Plan:
    """The fastest way through the heaviest load in which the others fit too.

    Raises UserError if nothing fits, saying what would.
    """
    heaviest = max(loads, key=lambda load: sum(map(packed_length, load.groups)))
    groups, cut = heaviest.groups, heaviest.objective.cut
    simulation = Simulation(model, profile, config.adapter, ops, config.model.load_in_4bit)
    kv_cache = engine_cache(config, model, profile) if engine == "vllm" else 0
    several = sum(map(packed_length, groups))

    def usage(tokens, layers, offload, chunk=HEAD_CHUNKS[-1]):
        apply_checkpointing(simulation.policy, layers, offload)
        apply_head_chunk(simulation.policy, chunk)
        return training(heaviest, simulation, tokens)

    def room(peak):
        return profile.memory - kv_cache - reserve(profile, peak) - peak

    longest = heaviest.longest
    options = [
        Candidate(tokens, layers, offload, seconds(profile, model, cut(groups, tokens), tokens, layers, offload))
        for tokens in microbatches(config, longest, max(map(packed_length, groups)), several)
        for layers in checkpointed(config, model.num_hidden_layers)
        for offload in ([False, True] if layers and profile.device.type == "cuda" else [False])
    ]
    probe = min(max(longest, 4096), max(option.tokens for option in options))
    anchors = {key: usage(probe, *key) for key in {(o.layers and model.num_hidden_layers, o.offload) for o in options}}
    fastest = min(option.seconds for option in options)
    ranked = sorted(
        (estimated(option, anchors, probe, model.num_hidden_layers) for option in options),
        key=lambda option: (int(math.log(option.seconds / fastest) / 0.02), option.estimate),
    )
    for option in ranked:
        if room(0.97 * option.estimate) < 0:
            continue
        chunks = ((chunk, usage(option.tokens, option.layers, option.offload, chunk)) for chunk in HEAD_CHUNKS)
        chunk, train = next(((chunk, train) for chunk, train in chunks if room(train.peak) >= 0), (None, None))
        if train is None:
            continue
        others = [load for load in loads if load is not heaviest]
        phases = {heaviest.method: train, **other_phases(config, simulation, heaviest, others, option.tokens, engine)}
        dense = 0
        if config.model.load_in_4bit and "generate" in phases:
            layer = linear_weights(model) // model.num_hidden_layers * profile.dtype.itemsize * (1 + FRAGMENTATION)
            dense = max(0, min(model.num_hidden_layers, int(room(phases["generate"].peak) // layer)))
            phases["generate"] = generating(config, simulation, dense)
        result = Plan(
            option.tokens, option.layers, model.num_hidden_layers, option.offload, chunk, kv_cache, phases,
            reserve(profile, max(phase.peak for phase in phases.values())), profile.memory, option.seconds, dense,
        )  # fmt: skip
        _refuse_phases(result)
        return result
    smallest = min(ranked, key=lambda option: option.estimate)
    raise UserError(_refusal(smallest, profile, kv_cache, usage(longest, smallest.layers, smallest.offload), longest))


def limits(config: Config, answers: int, groups: int) -> list[Group]:
    """Groups of so many answers at the config's limits, for when there is no data yet."""
    prompt, answer = (0,) * config.prompt.max_prompt_tokens, (0,) * config.prompt.max_answer_tokens
    return [Group(prompt, (answer,) * answers)] * groups


def steps(settings: Passes, groups: int) -> int:
    """Optimizer steps over so many groups."""
    return settings.epochs * math.ceil(groups / settings.groups_per_step)


def _content(group: Group) -> int:
    return len(group.prompt_ids) + sum(map(len, group.answers))


def worst_batch(groups: Sequence[Group], tokens: int) -> list[Group]:
    """The fullest microbatch: most tokens plus keys, with the later answers long, or short and so more of them."""
    short = [replace(group, answers=(group.answers[0], *((0,) for _ in group.answers[1:]))) for group in groups]
    batches = [[chosen[i] for i in rows] for chosen in (groups, short) for rows in bins(chosen, tokens)]
    return max(batches, key=lambda batch: sum(packed_length(g) + len(g.prompt_ids) for g in batch))


def microbatches(config: Config, longest: int, group: int, step: int) -> list[int]:
    """From the longest group in its smallest parts over the longest group in one to the whole step."""
    if config.train.microbatch_tokens != "auto":
        return [config.train.microbatch_tokens]
    larger = {group, step, *(2**i for i in range(10, 15))}
    return [longest, *sorted(tokens for tokens in larger if longest < tokens <= min(step, LARGEST_MICROBATCH))]


def checkpointed(config: Config, layers: int) -> list[int]:
    asked = config.train.checkpointing
    return list(range(layers + 1)) if asked == "auto" else [layers if asked else 0]


def reserve(profile: DeviceProfile, peak: float) -> int:
    """What no simulation sees: the context, workspaces inside operators, memory lost between allocations."""
    context = CONTEXT if profile.device.type == "cuda" else 0  # a CPU's is already spent
    return int(context + FRAGMENTATION * peak)


def engine_cache(config: Config, model: PretrainedConfig, profile: DeviceProfile) -> int:
    """vLLM's KV budget: what the config grants, and not more than a full batch at full length can use."""
    head = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    per_token = 2 * model.num_hidden_layers * model.num_key_value_heads * head * profile.dtype.itemsize
    useful = per_token * config.generation.batch_size * (config.prompt.max_prompt_tokens + config.generation.max_tokens)
    return min(int(config.generation.kv_cache_gib * GIB), useful)


def linear_weights(model: PretrainedConfig) -> int:
    """Weights of the decoder's linear layers."""
    head = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    heads = 2 * (model.num_attention_heads + model.num_key_value_heads)
    return model.num_hidden_layers * model.hidden_size * (heads * head + 3 * model.intermediate_size)


def seconds(profile: DeviceProfile, model, groups: Sequence[Group], tokens: int, layers: int, offload: bool) -> float:
    """A step's time by the roofline above."""
    rate = GPUS[profile.name].flops if profile.name in GPUS else CPU_RATE
    total = sum(map(packed_length, groups))
    scored = sum(len(answer) for group in groups for answer in group.answers)
    passes = 4 + 2 * layers / model.num_hidden_layers
    flops = total * linear_weights(model) * passes + scored * 4 * model.vocab_size * model.hidden_size
    copied = 2 * layers * total * model.hidden_size * profile.dtype.itemsize if offload else 0
    return flops / rate * (1 + HALF_RATE_TOKENS[profile.device.type] / tokens) + copied / HOST_COPY


def estimated(option: Candidate, anchors: dict, probe: int, layers: int) -> Candidate:
    """Bytes beside the static ones in proportion to tokens; between no layer and all checkpointed, a straight line."""
    none, full = anchors.get((0, False)), anchors.get((layers, option.offload))
    share = option.layers / layers
    ends = (none or full, full or none)
    static = sum(ends[0].by_kind.get(kind, 0) for kind in ("weights", "adapters", "optimizer", "gradients"))
    dynamic = (1 - share) * (ends[0].peak - static) + share * (ends[1].peak - static)
    bytes_ = static + dynamic * option.tokens / probe
    return Candidate(option.tokens, option.layers, option.offload, option.seconds, int(bytes_))


def training(load: Load, phases: Phases, tokens: int) -> Usage:
    """A step's fullest microbatch."""
    groups = load.objective.cut(load.groups, tokens)
    batch = worst_batch(groups, tokens)
    more = sum(map(packed_length, groups)) > sum(map(packed_length, batch))
    return phases.train(batch, load.objective, load.settings.optimizer, more).usage


def other_phases(
    config: Config, run: Phases, heaviest: Load, others: Sequence[Load], tokens: int, engine: str
) -> dict[str, Usage]:
    """Scoring where there is a reference, the other methods, and generation where the policy's own module does it."""
    phases = {}
    if heaviest.objective.reference:
        phases["score"] = run.score(worst_batch(heaviest.groups, tokens))
    for load in others:
        groups = load.objective.cut(load.groups, tokens)
        batch = max(([groups[i] for i in rows] for rows in bins(groups, tokens)), key=len)
        phases[load.method] = run.train(batch, load.objective, load.settings.optimizer, True).usage
    if engine == "transformers":
        phases["generate"] = generating(config, run)
    return phases


def generating(config: Config, run: Phases, dense_layers: int = 0) -> Usage:
    longest = config.prompt.max_prompt_tokens + config.longest_generated()
    return run.generate(config.generation.batch_size, longest, config.generation.top_p, dense_layers)


def _refuse_phases(result: Plan) -> None:
    if result.peak > result.budget:
        name = max(result.phases, key=lambda phase: result.phases[phase].peak)
        raise UserError(
            f"memory: the {name} phase needs {result.peak / GIB:.2f} GiB with reserve, {result.budget / GIB:.2f} GiB "
            f"are available; {'lower generation.batch_size' if name == 'generate' else 'lower train.microbatch_tokens'}"
        )


def _refusal(smallest: Candidate, profile: DeviceProfile, kv_cache: int, usage: Usage, longest: int) -> str:
    need = usage.peak + reserve(profile, usage.peak) + kv_cache
    static = sum(usage.by_kind.get(kind, 0) for kind in ("weights", "adapters", "optimizer", "gradients"))
    left = (profile.memory - kv_cache - reserve(profile, 0)) / (1 + FRAGMENTATION) - static
    fitting = int(longest * left / max(1, usage.peak - static))
    limits = "prompt.max_prompt_tokens + prompt.max_answer_tokens + generation.max_tokens"
    advice = (
        f"a pair of {fitting} tokens would fit ({limits})"
        if fitting > 64
        else "weights and context alone do not; use a smaller model, model.load_in_4bit or less generation.kv_cache_gib"
    )
    return (
        f"memory: one pair of {longest} tokens needs {need / GIB:.2f} GiB with {smallest.layers} layers checkpointed, "
        f"{profile.memory / GIB:.2f} GiB are available; {advice}"
    )
