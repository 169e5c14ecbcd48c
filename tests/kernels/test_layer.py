"""The element-wise functions and the LoRA blocks of a decoder layer, against fp64."""

import pytest
import torch
import torch.nn.functional as F
from bounds import DTYPES, TABLES, check, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from spinfast_kernels import cpu_ops, triton_ops
from spinfast_kernels.blocks import Lora, Norm
from torch.utils._python_dispatch import TorchDispatchMode

SCALING, EPS = 2.0, 1e-6


def plain_norm(x, weight):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS))).to(x.dtype)


def plain_lora(x, weight, bias=None, lora_A=None, lora_B=None):
    y = F.linear(x, weight, bias)
    return y if lora_A is None else y + F.linear(F.linear(x, lora_A.to(x.dtype)), lora_B.to(x.dtype)) * SCALING


def plain_rope(x, cos, sin):
    d = cos.shape[-1]
    heads = x.view(*cos.shape[:-1], -1, d)
    a, b = heads.chunk(2, -1)
    return (heads * cos.unsqueeze(-2) + torch.cat((-b, a), -1) * sin.unsqueeze(-2)).view_as(x)


def angles(T, d):
    theta = torch.arange(T, dtype=torch.float64)[:, None] * 0.3 ** torch.arange(d // 2)
    theta = torch.cat((theta, theta), -1)
    return {"cos": theta.cos(), "sin": theta.sin()}


def projection(inputs, name):
    """The Lora of `name` from the flat inputs of a check."""
    a, b = inputs.get(f"lora_A_{name}"), inputs.get(f"lora_B_{name}")
    return Lora(inputs[f"weight_{name}"], inputs.get(f"bias_{name}"), a, b, SCALING)


def plain_projection(x, inputs, name):
    lora = projection(inputs, name)
    return plain_lora(x, lora.weight, lora.bias, lora.lora_A, lora.lora_B)


def weights(name, D, O, R, seed, bias=False):
    made = {f"weight_{name}": randn(O, D, seed=seed, scale=D**-0.5)}
    if bias:
        made[f"bias_{name}"] = randn(O, seed=seed + 1)
    if R:
        made[f"lora_A_{name}"] = randn(R, D, seed=seed + 2, scale=D**-0.5)
        made[f"lora_B_{name}"] = randn(O, R, seed=seed + 3, scale=R**-0.5)
    return made


def frozen(inputs):
    return tuple(name for name in inputs if name.startswith(("weight", "bias", "norm", "cos", "sin")))


# Element-wise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((33, 64), id="many rows per program"),
        pytest.param((5, 896), id="Qwen2.5-0.5B"),
        pytest.param((2, 3, 1100), id="over a power of two, 3-D"),
        pytest.param((1, 3), id="one short row"),
    ],
)
def test_rms_norm(ops, device, dtype, shape):
    def kernel(x, weight):
        return ops.rms_norm(x, weight, EPS)

    check(kernel, plain_norm, {"x": randn(*shape), "weight": 1 + 0.1 * randn(shape[-1], seed=1)}, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 160), (3, 1025), (2, 4, 8)], ids=str)
def test_swiglu(ops, device, dtype, shape):
    def kernel(gate, up):
        return ops.swiglu(gate, up)

    def plain(gate, up):
        return F.silu(gate) * up

    check(kernel, plain, {"gate": randn(*shape) * 4, "up": randn(*shape, seed=1)}, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "groups", "d"), [(4, 2, 16), (9, 3, 64), (14, 2, 64), (3, 3, 6)])
def test_rope(ops, device, dtype, heads, groups, d):
    """Grouped queries; 9 heads and d = 6 are no powers of two."""

    def kernel(q, k, cos, sin):
        return ops.rope(q * 1.0, k * 1.0, cos, sin)

    def plain(q, k, cos, sin):
        return plain_rope(q, cos, sin), plain_rope(k, cos, sin)

    T = 11
    inputs = {"q": randn(T, heads * d), "k": randn(T, groups * d, seed=1)} | angles(T, d)
    check(kernel, plain, inputs, dtype, device, fixed=("cos", "sin"))


# Blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bias", "residual", "rank"), [(True, False, 4), (False, True, 4), (True, True, 0)])
def test_lora_linear(ops, device, dtype, bias, residual, rank):
    inputs = {"x": randn(2, 19, 48), **weights("o", 48, 72, rank, 10, bias)}
    if residual:
        inputs["residual"] = randn(2, 19, 72, seed=3)

    def kernel(x, residual=None, **w):
        return ops.lora_linear(x, *projection(w, "o"), residual=residual)

    def plain(x, residual=None, **w):
        y = plain_projection(x, w, "o")
        return y if residual is None else residual + y

    check(kernel, plain, inputs, dtype, device, frozen(inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (8, 0, 2)], ids=["equal ranks", "one without an adapter"])
def test_lora_qkv(ops, device, dtype, normed, ranks):
    inputs = {"x": randn(23, 48)}
    for seed, (name, O, R) in enumerate(zip("qkv", (48, 16, 16), ranks, strict=True)):
        inputs |= weights(name, 48, O, R, 10 * seed + 20, bias=True)
    if normed:
        inputs["norm"] = 1 + 0.1 * randn(48, seed=9)

    def kernel(x, norm=None, **w):
        return ops.lora_qkv(x, *(projection(w, n) for n in "qkv"), norm=norm if norm is None else Norm(norm, EPS))

    def plain(x, norm=None, **w):
        y = x if norm is None else plain_norm(x, norm)
        return tuple(plain_projection(y, w, n) for n in "qkv")

    check(kernel, plain, inputs, dtype, device, frozen(inputs))


def mlp_inputs(T, D, F_, ranks, normed):
    inputs = {"x": randn(T, D)}
    shapes = (("gate", D, F_), ("up", D, F_), ("down", F_, D))
    for seed, ((name, I, O), R) in enumerate(zip(shapes, ranks, strict=True)):
        inputs |= weights(name, I, O, R, 10 * seed + 20)
    if normed:
        inputs["norm"] = 1 + 0.1 * randn(D, seed=9)
    return inputs


def mlp_kernel(module, residual):
    def kernel(x, norm=None, **w):
        parts = [projection(w, n) for n in ("gate", "up", "down")]
        return module.lora_mlp(x, *parts, norm=norm if norm is None else Norm(norm, EPS), residual=residual)

    return kernel


def plain_mlp(residual):
    def plain(x, norm=None, **w):
        y = x if norm is None else plain_norm(x, norm)
        h = F.silu(plain_projection(y, w, "gate")) * plain_projection(y, w, "up")
        out = plain_projection(h, w, "down")
        return x + out if residual else out

    return plain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("normed", "residual", "ranks"),
    [(True, True, (4, 4, 4)), (False, False, (4, 4, 4)), (False, True, (0, 4, 0)), (True, False, (0, 0, 0))],
)
def test_lora_mlp(ops, device, dtype, normed, residual, ranks):
    inputs = mlp_inputs(23, 40, 104, ranks, normed)
    check(mlp_kernel(ops, residual), plain_mlp(residual), inputs, dtype, device, frozen(inputs))


@settings(max_examples=10, deadline=None)
@given(T=st.integers(1, 20), D=st.integers(8, 70), F_=st.integers(1, 70), R=st.integers(0, 5), residual=st.booleans())
@pytest.mark.parametrize("module", TABLES.values(), ids=TABLES)
def test_lora_mlp_any_shape(module, T, D, F_, R, residual):
    """From D = 8: over one or two numbers the norm's gradient is a difference of equals, noise in any dtype.

    A sum whose terms cancel (an adapter's gradient at rank 1) is as uncertain as its inputs' roundings make it.
    """
    inputs = mlp_inputs(T, D, F_, (R, R, R), True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(
        mlp_kernel(module, residual),
        plain_mlp(residual),
        inputs,
        torch.float32,
        device,
        frozen(inputs),
        roundings=8,
        ill=True,
    )


def test_packed_base_weight_through_a_hook(ops, device):
    """A 4-bit base: the hook is called anew in the backward, no dense copy outlives the call."""
    codes = torch.randint(0, 16, (24, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed, calls = (codes[:, ::2] * 16 + codes[:, 1::2]).to(device), []

    def dense():
        calls.append(1)
        pairs = torch.stack((packed // 16, packed % 16), -1).view(24, 16)
        return (pairs.float() - 7.5) / 8

    a, b = torch.randn(2, 16, device=device, requires_grad=True), torch.randn(24, 2, device=device, requires_grad=True)
    x = torch.randn(5, 16, device=device, requires_grad=True)
    y = ops.lora_linear(x, dense, None, a, b, SCALING)
    y.square().sum().backward()
    hooked = [t.grad.clone() for t in (x, a, b)]
    for t in (x, a, b):
        t.grad = None
    plain_lora(x, dense(), None, a, b).square().sum().backward()
    for got, expected in zip(hooked, (x.grad, a.grad, b.grad), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 3


def saved_bytes(function):
    """Bytes of distinct storages the backward of function() keeps, leaves' own storages left out."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function()
    return out, kept


def test_activations_kept(ops, device):
    """Per token: the MLP keeps its input, gate, up and 3 R numbers, and one fp32 for the norm; nothing else."""
    T, D, F_, R = 32, 64, 160, 4
    inputs = {n: t.to(device).half() for n, t in mlp_inputs(T, D, F_, (R, R, R), True).items()}
    for name in inputs:
        if name.startswith("lora"):
            inputs[name] = inputs[name].float().requires_grad_()
    x = inputs.pop("x").requires_grad_()
    own = {t.untyped_storage().data_ptr() for t in inputs.values()}
    out, kept = saved_bytes(lambda: mlp_kernel(ops, True)(x, **inputs))
    kept_bytes = sum(size for pointer, (size, _) in kept.items() if pointer not in own)
    assert kept_bytes == T * (2 * D + 2 * 2 * F_ + 2 * 3 * R + 4)
    out.sum().backward()


@pytest.mark.parametrize("name", ["lora_A_gate", "x"])
@pytest.mark.parametrize("module", [triton_ops, cpu_ops], ids=["triton", "numba"])
def test_a_second_backward_is_refused(module, device, name):
    """The compiled backward writes over gate and up: autograd must know, or it would return nonsense."""
    inputs = {n: t.to(device).float() for n, t in mlp_inputs(6, 8, 12, (2, 2, 2), False).items()}
    inputs[name].requires_grad_()
    out = mlp_kernel(module, False)(**inputs)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Products(TorchDispatchMode):
    """Collects the shapes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if "mm" in function._schema.name:
            self.shapes.add(tuple(result.shape))
        return result


@pytest.mark.parametrize("asked", [False, True], ids=["a first layer", "a later layer"])
@pytest.mark.parametrize("block", ["linear", "qkv", "mlp"])
def test_products_of_the_backward(ops, device, block, asked):
    """A first layer asks for dA and dB only: no dX is multiplied out. The frozen base never gets a gradient."""
    T, D = 5, 8
    shapes = {"linear": [(D, 12)], "qkv": [(D, 12), (D, 6), (D, 6)], "mlp": [(D, 20), (D, 20), (20, D)]}[block]
    inputs = {}
    for number, (I, O) in enumerate(shapes):
        inputs |= {name: t.to(device).float() for name, t in weights(str(number), I, O, 2, 10 * number).items()}
    adapters = [t.requires_grad_() for name, t in inputs.items() if name.startswith("lora")]
    parts = [projection(inputs, str(number)) for number in range(len(shapes))]
    x = torch.randn(T, D, device=device, requires_grad=asked)
    outputs = ops.lora_linear(x, *parts[0]) if block == "linear" else getattr(ops, f"lora_{block}")(x, *parts)
    with Products() as products:
        sum(y.sum() for y in (outputs if block == "qkv" else (outputs,))).backward()
    assert all(t.grad.dtype == torch.float32 for t in adapters)
    assert all(t.grad is None for name, t in inputs.items() if name.startswith("weight"))
    assert ((T, D) in products.shapes) == (x.grad is not None) == asked
