"""What ranks say to one another, and the sums of what they computed."""

import os
import re
import signal
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import EXIT, together

from spinfast import spread
from spinfast.errors import UserError

SHARES = 5  # more than ranks, and no multiple of 2, 3 or 4


def gradients_of(share: int, parameters: list[torch.nn.Parameter]) -> list[torch.Tensor | None]:
    """The last parameter has none anywhere, the first one in every second share."""
    generator = torch.Generator().manual_seed(share)
    found: list = [torch.randn(p.shape, generator=generator) * 10.0 ** (3 * share - 6) for p in parameters]
    return [found[0] if share % 2 else None, *found[1:-1], None]


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (7,), (2, 2), (5,))]


def summed(fixed: int) -> list[torch.Tensor | None]:
    """Every share's gradients by add_up; without a fixed number a rank has the sum of its own, as a step leaves it."""
    given = parameters()
    mine = [gradients_of(share, given) for share, *_ in spread.shares(SHARES, SHARES)]
    if not fixed:
        mine = [[added(each) for each in zip(*mine, strict=True)]]
        for parameter, gradient in zip(given, mine[0], strict=True):
            parameter.grad = gradient
    spread.add_up(given, mine, fixed)
    return [p.grad for p in given]


def added(gradients) -> torch.Tensor | None:
    there = [gradient for gradient in gradients if gradient is not None]
    return torch.stack(there).sum(0) if there else None


def expected() -> list[torch.Tensor | None]:
    given = parameters()
    totals = [torch.zeros_like(p) for p in given]
    for share in range(SHARES):
        for total, gradient in zip(totals, gradients_of(share, given), strict=True):
            total += 0 if gradient is None else gradient
    return [*totals[:-1], None]


def conversation() -> None:
    """In every rank: all that goes right."""
    rank, world = spread.rank(), spread.world()
    assert spread.gather("a", {"rank": rank, "text": "x" * 10**rank}) == [
        {"rank": r, "text": "x" * 10**r} for r in range(world)
    ]
    infinite = spread.gather("numbers", [float("inf"), 0.1 + 0.2, -0.0])
    assert infinite == [[float("inf"), 0.1 + 0.2, -0.0]] * world
    assert spread.told("b", lambda: rank + 41) == 41
    assert spread.first() == (rank == 0)
    dealt = spread.gather("c", spread.shares(3))
    assert sorted(i for shares in dealt for share in shares for i in share) == [0, 1, 2]
    own = [share for share, *_ in spread.shares(SHARES, SHARES)]
    assert spread.in_order(spread.gather("d", own)) == [*range(SHARES)]
    with spread.ahead("e"):
        began = time.time()
        time.sleep(0.05)
    firsts, *others = spread.gather("f", (began, time.time()))
    assert all(other[0] >= firsts[0] + 0.05 for other in others)
    spread.check_equal("g", lambda: "same")
    for found, wanted in zip(summed(SHARES), expected(), strict=True):
        assert (found is None) == (wanted is None)
        assert found is None or torch.equal(found, wanted)
    for found, wanted in zip(summed(0), expected(), strict=True):
        assert (found is None) == (wanted is None)
        assert found is None or torch.allclose(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_gather_in_order_and_sum_to_the_bit(world, tmp_path):
    assert together(conversation, world, tmp_path / "said") == [0] * world, (tmp_path / "said").read_text()


def apart() -> None:
    spread.gather("here" if spread.rank() else "there", None)


def unequal() -> None:
    spread.check_equal("step 50", lambda: str(spread.rank()))


@pytest.mark.parametrize(("function", "said"), [(apart, "rank 0 at 'there', rank 1 at 'here'"), (unequal, "differ")])
def test_ranks_that_went_apart_are_found_out(function, said, tmp_path):
    assert together(function, 2, tmp_path / "said") == [EXIT] * 2
    errors = [line for line in (tmp_path / "said").read_text().splitlines() if line.startswith("RuntimeError")]
    assert len(errors) == 2
    assert all(said in error for error in errors)


def hangs() -> None:
    if spread.rank() == 1:
        time.sleep(60)
    spread.gather("the step", None)


def dies() -> None:
    if spread.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    spread.gather("the step", None)


def dies_before_the_sum() -> None:
    if spread.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    summed(0)


WAITED = [(hangs, 2, "the step"), (dies, 60, "the step"), (dies_before_the_sum, 60, "the sum of gradients")]


@pytest.mark.parametrize(("function", "timeout", "where"), WAITED)
def test_a_rank_that_hangs_or_dies_is_named_within_seconds(function, timeout, where, tmp_path):
    started = time.monotonic()
    codes = together(function, 3, tmp_path / "said", timeout, ending=(0, 2))
    assert time.monotonic() - started < 30
    assert codes == [EXIT, -signal.SIGKILL, EXIT]
    said = (tmp_path / "said").read_text()
    lost = re.findall(rf"Lost: (rank .*) of 3 is gone or hangs, it was waited for at '{where}'", said)
    assert lost == ["rank 1"] * 2


@pytest.mark.parametrize(
    ("local", "here", "cards", "visible", "expected"),
    [(1, 2, 2, None, 1), (3, 4, 2, None, None), (0, 4, 2, None, None), (0, 2, 1, None, None), (1, 2, 1, "1", 0)],
)
def test_every_rank_of_a_machine_with_too_few_cards_says_so(monkeypatch, local, here, cards, visible, expected):
    for name, number in {
        "RANK": 8 + local,
        "WORLD_SIZE": 8 + here,
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": here,
    }.items():
        monkeypatch.setenv(name, str(number))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert spread.speaks() == (local == 0)  # of each machine one
    if expected is None:
        with pytest.raises(UserError, match=f"--nproc-per-node {cards}"):
            spread.card(local, cards)
    else:
        assert spread.card(local, cards) == expected


@given(items=st.integers(0, 40), fixed=st.integers(0, 9), world=st.integers(1, 6))
def test_every_item_is_dealt_once_and_a_fixed_deal_knows_no_ranks(items, fixed, world):
    shares = {}
    for rank in range(world):
        spread._here = spread._Here(rank, world, None)
        try:
            mine = spread.shares(items, fixed)
        finally:
            spread._here = None
        for turn, share in enumerate(mine):
            shares[turn * world + rank] = share
    assert sorted(i for share in shares.values() for i in share) == list(range(items))
    dealt = fixed or world
    assert shares == {share: list(range(share, items, dealt)) for share in range(dealt)}


def test_alone_everything_is_the_identity():
    value = object()
    assert spread.gather("alone", value)[0] is value
    assert spread.shares(3) == [[0, 1, 2]]
    given = parameters()
    for parameter in given:
        parameter.grad = torch.ones_like(parameter)
    before = [p.grad for p in given]
    spread.add_up(given, [before], 0)
    assert all(p.grad is grad for p, grad in zip(given, before, strict=True))
