"""What a run says at its end: results, what was gained and whether it is noise, answers before and after, what next.

Everything is read from the run directory, so it is the same for every method and for a run that was finished before.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from spinfast.evaluate import learning
from spinfast.evaluate.references import FLEXIBLE, STRICT
from spinfast.names import label, rows_named
from spinfast.progress import show
from spinfast.report import study
from spinfast.report.bounds import bounds
from spinfast.report.page import MAX_TRANSCRIPTS
from spinfast.report.read import Run

HEADLINES = {  # what the closing table may have, first things first: metric -> heading
    "heldout/reward": "held-out reward",
    "heldout/accuracy_strict": "accuracy strict",
    "heldout/accuracy_flexible": "accuracy flexible",
    "heldout/preference_accuracy": "preference accuracy",
    "heldout/pair_accuracy": "pair accuracy",
    "heldout/perplexity": "perplexity",
}
SHOWN = 2  # of them, so that the table fits 80 columns
ANSWERS = {  # of sampled ones, beside their rewards
    "completions/mean_length": "tokens of an answer",
    "completions/clipped_ratio": "share of answers cut",
    "groups/dead": "share of groups dead",
    "entropy": "entropy, nats per token",
    "kl": "KL, nats per token",
    "sampling/sampling_logp_difference/mean": "sampler and trainer apart",
}
LONGEST, LINES = 240, 6  # characters and lines of a text that is shown


def closing(run: Run, console: Console) -> None:
    """Print it all, whatever the console's width."""
    table(run.rows, console)
    for sentence in gains(run):
        console.print(sentence, markup=False)
    for transcript in transcripts(run):
        console.print()
        console.print(transcript)
    console.print()
    for what, command in what_next(run).items():
        console.print(f"# {what}", markup=False)
        console.print(command, markup=False, soft_wrap=True)  # stays whole, to be pasted


# The table -----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict], console: Console) -> None:
    """A line per stage, each value with its standard error; results.json and the report have all other figures."""
    metrics = [metric for metric in HEADLINES if any(metric in row["evaluation"] for row in rows)][:SHOWN]
    cells = [_cells(row, metrics) for row in rows]
    if any(any(row[1:]) for row in cells):
        name = rows_named(row["iteration"] for row in rows)
        headings = (name, "pairs", "loss first→last", *(HEADLINES[metric] for metric in metrics))
        show(console, _titled("held-out results", cells), headings, cells)
    for row in rows:
        if "window" in row["train"]:
            _sampled_answers(str(row["iteration"]), row["train"], console)


def _sampled_answers(name: str, train: dict, console: Console) -> None:
    """A table of what a stage's sampled answers were like at first and at last; `train` is learning.summary's."""
    functions = {f"rewards/{function}/mean": f"reward by {function}" for function in learning.functions(train)}
    ends, n = [train["first"], train["last"]], train["window"]
    lines = [
        (heading, *(_cell(end.get(metric)) for end in ends))
        for metric, heading in ({"reward": "reward"} | functions | ANSWERS).items()
        if any(metric in end for end in ends)
    ]
    title = _titled(f"{name}: sampled answers over {train['steps']} steps", lines)
    show(console, title, (f"mean over {n} steps" if n > 1 else "step", "first", "last"), lines)


def _titled(title: str, cells: Sequence[Sequence[str]]) -> str:
    return f"{title} (± one standard error)" if any("±" in cell for line in cells for cell in line) else title


def _cells(row: dict, metrics: Sequence[str]) -> list[str]:
    """A row of results.json. The loss of a stage with rewards says nothing, whatever it is."""
    train = row["train"]
    losses = f"{train['first_loss']:.3f}→{train['last_loss']:.3f}" if train and "window" not in train else ""
    values = [_cell(row["evaluation"].get(metric)) for metric in metrics]
    return [str(row["iteration"]), str(row["pairs"] or ""), losses, *values]


def _cell(estimate: dict | None) -> str:
    if estimate is None:
        return ""
    digits = 1 if abs(estimate["value"]) >= 10 else 3
    error = "" if estimate["stderr"] is None else f" ± {estimate['stderr']:.{digits}f}"
    return f"{estimate['value']:.{digits}f}{error}"


# What was gained -----------------------------------------------------------------------------------------------------

SAME = "no gain."
VERDICTS = {
    "better": "That is a gain, not noise.",
    "worse": "That is a loss, not noise.",
    "within noise": "That is within noise: no gain is shown.",
}


def gains(run: Run) -> list[str]:
    """Plain sentences: what the run gained over its base on the same held-out items, and whether that is noise."""
    if not run.config["heldout"]:
        return ["Nothing was held out (the config has no heldout), so this run cannot tell whether it helped."]
    best, row = study.best_row(run), shown_row(run)
    if row is None:
        return ["Nothing was trained, so there is nothing to compare."]
    said = [*_rewards(run, row), *_accuracies(run, row)] or _preferences(run, row) or _likelihoods(run, row)
    if not said:
        return ["Nothing held out was evaluated before and after, so this run cannot tell whether it helped."]
    if best and best["stage"] == "base":
        said = ["No stage did better than the base on held-out problems.", *said]
    elif best and len(run.rows) > 2 and not all(each.endswith(SAME) for each in said):
        said = [*said, "It is the best stage on these very problems, which flatters it a little."]
    return said


def shown_row(run: Run) -> dict | None:
    """The row that stands for the run beside the base: the best stage's, or the last's where that is the base."""
    best, last = study.best_row(run), run.rows[-1]
    row = last if best is None or best["stage"] == "base" else best
    return None if row["stage"] == "base" else row


def _accuracies(run: Run, row: dict) -> list[str]:
    readings = {"Strict accuracy": STRICT, "Flexible accuracy": FLEXIBLE}
    sides = {name: [run.scores(stage, r) for stage in ("base", row["stage"])] for name, r in readings.items()}
    return [said for name, both in sides.items() for said in _change(name, row, *both, percent=True)]


def _rewards(run: Run, row: dict) -> list[str]:
    """None where they say what accuracy says."""
    both = run.rewards("base"), run.rewards(row["stage"])
    if any(both == (run.scores("base", r), run.scores(row["stage"], r)) for r in (STRICT, FLEXIBLE)):
        return []
    return _change("The reward of greedy answers", row, *both)


def _likelihoods(run: Run, row: dict) -> list[str]:
    logps = (run.logps.get(stage, {}).get("policy.real", ()) for stage in ("base", row["stage"]))
    both = [dict(enumerate(map(float, values))) for values in logps]
    said = _change("The log-probability of the data's answers, in nats,", row, *both)
    without = said and run.transcripts.get("base")
    return [*(["No held-out row states a result, so there is no accuracy."] if without else ()), *said]


def _preferences(run: Run, row: dict) -> list[str]:
    """Beside a coin: the base prefers nothing to itself, and of single rows nothing is kept."""
    if (found := row["evaluation"].get("heldout/preference_accuracy")) is None:
        return []
    low, high = bounds(run, "heldout/preference_accuracy", found)
    verdict = "better than a coin, not noise" if low > 0.5 else "no better than a coin"
    return [
        f"Preference accuracy is {100 * found['value']:.1f} % on {found['n']} held-out rows "
        f"({label(row['iteration'])}), 95 % interval {100 * low:.1f} to {100 * high:.1f}. That is {verdict}."
    ]


def _change(name: str, row: dict, before: study.Values, after: study.Values, percent: bool = False) -> list[str]:
    """What became of one measure, on the items that both sides have; nothing where there are none."""
    changed = study.change(label(row["iteration"]), after, "base", before, name)
    if changed is None:
        return []
    outcome, scale, form, unit = changed.outcome, *((100, ".1f", " %") if percent else (1, ".3g", ""))
    first, last = (f"{scale * sum(side) / outcome['n']:{form}}" for side in (changed.before, changed.after))
    where = f"on {outcome['n']} held-out rows (base to {label(row['iteration'])})"
    if changed.before == changed.after:
        return [f"{name} stayed at {first}{unit} {where}: {SAME}"]
    difference, low, high = (f"{scale * outcome[key]:+{form}}" for key in ("difference", "low", "high"))
    p = "< 0.001" if outcome["p"] < 0.001 else f"= {outcome['p']:.2g}"
    return [
        f"{name} went from {first} to {last}{unit} {where}: {difference}, 95 % interval {low} to {high}, p {p}. "
        f"{VERDICTS[outcome['verdict']]}"
    ]


# Before and after ----------------------------------------------------------------------------------------------------


def transcripts(run: Run) -> Iterator[Table]:
    """Two held-out problems, each answered by the base and by the best: one that gained, one that did not."""
    if (row := shown_row(run)) is None:
        return
    before, after = ({line["index"]: line for line in run.transcripts.get(s, [])} for s in ("base", row["stage"]))
    reading = study.deciding(run)

    def gained(index: int) -> tuple[float, float]:
        was, is_now = (side[index]["scores"].get(reading, 0.0) for side in (before, after))
        return is_now - was, is_now

    shared = sorted((index for index in before if index in after), key=gained, reverse=True)
    for index in dict.fromkeys((*shared[:1], *shared[-1:])):
        problem = before[index]
        said = {"problem": problem["prompt"][-1]["content"], "expected": problem["reference"] or problem["real"]}
        for name, side in (("base", before), (label(row["iteration"]), after)):
            verdict, cut = side[index]["scores"].get(reading), side[index]["finish_reason"] == "length"
            notes = [*(["right" if verdict else "wrong"] if verdict is not None else ()), *(["cut"] if cut else ())]
            said[f"{name} ({', '.join(notes)})" if notes else name] = side[index]["text"]
        lines = Table.grid(padding=(0, 2))
        for name, text in said.items():
            lines.add_row(name, Text(_short(text), overflow="fold"))
        yield lines


def _short(text: str) -> str:
    """Its beginning, without what would move a terminal's cursor."""
    plain = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    lines = [line for line in plain.splitlines() if line.strip()]
    shown = "\n".join(lines[:LINES])[:LONGEST]
    return shown if shown == "\n".join(lines) else f"{shown} …"


# What next -----------------------------------------------------------------------------------------------------------


def what_next(run: Run) -> dict[str, str]:
    """What can be done now -> the command, to be pasted here."""
    here = shlex.quote(min(str(run.path), os.path.relpath(run.path), key=len))
    seen = f"curves, intervals and answers to up to {MAX_TRANSCRIPTS} problems, in one HTML file"
    return {
        seen: f"{program()} report {here}",
        "the best adapter on questions of your own": f"{program()} eval --adapter {here} --tasks mine.jsonl",
        "your own data, by a config of five lines (README.md)": f"{program()} run mine.yaml",
    }


def program() -> str:
    """How spinfast is called from here."""
    beside = Path(sys.executable).with_name("spinfast")
    if shutil.which("spinfast"):
        return "spinfast"
    return shlex.quote(os.path.relpath(beside)) if beside.exists() else "python -m spinfast.run"
