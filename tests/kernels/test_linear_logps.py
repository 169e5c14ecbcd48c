from functools import partial

import pytest
import torch
from bounds import DTYPES, TABLES, check, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from spinfast_kernels import linear_logps as triton_head
from spinfast_kernels import reference
from torch._subclasses.fake_tensor import FakeTensorMode


def plain(hidden, weight, targets, bias=None, temperature=1.0):
    logits = hidden @ weight.t()
    logits = (logits if bias is None else logits + bias) / temperature
    logps = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    return torch.where(targets >= 0, logps.gather(1, targets.clamp_min(0)[:, None])[:, 0], 0.0)


def case(N, D, V, scale=1.0, planted=0.5, ignored=0.0, seed=0):
    """Inputs whose targets are the most likely token in a share `planted` of the rows."""
    hidden, weight = randn(N, D, seed=seed), randn(V, D, seed=seed + 1, scale=scale * D**-0.5)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, V, (N,), generator=generator)
    likely = (hidden @ weight.t()).argmax(1)
    targets = torch.where(torch.rand(N, generator=generator) < planted, likely, targets)
    targets[torch.rand(N, generator=generator) < ignored] = -100
    return {"hidden": hidden, "weight": weight, "targets": targets}


SHAPES = [
    pytest.param(32, 64, 1024, id="aligned"),
    pytest.param(37, 50, 4099, id="ragged, several blocks"),
    pytest.param(1, 16, 1025, id="one row, one column over a block"),
    pytest.param(3, 8, 1, id="vocabulary of one"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "D", "V"), SHAPES)
def test_logps_and_hidden_gradient(ops, device, dtype, N, D, V):
    def kernel(hidden, weight, targets):
        return ops.linear_logps(hidden, weight, targets, chunk_tokens=16)

    check(kernel, plain, case(N, D, V, scale=4.0), dtype, device, fixed=("weight",))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_trainable_head_with_bias_temperature_and_ignored_rows(ops, device, dtype):
    def kernel(hidden, weight, targets, bias):
        return ops.linear_logps(hidden, weight, targets, bias=bias, temperature=0.7, chunk_tokens=16)

    inputs = case(40, 24, 2050, scale=3.0, ignored=0.3) | {"bias": randn(2050, seed=5)}
    check(kernel, partial(plain, temperature=0.7), inputs, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(ops, device, dtype):
    """Logits of +-1000: probabilities that underflow, targets far below and at the top."""

    def kernel(hidden, weight, targets):
        return ops.linear_logps(hidden, weight, targets)

    check(kernel, plain, case(24, 32, 3000, scale=200.0), dtype, device, fixed=("weight",))


@settings(max_examples=15, deadline=None)
@given(
    N=st.integers(0, 40),
    D=st.integers(1, 70),
    V=st.integers(1, 2100),
    chunk=st.integers(1, 50),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("module", TABLES.values(), ids=TABLES)
def test_any_shape(module, N, D, V, chunk, seed):
    inputs = case(N, D, V, scale=4.0, ignored=0.2, seed=seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def kernel(hidden, weight, targets):
        return module.linear_logps(hidden, weight, targets, chunk_tokens=chunk)

    check(kernel, plain, inputs, torch.float16, device, fixed=("weight",))


def test_sure_tokens_keep_a_relative_gradient(ops, device):
    """p -> 1: 1 - p and the gradient stay right to a per cent where eager's bf16 p W would cancel."""
    D, V = 16, 500
    weight = randn(V, D, seed=1)
    target = int(weight.norm(dim=1).argmax())
    for dtype in (torch.float16, torch.bfloat16):
        w = weight.to(dtype).double()
        hidden = (w[target] * (12.0 / w[target].norm() ** 2)).to(dtype)[None]
        x = hidden.detach().to(device, copy=True).requires_grad_()
        exact = hidden.detach().double().requires_grad_()
        targets = torch.tensor([target])
        ops.linear_logps(x, weight.to(device, dtype), targets.to(device)).sum().backward()
        truth = plain(exact, w, targets)
        truth.sum().backward()
        assert truth.item() > -0.5
        assert (x.grad.cpu().double() - exact.grad).norm() < 0.06 * exact.grad.norm()


@pytest.mark.parametrize("coefficient", [1e-8, 1.0])
def test_fp16_gradients_survive_loss_scale_and_small_coefficients(ops, device, coefficient):
    """Loss scale 2^16: the coefficient meets u in fp32, so fp16 neither overflows nor flushes to zero."""
    inputs = case(8, 32, 600, planted=0.0)
    hidden = inputs["hidden"].to(device, torch.float16).requires_grad_()
    weight, targets = inputs["weight"].to(device, torch.float16), inputs["targets"].to(device)
    (ops.linear_logps(hidden, weight, targets) * (coefficient * 2.0**16)).sum().backward()
    exact = hidden.detach().cpu().double().requires_grad_()
    (plain(exact, weight.cpu().double(), targets.cpu()) * (coefficient * 2.0**16)).sum().backward()
    assert torch.isfinite(hidden.grad).all()
    assert (hidden.grad.cpu().double() - exact.grad).norm() < 2e-3 * exact.grad.norm()


def test_no_rows_and_all_rows_ignored(ops, device):
    hidden, weight = torch.randn(4, 8, device=device, requires_grad=True), torch.randn(30, 8, device=device)
    nothing = ops.linear_logps(hidden[:0], weight, torch.empty(0, dtype=torch.int64, device=device))
    assert nothing.shape == (0,)
    logps = ops.linear_logps(hidden, weight, torch.full((4,), -1, device=device))
    logps.sum().backward()
    assert not logps.any()
    assert not hidden.grad.any()


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts GEMMs and the numbers they multiply."""

    def __init__(self):
        super().__init__()
        self.flops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = args[-2:]
            self.flops.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("wants_grad", "sweeps"), [(True, 2), (False, 1)])
def test_work_done(ops, device, wants_grad, sweeps):
    """Two GEMM sweeps with a gradient, one without, none for ignored rows, none in the backward."""
    hidden = torch.randn(20, 8, device=device, requires_grad=wants_grad)
    targets = torch.arange(20, device=device)
    targets[::2] = -1
    with Counting() as counting:
        logps = ops.linear_logps(hidden, torch.randn(300, 8, device=device), targets)
        if wants_grad:
            logps.sum().backward()
    assert sum(counting.flops) == sweeps * 2 * 10 * 8 * 300


def test_no_grad_mode_skips_the_second_sweep(ops, device):
    hidden = torch.randn(20, 8, device=device, requires_grad=True)
    with torch.no_grad(), Counting() as counting:
        ops.linear_logps(hidden, torch.randn(300, 8, device=device), torch.arange(20, device=device))
    assert sum(counting.flops) == 2 * 20 * 8 * 300


def test_reference_can_be_simulated():
    """The memory planner runs the step on fake tensors: no value may decide a shape."""
    with FakeTensorMode():
        hidden = torch.empty(100, 32, requires_grad=True)
        logps = reference.linear_logps(hidden, torch.empty(5000, 32), torch.empty(100, dtype=torch.int64))
        logps.sum().backward()
    assert hidden.grad.shape == (100, 32)


def test_row_block_covers_any_vocabulary():
    assert triton_head.row_block(1) == 1
    assert triton_head.row_block(151_936) == 4096
