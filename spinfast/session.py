"""Everything one run plays with, put together once: device, data, policy, generator. loop.py plays the game."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig

from spinfast import attention
from spinfast import ops as operators
from spinfast.config import Config, Data, at
from spinfast.data.formats import LoadedData, check_overlap, load_examples
from spinfast.data.renderer import Renderer
from spinfast.device import DeviceProfile, cap_memory, profile
from spinfast.errors import UserError
from spinfast.generation import Generator, prompt_seed
from spinfast.generation.canary import Scorer, check_adapter, policy_logps
from spinfast.memory.ledger import apply_checkpointing, apply_head_chunk
from spinfast.memory.planner import engine_cache, plan
from spinfast.models import ResolvedModel, load_tokenizer, resolve_model
from spinfast.policy import import_unsloth
from spinfast.policy.adapters import files as adapters
from spinfast.policy.transformers import TransformersPolicy, load_policy
from spinfast.progress import Display
from spinfast.store import files, room
from spinfast.store.record import RunDir, Stage
from spinfast.train import TrainPlan
from spinfast.types import Adapter, Example, Sampling

log = logging.getLogger("spinfast")
CANARY_TOKENS = 128
PLANNED = ("microbatch_tokens", "checkpoint_layers", "offload", "head_chunk")


@dataclass
class Game:
    """The pieces and the rules of one run."""

    config: Config
    run: RunDir
    display: Display
    device: DeviceProfile
    model: ResolvedModel
    renderer: Renderer
    examples: list[Example]
    heldout: list[Example]
    policy: TransformersPolicy
    generator: Generator
    microbatch_tokens: int
    plan: Path  # the run's plan.json, corrected where memory ran out
    base: str | None = None  # checksum of the frozen weights that the round is played on

    def sampling(self, temperature: float, max_tokens: int) -> Sampling:
        top_p = self.config.generation.top_p if temperature else 1.0
        return Sampling(temperature, top_p, max_tokens, self.renderer.stop_ids)

    def spin_plan(self, iteration: int) -> TrainPlan:
        settings = self.config.train
        return self._plan(settings.pairs_per_step, settings.epochs, at(settings.lr, iteration), iteration + 1)

    def sft_plan(self) -> TrainPlan:
        return self._plan(self.config.sft.examples_per_step, self.config.sft.epochs, self.config.sft.lr, 0)

    def _plan(self, groups_per_step: int, epochs: int, lr: float, round_number: int) -> TrainPlan:
        settings = self.config.train
        return TrainPlan(
            groups_per_step=groups_per_step,
            microbatch_tokens=self.microbatch_tokens,
            shrunk=self._shrink,
            epochs=epochs,
            seed=self.config.seed * 1009 + round_number,
            attention=self.device.attention,
            lr=lr,
            schedule=settings.schedule,
            warmup_ratio=settings.warmup_ratio,
            max_grad_norm=settings.max_grad_norm,
            max_overflows=settings.max_overflows,
        )

    def _shrink(self, tokens: int) -> None:
        """Memory ran out: smaller microbatches for the rest of the run, with room for the longest possible pair."""
        self.microbatch_tokens = max(tokens, min(self.microbatch_tokens, longest_pair(self.config)))
        known = files.read_sealed(self.plan, "plan")
        files.write_sealed(self.plan, known | {"microbatch_tokens": self.microbatch_tokens}, "plan")

    def become_opponent(self, previous: Stage) -> Adapter:
        """Put the policy where a round starts, the previous round's result, and return its adapter there.

        With lora.init: merge that result moves into the base and a fresh adapter starts, B zero.
        """
        self.policy.restore(adapters.load(previous.path("adapter"), self.model.revision))
        if self.config.lora.init == "merge" and previous.name != "base":
            self.policy.merge_and_restart(seed=prompt_seed(self.config.seed, len(self.policy.folded), 0, "adapter"))
        self.base = self.policy.base_checksum()
        opponent = self.policy.adapter()
        self.check_generator(opponent)
        return opponent

    def check_base(self) -> None:
        """No round may change the frozen weights: the engine's, the policy's and the opponent's are the same ones."""
        if self.base is not None and self.policy.base_checksum() != self.base:
            raise RuntimeError(
                "the base's weights changed while a round was played; its results cannot be trusted. "
                "Please report this with the run's log.txt and environment.json"
            )

    def check_generator(self, adapter: Adapter) -> None:
        """The canary: a generator with an engine of its own must answer as the policy does (generation/canary.py)."""
        if isinstance(self.generator, Scorer):
            prompt = (self.examples[0].prompt_ids + self.examples[0].real_ids)[:CANARY_TOKENS]
            measure = policy_logps(self.policy, self.device.attention)
            report = check_adapter(self.generator, measure, prompt, adapter, dtype=self.device.dtype)
            log.info("canary: %s", report)


@contextmanager
def open_game(config: Config, run: RunDir, display: Display) -> Iterator[Game]:
    """Load data and model, start the generator; leaving gives the generator's memory back."""
    device = profile(config.device.profile, config.device.dtype, config.device.attention)
    if device.rehearsal:
        cap_memory(device.memory)
    if config.device.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
    torch.use_deterministic_algorithms(config.device.deterministic)
    model = resolve_model(config.model.name, config.model.revision)
    renderer = Renderer(load_tokenizer(model.path), config.prompt.template)
    data = load_data(config, renderer)
    run.remember({"model": model.revision} | {name: loaded.fingerprint for name, loaded in data.items()})
    ops, why = operators.choose(config.device.kernels, device.device)
    for name, reason in {**device.reasons, "kernels": why}.items():
        log.info("%s: %s", name, reason)
    shape = AutoConfig.from_pretrained(model.path, local_files_only=True)
    chosen = adopt_plan(config, run, device, ops, shape, data["data"].examples)
    with open_players(config, device, model, shape, ops) as (policy, generator):
        apply_checkpointing(policy, chosen["checkpoint_layers"], chosen["offload"])
        apply_head_chunk(policy, chosen["head_chunk"])
        needed = room.of_run(config, room.of(policy.trainable_parameters().values()), len(data["data"].examples))
        room.check(run.path, needed - room.taken(run.path), "the run")
        yield Game(
            config=config,
            run=run,
            display=display,
            device=device,
            model=model,
            renderer=renderer,
            examples=data["data"].examples,
            heldout=data["heldout"].examples if "heldout" in data else [],
            policy=policy,
            generator=generator,
            microbatch_tokens=chosen["microbatch_tokens"],
            plan=plan_path(run),
        )


@contextmanager
def open_players(
    config: Config, device: DeviceProfile, model: ResolvedModel, shape: PretrainedConfig, ops: operators.Ops
) -> Iterator[tuple[TransformersPolicy, Generator]]:
    """The policy and the generator, on one copy of the base: the engine's if it is vLLM, else the policy's."""
    settings = config.generation
    context = config.prompt.max_prompt_tokens + max(settings.max_tokens, config.evaluate.max_tokens)
    if context > shape.max_position_embeddings:
        raise UserError(
            f"prompt.max_prompt_tokens + the longer max_tokens = {context} tokens, but {model.name} has a context of "
            f"{shape.max_position_embeddings}; lower them"
        )
    if config.lora.r > shape.hidden_size:
        raise UserError(
            f"lora.r: {config.lora.r} is more than the width of {model.name}, {shape.hidden_size}; lower it"
        )
    engine_options = {
        "device": device.device,
        "capability": device.capability,
        "dtype": device.dtype,
        "max_model_len": context,
        "max_lora_rank": config.lora.r,
        "kv_cache_bytes": engine_cache(config, shape, device),
        "batch_size": settings.batch_size,
        "seed": config.seed,
    }
    new_policy = partial(
        load_policy,
        model.path,
        model.name,
        model.revision,
        lora=config.lora,
        ops=ops,
        profile=device,
        load_in_4bit=config.model.load_in_4bit,
        seed=config.seed,
    )
    backend, why = choose_backend(config)
    log.info("generation: %s: %s", backend, why)
    if config.model.backend == "unsloth":
        unsloth = import_unsloth()
        base = unsloth.load_base(
            model.path,
            device,
            load_in_4bit=config.model.load_in_4bit,
            max_seq_length=context,
            engine_cache=engine_options["kv_cache_bytes"] if backend == "vllm" else None,
            max_lora_rank=config.lora.r,
        )
        new_policy = partial(new_policy, base=base, fuse=unsloth.fuse)
        engine_options["engine"] = getattr(base, "vllm_engine", None)
    if backend == "vllm":
        from spinfast.generation.vllm import VLLMGenerator

        with VLLMGenerator(model.path, **engine_options) as engine:
            if config.model.backend == "transformers":
                new_policy = partial(new_policy, base=engine.shared_model(attention.NAME))
            yield new_policy(), engine
    else:
        from spinfast.generation.transformers import TransformersGenerator

        policy = new_policy()
        with TransformersGenerator(
            policy, batch_size=settings.batch_size, max_model_len=context, attention=device.attention
        ) as generator:
            yield policy, generator


def choose_backend(config: Config) -> tuple[str, str]:
    """Who generates, and why."""
    asked, four_bit = config.generation.backend, config.model.load_in_4bit
    by_unsloth = config.model.backend == "unsloth"
    if asked == "vllm" and four_bit and not by_unsloth:
        raise UserError(
            "generation.backend: vllm shares 4-bit weights only with model.backend unsloth; use transformers"
        )
    if asked != "auto":
        return asked, "asked for"
    if four_bit:
        return "transformers", "4-bit weights are not shared with vLLM unless it is asked for"
    if importlib.util.find_spec("vllm") is None:
        return "transformers", "vLLM is not installed"
    if by_unsloth and not torch.cuda.is_available():
        return "transformers", "Unsloth shares its weights with vLLM on CUDA only"
    return "vllm", "installed; it shares its weights with the policy"


def load_data(config: Config, renderer: Renderer) -> dict[str, LoadedData]:
    """The training data and, where configured, the held-out data; warns of prompts in both."""
    sets = {name: getattr(config, name) for name in ("data", "heldout") if getattr(config, name)}
    loaded = {name: _load(config, data, renderer, name) for name, data in sets.items()}
    if "heldout" in loaded and (shared := check_overlap(loaded["data"].examples, loaded["heldout"].examples)):
        log.warning("heldout: %d of %d prompts are in the training data too", shared, len(loaded["heldout"].examples))
    return loaded


def _load(config: Config, data: Data, renderer: Renderer, name: str) -> LoadedData:
    loaded = load_examples(
        data.source,
        subset=data.subset,
        split=data.split,
        revision=data.revision,
        size=data.size,
        seed=data.seed,
        turns=data.turns,
        columns=data.columns,
        bad_rows=data.bad_rows,
        system=config.prompt.system,
        renderer=renderer,
        max_prompt_tokens=config.prompt.max_prompt_tokens,
        max_answer_tokens=config.prompt.max_answer_tokens,
    )
    log.info("%s: %d examples from %s", name, len(loaded.examples), data.source)
    for warning in loaded.warnings:
        log.warning("%s: %s", name, warning)
    return loaded


def longest_pair(config: Config) -> int:
    """Packed tokens of the longest pair that the config admits."""
    return config.prompt.max_prompt_tokens + config.prompt.max_answer_tokens + config.generation.max_tokens


def plan_path(run: RunDir) -> Path:
    return run.path / "plan.json"


def adopt_plan(
    config: Config,
    run: RunDir,
    device: DeviceProfile,
    ops: operators.Ops,
    shape: PretrainedConfig,
    examples: list[Example],
) -> dict:
    """What PLANNED names, planned where the config leaves it open; head_chunk None is the kernel's own.

    A resumed run keeps its plan, as far as memory corrected it, so that its batches stay the same.
    """
    settings, path = config.train, plan_path(run)
    if (known := files.read_sealed(path, "plan")) is not None:
        return known
    if settings.microbatch_tokens != "auto" and settings.checkpointing != "auto":
        layers = shape.num_hidden_layers if settings.checkpointing else 0
        chosen = dict(zip(PLANNED, (settings.microbatch_tokens, layers, False, None), strict=True))
    else:
        lengths = [(len(example.prompt_ids), len(example.real_ids)) for example in examples]
        planned = plan(config, device, shape, ops, choose_backend(config)[0], lengths)
        log.info("memory: %s", planned)
        chosen = {name: getattr(planned, name) for name in PLANNED}
        chosen["predicted_mib"] = {name: round(usage.peak / 2**20) for name, usage in planned.phases.items()}
    files.write_sealed(path, chosen, "plan")
    return chosen
