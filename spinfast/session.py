"""What a run is played with, opened once: device, model, policy, generator, memory plan. It knows no run directory,
so several runs can be played in one session, each from a fresh adapter (methods/run.py).
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import AutoConfig, PretrainedConfig

from spinfast import attention, spread
from spinfast import ops as operators
from spinfast.config import Config
from spinfast.data.renderer import Renderer
from spinfast.device import DeviceProfile, cap_memory, profile
from spinfast.errors import UserError
from spinfast.generation import Generator
from spinfast.generation.canary import Scorer, check_adapter, policy_logps
from spinfast.memory.ledger import apply_checkpointing, apply_head_chunk
from spinfast.memory.planner import Load, StepPlan, engine_cache, plan
from spinfast.model_check import end_ids, window
from spinfast.models import ResolvedModel, load_tokenizer, resolve_model
from spinfast.policy import Policy, calm, import_unsloth
from spinfast.policy.adapters import files as adapters
from spinfast.policy.transformers import load_policy
from spinfast.store.files import expanded
from spinfast.types import Adapter, Sampling

log = logging.getLogger("spinfast")
CANARY_TOKENS = 128


@dataclass(frozen=True)
class Machine:
    """All that is known before weights are loaded."""

    device: DeviceProfile
    model: ResolvedModel
    shape: PretrainedConfig
    renderer: Renderer
    ops: operators.Ops
    kernels: str  # why these operators
    start: Adapter | None = None  # what the run starts from, as adapter.start has it
    augmenting: ResolvedModel | None = None  # the other model of a composition


@dataclass(frozen=True)
class Session:
    """An open policy and generator on one copy of the weights."""

    config: Config
    machine: Machine
    policy: Policy
    generator: Generator | None  # None where nothing is generated
    plan: StepPlan
    put: Callable[[Config, torch.nn.Module], Policy]  # a policy on the session's base

    def fresh(self) -> None:
        """A new run starts: the base as it was loaded, and the adapter that its seed gives."""
        self.policy.restart(self.config.seed)

    def turned(self, config: Config, machine: Machine, plan: StepPlan) -> Session:
        """The session of another run on the same base, which was among those that this one was opened for."""
        policy = self.policy
        if config.adapter != self.config.adapter:
            policy = self.put(config, policy.leave())
        _settle(policy, plan)
        if self.generator is not None:
            self.generator.serve(policy, plan.dense_layers)
        return replace(self, config=config, machine=machine, policy=policy, plan=plan)

    def put_back(self) -> Session:
        """The session as it was, where it could not be turned to a run: its adapter could not be put on the base."""
        return replace(self, policy=self.put(self.config, self.policy.causal_lm))

    def rest(self) -> None:
        """The generator gives its memory back until it is asked again."""
        if self.generator is not None:
            self.generator.rest()

    def sampling(self, temperature: float, max_tokens: int) -> Sampling:
        top_p = self.config.generation.top_p if temperature else 1.0
        return Sampling(temperature, top_p, max_tokens, self.machine.renderer.stop_ids)

    def check_generator(self, prompt_ids: Sequence[int], adapter: Adapter) -> None:
        """The canary: a generator with an engine of its own must answer as the policy does (generation/canary.py)."""
        if isinstance(self.generator, Scorer):
            device = self.machine.device
            measure = policy_logps(self.policy, device.attention)
            report = check_adapter(self.generator, measure, prompt_ids[:CANARY_TOKENS], adapter, dtype=device.dtype)
            log.info("canary: %s", report)


def look(config: Config, plan_only: bool = False, model: ResolvedModel | None = None) -> Machine:
    """Device, model files, tokenizer and operators of a config; with plan_only the device need not be there.

    `model` is the config's where it was resolved already.
    """
    device = profile(config.device.profile, config.device.dtype, config.device.attention, plan_only)
    if device.rehearsal:
        cap_memory(device.memory)
    model = model or resolve_model(config.model.name, config.model.revision)
    renderer = Renderer(load_tokenizer(model.path), config.prompt.template, end_ids(model.path))
    ops, why = operators.choose(config.device.kernels, device.device)
    shape = AutoConfig.from_pretrained(model.path, local_files_only=True)
    return for_run(Machine(device, model, shape, renderer, ops, why), config)


def for_run(machine: Machine, config: Config) -> Machine:
    """With what a run on its model has of its own: what it starts from, and the other model of a composition."""
    model, augmenting = machine.model, None
    shape = AutoConfig.from_pretrained(model.path, local_files_only=True)  # the last run's may be a composition's
    check_limits(config, model, shape)
    if config.adapter.kind == "calm":
        augmenting, other = calm.augmenting_of(dict(config.adapter))
        calm.check_vocabulary(machine.renderer.tokenizer, augmenting)
        check_limits(config, augmenting, other)
        shape.max_position_embeddings = min(shape.max_position_embeddings, other.max_position_embeddings)
    start = load_start(config, model)
    if start and augmenting:
        told = {"base_model_name_or_path": start.config["augmenting"], "revision": start.config["augmenting_revision"]}
        adapters.check_base(expanded(config.adapter.start), told, augmenting.revision, augmenting.name)
    return replace(machine, shape=shape, start=start, augmenting=augmenting)


def load_start(config: Config, model: ResolvedModel) -> Adapter | None:
    """The adapter of adapter.start, which must not be larger than the run's own."""
    if config.adapter.start is None:
        return None
    path = adapters.find(expanded(config.adapter.start))
    start = adapters.load(path, model.revision, name=model.name)
    if start.kind != config.adapter.kind:
        raise UserError(
            f"adapter.start: {path} is a {start.kind}, adapter.kind is {config.adapter.kind}; give that kind"
        )
    if start.kind == "lora" and (rank := adapters.largest_rank(start)) > config.adapter.largest_rank:
        room = config.adapter.largest_rank
        raise UserError(f"adapter.start: {path} has rank {rank}, this run's adapter has {room}; raise adapter.r")
    log.info("adapter.start: %s, %s, %d tensors", path, start.kind, len(start.tensors))
    return start


def context_of(config: Config) -> int:
    """Tokens of the longest prompt with the longest answer that is generated."""
    return config.prompt.max_prompt_tokens + config.longest_generated()


def check_limits(config: Config, model: ResolvedModel, shape: PretrainedConfig) -> None:
    """Raises UserError where the config asks for more than the model has."""
    context = context_of(config)
    if context > shape.max_position_embeddings:
        raise UserError(
            f"prompt.max_prompt_tokens + the longer max_tokens = {context} tokens, but {model.name} has a context of "
            f"{shape.max_position_embeddings}; lower them"
        )
    longest = max(context, config.prompt.max_prompt_tokens + config.prompt.max_answer_tokens)
    if (seen := window(shape)) is not None and seen < longest:
        raise UserError(
            f"prompt.max_prompt_tokens + the longer of max_answer_tokens and max_tokens = {longest} tokens, but "
            f"{model.name} has a sliding_window of {seen}, beyond which the engine computes another model; lower them"
        )
    rank = config.adapter.largest_rank
    if rank > shape.hidden_size:
        raise UserError(f"adapter.r: {rank} is more than the width of {model.name}, {shape.hidden_size}; lower it")


def check_rows(machine: Machine, loads: Sequence[Load]) -> None:
    """Raises UserError where the data has a row that is longer than the model's context."""
    rows = (len(group.prompt_ids) + max(map(len, group.answers)) for load in loads for group in load.everything)
    longest, context = max(rows, default=0), machine.shape.max_position_embeddings
    if longest > context:
        raise UserError(
            f"data: a prompt and its answer have {longest} tokens, {machine.model.name} has a context of {context}; "
            "lower prompt.max_prompt_tokens or prompt.max_answer_tokens"
        )


def plan_steps(config: Config, machine: Machine, loads: Sequence[Load], engine: str) -> StepPlan:
    """How a step is made: what the config fixes, and the memory plan for the rest. `engine` is who generates."""
    settings = config.train
    if settings.microbatch_tokens != "auto" and settings.checkpointing != "auto":
        layers = machine.shape.num_hidden_layers if settings.checkpointing else 0
        return StepPlan(settings.microbatch_tokens, layers)
    planned = plan(config, machine.device, machine.shape, machine.ops, loads, engine)
    log.info("memory: %s", planned)
    return planned.step


@contextmanager
def open_session(
    config: Config,
    machine: Machine,
    plan: StepPlan,
    generate: bool = True,
    others: Sequence[Config] = (),
    context: int = 0,
) -> Iterator[Session]:
    """Load the weights and start the generator; leaving gives the generator's memory back.

    `others` are the configs of runs that the session will be turned to, `context` the tokens that the generator must
    have room for, if that is more than the runs ask.
    """
    for name, reason in {**machine.device.reasons, "kernels": machine.kernels}.items():
        log.info("%s: %s", name, reason)
    if config.device.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
    torch.use_deterministic_algorithms(config.device.deterministic)
    with open_players(config, machine, generate, plan.dense_layers, others, context) as (policy, generator, put):
        _settle(policy, plan)
        yield Session(config, machine, policy, generator, plan, put)


def _settle(policy: Policy, plan: StepPlan) -> None:
    apply_checkpointing(policy, plan.checkpoint_layers, plan.offload)
    apply_head_chunk(policy, plan.head_chunk)


@contextmanager
def open_players(
    config: Config,
    machine: Machine,
    generate: bool,
    dense_layers: int,
    others: Sequence[Config] = (),
    context: int = 0,
) -> Iterator[tuple[Policy, Generator | None, Callable[[Config, torch.nn.Module], Policy]]]:
    """The policy and the generator, on one copy of the base: the engine's if it is vLLM, else the policy's. And what
    puts another policy on it."""
    settings, device, model = config.generation, machine.device, machine.model
    context = max(context, *map(context_of, (config, *others)))
    rank = max(each.adapter.largest_rank for each in (config, *others))
    composed = (each for each in (config, *others) if each.adapter.kind == "calm")
    backend, why = choose_backend(next(composed, config), generate)
    log.info("generation: %s: %s", backend, why)
    cache = engine_cache(config, machine.shape, device)
    loaded = partial(
        load_policy,
        model.path,
        model.name,
        model.revision,
        ops=machine.ops,
        profile=device,
        load_in_4bit=config.model.load_in_4bit,
    )
    base = engine = None
    if config.model.backend == "unsloth":
        if spread.world() > 1:
            raise UserError("model.backend: unsloth plays on one card alone; start one rank, or use transformers")
        from spinfast.generation import vllm_compat

        unsloth = import_unsloth()
        base = unsloth.load_base(
            model.path,
            device,
            load_in_4bit=config.model.load_in_4bit,
            max_seq_length=max(context, config.prompt.max_prompt_tokens + config.prompt.max_answer_tokens),
            engine_cache=cache if backend == "vllm" else None,
            max_lora_rank=rank,
            prepare=vllm_compat.prepare,
        )
        loaded = partial(loaded, fuse=unsloth.fuse)
        engine = getattr(base, "vllm_engine", None)

    def put(config: Config, base: torch.nn.Module | None) -> Policy:
        return loaded(lora=config.adapter, seed=config.seed, base=base)

    if backend == "vllm":
        from spinfast.generation.vllm import VLLMGenerator

        with VLLMGenerator(
            model.path,
            device=device.device,
            capability=device.capability,
            dtype=device.dtype,
            max_model_len=context,
            max_lora_rank=rank,
            kv_cache_bytes=cache,
            batch_size=settings.batch_size,
            seed=config.seed,
            engine=engine,
        ) as generator:
            policy = put(config, base if base is not None else generator.shared_model(attention.NAME))
            generator.serve(policy)
            yield policy, generator, put
        return
    policy = put(config, base)
    generator = nullcontext()
    if backend == "transformers":
        from spinfast.generation.transformers import TransformersGenerator

        generator = TransformersGenerator(
            policy,
            batch_size=settings.batch_size,
            max_model_len=context,
            attention=device.attention,
            dense_layers=dense_layers,
        )
    with generator as opened:
        yield policy, opened, put


def choose_backend(config: Config, generate: bool = True) -> tuple[str, str]:
    """Who generates, and why."""
    backend, why = _chosen_backend(config, generate)
    temperature = config.generation.temperature
    if (backend, config.model.backend) == ("vllm", "unsloth") and "grpo" in config.method and temperature != 1:
        raise UserError(
            f"generation.temperature: the vLLM that Unsloth starts tells log-probs at temperature 1, got "
            f"{temperature:g}, and grpo compares them with its own; set it to 1, or model.backend or "
            "generation.backend to transformers"
        )
    return backend, why


def _chosen_backend(config: Config, generate: bool) -> tuple[str, str]:
    if not generate:
        return "none", "nothing is generated"
    asked, four_bit = config.generation.backend, config.model.load_in_4bit
    by_unsloth = config.model.backend == "unsloth"
    if asked == "vllm" and four_bit and not by_unsloth:
        raise UserError(
            "generation.backend: vllm shares 4-bit weights only with model.backend unsloth; use transformers"
        )
    if asked != "auto":
        return asked, "asked for"
    if config.adapter.kind == "calm":
        return "transformers", "a composition is two models, and vLLM runs one"
    if four_bit:
        return "transformers", "4-bit weights are not shared with vLLM unless it is asked for"
    if importlib.util.find_spec("vllm") is None:
        return "transformers", "vLLM is not installed"
    if by_unsloth and not torch.cuda.is_available():
        return "transformers", "Unsloth shares its weights with vLLM on CUDA only"
    return "vllm", "installed; it shares its weights with the policy"
