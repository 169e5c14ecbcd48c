"""Controls: the rounds of a finished run again, same pairs and as many steps, without what self-play claims to bring.

    sft        the real answers alone, by maximum likelihood: would further SFT have done as well?
    shuffled   the generated answers dealt to other prompts: does it matter what they answered?
    coin       real and generated swapped by a fair coin: nothing is there to be learned, what moves is noise

Each is a run directory of its own, RUN/controls/NAME, which `spinfast report RUN` shows beside the run.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from spinfast import spread
from spinfast.config import Config, at
from spinfast.data.pairs import read_pairs, write_pairs
from spinfast.errors import UserError
from spinfast.fit import fit
from spinfast.methods import METHODS
from spinfast.methods.phases import conclude, epochs
from spinfast.methods.run import Run, begin
from spinfast.methods.spin import game, train_policy
from spinfast.objectives import Nll
from spinfast.store import files
from spinfast.store.record import Stage, open_directory
from spinfast.types import Group, Pair

Deal = Callable[[Sequence[Pair], int], list[Pair]]


def check(config: Config) -> None:
    """Raises UserError if there would be nothing to play."""
    if "spin" not in config.method:
        raise UserError(f"--controls: they are of self-play, method is [{', '.join(config.method)}]; leave it out")


def play_controls(run: Run) -> Iterator[tuple[str, dict]]:
    """Play every control of the run, yielding (its name, row of its results.json)."""
    for name in CONTROLS:
        with open_directory(run.directory.path / "controls" / name, run.config) as directory:
            files.write_text(directory.path / "environment.json", (run.directory.path / "environment.json").read_text())
            control = begin(run.session, directory, run.display, run.examples, run.heldout, run.rewards)
            for row in play_control(control, run.played, name):
                yield name, row


def play_control(run: Run, played: Sequence[Stage], name: str) -> Iterator[dict]:
    """One control of a run whose stages were `played`."""
    last, apart = None, False  # apart: from here on it trains from another adapter than the run did
    for stage in played:
        if apart and stage.method != "spin":
            if stage.method != last.method:
                yield from METHODS[stage.method].play(run, last)
                last = run.played[-1]
            continue
        if stage.method != "spin":
            last = borrow(run, stage, last)
            yield conclude(run, last, run.played[-1] if run.played else last, run.policy.adapter())
            continue
        same = run.stage(stage.name, last, "spin", stage.number)
        start = run.become(last)
        pairs = deal(run, same, stage, CONTROLS[name])
        imitate(run, same, pairs) if name == "sft" else train_policy(run, same, pairs)
        yield conclude(run, same, last, start, game(run.config, stage.number), look=bool(stage.read("eval.json")))
        last, apart = same, True


def borrow(run: Run, stage: Stage, last: Stage | None) -> Stage:
    """A stage that control and run have in common, copied whole."""
    target = run.directory.path / stage.name

    def copy() -> None:
        if not target.exists():
            beside = target.with_name(f".{stage.name}.partial")
            shutil.rmtree(beside, ignore_errors=True)
            shutil.copytree(stage.directory, beside)
            beside.rename(target)

    spread.told(f"{stage.name}, borrowed", copy)
    return run.stage(stage.name, last, stage.method, stage.number)


def deal(run: Run, stage: Stage, source: Stage, dealt: Deal) -> list[Pair]:
    """The run's pairs of this round, changed as the control asks."""
    path = stage.path("pairs.parquet")
    if not stage.finished("pair"):
        with stage.phase("pair", path.name):
            pairs = dealt(read_pairs(source.path(path.name)), run.config.seed)
            with files.replacing(path) as partial:
                write_pairs(partial, pairs, run.examples, run.session.machine.renderer.text)
    return read_pairs(path)


def imitate(run: Run, stage: Stage, pairs: Sequence[Pair]) -> None:
    """SFT on the real answers of the round's pairs, with SPIN's learning rate and steps."""
    c, t = run.config.spin, stage.number
    groups = [Group(pair.prompt_ids, (pair.real_ids,)) for pair in pairs]
    fit(run, stage, epochs(run, groups, c, t + 1), Nll(), c, at(c.lr, t))


def shuffle(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """Every generated answer of an iteration goes to another prompt of it: one cycle through a seeded order."""
    dealt: dict[tuple[int, int], Pair] = {}
    for iteration, members in groupby(sorted(pairs, key=lambda p: (p.iteration, p.index)), key=lambda p: p.iteration):
        order = list(members)
        random.Random(f"{seed} shuffled {iteration}").shuffle(order)
        for pair, giver in zip(order, order[1:] + order[:1], strict=True):
            dealt[pair.iteration, pair.index] = replace(pair, generated_ids=giver.generated_ids)
    return [dealt[pair.iteration, pair.index] for pair in pairs]


def toss(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """A fair coin per pair says which answer counts as real; the same pair falls the same way in every round."""

    def heads(pair: Pair) -> bool:
        return random.Random(f"{seed} coin {pair.iteration} {pair.index}").random() < 0.5

    return [replace(p, real_ids=p.generated_ids, generated_ids=p.real_ids) if heads(p) else p for p in pairs]


def keep(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    return list(pairs)


CONTROLS: dict[str, Deal] = {"sft": keep, "shuffled": shuffle, "coin": toss}
