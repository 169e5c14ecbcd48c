"""Every live byte counted by kind, and the means to spend fewer: activation checkpointing, offloading.

A dispatch mode sees each storage when an operator returns it and when it dies. Run over a real step it is a
profiler; run over a policy of meta tensors (simulation.py) it predicts what the same code will hold.

Not seen, and therefore part of the planner's reserve: workspaces inside operators (cuBLAS: 8 MiB), the CUDA
context, and what the allocator cannot reuse for being cut into pieces.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from spinfast.policy import Policy
from spinfast.policy.quantised import states
from spinfast.policy.transformers import TransformersPolicy
from spinfast.train import TrainState

KINDS = ("weights", "adapters", "optimizer", "gradients", "generation", "checkpoints", "activations", "head")
META, HOST = torch.device("meta"), torch.device("cpu")
aten = torch.ops.aten


@dataclass(frozen=True)
class Usage:
    """The fullest moment: bytes on the device in all and by kind, and the most that ever lay on the host."""

    peak: int
    by_kind: dict[str, int]
    host: int = 0


class Ledger(TorchDispatchMode):
    """Live bytes by kind. With `simulated`, operators that need data answer without: every test is true."""

    def __init__(self, block: int = 1, simulated: bool = False, timeline: bool = False):
        super().__init__()
        self.block, self.simulated = block, simulated
        self.kind = "activations"  # of what is allocated now
        self.live: Counter[str] = Counter()
        self.usage = Usage(0, {})
        self.timeline: list[dict[str, int]] | None = [] if timeline else None
        self._entries: dict[int, tuple[weakref.ref, str, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = self._without_data(func, args, kwargs) if self.simulated else NotImplemented
        if out is NotImplemented:
            out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage(), self.kind)
        if self.timeline is not None:
            self.timeline.append(dict(self.live))
        return out

    def tag(self, tensor: torch.Tensor, kind: str) -> None:
        """From now on the tensor's storage counts as `kind`."""
        storage = tensor.untyped_storage()
        self._forget(storage._cdata)
        self._see(storage, kind)

    @contextmanager
    def allocating(self, kind: str) -> Iterator[None]:
        """What is allocated inside is of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def as_kind(self, kind: str, function: Callable) -> Callable:
        def counted(*args, **kwargs):
            with self.allocating(kind):
                return function(*args, **kwargs)

        return counted

    def _see(self, storage: torch.UntypedStorage, kind: str) -> None:
        key = storage._cdata
        if key in self._entries or (self.simulated and storage.device == HOST):
            return
        size = -(-storage.nbytes() // self.block) * self.block
        self._entries[key] = (weakref.ref(storage, lambda _: self._forget(key)), kind, size)
        self.live[kind] += size
        self._note_peak()

    def _forget(self, key: int) -> None:
        if key in self._entries:
            _, kind, size = self._entries.pop(key)
            self.live[kind] -= size

    def _note_peak(self) -> None:
        host = max(self.usage.host, self.live["host"])
        total = self.live.total() - self.live["host"]
        if total > self.usage.peak:
            by_kind = {kind: size for kind, size in self.live.items() if size and kind != "host"}
            self.usage = Usage(total, by_kind, host)
        elif host > self.usage.host:
            self.usage = replace(self.usage, host=host)

    def _without_data(self, func, args, kwargs):
        if func is aten.is_nonzero.default:
            return True
        if func in (aten._local_scalar_dense.default, aten.item.default):  # the second in inference mode
            return 1.0
        to_host = kwargs.get("device") == HOST
        if func in (aten._to_copy.default, aten.to.dtype_layout) and to_host and args[0].is_meta:
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=HOST)
        if func is aten.empty.memory_format and to_host and kwargs.get("pin_memory"):
            pinned = torch.empty(*args, dtype=kwargs.get("dtype"), device=META)
            self._see(pinned.untyped_storage(), "host")
            return pinned
        if func is aten._efficient_attention_backward.default:
            # torch 2.13's meta function lacks an argument; cutlass accumulates dq in fp32
            q, k, v = args[1:4]
            scratch = torch.empty(q.shape, dtype=torch.float32, device=q.device)
            self._see(scratch.untyped_storage(), self.kind)
            return *(torch.empty_like(x) for x in (q, k, v)), torch.empty(0, device=q.device)
        return NotImplemented


@contextmanager
def counting(
    policy: Policy, state: TrainState | None = None, block: int = 1, simulated: bool = False, timeline: bool = False
) -> Iterator[Ledger]:
    """A ledger of what lives while the block runs, the policy and the optimizer's moments told apart from the rest."""
    ledger = Ledger(block, simulated, timeline)
    for tensor in [*policy.model.parameters(), *policy.model.buffers()]:
        ledger.tag(tensor, "adapters" if tensor.requires_grad else "weights")
    for tensor in states(policy.model).values():
        ledger.tag(tensor, "weights")
    moments = {} if state is None else state.optimizer.state
    for tensor in tree_leaves([dict(moment) for moment in moments.values()]):
        if isinstance(tensor, torch.Tensor) and tensor.dim():  # step counters are scalars on the host
            ledger.tag(tensor, "optimizer")
    ops = policy.ops
    with ExitStack() as undo:
        for parameter in policy.trainable_parameters().values():
            if parameter.grad is not None:
                ledger.tag(parameter.grad, "gradients")
            hook = parameter.register_post_accumulate_grad_hook(lambda p: ledger.tag(p.grad, "gradients"))
            undo.callback(hook.remove)
        for layer in policy.decoder.layers:
            if layer.gradient_checkpointing:
                hook = layer.register_forward_pre_hook(lambda _, args: ledger.tag(args[0], "checkpoints"))
                undo.callback(hook.remove)
        undo.callback(setattr, policy, "ops", ops)
        policy.ops = replace(ops, linear_logps=ledger.as_kind("head", ops.linear_logps))
        with ledger:
            yield ledger


# Spending fewer -----------------------------------------------------------------------------------------------------


def apply_checkpointing(policy: TransformersPolicy, layers: int, offload: bool) -> None:
    """Recompute the first `layers` layers in the backward; with `offload` their inputs wait in host memory."""
    policy.checkpoint_layers(layers)
    if offload:
        for layer in policy.decoder.layers[:layers]:
            layer._gradient_checkpointing_func = _offloaded_checkpoint


def apply_head_chunk(policy: TransformersPolicy, tokens: int | None) -> None:
    """The one-sweep head works on `tokens` rows of logits at once; None is its own choice."""
    policy.ops = replace(policy.ops, linear_logps=partial(policy.ops.linear_logps, chunk_tokens=tokens))


def _offloaded_checkpoint(function: Callable, *args: torch.Tensor) -> torch.Tensor:
    # the hooks see the layer's input alone: inside, checkpoint's own hooks take over
    with saved_tensors_hooks(_to_host, _from_host):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _to_host(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=not tensor.is_cpu)
    return tensor.device, host.copy_(tensor, non_blocking=True)  # read back on the same stream


def _from_host(packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    device, host = packed
    return torch.empty(host.shape, dtype=host.dtype, device=device).copy_(host, non_blocking=True)
