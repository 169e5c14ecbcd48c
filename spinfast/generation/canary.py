"""Does the engine really generate with base + adapter_t? Asked at every swap, answered with log-probs.

The log-probs of a fixed prompt by the engine must match the training policy's, under the base and under the adapter,
within the rounding of the compute dtype. In 16 bit that alone tells little of an adapter that moves them less than
rounding does, so it is asked a second time, amplified until it moves them by STRONG: then the engine's move
and the policy's must be the same vector. Generating with the base, with last round's adapter, with one that is scaled
twice, or on a base that training has changed all fail it.

Bounds: mean over the prompt's tokens, in nats, and for the strong adapter |engine - policy| / |policy| of the moves.
Measured on SmolLM2-135M on a CPU, engine against policy: fp32 8e-6, bf16 0.06 (chat text) to 0.12 (random tokens);
moves of 1 nat in bf16 0.08 for the same adapter, 0.35 for one of half its size. Below 0.05 nats bf16 shows no adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from spinfast.packing import pack
from spinfast.policy import Policy
from spinfast.policy.adapters.files import idle, linear, rank_axis, twin
from spinfast.scoring import answer_logps
from spinfast.types import Adapter, Group

BOUNDS = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
MOVE_BOUNDS = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.25}
STRONG, STRONGEST = 1.0, 3.0**12  # nats per token; more amplification than any trained adapter needs
PolicyLogps = Callable[[Sequence[int], float], list[float]]  # (prompt ids, factor) -> len(ids) - 1 log-probs


@runtime_checkable
class Scorer(Protocol):
    """A generator that can also score a prompt."""

    def prompt_logps(self, prompt_ids: Sequence[int], adapter: Adapter | None) -> list[float]: ...


@dataclass(frozen=True)
class CanaryReport:
    """Mean absolute differences of log-probs over the prompt, in nats."""

    tokens: int
    base_error: float  # engine against policy, base alone
    adapter_error: float  # engine against policy, base + adapter
    moved: float  # base against base + adapter, both by the engine
    bound: float
    move_error: float | None  # relative, of the strong adapter; None while B is zero

    def __str__(self) -> str:
        moves = (
            "the adapter adds nothing"
            if self.move_error is None
            else f"the strong adapter's moves by {self.move_error:.1%}"
        )
        return f"engine and policy differ by {self.adapter_error:.2g} nats per token, {moves}"


def policy_logps(policy: Policy, attention: str) -> PolicyLogps:
    """The training policy's own forward as the measure: packed attention, its operators, its live adapter."""

    @torch.no_grad()
    def logps(prompt_ids: Sequence[int], factor: float) -> list[float]:
        batch = pack([Group(tuple(prompt_ids[:1]), (tuple(prompt_ids[1:]),))], [0], attention).to(policy.device)
        with _with_adapter(policy, factor):
            return answer_logps(policy, batch).tolist()

    return logps


def _with_adapter(policy: Policy, factor: float) -> AbstractContextManager:
    if factor == 0:
        return policy.without_adapter()
    return nullcontext() if factor == 1 else policy.playing(amplified(policy.adapter(), factor))


def amplified(adapter: Adapter, factor: float) -> Adapter:
    """What the adapter adds to the weights, times `factor`: of each rank of a LoRA the smaller side is multiplied, so
    that 16 bits hold it."""
    if adapter.kind == "lora":
        tensors = {name: tensor * _of_smaller(adapter, name, factor) for name, tensor in adapter.tensors.items()}
    else:
        tensors = {name: tensor * (factor if linear(name) else 1) for name, tensor in adapter.tensors.items()}
    return Adapter(adapter.config, tensors)


def _of_smaller(adapter: Adapter, name: str, factor: float) -> torch.Tensor:
    """For each rank of A or B: `factor` where it is smaller than the other's there, or as large and B's."""
    axis, sides = rank_axis(name), (adapter.tensors[name], adapter.tensors[twin(name)])
    own_r, other_r = (side.float().norm(dim=dim) for side, dim in zip(sides, (1 - axis, axis), strict=True))
    times_r = torch.where(own_r <= other_r if axis else own_r < other_r, factor, 1.0)
    return times_r if axis else times_r[:, None]


def check_adapter(
    generator: Scorer,
    policy_logps: PolicyLogps,
    prompt_ids: Sequence[int],
    adapter: Adapter,
    *,
    dtype: torch.dtype,
) -> CanaryReport:
    """Raises RuntimeError if the engine's base or its base + adapter is not the policy's."""
    bound = BOUNDS[dtype]
    base, policy_base = (
        torch.tensor(generator.prompt_logps(prompt_ids, None)),
        torch.tensor(policy_logps(prompt_ids, 0)),
    )
    trained = any(map(linear, adapter.tensors)) and not idle(adapter)  # whole weights are not amplified
    factor, policy_move = _strong(policy_logps, prompt_ids, policy_base) if trained else (1.0, None)
    strong = torch.tensor(generator.prompt_logps(prompt_ids, amplified(adapter, factor))) if trained else base
    adapted = torch.tensor(generator.prompt_logps(prompt_ids, adapter))  # last: it stays in the engine's slot
    base_error = _distance(base, policy_base)
    adapter_error = _distance(adapted, torch.tensor(policy_logps(prompt_ids, 1)))
    moved = _distance(base, adapted)
    if base_error > bound:
        raise RuntimeError(
            f"canary: the engine's base is not the policy's: log-probs differ by {base_error:.2g} nats per token "
            f"(bound {bound:g} for {dtype}); its weights were changed or belong to another checkpoint"
        )
    if trained and torch.equal(base, strong):
        raise RuntimeError(
            "canary: the adapter's B is not zero, yet the engine's log-probs are the base's; it generates without it"
        )
    if adapter_error > bound:
        raise RuntimeError(
            f"canary: the engine does not generate with this adapter: log-probs differ from the policy's by "
            f"{adapter_error:.2g} nats per token (bound {bound:g} for {dtype}; the adapter moved them by {moved:.2g})"
        )
    move_error = ((strong - base - policy_move).norm() / policy_move.norm()).item() if trained else None
    if move_error is not None and not move_error <= MOVE_BOUNDS[dtype]:
        raise RuntimeError(
            f"canary: the engine does not generate with this adapter: amplified {factor:g} times, it moves the "
            f"engine's log-probs otherwise than the policy's (relative difference {move_error:.2g}, bound "
            f"{MOVE_BOUNDS[dtype]:g} for {dtype})"
        )
    return CanaryReport(len(prompt_ids) - 1, base_error, adapter_error, moved, bound, move_error)


def _strong(policy_logps: PolicyLogps, prompt_ids: Sequence[int], base: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The first power of 3 at which the adapter moves the policy's log-probs by STRONG, and that move."""
    factor = 1.0
    while True:
        move = torch.tensor(policy_logps(prompt_ids, factor)) - base
        if move.abs().mean() >= STRONG or factor >= STRONGEST:
            return factor, move
        factor *= 3


def _distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left - right).abs().mean().item()
