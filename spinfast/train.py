"""Training on packed batches: the loss, the step. Knows no files and no iterations.

Gradients add up over microbatches, so where memory runs out the same step is made again of smaller ones. Groups are
dealt to ranks by their position (spread.py): each packs its share alone, all divide by the weight of all.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

import torch

from spinfast import spread
from spinfast.config import Optimisation
from spinfast.errors import UserError
from spinfast.objectives import Objective
from spinfast.policy import Policy
from spinfast.policy.checksum import checksum
from spinfast.scoring import Budget, answer_logps, batches, scored, within_memory
from spinfast.steps import Steps
from spinfast.types import Group, PackedBatch
from spinfast.watch import Watched

log = logging.getLogger("spinfast")


@dataclass
class TrainState:
    """All that a step changes besides the adapter."""

    optimizer: torch.optim.Optimizer
    scaled: bool  # fp16 gradients need a loss scale
    step: int = 0
    loss_scale: float = 1.0
    good_steps: int = 0  # since the scale last changed
    overflows: int = 0  # in all
    overflows_in_a_row: int = 0
    recent_norms: list[float] = field(default_factory=list)  # gradient norms of the last steps that were made
    names: list[str] = field(default_factory=list)  # parameter names, in the optimizer's order
    watched: Watched = field(default_factory=Watched)


MakeOptimizer = Callable[[list[torch.nn.Parameter], float, bool], torch.optim.Optimizer]
TOGETHER = (
    2**25
)  # numbers: one call updates so many at once, with copies of them all; larger models go tensor by tensor
GROWTH_INTERVAL, MAX_LOSS_SCALE = 200, 2.0**16
COMPARED = 50  # steps from one comparison of the ranks' parameters to the next
SPIKE, SPIKE_WINDOW = 10.0, 50  # a norm so many times the median of so many steps is told


def start_training(policy: Policy, optimizer: str, weight_decay: float, scaled: bool) -> TrainState:
    """A fresh optimizer over the adapter; fp16 starts at a loss scale of 2^12."""
    parameters = policy.trainable_parameters()
    together = sum(p.numel() for p in parameters.values()) <= TOGETHER
    return TrainState(
        OPTIMIZERS[optimizer](list(parameters.values()), weight_decay, together),
        scaled,
        loss_scale=2.0**12 if scaled else 1.0,
        names=list(parameters),
    )


def _of_torch(optimizer: type[torch.optim.Optimizer]) -> MakeOptimizer:
    return lambda parameters, weight_decay, together: optimizer(
        parameters, lr=0.0, weight_decay=weight_decay, foreach=together
    )


def _adamw_8bit(parameters: list[torch.nn.Parameter], weight_decay: float, _: bool) -> torch.optim.Optimizer:
    """bitsandbytes' (arXiv 2110.02861): moments in blocks of 8 bits; small tensors keep theirs in 32."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("optimizer: adamw_8bit needs bitsandbytes, which is not installed; use adafactor") from None
    return AdamW8bit(parameters, lr=0.0, weight_decay=weight_decay)


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw": _of_torch(torch.optim.AdamW),
    "rmsprop": _of_torch(torch.optim.RMSprop),
    "adafactor": _of_torch(torch.optim.Adafactor),
    "adamw_8bit": _adamw_8bit,
}


class NonFinite(UserError):
    """Every one of the last steps was skipped. Carries what reproduces the last of them (store/failed_step.py)."""

    def __init__(self, message: str, groups: Sequence[Group], loss_scale: float, microbatch_tokens: int):
        super().__init__(message)
        self.groups, self.loss_scale, self.microbatch_tokens = groups, loss_scale, microbatch_tokens


def train(
    policy: Policy,
    steps: Steps,
    objective: Objective,
    settings: Optimisation,
    lr: float,
    budget: Budget,
    state: TrainState,
    max_overflows: int,
) -> Iterator[dict[str, float]]:
    """Optimise from state.step to the end, yielding the metrics of each step after it was made.

    A caller may save policy and state between two yields and continue from there later. Raises NonFinite after
    max_overflows skipped steps in a row, and if not a single step could be made.
    """
    budget = replace(budget, longest=steps.longest)
    while state.step < len(steps):
        groups = steps[state.step]
        now = learning_rate(settings, lr, state.step, len(steps))
        for parameter_group in state.optimizer.param_groups:
            parameter_group["lr"] = now
        scale = state.loss_scale
        metrics, budget = train_step(policy, groups, objective, settings.max_grad_norm, budget, state)
        state.step += 1
        if state.step % COMPARED == 0 or state.step == len(steps):
            spread.check_equal(f"step {state.step}", partial(checksum, policy.trainable_parameters()))
        if state.overflows_in_a_row >= min(max_overflows, len(steps)):
            message = (
                f"{state.overflows_in_a_row} steps in a row had a non-finite loss or gradient (the last, step "
                f"{state.step}: loss {metrics['train/loss']}, gradient norm {metrics['train/grad_norm']}, loss scale "
                f"{scale:g})"
            )
            raise NonFinite(message, groups, scale, budget.microbatch_tokens)
        yield {"step": state.step, "steps": len(steps), "train/lr": now, **metrics}


def train_step(
    policy: Policy,
    groups: Sequence[Group],
    objective: Objective,
    max_grad_norm: float,
    budget: Budget,
    state: TrainState,
) -> tuple[dict[str, float], Budget]:
    """Accumulate, clip, update; the budget comes back, smaller if it did not fit. A non-finite step is skipped.

    Where the objective leaves no group to train on, nothing moves: not the adapter, nor the optimizer's moments.
    """

    def measure(parts: Sequence[Group]) -> list[list[float]]:
        nonlocal budget
        logps, budget = scored(policy, parts, budget)
        return logps

    weight = sum(map(objective.weight, groups))  # those that need no training count too
    objective, groups = objective.for_step(groups, measure)

    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    gradients: list[list[torch.Tensor | None]] = []  # of each share that is computed here

    def attempt(budget: Budget) -> list[Sums]:
        parts = objective.cut(groups, budget.microbatch_tokens)
        gradients.clear()
        found = []
        for rows in spread.shares(len(parts), budget.shares):
            packed = batches([parts[i] for i in rows], budget)
            found.append(accumulate(policy, packed, objective, weight, state))
            gradients.append([p.grad for p in parameters])
        return found

    if not groups:
        still = {"train/empty": 1.0, **dict.fromkeys(("train/loss", "train/grad_norm", "train/grad_spike"), 0.0)}
        return still | _counters(state, state.loss_scale, 0, budget), budget
    found, budget = within_memory(budget, objective.cut(groups, 0), attempt)
    metrics, tokens = combined(spread.in_order(found), weight)
    spread.add_up(parameters, gradients, budget.shares)
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1.0 / state.loss_scale)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    spike = norm / (statistics.median(state.recent_norms or [norm]) or 1.0)
    skipped = not (math.isfinite(norm) and math.isfinite(metrics["train/loss"]))
    if skipped:
        log.warning("step %d skipped: loss %g, gradient norm %g", state.step + 1, metrics["train/loss"], norm)
    else:
        state.optimizer.step()
        policy.updated()
        state.recent_norms = [*state.recent_norms, norm][-SPIKE_WINDOW:]
        if spike > SPIKE:
            log.warning("step %d: the gradient's norm, %.3g, is %.0f times its median", state.step + 1, norm, spike)
    state.optimizer.zero_grad(set_to_none=True)
    scale = state.loss_scale
    _update_loss_scale(state, skipped)
    metrics |= {"train/grad_norm": norm, "train/grad_spike": spike}
    return metrics | _counters(state, scale, tokens, budget), budget


def _counters(state: TrainState, scale: float, tokens: int, budget: Budget) -> dict[str, float]:
    made = {"train/loss_scale": scale, "train/overflows": state.overflows}
    return made | {"train/tokens": tokens, "train/microbatch_tokens": budget.microbatch_tokens}


EXTREMES = {"max": torch.maximum, "min": torch.minimum}  # how metrics of such a last name combine
Sums = tuple[dict[str, float], dict[str, tuple[float, float]], int]  # metrics, means' (sum, count), tokens


def accumulate(
    policy: Policy, packed: Sequence[PackedBatch], objective: Objective, weight: float, state: TrainState
) -> Sums:
    """The scaled gradients of these microbatches, from zero; what they say, and their tokens."""
    state.optimizer.zero_grad(set_to_none=True)
    found: dict[str, torch.Tensor] = {}
    means: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for batch in packed:
        batch = batch.to(policy.device)
        loss = objective(batch, answer_logps(policy, batch, objective.temperature), policy.ops)
        (loss.total * (state.loss_scale / weight)).backward()
        for name, value in {"train/loss": loss.total.detach(), **loss.metrics}.items():
            found[name] = _combine(name)(found[name], value) if name in found else value
        for name, (value, count) in loss.means.items():
            before, counted = means.get(name, (0.0, 0))
            means[name] = before + value, counted + count
    numbers = iter(on_host([*found.values(), *chain(*means.values())]))
    sums = {name: next(numbers) for name in found}
    of_means = {name: (next(numbers), next(numbers)) for name in means}
    return sums, of_means, sum(batch.tokens for batch in packed)


def on_host(scalars: Sequence[torch.Tensor]) -> list[float]:
    """Numbers of the device, for which the host waits once."""
    return torch.stack([x.double() for x in scalars]).cpu().tolist() if scalars else []


def combined(shares: Sequence[Sums], weight: float) -> tuple[dict[str, float], int]:
    """The means of a step's metrics and its tokens, from its shares in their order."""
    found: dict[str, torch.Tensor] = {}
    means: dict[str, torch.Tensor] = {}
    for sums, of_means, _ in shares:
        for name, value in sums.items():
            value = torch.tensor(value)
            found[name] = _combine(name)(found[name], value) if name in found else value
        for name, pair in of_means.items():
            means[name] = means.get(name, 0) + torch.tensor(pair)
    metrics = {name: (value / (weight if _combine(name) is torch.add else 1)).item() for name, value in found.items()}
    metrics |= {name: (value / count.clamp(min=1e-9)).item() for name, (value, count) in means.items()}
    return metrics, sum(tokens for *_, tokens in shares)


def _combine(name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return EXTREMES.get(name.rsplit("/", 1)[-1], torch.add)


def _update_loss_scale(state: TrainState, skipped: bool) -> None:
    if skipped:
        state.overflows += 1
        state.overflows_in_a_row += 1
        state.good_steps = 0
        state.loss_scale = max(state.loss_scale / 2, 1.0) if state.scaled else 1.0
        return
    state.overflows_in_a_row = 0
    state.good_steps += 1
    if state.scaled and state.good_steps == GROWTH_INTERVAL:
        state.good_steps = 0
        state.loss_scale = min(state.loss_scale * 2, MAX_LOSS_SCALE)


def learning_rate(settings: Optimisation, peak: float, step: int, steps: int) -> float:
    """Linear warm-up over warmup_ratio of the steps, then linear or cosine decay to min_lr_rate, or constant."""
    warmup = math.ceil(settings.warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[settings.schedule]
    return peak * (settings.min_lr_rate + (1 - settings.min_lr_rate) * factor)
