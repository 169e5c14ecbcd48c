"""What a reward function is about, as far as its name tells: metrics lines know no more of it."""

from __future__ import annotations

import re
from typing import Literal

Kind = Literal["form", "penalty", "result"]
PENALTY = re.compile(r"penal|repet|overlong|length", re.IGNORECASE)
FORM = re.compile(r"format|xml|think|(?<![a-z])(tags?|int(eger)?)(?![a-z])", re.IGNORECASE)


def kind(name: str) -> Kind:
    """penalty: its 0 is no fault; form: how an answer is written; result: what it says. `name` as reports have it."""
    function = name.rpartition(".")[2]
    return "penalty" if PENALTY.search(function) else "form" if FORM.search(function) else "result"
