import math

import pytest
import torch
from bounds import check, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from spinfast_kernels import reference, triton_ops

KINDS = ["logistic", "hinge", "exponential", "ipo"]


def plain(logps, ids, opponent, beta, kind):
    """A loop over pairs, straight from the paper."""
    losses, margins, ratios = [], [], []
    for pair in range(len(opponent) // 2):
        real, generated = (logps[ids == 2 * pair + i].sum() - opponent[2 * pair + i] for i in (0, 1))
        z = beta * (real - generated)
        losses.append(
            {
                "logistic": lambda z: torch.log1p(torch.exp(-z)),
                "hinge": lambda z: torch.clamp(1 - z, min=0),
                "exponential": lambda z: torch.exp(-z),
                "ipo": lambda z: (z / beta - 1 / (2 * beta)) ** 2,
            }[kind](z)
        )
        margins.append(z)
        ratios.append((real, generated))
    return torch.stack(losses).sum(), torch.stack(margins), ratios


def case(lengths, seed=0):
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return {"logps": -randn(len(ids), seed=seed).abs(), "ids": ids, "opponent": randn(len(lengths), seed=seed + 1)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([1, 1], id="one token each"),
        pytest.param([3, 300, 257, 1], id="over a block, ragged"),
        pytest.param([256, 512, 5, 6, 7, 8], id="whole blocks"),
    ],
)
def test_loss_and_gradient(ops, device, kind, lengths):
    def kernel(logps, ids, opponent):
        return ops.pairwise_loss(logps, ids, opponent, beta=0.1, kind=kind).loss

    def truth(logps, ids, opponent):
        return plain(logps, ids, opponent, 0.1, kind)[0]

    check(kernel, truth, case(lengths), torch.float32, device, fixed=("opponent",))


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), beta=st.floats(0.01, 5.0), kind=st.sampled_from(KINDS)
)
@pytest.mark.parametrize("module", [reference, triton_ops], ids=["reference", "triton"])
def test_margins_and_ratios(module, lengths, beta, kind):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = case(lengths + lengths)
    result = module.pairwise_loss(
        inputs["logps"].float().to(device), inputs["ids"].to(device), inputs["opponent"].float().to(device),
        beta=beta, kind=kind,
    )  # fmt: skip
    _, margins, ratios = plain(**inputs, beta=beta, kind=kind)
    real, generated = (torch.stack(r) for r in zip(*ratios, strict=True))
    torch.testing.assert_close(result.margins_P.cpu().double(), margins, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.real_logratio_P.cpu().double(), real, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.generated_logratio_P.cpu().double(), generated, rtol=1e-4, atol=1e-4)
    assert not result.margins_P.requires_grad


def test_first_loss_is_ln_2_per_pair(ops, device):
    """The opponent is the policy before its first step: margin 0, loss ln 2, whatever beta is."""
    inputs = case([4, 6, 2, 9])
    logps, ids = inputs["logps"].float().to(device), inputs["ids"].to(device)
    own = ops.pairwise_loss(logps, ids, torch.zeros(4, device=device), beta=0.1)
    opponent = torch.stack([own.real_logratio_P, own.generated_logratio_P], 1).flatten()
    assert ops.pairwise_loss(logps, ids, opponent, beta=5.0).loss.item() == pytest.approx(2 * math.log(2), abs=1e-6)


def test_microbatches_add_up_and_repeat_bit_for_bit(ops, device):
    inputs = case([30, 70, 20, 900])
    logps, ids = inputs["logps"].float().to(device), inputs["ids"].to(device)
    opponent = inputs["opponent"].float().to(device)
    whole = ops.pairwise_loss(logps, ids, opponent, beta=0.3).loss
    parts = [
        ops.pairwise_loss(logps[:100], ids[:100], opponent[:2], beta=0.3).loss,
        ops.pairwise_loss(logps[100:], ids[100:] - 2, opponent[2:], beta=0.3).loss,
    ]
    torch.testing.assert_close(whole, sum(parts))
    assert all(torch.equal(whole, ops.pairwise_loss(logps, ids, opponent, beta=0.3).loss) for _ in range(5))


@pytest.mark.parametrize("margin", [-300.0, 300.0])
def test_logistic_far_margins(ops, device, margin):
    """log(1 + e^-z) neither overflows nor loses its slope at |z| = 300."""
    logps = torch.tensor([margin, 0.0], device=device, requires_grad=True)
    loss = ops.pairwise_loss(logps, torch.tensor([0, 1], device=device), torch.zeros(2, device=device), beta=1.0).loss
    loss.backward()
    assert loss.item() == pytest.approx(max(0.0, -margin))
    assert logps.grad.tolist() == pytest.approx([-1.0, 1.0] if margin < 0 else [0.0, 0.0])
