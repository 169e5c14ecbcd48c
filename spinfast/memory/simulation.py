"""The phases of an iteration at their fullest: run and counted on a real policy, or simulated on one without data.

The simulation runs the real code on meta tensors, which have shapes but no storage, so it needs neither a GPU nor
weights. (FakeTensorMode does the same, but fake CUDA tensors need a CUDA build of torch, and fake CPU tensors took
three times as long.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from spinfast_kernels import blocks
from torch.fx.experimental import _config as fx_config
from transformers import AutoModelForCausalLM, PretrainedConfig

from spinfast import attention
from spinfast.device import DeviceProfile
from spinfast.memory.ledger import META, Ledger, Usage, counting
from spinfast.objectives import Objective
from spinfast.ops import Ops
from spinfast.packing import pack, packed_length
from spinfast.policy import Policy
from spinfast.policy.transformers import TransformersPolicy, load_policy
from spinfast.scoring import Budget, batch_sequence_logps
from spinfast.train import TrainState, start_training, train_step
from spinfast.types import Group, Request, Sampling

CUDA_BLOCK = 512  # the caching allocator rounds every request up to this


class Phases:
    """Each method runs one phase on `policy` and returns what it held."""

    def __init__(self, policy: TransformersPolicy, profile: DeviceProfile):
        self.policy, self.profile = policy, profile

    @contextmanager
    def counting(self, state: TrainState | None = None, timeline: bool = False) -> Iterator[Ledger]:
        """What lives while the block runs."""
        with counting(self.policy, state, timeline=timeline) as ledger:
            yield ledger

    def score(self, groups: Sequence[Group]) -> Usage:
        """A reference's log-probs of one packed batch."""
        with self.counting() as ledger:
            batch_sequence_logps(self.policy, pack(groups, range(len(groups)), self.profile.attention))
        return ledger.usage

    def generate(self, slots: int, longest: int, top_p: float, dense_layers: int = 0) -> Usage:
        """A full batch in its last steps beside freshly admitted prompts."""
        from spinfast.generation.transformers import TransformersGenerator

        lengths = [longest - 2, *[1] * (slots - 1)]
        requests = [Request(i, (0,) * length, seed=i) for i, length in enumerate(lengths)]
        sampling = Sampling(temperature=1.0, top_p=top_p, max_tokens=2, stop_ids=())
        with self.counting() as ledger:
            ledger.kind = "generation"
            generator = TransformersGenerator(
                self.policy,
                batch_size=slots,
                max_model_len=longest,
                attention=self.profile.attention,
                dense_layers=dense_layers,
            )
            list(generator.generate_live(requests, sampling))
        return ledger.usage

    def settled(self, optimizer: str) -> TrainState:
        return settled(self.policy, optimizer, self.profile.scaled_loss)

    def train(
        self, groups: Sequence[Group], objective: Objective, optimizer: str, more_microbatches: bool, timeline=False
    ) -> Ledger:
        """One optimizer step on one packed batch, moments in place, gradients too if other microbatches came before."""
        groups = objective.filled(groups)
        budget = Budget(sum(map(packed_length, groups)), self.profile.attention)
        state = self.settled(optimizer)
        with self.counting(state, timeline) as ledger:
            if more_microbatches:
                with ledger.allocating("gradients"):
                    held = [torch.empty_like(p) for p in self.policy.trainable_parameters().values()]
            train_step(self.policy, groups, objective, 1.0, budget, state)
            held = []  # noqa: F841
        return ledger


def settled(policy: Policy, optimizer: str, scaled: bool) -> TrainState:
    """A training state whose optimizer holds its moments, as from the second step on. Moves nothing: lr is 0."""
    state = start_training(policy, optimizer, 0.0, scaled)
    for parameter in policy.trainable_parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return state


class Nf4Weight:
    """Stands for a bitsandbytes NF4 weight with double quantisation: its bytes at rest, a dense one at each use.

    4 bits per weight, an 8-bit scale per 64 of them, a 32-bit scale per 256 of those (arXiv 2305.14314), their offset,
    and the tables of the 16 and the 256 values. While it becomes dense its scales are 32-bit.
    """

    def __init__(self, weight: torch.Tensor):
        self.scales = -(-weight.numel() // 64)
        sizes = (-(-weight.numel() // 2), self.scales, 4 * -(-self.scales // 256), 4, 4 * 16, 4 * 256)
        self.packed = [torch.empty(size, dtype=torch.uint8, device=weight.device) for size in sizes]
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device

    def __call__(self) -> torch.Tensor:
        scales = torch.empty(self.scales, device=self.device)  # noqa: F841
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


class Simulation(Phases):
    """The phases on a policy without weights, as `profile` would hold it."""

    def __init__(self, model: PretrainedConfig, profile: DeviceProfile, lora, ops: Ops, load_in_4bit: bool = False):
        self.on_cuda = profile.device.type == "cuda"
        if profile.attention == "xformers":  # its kernel is aten's
            profile = replace(profile, attention="aten_efficient")
        with META:
            base = AutoModelForCausalLM.from_config(model, dtype=profile.dtype, attn_implementation=attention.NAME)
            policy = load_policy(
                None, "simulated", None, lora=lora, ops=ops, profile=profile, load_in_4bit=False, seed=0, base=base
            )
        super().__init__(policy, profile)
        self.packed = list(self._quantise()) if load_in_4bit else []
        self._settled: dict[str, TrainState] = {}

    def settled(self, optimizer: str) -> TrainState:
        """Made once: a simulated step moves nothing."""
        if optimizer not in self._settled:
            with Ledger(simulated=True):  # an optimizer may ask for a number
                self._settled[optimizer] = super().settled(optimizer)
        return self._settled[optimizer]

    def _quantise(self) -> Iterator[torch.Tensor]:
        """Linear weights become NF4; bitsandbytes leaves embedding, head and norms as they are."""
        head_VD = self.policy.head_VD
        for module in self.policy.model.modules():
            linear = isinstance(module, torch.nn.Linear) and module.weight is not head_VD
            if linear and not module.weight.requires_grad:
                weight = Nf4Weight(module.weight)
                del module.weight
                module.weight = weight
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
