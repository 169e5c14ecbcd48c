"""Memory simulated before it is spent: the real step on tensors without storage, every live byte counted by kind.

A dispatch mode sees each storage when an operator returns it and when it dies. Run over a real step it is a
profiler; run over a policy of meta tensors, which have shapes but no data, it predicts what the same code will
hold, without a GPU and without weights. (FakeTensorMode does the same, but fake CUDA tensors need a CUDA build of
torch, and fake CPU tensors took three times as long.)

Not seen, and therefore part of the planner's reserve: workspaces inside operators (cuBLAS: 8 MiB), the CUDA
context, and what the allocator cannot reuse for being cut into pieces.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from peft.tuners.lora import LoraLayer
from spinfast_kernels import blocks
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental import _config as fx_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PretrainedConfig

from spinfast import attention
from spinfast.device import DeviceProfile
from spinfast.objectives import Objective
from spinfast.objectives.spin import Spin
from spinfast.ops import Ops
from spinfast.packing import pack, packed_length
from spinfast.policy import Policy
from spinfast.policy.transformers import TransformersPolicy, load_policy
from spinfast.train import TrainPlan, TrainState, batch_sequence_logps, start_training, train_step
from spinfast.types import Group, Request, Sampling

KINDS = ("weights", "adapters", "optimizer", "gradients", "generation", "checkpoints", "activations", "head")
CUDA_BLOCK = 512  # the caching allocator rounds every request up to this
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


# Checkpointing -----------------------------------------------------------------------------------------------------


def apply_checkpointing(policy: TransformersPolicy, layers: int, offload: bool) -> None:
    """Recompute the first `layers` layers in the backward; with `offload` their inputs wait in host memory."""
    policy.checkpoint_layers(layers)
    if offload:
        for layer in policy.decoder.layers[:layers]:
            layer._gradient_checkpointing_func = _offloaded_checkpoint


def _offloaded_checkpoint(function: Callable, *args: torch.Tensor) -> torch.Tensor:
    # the hooks see the layer's input alone: inside, checkpoint's own hooks take over
    with saved_tensors_hooks(_to_host, _from_host):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _to_host(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=not tensor.is_cpu)
    return tensor.device, host.copy_(tensor)


def _from_host(packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    device, host = packed
    return torch.empty(host.shape, dtype=host.dtype, device=device).copy_(host, non_blocking=True)


# Simulation --------------------------------------------------------------------------------------------------------


class Nf4Weight:
    """Stands for a bitsandbytes NF4 weight with double quantisation: its bytes at rest, a dense one at each use.

    4 bits per weight, an 8-bit scale per 64 of them, a 32-bit scale per 256 of those (arXiv 2305.14314).
    """

    def __init__(self, weight: torch.Tensor):
        scales = -(-weight.numel() // 64)
        sizes = (-(-weight.numel() // 2), scales, 4 * -(-scales // 256))
        self.packed = [torch.empty(size, dtype=torch.uint8, device=weight.device) for size in sizes]
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device

    def __call__(self) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


def _cublas_mm_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """cuBLAS writes the fp32 result itself; a meta tensor would take the CPU's way."""
    return torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)


@contextmanager
def _without_launches() -> Iterator[None]:
    """Triton functions run their host code, which allocates; the kernels, which only write, are left out."""
    from triton.runtime.jit import KernelInterface

    launch = KernelInterface.__getitem__
    KernelInterface.__getitem__ = lambda kernel, grid: lambda *args, **constants: None
    try:
        yield
    finally:
        KernelInterface.__getitem__ = launch


class Simulation:
    """A policy without weights, as `profile` would hold it, and the phases of an iteration run on it."""

    def __init__(self, model: PretrainedConfig, profile: DeviceProfile, lora, ops: Ops, load_in_4bit: bool = False):
        self.on_cuda = profile.device.type == "cuda"
        if profile.attention == "xformers":  # its kernel is aten's
            profile = replace(profile, attention="aten_efficient")
        self.profile = profile
        with META:
            base = AutoModelForCausalLM.from_config(model, dtype=profile.dtype, attn_implementation=attention.NAME)
            self.policy = load_policy(
                None, "simulated", None, lora=lora, ops=ops, profile=profile, load_in_4bit=False, seed=0, base=base
            )
        self.packed = list(self._quantise()) if load_in_4bit else []

    def _quantise(self) -> Iterator[torch.Tensor]:
        """The decoder's linear weights become NF4; bitsandbytes leaves embedding, head and norms as they are."""
        for module in self.policy.decoder.modules():
            if isinstance(module, LoraLayer):
                base = module.get_base_layer()
                weight = Nf4Weight(base.weight)
                del base.weight
                base.weight = weight
                yield from weight.packed

    @contextmanager
    def counting(self, state: TrainState | None = None, timeline: bool = False) -> Iterator[Ledger]:
        """`counting` of the simulated policy; what is made on the host inside is real, and not counted."""
        block = CUDA_BLOCK if self.on_cuda else 1
        with ExitStack() as undo:
            if self.on_cuda:
                undo.callback(setattr, blocks, "mm_fp32", blocks.mm_fp32)
                blocks.mm_fp32 = _cublas_mm_fp32
            if self.policy.ops.name == "triton":
                undo.enter_context(_without_launches())
            undo.enter_context(fx_config.patch(meta_nonzero_assume_all_nonzero=True))
            ledger = undo.enter_context(counting(self.policy, state, block, simulated=True, timeline=timeline))
            for tensor in self.packed:
                ledger.tag(tensor, "weights")
            yield ledger

    def score(self, groups: Sequence[Group]) -> Usage:
        """The opponent's log-probs of one packed batch."""
        with self.counting() as ledger:
            batch_sequence_logps(self.policy, pack(groups, range(len(groups)), self.profile.attention))
        return ledger.usage

    def generate(self, slots: int, longest: int, top_p: float) -> Usage:
        """A full batch in its last steps beside freshly admitted prompts."""
        from spinfast.generation.transformers import TransformersGenerator

        lengths = [longest - 2, *[1] * (slots - 1)]
        requests = [Request(i, (0,) * length, seed=i) for i, length in enumerate(lengths)]
        sampling = Sampling(temperature=1.0, top_p=top_p, max_tokens=2, stop_ids=())
        with self.counting() as ledger:
            ledger.kind = "generation"
            generator = TransformersGenerator(self.policy, batch_size=slots, max_model_len=longest)
            list(generator.generate(requests, sampling, None))
        return ledger.usage

    def train(
        self, groups: Sequence[Group], objective: Objective, optimizer: str, more_microbatches: bool, timeline=False
    ) -> Ledger:
        """One optimizer step on one packed batch, moments in place, gradients too if other microbatches came before."""
        tokens = sum(map(packed_length, groups))
        plan = TrainPlan(len(groups), tokens, 1, 0, self.profile.attention, lr=0.0)
        with META:
            state = settled(self.policy, optimizer)
        with self.counting(state, timeline) as ledger:
            if more_microbatches:
                with ledger.allocating("gradients"):
                    held = [torch.empty_like(p) for p in self.policy.trainable_parameters().values()]
            train_step(self.policy, groups, range(len(groups)), objective, plan, state, self.profile.scaled_loss)
            held = []  # noqa: F841
        return ledger

    def spin(self, groups, optimizer: str, kind: str, more_microbatches: bool, timeline: bool = False) -> Ledger:
        with META:
            opponent = torch.empty(len(groups), 2, device=self.policy.device)
        objective = Spin(opponent, beta=0.1, kind=kind, ops=self.policy.ops)
        return self.train(groups, objective, optimizer, more_microbatches, timeline)


def settled(policy: Policy, optimizer: str) -> TrainState:
    """A training state whose optimizer holds its moments, as from the second step on. Moves nothing: lr is 0."""
    state = start_training(policy, optimizer, 0.0, scaled=False)
    for parameter in policy.trainable_parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return state
