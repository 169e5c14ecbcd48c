"""Problems made on demand by reasoning-gym, with worked solutions: data for demos that needs no download.

    gsm_symbolic      word problems as in GSM8K
    chain_sum         sums of two or three one-digit numbers, a line per step
    chain_sum/two     of two numbers only, of which there are 200; two fifths of them belong to "test"
    chain_sum/pairs   sums with a wrong solution beside the right one, to be compared
    products          products of two or three one-digit numbers, a line per step
    gcd, lcm          of two numbers up to 50, by Euclid's divisions
    simple_equations  linear in one unknown, small numbers: the constant goes to the right, then the factor

Problem i is drawn from seed + i in reasoning-gym: neighbouring seeds would share problems, so the seed is hashed with
the split's name. There are few one-digit sums: its own text decides which split one belongs to, and none occurs twice.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from operator import add, mul, sub
from random import Random
from typing import Any

Rows = list[dict[str, Any]]
Problem = Mapping[str, Any]
DRAWN = 200_000  # problems looked at, at the most
OPERATORS = {"+": add, "-": sub, "*": mul}
ONE_DIGIT = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
UP_TO_50 = {"min_numbers": 2, "max_numbers": 2, "min_value": 2, "max_value": 50}
LINEAR = {"min_terms": 2, "max_terms": 2, "min_value": 1, "max_value": 9}


def gsm_symbolic(create: Callable, split: str, rows: int, seed: int) -> Rows:
    problems = create("gsm_symbolic", size=rows, seed=_key(split, seed))

    def row(problem: Problem) -> dict[str, Any]:
        steps = re.sub(r"\n?####[^\n]*\Z", "", problem["metadata"]["answer_cot"].rstrip())
        answer = problem["answer"]
        return {"question": problem["question"], "answer": f"{steps}\n#### {answer}", "reference": answer}

    return [row(problem) for problem in problems]


def _worked_out(task: str, name: str, solve: Callable[[Any], str | None], heldout: int = 1, **options: int) -> Callable:
    """A source of the task's problems; solve(metadata[name]) is the worked solution, None where there is none."""

    def source(create: Callable, split: str, rows: int, seed: int) -> Rows:
        distinct = _distinct(create, task, name, split, seed, heldout, options)
        solved = ((problem, solve(problem["metadata"][name])) for problem in distinct)
        return [
            {"question": _asked(problem), "answer": solution, "reference": problem["answer"]}
            for problem, solution in itertools.islice((each for each in solved if each[1]), rows)
        ]

    return source


def chain_sum_pairs(create: Callable, split: str, rows: int, seed: int) -> Rows:
    problems = itertools.islice(_distinct(create, "chain_sum", "expression", split, seed, 1, ONE_DIGIT), rows)
    expressions = [(problem, problem["metadata"]["expression"]) for problem in problems]
    return [
        {
            "prompt": problem["question"],
            "chosen": worked(expression),
            "rejected": worked(expression, wrong=Random(f"{seed}/{expression}")),
            "reference": problem["answer"],
        }
        for problem, expression in expressions
    ]


def worked(expression: str, wrong: Random | None = None) -> str:
    """ "8 + 0 - 7" -> "8 + 0 = 8\\n8 - 7 = 1\\n#### 1"; with `wrong` one of the steps is off by up to three.

    From left to right: sums and differences, or products.
    """
    total, *rest = expression.split()
    steps = list(zip(rest[::2], rest[1::2], strict=True))
    at = wrong.randrange(len(steps)) if wrong else None
    lines = []
    for number, (sign, term) in enumerate(steps):
        result = OPERATORS[sign](int(total), int(term))
        if number == at:
            result += wrong.choice([-3, -2, -1, 1, 2, 3])
        lines.append(f"{total} {sign} {term} = {result}")
        total = str(result)
    return "\n".join([*lines, f"#### {total}"])


def euclid(numbers: list[int], multiple: bool = False) -> str:
    """[36, 48] -> "48 = 1 * 36 + 12\\n36 = 3 * 12 + 0\\n#### 12", or on to the least common multiple."""
    large, small = sorted(numbers, reverse=True)
    lines = []
    while small:
        lines.append(f"{large} = {large // small} * {small} + {large % small}")
        large, small = small, large % small
    if multiple:
        first, second = numbers
        lines.append(f"{first} / {large} * {second} = {math.lcm(first, second)}")
        large = math.lcm(first, second)
    return "\n".join([*lines, f"#### {large}"])


def solved(equation: str) -> str | None:
    """ "3*x + 5 = 20" -> "3*x = 20 - 5 = 15\\nx = 15 / 3 = 5\\n#### 5".

    None where nothing is left to be done (x = 7), or the unknown is gone (0 = 0).
    """
    left, _, right = equation.partition(" = ")
    terms = {"": 0} | {
        name: int(f"{sign}{number or 1}")
        for sign, number, name in re.findall(r"([+-]?)(\d*)\*?([a-z]?)(?=[+-]|$)", left.replace(" ", ""))
        if number or name
    }
    constant, result, lines = terms.pop(""), int(right), []
    if not terms:
        return None
    ((unknown, factor),) = terms.items()
    if constant:
        sides = f"{right} {'-' if constant > 0 else '+'} {abs(constant)}"
        result -= constant
        lines.append(f"{'' if factor == 1 else '-' if factor == -1 else f'{factor}*'}{unknown} = {sides} = {result}")
    if factor != 1:
        lines.append(f"{unknown} = {result} / {factor} = {result // factor}")
    return "\n".join([*lines, f"#### {result // factor}"]) if lines else None


SOURCES = {
    "gsm_symbolic": gsm_symbolic,
    "chain_sum": _worked_out("chain_sum", "expression", worked, **ONE_DIGIT),
    "chain_sum/two": _worked_out("chain_sum", "expression", worked, heldout=2, **ONE_DIGIT | {"max_terms": 2}),
    "chain_sum/pairs": chain_sum_pairs,
    "products": _worked_out("products", "expression", worked, **ONE_DIGIT),
    "gcd": _worked_out("gcd", "numbers", euclid, **UP_TO_50),
    "lcm": _worked_out("lcm", "numbers", lambda numbers: euclid(numbers, multiple=True), **UP_TO_50),
    "simple_equations": _worked_out("simple_equations", "equation", solved, **LINEAR),
}


def _asked(problem: Problem) -> str:
    """The question, without the wish for a result and nothing else: the answer shows its steps."""
    return re.sub(r" Give only the [\w ]+ as your final answer\.$", "", problem["question"])


def _distinct(
    create: Callable, task: str, name: str, split: str, seed: int, heldout: int, options: Mapping[str, int]
) -> Iterator[Problem]:
    """Problems of the split, each once: so many fifths of all belong to "test", the rest to every other name."""
    seen = set()
    for problem in create(task, size=DRAWN, seed=_key(split, seed), **options):
        text = _text(problem["metadata"][name])
        apart = hashlib.blake2b(text.encode(), digest_size=1).digest()[0] % 5 < heldout
        if text not in seen and apart == (split == "test"):
            seen.add(text)
            yield problem


def _text(stated: str | list[int]) -> str:
    """What makes two problems one: their expression, their numbers in any order, their equation in any unknown."""
    return re.sub("[a-z]", "x", stated) if isinstance(stated, str) else str(sorted(stated))


def _key(split: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{split}/{seed}".encode(), digest_size=6).digest(), "big")
