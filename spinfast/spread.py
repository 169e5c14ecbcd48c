"""More than one process, started by torchrun: the one place that knows torch.distributed.

    torchrun --nproc-per-node 2 -m spinfast.run CONFIG.yaml

Every rank runs the same program on the same data, card LOCAL_RANK its own (SPMD), and lists are dealt by position: item
i is rank i mod N's. So data, order and seeds do not depend on N. What is said between ranks is of two kinds:

- `gather`, plain values as JSON over gloo, in the ranks' order: answers, log-probs, what a step's microbatches say, and
  whether memory ran out. Each has a name, so that ranks that went apart are found out, and a time limit.
- `add_up`, the trained parameters' gradients, one flat fp32 sum per step over NCCL (gloo on a CPU).

A step has no collective inside a microbatch, so ranks may have different numbers of them, or none: nothing is padded. A
loss or gradient that is not finite stays so in a sum, so all ranks skip the step that one has to.

Rank 0 writes, logs and draws; the others compute, and read what it wrote after they were `told` of it. A rank that ends
closes its connections: whoever waits for it then, or for longer than SPINFAST_RANK_TIMEOUT, raises Lost. torchrun ends
the others, and the same command, with any number of ranks, goes on.

Without torchrun, and with one rank, every function here is the identity.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

from spinfast.errors import UserError
from spinfast.interrupt import Stopped

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
TIMEOUT = "SPINFAST_RANK_TIMEOUT"  # seconds that a rank waits for the others; reward functions may take their time
PATIENCE = 1800.0
LINGER = 2.0  # seconds in which ranks that lost another tell that they are still there
AT_ONCE = 2**25  # numbers that are summed by one call: 128 MiB
PR_SET_PDEATHSIG = 1
LINE = "torchrun --standalone --nproc-per-node {} -m spinfast.run CONFIG.yaml"  # what starts so many ranks


class Lost(Stopped):
    """Another rank is gone or does not answer; what was done is saved."""


@dataclass
class _Here:
    rank: int
    world: int
    store: Any  # torch.distributed.Store, which torchrun keeps
    said: int = 0  # gathers so far


_here: _Here | None = None
_last_word: Any = None  # the store, also after the block: who tells what ended the run?


def rank() -> int:
    return _here.rank if _here else 0


def world() -> int:
    return _here.world if _here else 1


def first() -> bool:
    """Whether this is the rank that writes, logs and draws."""
    return rank() == 0


def launched() -> tuple[int, int, int, int]:
    """(rank, ranks, rank on this machine, ranks on this machine) as torchrun says; (0, 1, 0, 1) without it."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    return tuple(int(os.environ.get(name, alone)) for name, alone in names.items())


def ranks_here() -> int:
    """How many ranks torchrun started; without it how many it could, one for each card that is visible."""
    import torch

    started = launched()[1]
    return started if started > 1 else max(1, torch.cuda.device_count())


def settle() -> None:
    """Before torch is imported: a rank keeps to its share of the machine's cores, and ends when its launcher does."""
    _, ranks, local, here = launched()
    if ranks == 1:
        return
    cores = sorted(os.sched_getaffinity(0))
    start, stop = local * len(cores) // here, (local + 1) * len(cores) // here
    mine = cores[start : max(stop, start + 1)]
    os.sched_setaffinity(0, mine)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a launcher that is gone is told in our words
    if os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's own default
        os.environ["OMP_NUM_THREADS"] = str(len(mine))
    with suppress(OSError, AttributeError):  # Linux alone
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def opened() -> Iterator[None]:
    """Inside the block the ranks that torchrun started know one another. Open it before any engine."""
    global _here, _last_word
    rank, ranks, local, _ = launched()
    if ranks == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    patience = timedelta(seconds=float(os.environ.get(TIMEOUT, PATIENCE)))
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(card(local, torch.cuda.device_count()))
        backend = "cpu:gloo,cuda:nccl"
    _last_word, rank, ranks = next(dist.rendezvous("env://", timeout=patience))
    dist.init_process_group(backend, store=_last_word, rank=rank, world_size=ranks, timeout=patience)
    _here = _Here(rank, ranks, _last_word)
    if torch.cuda.is_available():  # the communicator's memory is spoken for before a plan asks what is free
        dist.all_reduce(torch.zeros(1, device="cuda"))
    yield
    gather("the end", None)
    _here = None
    dist.destroy_process_group()


def card(local: int, cards: int) -> int:
    """The CUDA device of a rank on its machine; a launcher may show each its own alone.

    All ranks of a machine with too few raise UserError, so that the one who speaks is among them.
    """
    here, apart = launched()[3], cards == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
    if here > cards and not apart:
        raise UserError(f"{here} ranks were started on this machine, which has {cards} cards: --nproc-per-node {cards}")
    return 0 if apart else local


def alone() -> int:
    """Leave the ranks for good, for work that needs no word between them; returns which of them this is.

    Whoever looks later finds a process of its own with one card, as if torchrun had not started it.
    """
    rank, ranks, local, _ = launched()
    if ranks > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        cards = visible.split(",") if visible else [str(local)]
        os.environ["CUDA_VISIBLE_DEVICES"] = cards[local % len(cards)]
        for name in [*os.environ]:
            if name.startswith("TORCHELASTIC_") or name in (
                *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
                *("WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
            ):
                del os.environ[name]
    return rank


def speaks() -> bool:
    """Whether this process says what ended it: the first of all ranks that asks; before they met, of each machine."""
    if _last_word is None:
        return launched()[2] == 0
    try:
        return _last_word.add("last word", 1) == 1
    except RuntimeError:  # the launcher is gone
        return launched()[0] == 0


# What is dealt --------------------------------------------------------------------------------------------------


def shares(items: int, fixed: int = 0) -> list[list[int]]:
    """The positions of the items that are computed here, share by share.

    A list is dealt into as many shares as there are ranks, or into a `fixed` number, by position; share v is rank
    v mod N's. Sums over a fixed number of shares do not depend on N, to the bit.
    """
    dealt = fixed or world()
    return [list(range(share, items, dealt)) for share in range(rank(), dealt, world())]


def in_order(of_ranks: Sequence[Sequence[T]]) -> list[T]:
    """The ranks' shares as they were dealt."""
    return [share for turn in zip_longest(*of_ranks) for share in turn if share is not None]


# What is said ---------------------------------------------------------------------------------------------------


def gather(where: str, value: T) -> list[T]:
    """Every rank's value, which JSON must hold, in their order; all ranks must come to it, under this name.

    Raises Lost if one does not, and RuntimeError if one comes to another gather.
    """
    if _here is None:
        return [value]
    with _waiting(where):
        said = _exchanged(json.dumps([where, value]).encode())
    names, values = zip(*map(json.loads, said), strict=True)
    if {*names} != {where}:
        places = ", ".join(f"rank {i} at {name!r}" for i, name in enumerate(names))
        raise RuntimeError(f"the ranks went apart: {places}. Please report this with the run's log.txt")
    return list(values)


def _exchanged(message: bytes) -> list[bytes]:
    import torch
    import torch.distributed as dist

    own = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    dist.all_gather(lengths, torch.tensor([len(own)]))
    longest = int(max(lengths))
    found = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(found, torch.nn.functional.pad(own, (0, longest - len(own))))
    return [bytes(each[: int(length)].numpy()) for each, length in zip(found, lengths, strict=True)]


@contextmanager
def _waiting(where: str) -> Iterator[None]:
    """Raises Lost where the others do not come to what is done together inside."""
    if _here is None:
        yield
        return
    import torch

    _here.said += 1
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # the backend's: closed by a peer, or time is out
        raise Lost(_who_is_lost(_here, where, error)) from None


def _who_is_lost(here: _Here, where: str, error: RuntimeError) -> str:
    """Ranks that wait in vain say so to the store; who does not is the one."""
    missing = list(range(here.world))
    with suppress(RuntimeError):  # the launcher is gone, its store with it
        here.store.set(f"waits {here.said} {here.rank}", socket.gethostname())
        until = time.monotonic() + LINGER
        while missing and time.monotonic() < until:
            missing = [r for r in missing if not here.store.check([f"waits {here.said} {r}"])]
            time.sleep(0.05)
    who = f"rank {', '.join(map(str, missing))} of {here.world}" if missing else f"another rank ({str(error)[:200]})"
    return (
        f"{who} is gone or hangs, it was waited for at {where!r}; everything done is saved. Run the same command again "
        "to go on"
    )


def told(where: str, make: Callable[[], T]) -> T:
    """make() by rank 0, as if there were no others, for all; they wait until it is done."""
    global _here
    before, value = _here, None
    if first():
        _here = None
        try:
            value = make()
        finally:
            _here = before
    return gather(where, value)[0]


@contextmanager
def ahead(where: str) -> Iterator[None]:
    """Rank 0 goes first, then the others at once: they find what it left in caches."""
    if not first():
        gather(where, None)
    yield
    if first():
        gather(where, None)


def check_equal(where: str, sum_of: Callable[[], str]) -> None:
    """Raises RuntimeError unless all ranks have the same sum over their parameters, which by construction they must."""
    if _here is None:
        return
    found = gather(where, sum_of())
    if len({*found}) > 1:
        raise RuntimeError(
            f"{where}: the ranks' parameters differ ({', '.join(found)}), so their cards or builds of torch compute "
            "differently; start all on one kind of card, and report this with the run's log.txt"
        )


def add_up(parameters: Sequence[torch.nn.Parameter], mine: Sequence[Sequence[torch.Tensor | None]], fixed: int) -> None:
    """Give every parameter the sum of its gradients over all shares; `mine` has those of the shares computed here.

    Over a fixed number of shares it is summed share by share, in their order. A parameter that no share has a
    gradient for gets none. At world 1, of one share, there is nothing to do.
    """
    if world() == 1 and not fixed:
        return
    import torch

    start = 0
    while start < len(parameters):
        stop, numbers = start, 0
        while stop < len(parameters) and (stop == start or numbers + parameters[stop].numel() <= AT_ONCE):
            numbers, stop = numbers + parameters[stop].numel(), stop + 1
        some = parameters[start:stop]
        flat = [_flat(some, gradients[start:stop]) for gradients in mine]
        with _waiting("the sum of gradients"):
            *sums, there = _total(flat, some, fixed).split([*(p.numel() for p in some), len(some)])
            found = (there > 0).tolist()  # a card is waited for here
        for parameter, summed, any_has_it in zip(some, sums, found, strict=True):
            parameter.grad = summed.view_as(parameter) if any_has_it else None
        start = stop
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in parameters)


def _flat(parameters: Sequence[torch.nn.Parameter], gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Gradients end to end, then for each whether there is one."""
    import torch

    device = parameters[0].device
    there = torch.tensor([float(g is not None) for g in gradients], device=device)
    pairs = zip(parameters, gradients, strict=True)
    return torch.cat([*((torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in pairs), there])


def _total(shares: list[torch.Tensor], some: Sequence[torch.nn.Parameter], fixed: int) -> torch.Tensor:
    import torch
    import torch.distributed as dist

    nothing = torch.zeros(sum(p.numel() for p in some) + len(some), device=some[0].device)
    if not fixed:
        (total,) = shares
        dist.all_reduce(total)
        return total
    total = nothing.clone()
    for turn in range(-(-fixed // world())):
        own = shares[turn] if turn < len(shares) else nothing
        of_ranks = [own]
        if world() > 1:
            of_ranks = [torch.empty_like(own) for _ in range(world())]
            dist.all_gather(of_ranks, own)
        for part in of_ranks:
            total += part
    return total
