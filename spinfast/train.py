"""Scoring and training on packed batches: the forward, the loss, the step. Knows no files and no iterations.

A reference is the policy before its first step, so scoring runs the very batches that training runs first: same
kernels, same shapes, and the first loss is l(0) to rounding even in bf16. Gradients add up over microbatches, so
where memory runs out the same step is made again of smaller ones.

Groups are dealt to ranks by their position (spread.py): each packs its share alone, all divide by the weight of all.
"""

from __future__ import annotations

import logging
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Protocol, TypeVar

import torch

from spinfast import spread
from spinfast.config import Optimisation
from spinfast.errors import UserError
from spinfast.objectives import Objective, split
from spinfast.packing import bins, pack, packed_length
from spinfast.policy import Policy
from spinfast.policy.checksum import checksum
from spinfast.sums import segment_sums, take_rows
from spinfast.types import Group, PackedBatch
from spinfast.watch import Watched

log = logging.getLogger("spinfast")
Result = TypeVar("Result")
Advance = Callable[[int, int], object]  # called with the groups and the tokens that were scored


def unseen(groups: int, tokens: int) -> None:
    """The Advance of whoever shows nothing."""


@dataclass(frozen=True)
class Budget:
    """How much is computed at once, and by which attention."""

    microbatch_tokens: int
    attention: str
    longest: int = 0  # packed tokens of the longest group to come, see Steps; microbatches never get smaller
    shares: int = 0  # into how many a list of groups is dealt; 0: as many as there are ranks
    shrunk: Callable[[int], None] = lambda tokens: None  # told the new microbatch_tokens when memory ran out

    @property
    def dealt(self) -> int:
        """Into how many shares a list of groups is dealt."""
        return self.shares or spread.world()


class Steps(Protocol):
    """The groups of every optimizer step, asked for when it is their turn; a resumed run must get the same."""

    longest: int  # packed tokens of the longest group there can be, cut as small as the objective allows
    files: Sequence[str]  # what the stage keeps of them

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Sequence[Group]: ...

    def figures(self, step: int) -> dict[str, float]:
        """What a metrics line says of a step's groups themselves."""


class Epochs:
    """Steps over a list of groups: a seeded shuffle per epoch, cut into steps."""

    files = ()

    def __init__(self, groups: Sequence[Group], per_step: int, epochs: int, seed: int):
        self.groups = groups
        self.longest = max(map(packed_length, groups), default=0)
        self.rows: list[list[int]] = []  # positions in `groups`, of every step
        for epoch in range(epochs):
            order = list(range(len(groups)))
            random.Random(seed * 1_000_003 + epoch).shuffle(order)
            self.rows += [order[i : i + per_step] for i in range(0, len(groups), per_step)]
        self.first = self.rows[: len(self.rows) // epochs]  # the steps in which every group occurs once

    def of(self, groups: Sequence[Group]) -> Epochs:
        """The same steps over other groups, one for each."""
        steps = copy(self)
        steps.groups = groups
        return steps

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, step: int) -> list[Group]:
        return [self.groups[row] for row in self.rows[step]]

    def figures(self, step: int) -> dict[str, float]:
        return {}


def batches(groups: Sequence[Group], budget: Budget) -> list[PackedBatch]:
    """The microbatches of a list of groups."""
    return [pack(groups, rows, budget.attention) for rows in bins(groups, budget.microbatch_tokens)]


def within_memory(
    budget: Budget, groups: Sequence[Group], attempt: Callable[[Budget], Result]
) -> tuple[list[Result], Budget]:
    """attempt(budget) of every rank, and again with half the microbatch each time memory runs out on one of them.

    Returns the ranks' plain results and the budget that fitted. An attempt says nothing to other ranks.
    """
    longest = max(budget.longest, *map(packed_length, groups))
    while True:
        mine, failed = None, ""
        try:
            mine = attempt(budget)
        except torch.OutOfMemoryError as error:
            failed = " ".join(str(error).split())[:200] or "no reason given"
        found = spread.gather("what was computed", (mine, failed))
        failures = [f"rank {rank}: {why}" if rank else why for rank, (_, why) in enumerate(found) if why]
        if not failures:
            return [result for result, _ in found], budget
        if budget.microbatch_tokens <= longest:
            raise UserError(
                f"memory ran out with microbatches of {budget.microbatch_tokens} tokens, the longest group; set "
                "train.checkpointing=true or lower prompt.max_prompt_tokens, prompt.max_answer_tokens or "
                f"generation.max_tokens ({failures[0]})"
            )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tokens = max(budget.microbatch_tokens // 2, longest)
        log.warning("memory ran out at %d tokens; microbatches have %d from here on", budget.microbatch_tokens, tokens)
        budget = replace(budget, microbatch_tokens=tokens)
        budget.shrunk(tokens)


def answer_logps(policy: Policy, batch: PackedBatch, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs (N,) fp32 of the answers' tokens; the prompt's tokens never reach the head."""
    hidden_ND = take_rows(policy.hidden(batch), batch.scored_N)
    head = {"bias": policy.head_bias_V, "temperature": temperature}
    return policy.ops.linear_logps(hidden_ND, policy.head_VD, batch.targets_N, **head)


@torch.no_grad()
def batch_sequence_logps(policy: Policy, batch: PackedBatch) -> torch.Tensor:
    """Log-prob sums (S,) fp32 on the host, one per answer."""
    batch = batch.to(policy.device)
    return segment_sums(answer_logps(policy, batch), batch.sequence_ids_N, batch.sequences).cpu()


def score(policy: Policy, epochs: Epochs, budget: Budget, advance: Advance) -> tuple[list[list[float]], Budget]:
    """Log-prob sums per group and answer, and the budget that fitted.

    Cut into the microbatches of the first epoch; advance(groups, tokens) is called after each step's rows. If memory
    runs out all are scored again, so that all are cut alike: another cut rounds otherwise.
    """
    groups = epochs.groups
    if budget.longest < epochs.longest:
        budget = replace(budget, longest=epochs.longest)
    scores: list[list[float]] = [[] for _ in groups]
    for rows in epochs.first:
        chosen = [groups[row] for row in rows]
        sums, fitting = scored(policy, chosen, budget)
        if fitting is not budget:
            return score(policy, epochs, fitting, advance)
        for row, logps in zip(rows, sums, strict=True):
            scores[row] = logps
        advance(len(rows), sum(map(packed_length, chosen)))
    return scores, budget


def sequence_logps(
    policy: Policy, groups: Sequence[Group], budget: Budget, advance: Advance = unseen
) -> list[list[float]]:
    """Log-prob sums per group and answer, any number of answers each, in the order given."""
    return scored(policy, groups, with_room(budget, groups), advance)[0] if groups else []


def scored(
    policy: Policy, groups: Sequence[Group], budget: Budget, advance: Advance = unseen
) -> tuple[list[list[float]], Budget]:
    """The same, by all ranks; and the budget that fitted, which may have to be smaller than this one."""

    def attempt(budget: Budget) -> list[tuple[int, list[float]]]:
        return [
            found
            for rows in spread.shares(len(groups), budget.shares)
            for found in zip(rows, logps_in_cut(policy, [groups[i] for i in rows], budget, advance), strict=True)
        ]

    found, budget = within_memory(budget, groups, attempt)
    return [logps for _, logps in sorted(chain(*found))], budget


def as_step(
    policy: Policy, objective: Objective, groups: Sequence[Group], budget: Budget, advance: Advance = unseen
) -> tuple[Objective, Sequence[Group], list[list[float]]]:
    """Groups that are only scored, as a step of them: the objective for it, its groups, their log-prob sums."""
    objective, groups = objective.for_step(groups, partial(sequence_logps, policy, budget=budget))
    return objective, groups, sequence_logps(policy, groups, budget, advance)


def with_room(budget: Budget, groups: Sequence[Group]) -> Budget:
    """The budget, larger where a group that is only scored is longer than any that is trained on."""
    return replace(budget, microbatch_tokens=max(budget.microbatch_tokens, *map(packed_length, groups), 0))


def logps_in_cut(
    policy: Policy, groups: Sequence[Group], budget: Budget, advance: Advance = unseen
) -> list[list[float]]:
    """The same here, in the budget's microbatches and no others; raises torch.OutOfMemoryError."""
    scores: list[list[float]] = [[] for _ in groups]
    for batch in batches(groups, budget):
        sums = iter(batch_sequence_logps(policy, batch).tolist())
        for row in batch.rows:
            scores[row] = [next(sums) for _ in groups[row].answers]
        advance(len(batch.rows), batch.tokens)
    return scores


@torch.no_grad()
def token_logps(
    policy: Policy, groups: Sequence[Group], budget: Budget, temperature: float = 1.0
) -> list[tuple[tuple[float, ...], ...]]:
    """Per group and answer the log-prob of every scored token, cut as a step of a Surrogate on these groups is."""
    if not groups:
        return []

    def attempt(budget: Budget) -> list[tuple[int, list[tuple[float, ...]]]]:
        parts = [part for group in groups for part in split(group, budget.microbatch_tokens)]
        found = []
        for rows in spread.shares(len(parts), budget.shares):
            share = [parts[i] for i in rows]
            for batch in batches(share, budget):
                logps = iter(answer_logps(policy, batch.to(policy.device), temperature).tolist())
                for i in batch.rows:
                    found.append((rows[i], [tuple(islice(logps, length)) for length in share[i].lengths]))
        return found

    smallest = [part for group in groups for part in split(group, 0)]
    found, _ = within_memory(with_room(budget, smallest), smallest, attempt)
    answers = (tuple(answer) for _, part in sorted(chain(*found)) for answer in part)
    return [tuple(islice(answers, len(group.answers))) for group in groups]


# Optimisation --------------------------------------------------------------------------------------------------


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
