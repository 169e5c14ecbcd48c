"""Scoring and training on packed batches: the forward, the loss, the step. Knows no files and no iterations.

The opponent is the policy before its first step, so scoring runs the very batches that training runs first: same
kernels, same shapes, and the first loss is l(0) to rounding even in bf16. Gradients add up over microbatches, so
where memory runs out the same step is made again of smaller ones.
"""

from __future__ import annotations

import logging
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch

from spinfast.errors import UserError
from spinfast.objectives import Objective
from spinfast.packing import bins, pack, packed_length
from spinfast.policy import Policy
from spinfast.types import Group, PackedBatch

log = logging.getLogger("spinfast")
Result = TypeVar("Result")


@dataclass(frozen=True)
class TrainPlan:
    """How a list of groups becomes optimizer steps."""

    groups_per_step: int
    microbatch_tokens: int
    epochs: int
    seed: int
    attention: str
    lr: float
    schedule: str = "linear"
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0
    max_overflows: int = 20
    shrunk: Callable[[int], None] = lambda tokens: None  # told the new microbatch_tokens when memory ran out

    def steps(self, groups: int) -> int:
        return self.epochs * math.ceil(groups / self.groups_per_step)


def step_rows(plan: TrainPlan, groups: int) -> list[list[int]]:
    """The rows of every optimizer step: a seeded shuffle per epoch, cut into steps. Pure, so resume recomputes it."""
    rows = []
    for epoch in range(plan.epochs):
        order = list(range(groups))
        random.Random(plan.seed * 1_000_003 + epoch).shuffle(order)
        rows += [order[i : i + plan.groups_per_step] for i in range(0, groups, plan.groups_per_step)]
    return rows


def step_batches(plan: TrainPlan, groups: Sequence[Group], rows: Sequence[int]) -> list[PackedBatch]:
    """The microbatches of one step."""
    chosen = [groups[row] for row in rows]
    return [
        pack(groups, [rows[i] for i in positions], plan.attention) for positions in bins(chosen, plan.microbatch_tokens)
    ]


def within_memory(
    plan: TrainPlan, groups: Sequence[Group], attempt: Callable[[TrainPlan], Result]
) -> tuple[Result, TrainPlan]:
    """attempt(plan), and again with half the microbatch each time memory runs out; returns the plan that fitted."""
    longest = max(map(packed_length, groups))
    while True:
        try:
            return attempt(plan), plan
        except torch.OutOfMemoryError as error:
            if plan.microbatch_tokens <= longest:
                raise UserError(
                    f"memory ran out with microbatches of {plan.microbatch_tokens} tokens, the longest group; set "
                    "train.checkpointing=true or lower prompt.max_prompt_tokens, prompt.max_answer_tokens or "
                    f"generation.max_tokens ({' '.join(str(error).split())[:200]})"
                ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tokens = max(plan.microbatch_tokens // 2, longest)
        log.warning("memory ran out at %d tokens; microbatches have %d from here on", plan.microbatch_tokens, tokens)
        plan = replace(plan, microbatch_tokens=tokens)
        plan.shrunk(tokens)


def answer_logps(policy: Policy, batch: PackedBatch) -> torch.Tensor:
    """Log-probs (N,) fp32 of the answers' tokens; the prompt's tokens never reach the head."""
    hidden_ND = policy.hidden(batch).index_select(0, batch.scored_N)
    return policy.ops.linear_logps(hidden_ND, policy.head_VD, batch.targets_N, bias=policy.head_bias_V)


@torch.no_grad()
def batch_sequence_logps(policy: Policy, batch: PackedBatch) -> torch.Tensor:
    """Log-prob sums (S,) fp32 on the host, one per answer."""
    batch = batch.to(policy.device)
    sums_S = torch.zeros(batch.sequences, device=policy.device, dtype=torch.float64)
    return sums_S.index_add_(0, batch.sequence_ids_N, answer_logps(policy, batch).double()).float().cpu()


def score(
    policy: Policy, groups: Sequence[Group], plan: TrainPlan, advance: Callable[[int, int], None]
) -> tuple[torch.Tensor, TrainPlan]:
    """Log-prob sums (groups, answers) of a list whose groups all have the same number of answers, and the plan that
    fitted.

    advance(groups, tokens) is called after each step's rows. If memory runs out all are scored again, so that all are
    cut alike: another cut rounds otherwise.
    """
    scores = torch.empty(len(groups), len(groups[0].answers) if groups else 0)
    first_epoch = step_rows(plan, len(groups))[: plan.steps(len(groups)) // plan.epochs]
    for rows in first_epoch:
        tokens, fitting = within_memory(plan, groups, partial(_score_rows, policy, groups, rows, scores))
        if fitting is not plan:
            return score(policy, groups, fitting, advance)
        advance(len(rows), tokens)
    return scores, plan


def _score_rows(policy, groups, rows, scores, plan) -> int:
    batches = step_batches(plan, groups, rows)
    for batch in batches:
        scores[list(batch.rows)] = batch_sequence_logps(policy, batch).view(len(batch.rows), -1)
    return sum(batch.tokens for batch in batches)


def sequence_logps(
    policy: Policy, groups: Sequence[Group], microbatch_tokens: int, attention: str
) -> list[list[float]]:
    """Log-prob sums per group and answer, any number of answers each, in the order given."""
    if not groups:
        return []
    plan = TrainPlan(len(groups), microbatch_tokens, epochs=1, seed=0, attention=attention, lr=0.0)
    return within_memory(plan, groups, partial(_sequence_logps, policy, groups))[0]


def _sequence_logps(policy, groups, plan) -> list[list[float]]:
    scores: list[list[float]] = [[] for _ in groups]
    for rows in bins(groups, plan.microbatch_tokens):
        batch = pack(groups, rows, plan.attention)
        sums = iter(batch_sequence_logps(policy, batch).tolist())
        for row in batch.rows:
            scores[row] = [next(sums) for _ in groups[row].answers]
    return scores


# Optimisation --------------------------------------------------------------------------------------------------


@dataclass
class TrainState:
    """All that a step changes besides the adapter."""

    optimizer: torch.optim.Optimizer
    step: int = 0
    loss_scale: float = 1.0
    good_steps: int = 0  # since the scale last changed
    overflows: int = 0  # in all
    overflows_in_a_row: int = 0
    recent_norms: list[float] = field(default_factory=list)  # gradient norms of the last steps that were made
    names: list[str] = field(default_factory=list)  # parameter names, in the optimizer's order


GROWTH_INTERVAL, MAX_LOSS_SCALE = 200, 2.0**16
SPIKE, SPIKE_WINDOW = 10.0, 50  # a norm so many times the median of so many steps is told


def start_training(policy: Policy, optimizer: str, weight_decay: float, scaled: bool) -> TrainState:
    """A fresh optimizer over the adapter; fp16 starts at a loss scale of 2^12."""
    parameters = policy.trainable_parameters()
    make = {"adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}[optimizer]
    return TrainState(
        make(list(parameters.values()), lr=0.0, weight_decay=weight_decay, foreach=True),
        loss_scale=2.0**12 if scaled else 1.0,
        names=list(parameters),
    )


class NonFinite(UserError):
    """Every one of the last steps was skipped. Carries what reproduces the last of them (failed_step.py)."""

    def __init__(self, message: str, rows: list[int], loss_scale: float, microbatch_tokens: int):
        super().__init__(message)
        self.rows, self.loss_scale, self.microbatch_tokens = rows, loss_scale, microbatch_tokens


def train(
    policy: Policy, groups: Sequence[Group], objective: Objective, plan: TrainPlan, state: TrainState, scaled: bool
) -> Iterator[dict[str, float]]:
    """Optimise from state.step to the end, yielding the metrics of each step after it was made.

    A caller may save policy and state between two yields and continue from there later. Raises NonFinite after
    max_overflows skipped steps in a row, and if not a single step could be made.
    """
    schedule = step_rows(plan, len(groups))
    while state.step < len(schedule):
        rows = schedule[state.step]
        lr = learning_rate(plan, state.step, len(schedule))
        for parameter_group in state.optimizer.param_groups:
            parameter_group["lr"] = lr
        scale = state.loss_scale
        metrics, plan = train_step(policy, groups, rows, objective, plan, state, scaled)
        state.step += 1
        if state.overflows_in_a_row >= min(plan.max_overflows, len(schedule)):
            message = (
                f"{state.overflows_in_a_row} steps in a row had a non-finite loss or gradient (the last, step "
                f"{state.step}: loss {metrics['train/loss']}, gradient norm {metrics['train/grad_norm']}, loss scale "
                f"{scale:g})"
            )
            raise NonFinite(message, rows, scale, plan.microbatch_tokens)
        yield {"step": state.step, "steps": len(schedule), "train/lr": lr, **metrics}


def train_step(policy, groups, rows, objective, plan, state, scaled) -> tuple[dict[str, float], TrainPlan]:
    """Accumulate, clip, update; the plan comes back, smaller if it did not fit. A non-finite step is skipped."""
    weight = sum(objective.weight(groups[row]) for row in rows)

    def attempt(plan: TrainPlan) -> tuple[dict[str, float], int]:
        return accumulate(policy, step_batches(plan, groups, rows), objective, weight, state)

    (metrics, tokens), plan = within_memory(plan, groups, attempt)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, 1.0 / state.loss_scale)
    norm = torch.nn.utils.clip_grad_norm_(parameters, plan.max_grad_norm).item()
    spike = norm / (statistics.median(state.recent_norms or [norm]) or 1.0)
    skipped = not (math.isfinite(norm) and math.isfinite(metrics["train/loss"]))
    if skipped:
        log.warning("step %d skipped: loss %g, gradient norm %g", state.step + 1, metrics["train/loss"], norm)
    else:
        state.optimizer.step()
        state.recent_norms = [*state.recent_norms, norm][-SPIKE_WINDOW:]
        if spike > SPIKE:
            log.warning("step %d: the gradient's norm, %.3g, is %.0f times its median", state.step + 1, norm, spike)
    state.optimizer.zero_grad(set_to_none=True)
    scale = state.loss_scale
    _update_loss_scale(state, skipped, scaled)
    metrics |= {"train/grad_norm": norm, "train/grad_spike": spike}
    metrics |= {"train/loss_scale": scale, "train/overflows": state.overflows}
    return metrics | {"train/tokens": tokens, "train/microbatch_tokens": plan.microbatch_tokens}, plan


def accumulate(policy, batches, objective, weight, state) -> tuple[dict[str, float], int]:
    """The step's scaled gradients, from zero; the means of its metrics and its tokens."""
    state.optimizer.zero_grad(set_to_none=True)
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        batch = batch.to(policy.device)
        loss = objective(batch, answer_logps(policy, batch))
        (loss.total * (state.loss_scale / weight)).backward()
        for name, value in {"train/loss": loss.total.detach(), **loss.metrics}.items():
            sums[name] = sums.get(name, 0.0) + value
    metrics = {name: (value / weight).item() for name, value in sums.items()}
    return metrics, sum(batch.tokens for batch in batches)


def _update_loss_scale(state: TrainState, skipped: bool, scaled: bool) -> None:
    if skipped:
        state.overflows += 1
        state.overflows_in_a_row += 1
        state.good_steps = 0
        state.loss_scale = max(state.loss_scale / 2, 1.0) if scaled else 1.0
        return
    state.overflows_in_a_row = 0
    state.good_steps += 1
    if scaled and state.good_steps == GROWTH_INTERVAL:
        state.good_steps = 0
        state.loss_scale = min(state.loss_scale * 2, MAX_LOSS_SCALE)


def learning_rate(plan: TrainPlan, step: int, steps: int) -> float:
    """Linear warm-up over warmup_ratio of the steps, then linear or cosine decay to zero, or constant."""
    warmup = math.ceil(plan.warmup_ratio * steps)
    if step < warmup:
        return plan.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[plan.schedule]
    return plan.lr * factor
