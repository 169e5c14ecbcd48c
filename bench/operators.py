"""The operators at one model's sizes, their rivals and their floors, for kernels.py to time.

    linear_logps                    floor: its bare GEMMs (one without grad, two with)
    lora_linear, lora_qkv, lora_mlp floor: the frozen projections, forward and dX
    rms_norm, swiglu, rope          floor: the bytes they must move, copied

Rivals are the expressions of transformers and PEFT, torch.compile of them and, on CUDA where it is installed, Liger's
kernels. A form takes an operator's data and returns its outputs; time / floor says how far an implementation is from
what the device can do, and floor / time is its share of the roofline.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from spinfast_kernels.blocks import Lora
from torch.nn.functional import linear, silu
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from spinfast import ops

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.float16 if CUDA else torch.bfloat16
COMPILED = ops.COMPILED[DEVICE]
TABLES = {"eager twin": ops.EAGER, COMPILED: ops.compiled(COMPILED)}
RANK, SCALING = 16, 2.0
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
    for leaf in tree_leaves(data):
        if isinstance(leaf, torch.Tensor):
            leaf.grad = None


# Rivals and floors -------------------------------------------------------------------------------------------------


def plain_logps(hidden, weight, targets):
    return (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def plain_norm(x, weight, eps):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def plain_rope(q, k, cos, sin):
    def rotate(x):
        heads = x.view(len(x), -1, cos.shape[-1])
        a, b = heads.chunk(2, -1)
        return heads * cos[:, None] + torch.cat((-b, a), -1) * sin[:, None]

    return rotate(q), rotate(k)


def peft_linear(x, p):
    """What PEFT computes: an fp32 low-rank branch from an upcast input."""
    y = linear(x, p.weight, p.bias)
    return (y + linear(linear(x.float(), p.lora_A), p.lora_B) * p.scaling).to(y.dtype)


def frozen_linear(x, p):
    return linear(x, p.weight, p.bias)


def mlp(project):
    return lambda x, gate, up, down: project(silu(project(x, gate)) * project(x, up), down)


def qkv(project):
    return lambda x, *projections: tuple(project(x, p) for p in projections)


def frozen(form):
    return lambda data, passes: run(form(frozen_linear), data, passes)


def head_floor(data, passes):
    hidden, weight, _ = data
    logits = torch.mm(hidden.detach(), weight.t())
    return torch.mm(logits, weight) if passes == "forward+backward" else logits


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


def liger() -> dict[str, Callable]:
    """Liger's forms by operator. Its head sums the losses in fp32 or the input's dtype, as its trainer integration."""
    if not CUDA or importlib.util.find_spec("liger_kernel") is None:
        return {}
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


def operators(model: PretrainedConfig, T: int, N: int) -> dict[str, Operator]:
    """All of them at the model's sizes, on T tokens, the head on N."""
    D, F, V, d = model.hidden_size, model.intermediate_size, model.vocab_size, model.head_dim
    KV = model.num_key_value_heads * d

    def lora(I, O, bias=False):
        a = randn(RANK, I, grad=True, dtype=torch.float32, scale=I**-0.5)
        b = randn(O, RANK, grad=True, dtype=torch.float32, scale=RANK**-0.5)
        return Lora(randn(O, I, scale=I**-0.5), randn(O) if bias else None, a, b, SCALING)

    def block(*shapes, bias=False):
        return lambda: (randn(T, D, grad=True), *(lora(I, O, bias) for I, O in shapes))

    def head():
        hidden, weight = randn(N, D, grad=True), randn(V, D, scale=D**-0.5)
        return hidden, weight, torch.randint(V, (N,), device=DEVICE)

    def turned():
        angle, (q, k) = torch.randn(T, d, device=DEVICE), (randn(T, O, grad=True) for O in (D, KV))
        return q, k, angle.cos().to(DTYPE), angle.sin().to(DTYPE)

    def twice():
        return randn(T, F, grad=True), randn(T, F, grad=True)

    low, rivals = {"T": T, "D": D, "F": F, "rank": RANK}, liger()
    made = {  # data, whose expression, the expression, ours of a table, floor, facts
        "linear_logps": (head, "plain", plain_logps, lambda t: t.linear_logps, head_floor, {"N": N, "D": D, "V": V}),
        "lora_linear": (block((D, F)), "PEFT", peft_linear, lambda t: lambda x, p: t.lora_linear(x, *p),
                        frozen(lambda project: project), low),
        "lora_qkv": (block((D, D), (D, KV), (D, KV), bias=True), "PEFT", qkv(peft_linear), lambda t: t.lora_qkv,
                     frozen(qkv), low),
        "lora_mlp": (block((D, F), (D, F), (F, D)), "PEFT", mlp(peft_linear), lambda t: t.lora_mlp, frozen(mlp), low),
        "rms_norm": (lambda: (randn(T, D, grad=True), randn(D), 1e-6), "transformers", plain_norm,
                     lambda t: t.rms_norm, copied(2, 3), {"T": T, "D": D}),
        "swiglu": (twice, "transformers", lambda gate, up: silu(gate) * up, lambda t: t.swiglu, copied(3, 5),
                   {"T": T, "F": F}),
        "rope": (turned, "transformers", plain_rope, lambda t: lambda q, k, *angles: t.rope(q * 1, k * 1, *angles),
                 copied(2, 2), {"T": T, "D": D, "kv": KV}),
    }  # fmt: skip
    found = {}
    for name, (data, whose, plain, ours, floor, facts) in made.items():
        forms = {f"{whose} eager": plain, "torch.compile": torch.compile(plain, dynamic=False)}
        forms |= {table: ours(functions) for table, functions in TABLES.items()}
        forms |= {"Liger": rivals[name]} if name in rivals else {}
        found[name] = Operator(data, forms, floor, facts)
    return found
