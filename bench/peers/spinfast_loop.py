"""spinfast's own sampling, scoring and training, as its methods call them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench import shapes
from bench.peers.watch import Watch
from bench.peers.work import Work
from spinfast.config import Optimisation
from spinfast.generation import Generator, prompt_seed
from spinfast.objectives import Nll, Objective, Pairwise, Preference, Surrogate, with_reference
from spinfast.packing import packed_length
from spinfast.policy.adapters import files as adapters
from spinfast.policy.transformers import TransformersPolicy
from spinfast.scoring import Budget, score
from spinfast.steps import Epochs
from spinfast.train import start_training, train
from spinfast.types import Completion, Group, Request, Sampling


def play(work: Work, watch: Watch) -> dict:
    policy = work.policy()
    watch.loaded(ready(policy, work).model)
    steps, budget, objective = steps_of(work), budget_of(work), objective_of(work)
    if objective.reference:
        with watch.phase("score"):
            logps, _ = score(policy, steps, budget, lambda *_: None)
        steps = steps.of([*map(with_reference, steps.groups, logps)])
    trained(policy, steps, objective, budget, work, watch)
    return {"scored_positions": "answers"}


def whole(work: Work, watch: Watch) -> dict:
    """Steps that sample their answers first: by vLLM on the policy's weights, or by the policy's own module."""
    with players(work) as (policy, generator):
        watch.loaded(ready(policy, work).model, owned=generator.name != "vllm")
        steps = Sampled(work, watch, policy, generator)
        steps.answers(steps.groups[:1], tokens=2, seed=-1)  # what is compiled once
        trained(policy, steps, objective_of(work), budget_of(work), work, watch)
    return {"engine": generator.name, "prompt_tokens_cached": round(steps.cached / steps.prompts, 4)}


def ready(policy: TransformersPolicy, work: Work) -> TransformersPolicy:
    policy.load_adapter(adapters.load(work.adapter))
    policy.checkpoint_layers(len(policy.decoder.layers) if work.gradient_checkpointing else 0)
    return policy


def trained(policy, steps, objective: Objective, budget: Budget, work: Work, watch: Watch) -> None:
    state = start_training(policy, "adamw", 0.0, work.dtype == "float16")
    watch.optimizer(state.optimizer, policy.model)
    settings = Optimisation(schedule="constant", warmup_ratio=0.0, max_grad_norm=work.max_grad_norm)
    with watch.phase("train"):
        for metrics in train(policy, steps, objective, settings, work.lr, budget, state, max_overflows=20):
            watch.step(metrics["train/loss"])


def objective_of(work: Work) -> Objective:
    objectives = {"sft": Nll(), "dpo": Preference(beta=work.beta), "spin": Pairwise(beta=work.beta)}
    return objectives.get(work.method, Surrogate())


def steps_of(work: Work) -> Epochs:
    """One epoch in the file's order, which every peer follows."""
    steps = Epochs(work.groups(), work.pairs_per_step, epochs=1, seed=0)
    order = range(len(steps.groups))
    steps.rows = steps.first = [[*order[i : i + work.pairs_per_step]] for i in order[:: work.pairs_per_step]]
    return steps


def budget_of(work: Work) -> Budget:
    """A microbatch holds as many tokens as the pairs of a step have at most."""
    tokens = sum(sorted(map(packed_length, work.groups()))[-work.pairs_per_step :])
    return Budget(tokens, shapes.device(work.device, work.dtype).attention, shrunk=refuse)


def refuse(tokens: int) -> None:
    """A peer that runs out of memory has lost; so has spinfast, which would go on with smaller microbatches."""
    raise torch.OutOfMemoryError(f"the step did not fit; microbatches of {tokens} tokens would be next")


# Sampling ----------------------------------------------------------------------------------------------------------


@contextmanager
def players(work: Work) -> Iterator[tuple[TransformersPolicy, Generator]]:
    """Policy and generator on one copy of the weights, as a session opens them."""
    device, slots = shapes.device(work.device, work.dtype), work.pairs_per_step * work.samples
    context = max(len(group.prompt_ids) for group in work.groups()) + work.max_tokens
    if work.engine == "transformers":
        from spinfast.generation.transformers import TransformersGenerator

        policy = work.policy()
        with TransformersGenerator(
            policy, batch_size=slots, max_model_len=context, attention=device.attention
        ) as generator:
            yield policy, generator
        return
    from spinfast.generation.vllm import VLLMGenerator

    with VLLMGenerator(
        Path(work.model), device=device.device, capability=device.capability, dtype=device.dtype,
        max_model_len=context, max_lora_rank=16, batch_size=slots,
    ) as generator:  # fmt: skip
        yield shapes.policy(device, generator.shared_model()), generator


class Sampled:
    """Implements train.Steps: a step's groups are answered when its turn comes, as methods/sampling.py does it."""

    files = ()

    def __init__(self, work: Work, watch: Watch, policy: TransformersPolicy, generator: Generator):
        self.work, self.watch, self.policy, self.generator = work, watch, policy, generator
        self.groups = work.groups()
        self.longest = max(map(packed_length, self.groups))
        self.cached = self.prompts = 0  # tokens of prompts: that were not computed, of all

    def __len__(self) -> int:
        return -(-len(self.groups) // self.work.pairs_per_step)

    def __getitem__(self, step: int) -> list[Group]:
        size = self.work.pairs_per_step
        groups = self.groups[step * size : (step + 1) * size]
        with self.watch.phase("generate"):
            found = self.answers(groups, self.work.max_tokens, step)
        self.cached += sum(answer.cached for answers in found for answer in answers)
        self.prompts += self.work.samples * sum(len(group.prompt_ids) for group in groups)
        return [
            self.work.rewarded(
                Group(group.prompt_ids, tuple(answer.token_ids for answer in answers)),
                tuple(answer.logps for answer in answers),
            )
            for group, answers in zip(groups, found, strict=True)
        ]

    def answers(self, groups: list[Group], tokens: int, seed: int) -> list[list[Completion]]:
        samples = range(self.work.samples)
        requests = [
            Request(i, group.prompt_ids, prompt_seed(seed, 0, i, sample=sample), sample)
            for i, group in enumerate(groups)
            for sample in samples
        ]
        sampling, adapter = Sampling(1.0, 1.0, tokens, ()), self.policy.adapter()
        found = {(a.index, a.sample): a for a in self.generator.generate(requests, sampling, adapter)}
        return [[found[i, sample] for sample in samples] for i in range(len(groups))]

    def figures(self, step: int) -> dict[str, float]:
        return {}
