"""A T4 that is not there: torch's queries answered, tensors of shapes alone on it, Triton compiling for it.

What is faked: the answers of torch.cuda, vLLM's platform, the values of tensors. What is real: torch's own rules of
shapes, dtypes and devices (FakeTensorMode), the host code of every kernel, Triton's compiler with sm_75 as its target.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, contextmanager
from types import FunctionType, SimpleNamespace
from unittest import mock

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime.jit import JITFunction

from bench.compile import caught_launches

GIB = 2**30
CAPABILITY, TOTAL, FREE = (7, 5), int(14.74 * GIB), int(14.6 * GIB)
CUDA = torch.device("cuda:0")
aten = torch.ops.aten


def answers() -> dict[str, object]:
    """torch.cuda's functions on a machine with one idle T4."""
    properties = SimpleNamespace(
        name="Tesla T4", major=7, minor=5, total_memory=TOTAL, multi_processor_count=40, warp_size=32,
        max_threads_per_multi_processor=1024, regs_per_multiprocessor=65536, shared_memory_per_block=49152,
        shared_memory_per_block_optin=65536, gcnArchName="", is_integrated=False, uuid="T4", L2_cache_size=4 << 20,
    )  # fmt: skip
    values = {
        "is_available": True,
        "is_initialized": True,
        "is_current_stream_capturing": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "Tesla T4",
        "get_device_capability": CAPABILITY,
        "get_device_properties": properties,
        "mem_get_info": (FREE, TOTAL),
        "get_arch_list": ["sm_75", "sm_80", "sm_90"],
    }
    nothing = ("_lazy_init", "synchronize", "empty_cache", "set_device", "reset_peak_memory_stats", "manual_seed_all")
    zero = ("memory_reserved", "memory_allocated", "max_memory_allocated", "max_memory_reserved")
    values |= dict.fromkeys(nothing) | dict.fromkeys(zero, 0)
    made = {name: lambda *_, value=value, **__: value for name, value in values.items()}
    return made | {"get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8), "set_rng_state": lambda *_: None}


@contextmanager
def present():
    """Within, torch says that there is a T4; nothing can be put on it."""
    with ExitStack() as undo:
        for name, function in answers().items():
            undo.enter_context(mock.patch.object(torch.cuda, name, function))
        stream = SimpleNamespace(is_capturing=lambda: False)  # from torch 2.13 on the optimizers ask there
        undo.enter_context(mock.patch.object(torch.accelerator, "current_stream", return_value=stream))
        yield


def _on_meta(cls, data, requires_grad=False, **_):
    return torch.Tensor._make_subclass(cls, data, requires_grad)


def _new_fake_tensor():
    """FakeTensor.__new__, but C++ is not told of the card. To Python a fake tensor is on it; to autograd's threads,
    which would ask the driver for a stream, it stays where its shape is, on meta."""
    new = FakeTensor.__new__
    changes = {"Tensor": SimpleNamespace(_make_subclass=_on_meta), "init_gpu_context": mock.Mock()}
    made = FunctionType(new.__code__, vars(fake_tensor) | changes, new.__name__, new.__defaults__, new.__closure__)
    made.__kwdefaults__ = new.__kwdefaults__
    return staticmethod(made)


def _swap_tensors(a, b, swap=torch.utils.swap_tensors):
    """Module.to swaps fake tensors, and minds the weak references that the mode holds to them."""
    with mock.patch("weakref.getweakrefs", return_value=[]):
        swap(a, b)


class Shapes(FakeTensorMode):
    avoid_device_init = True  # as where no card is: literals are made on the host first

    def dispatch(self, func, types, args=(), kwargs=None):
        """What C++ makes beside a card's tensor, a zero gradient or a number, it makes on meta (`_on_meta`)."""
        args, kwargs = tree_map_only(torch.Tensor, self._on_card, (args, kwargs or {}))
        if torch.device(kwargs.get("device") or "cpu").type == "meta":
            kwargs = {**kwargs, "device": CUDA}
        return super().dispatch(func, types, args, kwargs)

    def _on_card(self, x):
        plain = x.device.type == "meta" and not isinstance(x, FakeTensor)
        return self.fake_tensor_converter.from_meta_and_device(self, x, CUDA) if plain else x


class Host(TorchDispatchMode):
    """The host's side: its own tensors are real, what it reads from the card is `number`, and each wait is counted."""

    def __init__(self, number: float = 1.0):
        super().__init__()
        self.number = number
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        asked = torch.device(kwargs.get("device") or "cpu").type
        fakes = [x for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)]
        if not fakes and asked == "cpu":
            with _disable_current_modes():
                return function(*args, **kwargs | ({"pin_memory": False} if kwargs.get("pin_memory") else {}))
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
            with self:  # without autograd these come whole
                return function.decompose(*args, **kwargs)
        if function is aten.copy_.default and not isinstance(args[0], FakeTensor):
            self.waits["cuda to cpu"] += not any(args[2:])
            with _disable_current_modes():
                return args[0].fill_(self.number)
        if function is aten._local_scalar_dense.default:
            self.waits["item"] += 1
            return self.number if fakes[0].is_floating_point() else int(self.number)
        if function is aten._to_copy.default and "device" in kwargs and not kwargs.get("non_blocking"):
            route = f"{args[0].device.type} to {asked}"
            self.waits[route] += route != "cuda to cuda"
        if function is aten._efficient_attention_backward.default:
            kwargs.pop("scale", None)  # which torch's own rule of its shapes does not take
            args = (*args[:12], args[10], args[10], *args[14:])  # seed and offset of no dropout, which lie on the host
        result = function(*args, **kwargs)
        if isinstance(result, FakeTensor) and result.device.type == "cpu":
            with _disable_current_modes():
                return torch.full(result.shape, self.number).to(result.dtype)
        return result


def vllm_platform():
    """A T4 as vLLM sees it, which never asks the driver."""
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    class T4(NonNvmlCudaPlatform):
        """A class of its own: `vllm_compat.prepare` writes on it."""

    return T4()


def unpinned(*args, tensor=torch.tensor, pin_memory=False, **kwargs):
    return tensor(*args, **kwargs)  # memory is pinned by the driver


def _grouped(lists, with_indices=False):
    """torch._C's grouping of optimizers and clipping, by the device that Python sees."""
    groups: dict = {}
    for index, first in enumerate(lists[0]):
        columns, indices = groups.setdefault((first.device, first.dtype), ([[] for _ in lists], []))
        indices.append(index)
        for column, tensors in zip(columns, lists, strict=True):
            column += tensors[index : index + 1]
    return groups


@contextmanager
def in_use():
    """Within, tensors on "cuda" have shapes and no values, and Triton compiles for sm_75 what it would launch.

    Yields (the host, compiled kernels by name and constants). A launch on a tensor of another device is an error.
    """
    shapes_alone = Shapes(allow_non_fake_inputs=True)
    with ExitStack() as undo:
        undo.enter_context(present())
        undo.enter_context(mock.patch.object(FakeTensor, "__new__", _new_fake_tensor()))
        undo.enter_context(mock.patch.object(FakeTensor, "is_cuda", property(lambda x: x.device.type == "cuda")))
        undo.enter_context(mock.patch.object(torch.utils, "swap_tensors", _swap_tensors))
        undo.enter_context(mock.patch.object(torch, "tensor", unpinned))
        undo.enter_context(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", _grouped))
        compiled = undo.enter_context(caught_launches(75))
        launch = JITFunction.run

        def on_card(kernel, *args, **constants):
            strangers = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.device != CUDA]
            assert not strangers, f"{kernel.__name__}: {strangers} not on {CUDA}"
            return launch(kernel, *args, **constants)

        undo.enter_context(mock.patch.object(JITFunction, "run", on_card))
        undo.enter_context(shapes_alone)
        yield undo.enter_context(Host()), compiled
