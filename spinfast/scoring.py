"""Log-probs of packed batches, within memory; knows no files.

A reference is the policy before its first step, so scoring runs the very batches that training runs first: same
kernels, same shapes, and the first loss is l(0) to rounding even in bf16.

Groups are dealt to ranks by their position (spread.py): each packs its share alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import TypeVar

import torch

from spinfast import spread
from spinfast.errors import UserError
from spinfast.objectives import Objective, split
from spinfast.packing import bins, pack, packed_length
from spinfast.policy import Policy
from spinfast.steps import Epochs
from spinfast.sums import segment_sums, take_rows
from spinfast.types import Group, PackedBatch

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
