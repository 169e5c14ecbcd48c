"""What goes with what: of a large product of parameters the default suite plays enough to meet every value."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest


def crossed(first: Sequence, second: Sequence, each: int = 1) -> list:
    """All pairs, as pytest's parameters; those beyond `each` partners of every value of the longer side are slow."""
    longest = max(len(first), len(second))
    fast = {((i + lap) % len(first), i % len(second)) for i in range(longest) for lap in range(each)}
    return [
        pytest.param(first[i], second[j], marks=() if (i, j) in fast else pytest.mark.slow)
        for i, j in product(range(len(first)), range(len(second)))
    ]
