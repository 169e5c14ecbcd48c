"""`spinfast merge RECIPE.yaml | RUN | ADAPTER --out DIR`: one model of several, or of a base and what was trained."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from spinfast.errors import UserError
from spinfast.interrupt import catching_signals
from spinfast.terminal import Parser

log = logging.getLogger("spinfast")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="spinfast merge",
        description="Merge the models of a mergekit recipe, tensor by tensor; or adapters of one base, where the "
        "recipe's models are adapters; or a run's best adapter, of any kind, into its base.",
    )
    parser.add_argument("what", type=Path, metavar="RECIPE.yaml | RUN | ADAPTER")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where it goes; must not be there")
    parser.add_argument("--model", help="an adapter's base, where its own name for it does not lead there")
    parser.add_argument("--rank", type=int, help="of a merge of adapters: bring it down to this rank")
    parser.add_argument("--seed", type=int, help="of dare's random choice (default: 0)")
    return parser.parse(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Read, plan, write; UserError for what the user can mend."""
    arguments = parse(argv)
    what, rank = arguments.what, arguments.rank
    if rank is not None and rank < 1:
        raise UserError(f"--rank: expected a positive number, got {rank}")
    if arguments.model and not what.is_dir():
        raise UserError("--model: a recipe names its models itself; write base+adapter there")

    from spinfast.progress import heard, open_console
    from spinfast.weights import adapter_merge, merging
    from spinfast.weights.checkpoint import with_base
    from spinfast.weights.merge import METHODS
    from spinfast.weights.recipe import Recipe, read_recipe

    with catching_signals(), heard(open_console(sys.stderr)) as display:
        if what.is_dir():
            reference = with_base(what, arguments.model)
            recipe = Recipe(merge_method="passthrough", models=[{"model": reference}])
            tree = {"models": [{"model": str(reference)}], "merge_method": "passthrough"}
            text = yaml.safe_dump(tree, sort_keys=False)
        else:
            recipe = read_recipe(what)
            text = what.read_text(encoding="utf-8-sig")
        if arguments.seed is not None and not METHODS[recipe.merge_method].random:
            log.warning("--seed has no effect on %s, which draws nothing", recipe.merge_method)
        if adapter_merge.of_adapters(recipe):
            said = adapter_merge.merge(recipe, text, arguments.out, rank, display, arguments.seed or 0)
        elif rank is not None:
            raise UserError("--rank: only a merge of adapters has one; the recipe's models are none")
        else:
            said = merging.merge(recipe, text, arguments.out, display, arguments.seed or 0)
    print(f"{arguments.out}: {said}")
    return 0
