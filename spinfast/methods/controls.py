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
from contextlib import closing
from dataclasses import replace
from itertools import groupby

from spinfast.data.pairs import read_pairs, write_pairs
from spinfast.methods.spin import conclude, optimise, score_opponent, train_policy
from spinfast.objectives.sft import Sft
from spinfast.session import Game
from spinfast.store import files
from spinfast.store.record import RunDir, Stage
from spinfast.types import Group, Pair

Deal = Callable[[Sequence[Pair], int], list[Pair]]


def play_controls(game: Game) -> Iterator[tuple[str, dict]]:
    """Play every control of the run, yielding (its name, row of its results.json)."""
    for name in CONTROLS:
        with closing(RunDir(game.run.path / "controls" / name, game.config)) as run:
            shutil.copy(game.run.path / "environment.json", run.path)
            for row in play_control(replace(game, run=run), game.run, name):
                yield name, row


def play_control(game: Game, played: RunDir, name: str) -> Iterator[dict]:
    """One control of the run `played`, in game.run."""
    for label in ("base", "sft"):
        if (played.path / label).is_dir():
            previous = borrow(game, played, label)
            yield conclude(game, previous, label, previous, game.policy.adapter())
    for iteration, source in enumerate(sorted(played.path.glob("iter_*"))):
        stage = game.run.stage(source.name)
        opponent = game.become_opponent(previous)
        deal(game, stage, played.stage(source.name), CONTROLS[name])
        if name == "sft":
            imitate(game, stage, iteration)
        else:
            score_opponent(game, stage, iteration)
            train_policy(game, stage, iteration)
        yield conclude(game, stage, iteration, previous, opponent)
        previous = stage


def borrow(game: Game, played: RunDir, label: str) -> Stage:
    """A stage that control and run have in common, copied whole."""
    target = game.run.path / label
    if not target.exists():
        beside = target.with_name(f".{label}.partial")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(played.path / label, beside)
        beside.rename(target)
    return game.run.stage(label)


def deal(game: Game, stage: Stage, source: Stage, dealt: Deal) -> None:
    """The run's pairs of this round, changed as the control asks."""
    if stage.finished("pair"):
        return
    with stage.phase("pair", "pairs.parquet"):
        pairs = dealt(read_pairs(source.path("pairs.parquet")), game.config.seed)
        with files.replacing(stage.path("pairs.parquet")) as path:
            write_pairs(path, pairs, game.examples, game.renderer.text)


def imitate(game: Game, stage: Stage, iteration: int) -> None:
    """SFT on the real answers of the round's pairs, with SPIN's learning rate and steps."""
    if not stage.finished("train"):
        pairs = read_pairs(stage.path("pairs.parquet"))
        groups = [Group(pair.prompt_ids, (pair.real_ids,)) for pair in pairs]
        identity = {"pairs": files.sha256(stage.path("pairs.parquet"))}
        optimise(game, stage, groups, Sft(), game.spin_plan(iteration), identity)


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
