"""`spinfast study STUDY.yaml` and `spinfast rate TEXT ...`: plan, play what is not there yet, compare, write."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from spinfast import spread
from spinfast.errors import UserError
from spinfast.interrupt import catching_signals
from spinfast.store import files
from spinfast.studies.design import FEWEST, Cell, Design, cells_of, find_base, load_design
from spinfast.terminal import Parser

GUESS = (0.02, 0.15, 0.15)  # standard deviations of seeds, items, rest of `worked`, nats per token, before any is known
PRESET = {"cpu": "rate-texts-cpu.yaml", "cuda": "rate-texts-t4.yaml"}


def _options(parser: Parser) -> None:
    parser.add_argument("--dir", type=Path, help="where its files go (default: studies/NAME)")
    parser.add_argument(
        "--plan", action="store_true", help="say what would be played and what it could find, then stop"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help=f"seeds of each setting (default: the file's; {FEWEST})")


def study(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="spinfast study",
        description="A grid of short runs on one loaded base, compared with statistics. The same command goes on where "
        "it stopped; several processes may play one study.",
    )
    parser.add_argument("study", type=Path, metavar="STUDY.yaml")
    _options(parser)
    arguments = parser.parse(argv)
    design = _with_seeds(load_design(arguments.study), arguments.seeds)
    directory = arguments.dir or Path("studies") / arguments.study.stem
    return _run(arguments, directory, lambda renderer: (design, [], []), design, arguments.study.parent)


def parse_rate(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="spinfast rate",
        description="What training on each text does to reasoning, more than training on its own words in random order "
        "does. Texts: files (.txt .md .html .epub .pdf .jsonl ...), folders, package:NAME/FILE, sums:right, sums:wrong",
    )
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--preset", type=Path, help="base, items, seeds (default: configs/studies/rate-texts-*.yaml)")
    parser.add_argument("--tokens", type=int, default=8192, help="trained tokens of each text and seed (8192)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a training row (256)")
    parser.add_argument("--sentences", action="store_true", help="each text with its sentences shuffled, too")
    _options(parser)
    return parser.parse(argv)


def rate(argv: Sequence[str]) -> int:
    arguments = parse_rate(argv)
    for name, least in (("tokens", 1), ("length", 8)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name}: expected at least {least}, got {getattr(arguments, name)}")
    from spinfast.studies.rate import text_study

    preset = arguments.preset or _preset()
    design = _with_seeds(load_design(preset), arguments.seeds)
    directory = arguments.dir or Path("studies") / "rate"

    def build(renderer):
        made, rated, texts = text_study(
            design, arguments.texts, directory, renderer, arguments.tokens, arguments.length, arguments.sentences
        )
        tree = made.model_dump(mode="json", exclude_defaults=True)
        tree["base"] = str(find_base(made.base, preset.parent).absolute())
        files.write_text(directory / "study.yaml", yaml.safe_dump(tree, sort_keys=False))
        return made, rated, texts

    return _run(arguments, directory, build, design, preset.parent)


def _run(arguments: argparse.Namespace, directory: Path, build: Callable, design: Design, beside: Path) -> int:
    from spinfast.progress import Display, heard, silent
    from spinfast.run import quiet_libraries, spare_imports
    from spinfast.session import check_limits, look
    from spinfast.studies import rate
    from spinfast.studies.play import asked, one_at_a_time, play
    from spinfast.studies.results import Results
    from spinfast.studies.together import check

    spare_imports()
    quiet_libraries()
    ranks = spread.launched()[1]
    rank = spread.alone()  # of torchrun each takes cells as any other process would; the first one waits and tells
    display = Display(silent() if rank else None)
    if len(design.seeds) < FEWEST and not rank:
        print(f"spinfast: {len(design.seeds)} seeds; {FEWEST} are the least that is advised", file=sys.stderr)
    directory.mkdir(parents=True, exist_ok=True)
    with catching_signals():
        first = cells_of(design, beside)[0]
        with heard(display.console):
            machine = look(first.config)
            with one_at_a_time(directory):
                design, rated, texts = build(machine.renderer)
            cells = cells_of(design, beside)
            for cell in cells:
                check_limits(cell.config, machine.model, machine.shape)
            if design.together:
                check(design, cells)
            probes = asked(design, first.config, machine) if arguments.plan or texts else []
            notes = [*rate.told_twice(texts, design), *(_shared(*each) for each in rate.contaminated(texts, probes))]
        if arguments.plan and rank:
            return 0
        if arguments.plan:
            return _plan(display.console, design, cells, probes, notes)
        started, results = time.monotonic(), Results(design, cells, directory, rated, notes)
        with display.logged(directory / "log.txt"):
            with display.phase("cells", len(cells), "cells") as tick:
                for cell, known in play(design, cells, directory, display, waits=rank == 0 and ranks > 1):
                    tick.advance(metrics=cell.name)
                    if rank == 0:
                        results.take(cell, known, display.console)
            if rank == 0 and design.together and results.found:
                results.together(probes or asked(design, first.config, machine), machine, display)
    if rank:
        return 0
    results.tell(display.console)
    print(f"{directory}/index.html, scores.csv, runs.jsonl; {time.monotonic() - started:.0f} s")
    return 0


def _plan(console, design: Design, cells: Sequence[Cell], probes: Sequence, notes: Sequence[str]) -> int:
    """What would be played, and what it could find, before anything is."""
    from spinfast.dry_run import dry_run
    from spinfast.studies.outcomes import LEARNING, Problems
    from spinfast.studies.statistics import Variances, detectable

    planned = dry_run(cells[0].config)
    settings = list(dict.fromkeys(cell.setting for cell in cells))
    controls = {*design.controls.values()}
    ranked = sum(not {*cell.levels} & controls for cell in cells if cell.seed == design.seeds[0])
    hours = len(cells) * _seconds(cells[0], probes, planned.step.microbatch_tokens, design.curve) / 3600
    lines = [
        f"{len(cells)} cells: {len(settings)} settings, {len(design.seeds)} seeds; about {hours:.1f} hours, if all "
        "are as the first, whose memory stands above (the planner's figures; answers that are written come on top)"
    ]
    name, _, reading = (design.score or f"{probes[0].name}/{LEARNING[0]}").rpartition("/")
    if name not in design.learning:
        raise UserError(f"study: score: expected SET/READING with a set of {', '.join(design.learning)}, got {name!r}")
    ranks = next(probe for probe in probes if probe.name == name)
    if reading != LEARNING[0] or not isinstance(ranks, Problems):
        lines.append(
            "what it could find is not told: that is known of worked answers' likelihood only, not of this score"
        )
    elif len(design.seeds) > 1:
        items = ranks.items
        smallest = detectable(Variances(*(each**2 for each in GUESS)), len(design.seeds), items, ranked)
        lines.append(
            f"found in 80 of 100 studies: an effect of {smallest:.3f} nats a token ({ranked} compared, {items} items; "
            f"spreads of {GUESS[0]} between seeds, {GUESS[1]} between items, {GUESS[2]} in each are assumed)"
        )
    for line in (*lines, *notes):
        console.print(line, markup=False, highlight=False)
    return 0


def _seconds(cell: Cell, probes: Sequence, tokens: int, curve: int) -> float:
    """To train a cell and to score what is asked of it, by the planner's roofline; scoring is a third of a step."""
    from spinfast.data import load_data
    from spinfast.memory.planner import seconds
    from spinfast.methods.run import loads
    from spinfast.session import look

    machine = look(cell.config, plan_only=True)
    work = loads(cell.config, load_data(cell.config, machine.renderer)["data"].examples)

    def reckoned(groups) -> float:
        return seconds(machine.device, machine.shape, groups, tokens, 0, False)

    trained = sum(sum(load.rounds) * reckoned(load.groups) for load in work)
    return trained + (1 + curve) * sum(reckoned(probe.groups) for probe in probes if probe.groups) / 3


def _shared(text: str, items: str, of) -> str:
    """What is told of a text that holds evaluation items."""
    return (
        f"{text} shares runs of {of.n} words with {of.share:.0%} of the items of {items}; {of.whole} are in it whole, "
        f"of item {of.worst + 1} {of.worst_share:.0%}"
    )


def _with_seeds(design: Design, seeds: int | None) -> Design:
    if seeds is None:
        return design
    if seeds < 1:
        raise UserError(f"--seeds: expected at least 1, got {seeds}")
    return design.model_copy(update={"seeds": tuple(range(seeds))})


def _preset() -> Path:
    import torch

    from spinfast.run import CONFIGS

    return CONFIGS / "studies" / PRESET["cuda" if torch.cuda.is_available() else "cpu"]
