"""The operators, their rivals and their floors, as test_operators.py times them.

    linear_logps                    floor: its bare GEMMs (one without grad, two with)
    lora_linear, lora_qkv, lora_mlp floor: the frozen projections, forward and dX
    rms_norm, swiglu, rope          floor: the bytes they must move, copied

Rivals are the expressions of transformers and PEFT, torch.compile of them and, on CUDA where they are installed,
Liger's and Unsloth's kernels. A form takes an operator's data and returns its outputs; time / floor says how far an
implementation is from what the device can do, and floor / time is its share of the roofline.
"""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from spinfast_kernels.blocks import Lora
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from spinfast import ops

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.float16 if CUDA else torch.bfloat16
COMPILED = ops.COMPILED[DEVICE]
TABLES = {"eager twin": ops.EAGER, COMPILED: ops.compiled(COMPILED)}
QWEN = {"D": 896, "F": 4864, "kv": 128, "V": 151_936}  # Qwen2.5-0.5B
RANK, SCALING = 16, 2.0
HEAD_TOKENS, TOKENS = 1024, 2048
PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Operator:
    """data() makes the arguments; floor(data, pass) does the least work there is."""

    data: Callable[[], tuple]
    forms: dict[str, Callable]
    floor: Callable[[tuple, str], object]
    facts: dict


def randn(*shape, grad=False, dtype=DTYPE, scale=1.0):
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype).requires_grad_(grad)


def run(form: Callable, data: tuple, passes: str) -> None:
    """One call; with the backward of ones on every output."""
    if passes == "forward":
        with torch.no_grad():
            form(*data)
        return
    outputs = form(*data)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    for leaf in leaves(data):
        leaf.grad = None


def leaves(data) -> list[torch.Tensor]:
    found = [data] if isinstance(data, torch.Tensor) and data.requires_grad else []
    return found + [leaf for item in data for leaf in leaves(item)] if isinstance(data, tuple) else found


# Memory ----------------------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """The most bytes of storages made within that ever lived at once."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.live += size
            self.peak = max(self.peak, self.live)
            self.seen[key] = weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self.live -= size
        del self.seen[key]


def memory(form: Callable, data: tuple) -> dict[str, int]:
    """Bytes that the backward keeps beside the data, and the peak of a forward and backward above it."""
    arguments = [leaf for leaf in torch.utils._pytree.tree_leaves(data) if isinstance(leaf, torch.Tensor)]
    given = {tensor.untyped_storage().data_ptr() for tensor in arguments}
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        form(*data)
    size = sum(size for pointer, (size, _) in kept.items() if pointer not in given)
    kept.clear()
    with Peak() as peak:
        run(form, data, "forward+backward")
    return {"bytes_kept": size, "peak_extra_bytes": peak.peak}


# The head --------------------------------------------------------------------------------------------------------


def plain_logps(hidden, weight, targets):
    return (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def head_data():
    hidden, weight = randn(HEAD_TOKENS, QWEN["D"], grad=True), randn(QWEN["V"], QWEN["D"], scale=QWEN["D"] ** -0.5)
    return hidden, weight, torch.randint(QWEN["V"], (HEAD_TOKENS,), device=DEVICE)


def head_floor(data, passes):
    hidden, weight, _ = data
    logits = torch.mm(hidden.detach(), weight.t())
    return torch.mm(logits, weight) if passes == "forward+backward" else logits


# LoRA --------------------------------------------------------------------------------------------------------------


def lora(D, O, bias=False):
    a = randn(RANK, D, grad=True, dtype=torch.float32, scale=D**-0.5)
    b = randn(O, RANK, grad=True, dtype=torch.float32, scale=RANK**-0.5)
    return Lora(randn(O, D, scale=D**-0.5), randn(O) if bias else None, a, b, SCALING)


def peft_linear(x, p):
    """What PEFT computes: an fp32 low-rank branch from an upcast input."""
    y = F.linear(x, p.weight, p.bias)
    return (y + F.linear(F.linear(x.float(), p.lora_A), p.lora_B) * p.scaling).to(y.dtype)


def frozen_linear(x, p):
    return F.linear(x, p.weight, p.bias)


def mlp(linear):
    return lambda x, gate, up, down: linear(F.silu(linear(x, gate)) * linear(x, up), down)


def qkv(linear):
    return lambda x, *projections: tuple(linear(x, p) for p in projections)


def lora_data(*shapes, bias=False):
    return lambda: (randn(TOKENS, QWEN["D"], grad=True), *(lora(D, O, bias) for D, O in shapes))


def frozen(form):
    return lambda data, passes: run(form(frozen_linear), data, passes)


# Element-wise ------------------------------------------------------------------------------------------------------


def plain_norm(x, weight, eps):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def plain_rope(q, k, cos, sin):
    def rotate(x):
        heads = x.view(len(x), -1, cos.shape[-1])
        a, b = heads.chunk(2, -1)
        return heads * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]

    return rotate(q), rotate(k)


def rope_data():
    angle = torch.randn(TOKENS, 64, device=DEVICE)
    q, k = randn(TOKENS, QWEN["D"], grad=True), randn(TOKENS, QWEN["kv"], grad=True)
    return q, k, angle.cos().to(DTYPE), angle.sin().to(DTYPE)


def copied(forward: int, backward: int):
    """The floor of `forward` and `backward` times a tensor's elements read or written."""
    buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def copy(data, passes):
        moved = (forward + backward * (passes != "forward")) * data[0].numel()
        if moved not in buffers:
            buffers[moved] = (torch.zeros(moved // 2, dtype=DTYPE, device=DEVICE), randn(moved // 2))
        target, source = buffers[moved]
        return target.copy_(source)

    return copy


# Rivals ------------------------------------------------------------------------------------------------------------


def liger() -> dict[str, Callable]:
    """Liger's forms by operator. Its head sums the losses in fp32 or the input's dtype, as its trainer integration."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Head
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def rope(q, k, cos, sin):
        q, k = (x.view(1, len(x), -1, cos.shape[-1]).transpose(1, 2) * 1 for x in (q, k))
        return LigerRopeFunction.apply(q, k, cos[None], sin[None])

    return {
        "linear_logps": lambda h, w, t: Head.apply(h, w, t, None, None, -100, 0.0, 0.0, "sum")[0],
        "rms_norm": lambda x, w, eps: LigerRMSNormFunction.apply(x, w, eps, 0.0, "llama", False),
        "swiglu": lambda gate, up: LigerSiLUMulFunction.apply(gate, up),
        "rope": rope,
    }


def unsloth() -> dict[str, Callable]:
    """Unsloth's forms by operator."""
    from unsloth.kernels.fast_lora import LoRA_MLP, LoRA_QKV, LoRA_W
    from unsloth.kernels.rms_layernorm import Fast_RMS_Layernorm
    from unsloth.kernels.swiglu import swiglu_DWf_DW_dfg_kernel, swiglu_fg_kernel

    def flat(projections):
        return [item for p in projections for item in (p.weight, None, p.lora_A, p.lora_B, p.scaling)]

    def block(x, *projections):
        return LoRA_MLP.apply(x[None], *flat(projections), swiglu_fg_kernel, swiglu_DWf_DW_dfg_kernel, False)

    return {
        "lora_linear": lambda x, p: LoRA_W.apply(x[None], *flat([p])),
        "lora_qkv": lambda x, *projections: LoRA_QKV.apply(x[None], *flat(projections), False),
        "lora_mlp": block,
        "rms_norm": lambda x, w, eps: Fast_RMS_Layernorm.apply(x, w, eps),
    }


def rivals(op: str) -> dict[str, Callable]:
    """The forms of those that are installed here and run on this device."""
    found = {"Liger": ("liger_kernel", liger), "Unsloth": ("unsloth", unsloth)}
    made = {name: load() for name, (package, load) in found.items() if CUDA and importlib.util.find_spec(package)}
    return {name: forms[op] for name, forms in made.items() if op in forms}


def forms(op: str, plain_name: str, plain: Callable, ours: Callable) -> dict[str, Callable]:
    """Every contestant; `ours` makes one of a table of operators."""
    compiled = torch.compile(plain, dynamic=False)
    tables = {name: ours(table) for name, table in TABLES.items()}
    return {plain_name: plain, "torch.compile": compiled, **tables, **rivals(op)}


D, FEATURES, KV = QWEN["D"], QWEN["F"], QWEN["kv"]
LINEAR = {"T": TOKENS, "D": D, "F": FEATURES, "rank": RANK}
OPERATORS = {
    "linear_logps": Operator(
        head_data,
        forms("linear_logps", "plain eager", plain_logps, lambda t: t.linear_logps),
        head_floor,
        {"N": HEAD_TOKENS, "D": D, "V": QWEN["V"]},
    ),
    "lora_linear": Operator(
        lora_data((D, FEATURES)),
        forms("lora_linear", "PEFT eager", peft_linear, lambda t: lambda x, p: t.lora_linear(x, *p)),
        frozen(lambda linear: linear),
        LINEAR,
    ),
    "lora_qkv": Operator(
        lora_data((D, D), (D, KV), (D, KV), bias=True),
        forms("lora_qkv", "PEFT eager", qkv(peft_linear), lambda t: t.lora_qkv),
        frozen(qkv),
        LINEAR,
    ),
    "lora_mlp": Operator(
        lora_data((D, FEATURES), (D, FEATURES), (FEATURES, D)),
        forms("lora_mlp", "PEFT eager", mlp(peft_linear), lambda t: t.lora_mlp),
        frozen(mlp),
        LINEAR,
    ),
    "rms_norm": Operator(
        lambda: (randn(TOKENS, D, grad=True), randn(D), 1e-6),
        forms("rms_norm", "transformers eager", plain_norm, lambda t: t.rms_norm),
        copied(2, 3),
        {"T": TOKENS, "D": D},
    ),
    "swiglu": Operator(
        lambda: (randn(TOKENS, FEATURES, grad=True), randn(TOKENS, FEATURES, grad=True)),
        forms("swiglu", "transformers eager", lambda gate, up: F.silu(gate) * up, lambda t: t.swiglu),
        copied(3, 5),
        {"T": TOKENS, "F": FEATURES},
    ),
    "rope": Operator(
        rope_data,
        forms("rope", "transformers eager", plain_rope, lambda t: lambda q, k, *angles: t.rope(q * 1, k * 1, *angles)),
        copied(2, 2),
        {"T": TOKENS, "D": D, "kv": KV},
    ),
}
