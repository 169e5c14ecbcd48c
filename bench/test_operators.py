"""Every operator against its rivals and its floor: `pytest bench/test_operators.py`, rows by `python -m bench kernels`.

pytest bench/test_operators.py -k swiglu --benchmark-compare     against your last saved run (--benchmark-save)
"""

from __future__ import annotations

import os
from functools import cache, lru_cache

import pytest
import torch

from bench import shapes
from bench.operators import DEVICE, PASSES, Operator, operators, run
from bench.peers.watch import now

SHAPE = os.environ.get("BENCH_OPERATORS", "Qwen2.5-0.5B,2048,1024")  # model, tokens, of which are scored


@cache
def made() -> dict[str, Operator]:
    model, tokens, scored = SHAPE.split(",")
    return operators(shapes.shape(model), int(tokens), int(scored))


@lru_cache(maxsize=1)
def data(op: str) -> tuple:
    torch.manual_seed(0)
    return made()[op].data()


CASES = [(op, name, passes) for op in made() for passes in PASSES for name in ("floor", *made()[op].forms)]


@pytest.mark.parametrize(("op", "name", "passes"), CASES, ids=["-".join(case) for case in CASES])
def test_operator(benchmark, op, name, passes, request):
    operator, args = made()[op], data(op)
    benchmark.group = f"{op} {passes}"
    benchmark.extra_info = {"op": op, "what": name, "pass": passes, **operator.facts}

    def synchronised():
        operator.floor(args, passes) if name == "floor" else run(operator.forms[name], args, passes)
        now(DEVICE)

    benchmark.pedantic(synchronised, rounds=request.config.getoption("--benchmark-min-rounds"), warmup_rounds=1)
