"""Every operator against its rivals and its floor: `pytest bench/test_operators.py`, rows by `python -m bench kernels`.

pytest bench/test_operators.py -k swiglu --benchmark-compare     against your last saved run (--benchmark-save)
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from bench.operators import OPERATORS, PASSES, memory, run

CASES = [(op, name, passes) for op in OPERATORS for passes in PASSES for name in ("floor", *OPERATORS[op].forms)]


@lru_cache(maxsize=1)
def data(op: str) -> tuple:
    torch.manual_seed(0)
    return OPERATORS[op].data()


@pytest.mark.parametrize(("op", "name", "passes"), CASES, ids=["-".join(case) for case in CASES])
def test_operator(benchmark, op, name, passes, request):
    operator, args = OPERATORS[op], data(op)
    form = (
        (lambda: operator.floor(args, passes)) if name == "floor" else (lambda: run(operator.forms[name], args, passes))
    )
    benchmark.group = f"{op} {passes}"
    benchmark.extra_info = {"op": op, "what": name, "pass": passes, **operator.facts}
    if name not in ("floor", "torch.compile") and passes == "forward+backward":  # a compiled graph hides its tensors
        benchmark.extra_info |= memory(operator.forms[name], args)

    def synchronised():
        form()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=request.config.getoption("--benchmark-min-rounds"), warmup_rounds=1)
