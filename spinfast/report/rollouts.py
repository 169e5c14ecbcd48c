"""Some of a run's rollouts as HTML: a prompt, and the answers of its group side by side with what they earned.

It is there to be read without a script; page.js adds the search and hides what was not asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from spinfast.report.plots import number
from spinfast.report.read import Run
from spinfast.store.rollouts import by_group

MAX_ROLLOUTS, MAX_GROUPS, MAX_ANSWERS = 12, 8, 16  # of all runs together; of a rollout; of a group
MAX_TEXT = 2000  # characters of a text
SHOWN = ("group", "sample", "index", "prompt", "completion", "finish_reason", "reward", "advantage", "active", "extra")


@dataclass(frozen=True)
class Shown:
    """What is shown of one rollout: groups of rows as store/rollouts.py has them, without what is per token."""

    title: str
    groups: list[list[dict]]
    functions: list[str]
    answers: int  # all of the file
    prompts: int
    dead: int


def section(runs: Sequence[Run]) -> str:
    """The page's section; nothing where no run has rollouts."""
    if not any(run.rollouts for run in runs):
        return ""
    there = sum(len(paths) for run in runs for paths in run.rollouts.values())
    most = max(2, MAX_ROLLOUTS // sum(bool(run.rollouts) for run in runs))
    shown = [each for run in runs for each in chosen(run, most, len(runs) > 1)]
    options = "".join(f'<option value="{i}">{escape(each.title)}</option>' for i, each in enumerate(shown))
    parts = [_rollout(each, i, opened=i == len(shown) - 1) for i, each in enumerate(shown)]
    return f"""<section id="rollouts"><h2>Rollouts</h2>
<p class="soft">Answers that were sampled for training, those to one prompt side by side. The advantage is what training
weighs an answer by: above 0 it becomes likelier, below 0 less likely. {len(shown)} of {there} rollouts are shown, the
first, the newest and some between; of each at most {MAX_GROUPS} groups, of a group {MAX_ANSWERS} answers, of a text
{MAX_TEXT:,} characters. All are in the run's rollouts/*.parquet.</p>
<div class="controls" id="rollout-controls" hidden>
<input type="search" id="rollout-search" placeholder="search" aria-label="search rollouts">
<select id="rollout-step" aria-label="rollout"><option value="">all steps</option>{options}</select>
<select id="rollout-kind" aria-label="groups"><option value="">all groups</option>
<option value="teaches">groups that teach</option><option value="dead">dead groups</option>
<option value="cut">with a cut answer</option></select><span id="rollout-count" class="soft"></span></div>
{"".join(parts)}</section>"""


def chosen(run: Run, most: int, several: bool) -> list[Shown]:
    """At most so many of the run's rollouts, evenly spaced, the first and the newest among them."""
    found = [(stage, path) for stage, paths in run.rollouts.items() for path in paths]
    places = np.unique(np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int))
    return [read(run, *found[place], several) for place in places]


def read(run: Run, stage: str, path: Path, several: bool) -> Shown:
    schema = pq.read_schema(path)
    functions = [name for name in schema.names if name.startswith("rewards/")]
    rows = pq.read_table(path, columns=[name for name in schema.names if name in (*SHOWN, *functions)]).to_pylist()
    groups = by_group(rows)
    dead = sum(map(_dead, groups))
    return Shown(_title(run, stage, path, several), groups[:MAX_GROUPS], functions, len(rows), len(groups), dead)


def _title(run: Run, stage: str, path: Path, several: bool) -> str:
    """Which steps it fed."""
    c = run.config["grpo"]
    size = c["steps_per_generation"] * c["num_iterations"]
    first = int(path.stem) * size + 1
    steps = f"step {first}" if size == 1 else f"steps {first} to {first + size - 1}"
    return f"{run.name}, {steps}" if several else steps if len(run.rollouts) == 1 else f"{run.label(stage)}, {steps}"


def _dead(group: Sequence[dict]) -> bool:
    return not any(row["advantage"] for row in group)


def _rollout(each: Shown, place: int, opened: bool) -> str:
    rewards = [row["reward"] for group in each.groups for row in group if row["reward"] is not None]
    mean = f", mean reward of those shown {number(sum(rewards) / len(rewards))}" if rewards else ""
    less = f", {len(each.groups)} shown" if len(each.groups) < each.prompts else ""
    return (
        f'<details class="rollout" data-rollout="{place}"{" open" * opened}><summary>{escape(each.title)}: '
        f"{each.answers} answers to {each.prompts} prompts{less}, {each.dead} dead{mean}</summary>"
        f"{''.join(_group(group, each.functions) for group in each.groups)}</details>"
    )


def _group(group: Sequence[dict], functions: Sequence[str]) -> str:
    kinds = ["dead" if _dead(group) else "teaches", *["cut"] * any(map(_cut, group))]
    answers = "".join(_answer(row, functions) for row in group[:MAX_ANSWERS])
    more = len(group) - MAX_ANSWERS
    left_out = f"<p class='soft'>{more} more answers are not shown.</p>" if more > 0 else ""
    return (
        f'<article data-kinds="{" ".join(kinds)}"><h4>prompt {group[0]["index"]}{", dead group" * _dead(group)}</h4>'
        f'{_text(group[0]["prompt"])}<div class="answers">{answers}</div>{left_out}</article>'
    )


def _cut(row: dict) -> bool:
    return row["finish_reason"] == "length"


def _answer(row: dict, functions: Sequence[str]) -> str:
    advantage = row["advantage"] or 0.0
    look = "better" if advantage > 0 else "worse" if advantage < 0 else "noise"
    each = [f"{name.removeprefix('rewards/')} {_value(row[name])}" for name in functions]
    notes = [*each, *["cut"] * _cut(row), *["not trained on"] * (row["active"] == 0), *_extra(row["extra"])]
    return (
        f"<div><h4>reward {_value(row['reward'])} <span class='{look}'>advantage {advantage:+.2f}</span></h4>"
        f"<small>{escape(' · '.join(notes))}</small>{_text(row['completion'])}</div>"
    )


def _extra(noted: str | None) -> list[str]:
    """What reward functions noted by log_extra, as JSON."""
    return [_short(noted, 200)] if noted and noted not in ("{}", "null") else []


def _value(reward: float | None) -> str:
    """A function that does not apply gives none."""
    return "–" if reward is None else number(reward)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


def _text(text: str) -> str:
    return f'<div class="text">{escape(_short(text, MAX_TEXT))}</div>'
