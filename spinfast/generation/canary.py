"""Does the engine really generate with base + adapter_t? Asked at every swap, answered with log-probs.

The log-probs of a fixed prompt by the engine must match the training policy's, under the base and under the adapter,
within the rounding of the compute dtype; and where B is not zero they must not be the base's own. Generating with the
base, with last round's adapter, or on a base that training has changed all fail it.

Bounds are on the mean over the prompt's tokens, in nats. Measured on SmolLM2-135M on a CPU, engine against policy:
fp32 8e-6, bf16 0.06 (chat text) to 0.12 (random tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from spinfast.packing import pack
from spinfast.policy import Policy
from spinfast.train import answer_logps
from spinfast.types import Adapter, Group

BOUNDS = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
PolicyLogps = Callable[[Sequence[int], bool], list[float]]  # (prompt ids, with the adapter?) -> len(ids) - 1 log-probs


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


def policy_logps(policy: Policy, attention: str) -> PolicyLogps:
    """The training policy's own forward as the measure: packed attention, its operators, its live adapter."""

    @torch.no_grad()
    def logps(prompt_ids: Sequence[int], with_adapter: bool) -> list[float]:
        batch = pack([Group(tuple(prompt_ids[:1]), (tuple(prompt_ids[1:]),))], [0], attention).to(policy.device)
        with nullcontext() if with_adapter else policy.model.disable_adapter():
            return answer_logps(policy, batch).tolist()

    return logps


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
    base = torch.tensor(generator.prompt_logps(prompt_ids, None))
    adapted = torch.tensor(generator.prompt_logps(prompt_ids, adapter))
    base_error = _distance(base, policy_logps(prompt_ids, False))
    adapter_error = _distance(adapted, policy_logps(prompt_ids, True))
    moved = _distance(base, adapted)
    if base_error > bound:
        raise RuntimeError(
            f"canary: the engine's base is not the policy's: log-probs differ by {base_error:.2g} nats per token "
            f"(bound {bound:g} for {dtype}); its weights were changed or belong to another checkpoint"
        )
    trained = any(tensor.any() for name, tensor in adapter.tensors.items() if ".lora_B." in name)
    if trained and torch.equal(base, adapted):
        raise RuntimeError(
            "canary: the adapter's B is not zero, yet the engine's log-probs are the base's; it generates without it"
        )
    if adapter_error > bound:
        raise RuntimeError(
            f"canary: the engine does not generate with this adapter: log-probs differ from the policy's by "
            f"{adapter_error:.2g} nats per token (bound {bound:g} for {dtype}; the adapter moved them by {moved:.2g})"
        )
    return CanaryReport(len(prompt_ids) - 1, base_error, adapter_error, moved, bound)


def _distance(left: torch.Tensor, right: Sequence[float] | torch.Tensor) -> float:
    return (left - torch.as_tensor(right)).abs().mean().item()
