"""Problems made on demand by reasoning-gym, with worked solutions: data for demos that needs no download.

    gsm_symbolic      word problems as in GSM8K
    chain_sum         sums of two or three one-digit numbers, a line per step
    chain_sum/two     of two numbers only, of which there are 200; two fifths of them belong to "test"
    chain_sum/pairs   sums with a wrong solution beside the right one, to be compared

Problem i is drawn from seed + i in reasoning-gym: neighbouring seeds would share problems, so the seed is hashed with
the split's name. There are few one-digit sums: its own text decides which split one belongs to, and none occurs twice.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import Any

Rows = list[dict[str, Any]]
DRAWN = 200_000  # problems looked at, at the most


def gsm_symbolic(create: Callable, split: str, rows: int, seed: int) -> Rows:
    problems = create("gsm_symbolic", size=rows, seed=_key(split, seed))

    def row(problem: Mapping[str, Any]) -> dict[str, Any]:
        steps = re.sub(r"\n?####[^\n]*\Z", "", problem["metadata"]["answer_cot"].rstrip())
        answer = problem["answer"]
        return {"question": problem["question"], "answer": f"{steps}\n#### {answer}", "reference": answer}

    return [row(problem) for problem in problems]


def chain_sum(create: Callable, split: str, rows: int, seed: int) -> Rows:
    return [
        {"question": problem["question"], "answer": worked(expression), "reference": problem["answer"]}
        for problem, expression in itertools.islice(_sums(create, split, seed), rows)
    ]


def chain_sum_two(create: Callable, split: str, rows: int, seed: int) -> Rows:
    return [
        {"question": problem["question"], "answer": worked(expression), "reference": problem["answer"]}
        for problem, expression in itertools.islice(_sums(create, split, seed, terms=2, heldout=2), rows)
    ]


def chain_sum_pairs(create: Callable, split: str, rows: int, seed: int) -> Rows:
    return [
        {
            "prompt": problem["question"],
            "chosen": worked(expression),
            "rejected": worked(expression, wrong=Random(f"{seed}/{expression}")),
            "reference": problem["answer"],
        }
        for problem, expression in itertools.islice(_sums(create, split, seed), rows)
    ]


SOURCES = {
    "gsm_symbolic": gsm_symbolic,
    "chain_sum": chain_sum,
    "chain_sum/two": chain_sum_two,
    "chain_sum/pairs": chain_sum_pairs,
}


def worked(expression: str, wrong: Random | None = None) -> str:
    """ "8 + 0 - 7" -> "8 + 0 = 8\\n8 - 7 = 1\\n#### 1"; with `wrong` one of the steps is off by up to three."""
    total, *rest = expression.split()
    steps = list(zip(rest[::2], rest[1::2], strict=True))
    at = wrong.randrange(len(steps)) if wrong else None
    lines = []
    for number, (sign, term) in enumerate(steps):
        result = int(total) + int(sign + term)
        if number == at:
            result += wrong.choice([-3, -2, -1, 1, 2, 3])
        lines.append(f"{total} {sign} {term} = {result}")
        total = str(result)
    return "\n".join([*lines, f"#### {total}"])


def _sums(
    create: Callable, split: str, seed: int, terms: int = 3, heldout: int = 1
) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Problems of the split, each once: so many fifths of all belong to "test", the rest to every other name."""
    options = {"min_terms": 2, "max_terms": terms, "min_digits": 1, "max_digits": 1}
    seen = set()
    for problem in create("chain_sum", size=DRAWN, seed=_key(split, seed), **options):
        expression = problem["metadata"]["expression"]
        apart = hashlib.blake2b(expression.encode(), digest_size=1).digest()[0] % 5 < heldout
        if expression not in seen and apart == (split == "test"):
            seen.add(expression)
            yield problem, expression


def _key(split: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{split}/{seed}".encode(), digest_size=6).digest(), "big")
