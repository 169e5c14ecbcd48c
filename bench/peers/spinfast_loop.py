"""spinfast's own scoring and training, as its methods call them."""

from __future__ import annotations

import torch

from bench import shapes
from bench.peers.watch import Watch
from bench.peers.work import Work
from spinfast.config import Optimisation
from spinfast.objectives import Nll, Pairwise, Preference, with_reference
from spinfast.packing import packed_length
from spinfast.policy.adapters import files as adapters
from spinfast.train import Budget, Epochs, score, start_training, train


def play(work: Work, watch: Watch) -> dict:
    policy = work.policy()
    policy.load_adapter(adapters.load(work.adapter))
    policy.checkpoint_layers(len(policy.decoder.layers) if work.gradient_checkpointing else 0)
    watch.loaded(policy.model)
    steps, budget = steps_of(work), budget_of(work)
    state = start_training(policy, "adamw", 0.0, work.dtype == "float16")
    watch.optimizer(state.optimizer, policy.model)
    objective = {"sft": Nll(), "dpo": Preference(beta=work.beta), "spin": Pairwise(beta=work.beta)}[work.method]
    if objective.reference:
        with watch.phase("score"):
            logps, _ = score(policy, steps, budget, lambda *_: None)
        steps = steps.of([*map(with_reference, steps.groups, logps)])
    settings = Optimisation(schedule="constant", warmup_ratio=0.0, max_grad_norm=work.max_grad_norm)
    with watch.phase("train"):
        for metrics in train(policy, steps, objective, settings, work.lr, budget, state, max_overflows=20):
            watch.step(metrics["train/loss"])
    return {"scored_positions": "answers"}


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
