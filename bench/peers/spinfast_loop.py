"""spinfast's own scoring and training, as loop.py calls them."""

from __future__ import annotations

import torch

from bench.peers.watch import Watch
from bench.peers.work import Work, load
from spinfast.device import profile
from spinfast.objectives.spin import Spin
from spinfast.packing import packed_length
from spinfast.policy.adapters import files as adapters
from spinfast.train import TrainPlan, score, start_training, step_rows, train


def play(work: Work, watch: Watch) -> None:
    policy = load(work)
    policy.load_adapter(adapters.load(work.adapter))
    policy.checkpoint_layers(len(policy.decoder.layers) if work.gradient_checkpointing else 0)
    watch.loaded(policy.model)
    plan = train_plan(work)
    groups = unshuffled(work.groups(), plan)
    scaled = work.dtype == "float16"
    state = start_training(policy, "adamw", 0.0, scaled)
    watch.optimizer(state.optimizer, policy.model)
    with watch.phase("score"):
        logps_P2, _ = score(policy, groups, plan, lambda *_: None)
    objective = Spin(logps_P2.to(policy.device), work.beta, "logistic", policy.ops)
    with watch.phase("train"):
        for metrics in train(policy, groups, objective, plan, state, scaled):
            watch.step(metrics["train/loss"])


def train_plan(work: Work) -> TrainPlan:
    """A microbatch holds as many tokens as the padded peers' pairs of one microbatch have at most."""
    attention = profile("auto" if work.device == "cuda" else "cpu", dtype=work.dtype).attention
    tokens = sum(sorted(map(packed_length, work.groups()))[-work.rows_at_once :])
    return TrainPlan(
        work.pairs_per_step, tokens, 1, 0, attention, work.lr, "constant", 0.0, max_grad_norm=work.max_grad_norm,
        shrunk=refuse,
    )  # fmt: skip


def refuse(tokens: int) -> None:
    """A peer that runs out of memory has lost; so has spinfast, which would go on with smaller microbatches."""
    raise torch.OutOfMemoryError(f"the step did not fit; microbatches of {tokens} tokens would be next")


def unshuffled(groups: list, plan: TrainPlan) -> list:
    """The list whose shuffle is `groups`: every peer trains in the order of the file."""
    order = [row for rows in step_rows(plan, len(groups)) for row in rows]
    return [group for _, group in sorted(zip(order, groups, strict=True))]
