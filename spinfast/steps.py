"""What every optimizer step is made of: groups in a seeded order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import copy
from typing import Protocol

from spinfast.packing import packed_length
from spinfast.types import Group


class Steps(Protocol):
    """The groups of every optimizer step, asked for when it is their turn; a resumed run must get the same."""

    longest: int  # packed tokens of the longest group there can be, cut as small as the objective allows
    files: Sequence[str]  # what the stage keeps of them

    def __len__(self) -> int: ...

    def __getitem__(self, step: int) -> Sequence[Group]: ...

    def figures(self, step: int) -> dict[str, float]:
        """What a metrics line says of a step's groups themselves."""


class Epochs:
    """Steps over a list of groups: a seeded shuffle per epoch, cut into steps."""

    files = ()

    def __init__(self, groups: Sequence[Group], per_step: int, epochs: int, seed: int):
        self.groups = groups
        self.longest = max(map(packed_length, groups), default=0)
        self.rows: list[list[int]] = []  # positions in `groups`, of every step
        for epoch in range(epochs):
            order = list(range(len(groups)))
            random.Random(seed * 1_000_003 + epoch).shuffle(order)
            self.rows += [order[i : i + per_step] for i in range(0, len(groups), per_step)]
        self.first = self.rows[: len(self.rows) // epochs]  # the steps in which every group occurs once

    def of(self, groups: Sequence[Group]) -> Epochs:
        """The same steps over other groups, one for each."""
        steps = copy(self)
        steps.groups = groups
        return steps

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, step: int) -> list[Group]:
        return [self.groups[row] for row in self.rows[step]]

    def figures(self, step: int) -> dict[str, float]:
        return {}
