"""Made problems: every worked step is true, the last one is the result, and no problem is in two splits or twice."""

import math
import re

import pytest

from spinfast.data.problems import solved
from spinfast.data.sources import open_table

RESULTS = {"gcd": math.gcd, "lcm": math.lcm}


def problems(family, split, rows):
    table = open_table(f"reasoning_gym:{family}", split=split, rows=rows, seed=5)
    return [table.row(i) for i in range(table.length)]


def value(side, unknown):
    """Of one side of an equation, with the unknown's value in its place."""
    return eval(re.sub(r"(?<![a-z])[a-z](?![a-z])", f"({unknown})", side))


def expected(family, row):
    """Whether the row's result is what its question asks for, worked out another way."""
    asked = row["question"].split(": ")[-1].rstrip(" =.")
    if family in RESULTS:
        return RESULTS[family](*map(int, asked.split(", "))) == int(row["reference"])
    left, *right = asked.split(" = ")
    return value(left, row["reference"]) == int(*(right or [row["reference"]]))


@pytest.mark.parametrize("family", ["chain_sum", "chain_sum/two", "products", "gcd", "lcm", "simple_equations"])
def test_every_step_and_the_result_are_right(family):
    count = 60 if family == "chain_sum/two" else 200  # of two terms there are only 200 in all
    rows = {split: problems(family, split, count) for split in ("train", "test")}
    questions = {split: {row["question"] for row in found} for split, found in rows.items()}
    assert not questions["train"] & questions["test"]
    for found in rows.values():
        assert len({row["question"] for row in found}) == len(found) == count
    for row in (*rows["train"], *rows["test"]):
        *steps, end = row["answer"].split("\n")
        assert end == f"#### {row['reference']}"
        for step in steps:
            assert len({value(side, row["reference"]) for side in step.split(" = ")}) == 1, step
        assert steps[-1].endswith(f" {row['reference']}") or family == "gcd"
        assert expected(family, row), row
        assert "Give only" not in row["question"]


@pytest.mark.parametrize(
    ("equation", "solution"),
    [
        ("3*x + 5 = 20", "3*x = 20 - 5 = 15\nx = 15 / 3 = 5\n#### 5"),
        ("5 - t = 3", "-t = 3 - 5 = -2\nt = -2 / -1 = 2\n#### 2"),
        ("h - 8 = 0", "h = 0 + 8 = 8\n#### 8"),
        ("15*x = 30", "x = 30 / 15 = 2\n#### 2"),
        ("0 = 0", None),  # of which reasoning-gym asks for the unknown too
        ("x = 7", None),
    ],
)
def test_linear_equations(equation, solution):
    assert solved(equation) == solution
