"""Sums in a fixed order against fp64, and that a card's step makes no other kind."""

import pytest
import torch
from packed_cases import make_groups
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from spinfast import ops
from spinfast.config import Lora
from spinfast.device import profile
from spinfast.memory.simulation import Simulation
from spinfast.objectives import Nll, Pairwise
from spinfast.sums import add_rows, segment_sums, take_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ATOMIC = {"index_add", "index_add_", "index_put", "index_put_", "_index_put_impl_", "scatter_add", "scatter_add_"}
COPIES = torch.randint(0, 9, (4000,), generator=torch.Generator().manual_seed(0))  # of 10 rows, the last has none


@pytest.mark.parametrize("shape", [(4000,), (4000, 2, 3)], ids=["numbers", "rows"])
def test_segment_sums(shape):
    x, ids = torch.randn(shape, dtype=torch.float64), COPIES.sort().values
    sums = segment_sums(x.to(DEVICE), ids.to(DEVICE), 10).cpu()
    for number in range(10):
        torch.testing.assert_close(sums[number], x[ids == number].sum(0))
    assert segment_sums(x.to("meta"), ids.to("meta"), 10).shape == sums.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_copies_are_summed_in_fp32(dtype):
    """The gradient of rows taken hundreds of times: off by its own rounding to `dtype`, not by one for every copy."""
    x = torch.zeros(10, 3, dtype=dtype, device=DEVICE, requires_grad=True)
    gradient = (1 + torch.rand(4000, 3, dtype=torch.float64)).to(dtype)
    taken = take_rows(x, COPIES.to(DEVICE))
    assert taken.shape == (4000, 3)
    taken.backward(gradient.to(DEVICE))
    exact = torch.zeros(10, 3, dtype=torch.float64).index_add_(0, COPIES, gradient.double())
    rounding = (exact.to(dtype).double() - exact).abs() + torch.finfo(torch.float32).eps * 500 * exact
    assert ((x.grad.cpu().double() - exact).abs() <= 2 * rounding).all()


def test_derivative_of_taking_rows():
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: take_rows(x, torch.tensor([4, 0, 4, 2, 0, 0])), x)


@pytest.mark.gpu
def test_the_same_bits_every_time():
    x, index = torch.randn(4000, 64, device="cuda"), COPIES.cuda()
    assert all(torch.equal(add_rows(x, index, 10), add_rows(x, index, 10)) for _ in range(20))


class Operators(TorchDispatchMode):
    """Collects the names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function._schema.name.removeprefix("aten::"))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("attention", ["aten_efficient", "sdpa"])
def test_a_card_makes_no_sum_by_atomics(tiny_model, attention):
    """Scoring, SPIN and four answers to a prompt as a T4 would run them: nothing adds in the order threads arrive."""
    t4 = profile("t4", attention=attention, plan_only=True)
    simulation = Simulation(
        AutoConfig.from_pretrained(tiny_model()), t4, Lora(r=4, alpha=8), ops.choose("triton", "cuda")[0]
    )
    with Operators() as operators:
        simulation.score(make_groups([(9, (4, 5))]))
        simulation.train(make_groups([(9, (4, 5)), (3, (1, 7))]), Pairwise(), "adamw", more_microbatches=True)
        simulation.train(make_groups([(9, (4, 5, 1, 6))]), Nll(), "adamw", more_microbatches=False)
    assert not operators.names & ATOMIC
    assert "segment_reduce" in operators.names
