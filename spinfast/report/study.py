"""What a report says about its runs, before any HTML: plots, table cells, verdicts.

Colour slots: on plots of several runs a run's slot is its position; on plots of one run's answers real is 0 and
generated 1; on time bars a phase has its own.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from spinfast.evaluate.references import ACCURACY, STRICT
from spinfast.evaluate.statistics import Estimate, compare, over_seeds
from spinfast.evaluate.stopping import kept, telling
from spinfast.names import label, rows_named, source_name
from spinfast.report import training
from spinfast.report.bounds import REWARD, bounds
from spinfast.report.plots import Plot, Series
from spinfast.report.read import Run, seeds_apart

HELDOUT = {
    "heldout/reward": ("Reward of greedy answers", None),
    "heldout/accuracy_strict": ("Accuracy, strict", None),
    "heldout/accuracy_flexible": ("Accuracy, flexible", None),
    "heldout/preference_accuracy": ("Preference accuracy", (0.5, "chance")),
    "heldout/chosen_likelier": ("Chosen answers likelier per token", (0.5, "chance")),
    "heldout/pair_accuracy": ("Pair accuracy", (0.5, "chance")),
    "heldout/margin": ("Margin", (0.0, "")),
    "heldout/real_logp_vs_base": ("log p(real), change from the base", (0.0, "")),
    "heldout/generated_logp_vs_base": ("log p(generated), change from the base", (0.0, "")),
    "heldout/perplexity": ("Perplexity of the real answers", None),
    "fresh/auc_log_ratio": ("Fresh opponent: AUC of the log-ratio", (0.5, "game over")),
    "fresh/auc_length": ("Fresh opponent: AUC of length alone", (0.9, "shortcut")),
    "fresh/auc_eos": ("Fresh opponent: AUC of the end token alone", (0.9, "shortcut")),
    "heldout/kl_k1": ("KL to the base (k1, nats per answer)", (0.0, "")),
    "heldout/length": ("Tokens of a sampled answer", None),
    "heldout/eos_rate": ("Answers that end by themselves", None),
    "heldout/distinct_2": ("Distinct bigrams", None),
    "heldout/repeated_4grams": ("Repeated 4-grams", None),
}
PHASES = ("generate", "pair", "score", "train", "evaluate", "save")
OVER_SEEDS = (
    "heldout/accuracy_strict",
    "heldout/accuracy_flexible",
    "heldout/real_logp_per_token",
    "heldout/perplexity",
)
MEASURES = {  # what two runs are compared by -> (run, stage) -> value by held-out item
    "accuracy strict": lambda run, stage: run.scores(stage, STRICT),
    "log p(real)": Run.real_logps,
}


# Plots -----------------------------------------------------------------------------------------------------------


def plots(runs: Sequence[Run]) -> list[Plot]:
    """Every plot that has data, in the page's order."""
    made = training.plots(runs)
    made += [_heldout(runs, metric, *look) for metric, look in HELDOUT.items()]
    made += [plot for run in runs for plot in _log_ratios(run, len(runs) > 1)]
    made += [_memory(runs), *(_seconds(run, len(runs) > 1) for run in runs)]
    return [plot for plot in made if plot.series]


def _heldout(runs: Sequence[Run], metric: str, title: str, level) -> Plot:
    order: dict[str, None] = {}
    for run in runs:
        order |= {label(row["iteration"]): None for row in run.rows}
    if "SFT" in order:  # it comes second even if only a later run has it
        order = {"base": None, "SFT": None} | order
    place = {name: i for i, name in enumerate(order)}
    series = []
    for position, run in enumerate(runs):
        rows = [row for row in run.rows if metric in row["evaluation"]]
        estimates = [row["evaluation"][metric] for row in rows]
        low, high = zip(*(bounds(run, metric, e) for e in estimates), strict=True) if rows else ((), ())
        x = [float(place[label(row["iteration"])]) for row in rows]
        if rows:
            y = [e["value"] for e in estimates]
            series.append(Series(run.name, position, x, y, list(low), list(high)))
    ticks = tuple((float(i), _tick(name, runs)) for name, i in place.items())
    name = metric.replace("/", "-")
    return Plot(name, title, heading(runs), metric, "points", series, x_ticks=ticks, level=level, group="heldout")


def heading(runs: Sequence[Run]) -> str:
    """What the rows of these runs are called together."""
    return rows_named(row["iteration"] for run in runs for row in run.rows)


def _tick(name: str, runs: Sequence[Run]) -> str:
    """A row's label under an axis that is called heading(runs)."""
    return name.replace("iteration ", "" if heading(runs) == "iteration" else "iter. ")


def _log_ratios(run: Run, several: bool) -> list[Plot]:
    """For each round the log-ratio of policy to opponent, of the real answers and of the opponent's.

    Iterations share their bins; SFT, which moves much further, has its own.
    """
    changes = {
        stage: [arrays[f"policy.{side}"] - arrays[f"opponent.{side}"] for side in ("real", "rival")]
        for stage, arrays in run.logps.items()
        if stage != "base" and "opponent.real" in arrays
    }
    made = []
    for stage, sides in changes.items():
        alike = [members for other, members in changes.items() if run.method(other) == run.method(stage)]
        edges = _bins(np.concatenate([side for members in alike for side in members]), len(sides[0]))
        counts = [np.histogram(np.clip(side, edges[0], edges[-1]), edges)[0] for side in sides]
        series = [
            Series(name, slot, edges.tolist(), count.tolist())
            for slot, (name, count) in enumerate(zip(("real", "generated"), counts, strict=True))
        ]
        name, title = f"log-ratio-{stage}", run.label(stage)
        if several:
            name, title = f"{run.name}-{name}", f"{run.name}: {title}"
        name = name.replace("/", "-")  # names a file
        made.append(
            Plot(name, title, "log p(policy) − log p(opponent), nats", "answers", "steps", series, group="ratios")
        )
    return made


def _bins(values: np.ndarray, pairs: int) -> np.ndarray:
    """Edges over all but the outer 1 % of the values, more of them for more pairs."""
    low, high = np.quantile(values, [0.005, 0.995])
    if low == high:  # nothing moved
        low, high = low - 1.0, high + 1.0
    return np.linspace(low, high, int(np.clip(2 * pairs**0.5, 8, 24)) + 1)


def _memory(runs: Sequence[Run]) -> Plot:
    measure = (
        "memory/allocated_mib"
        if any("memory/allocated_mib" in row for r in runs for row in r.system)
        else "memory/rss_mib"
    )
    series, marks = [], {}
    for position, run in enumerate(runs):
        rows = [row for row in run.system if measure in row and "time" in row]
        if not rows:
            continue
        start = rows[0]["time"]
        x = [(row["time"] - start) / 60 for row in rows]
        for minute, row in zip(x, rows, strict=True):
            if (name := run.label(row["stage"])) not in marks.values():
                marks[minute] = name
        series.append(Series(run.name, position, x, [row[measure] for row in rows]))
    shown = tuple(marks.items()) if len(runs) == 1 else ()
    what = "GPU memory (allocator's peak)" if measure == "memory/allocated_mib" else "Resident memory"
    return Plot("memory", what, "minutes", "MiB", "line", series, marks=shown, group="machine")


def _seconds(run: Run, several: bool) -> Plot:
    x = [float(i) for i in range(len(run.rows))]
    series = [
        Series(phase, slot, x, [row["seconds"].get(phase, 0.0) / 60 for row in run.rows])
        for slot, phase in enumerate(_phases({phase for row in run.rows for phase in row["seconds"]}))
    ]
    ticks = tuple((float(i), _tick(label(row["iteration"]), [run])) for i, row in enumerate(run.rows))
    name, title = ("time", "Time per phase")
    if several:
        name, title = f"{run.name.replace('/', '-')}-time", f"{run.name}: time per phase"
    return Plot(name, title, heading([run]), "minutes", "bars", series, x_ticks=ticks, group="machine")


def memory_table(run: Run) -> list[tuple[str, float, float | None]]:
    """(phase, highest measured MiB, predicted MiB) in the order of the phases."""
    peaks: dict[str, float] = {}
    for row in run.system:
        mib = row.get("memory/allocated_mib", row.get("memory/rss_mib"))
        if mib is not None:
            peaks[row["phase"]] = max(peaks.get(row["phase"], 0.0), mib)
    trained = [run.predicted_mib[name] for name in run.config["method"] if name in run.predicted_mib]
    predicted = run.predicted_mib | ({"train": max(trained)} if trained else {})
    return [(phase, peaks[phase], predicted.get(phase)) for phase in _phases(peaks)]


def _phases(found: Collection[str]) -> list[str]:
    """The known phases that occur, in their order, then any other."""
    return [*(phase for phase in PHASES if phase in found), *sorted(set(found) - set(PHASES))]


# Verdicts --------------------------------------------------------------------------------------------------------


Values = Mapping[Hashable, float]  # by held-out item


@dataclass(frozen=True)
class Change:
    """One result against another on the same items."""

    name: str
    against: str
    measure: str
    outcome: dict  # statistics.compare's
    before: list[float]  # by item that both have
    after: list[float]

    @property
    def figures(self) -> tuple[str, str, str]:
        """(difference with its unit, 95 % interval, p) as text."""
        factor, unit = (100, "points") if self.measure.startswith("accuracy") else (1, "nats per answer")
        if self.measure == "reward":
            unit = "per answer"
        difference, low, high = (factor * self.outcome[name] for name in ("difference", "low", "high"))
        p = self.outcome["p"]
        return f"{difference:+.1f} {unit}", f"{low:+.1f} to {high:+.1f}", f"= {p:.3g}" if p >= 1e-4 else "< 0.0001"

    def sentence(self) -> str:
        difference, interval, p = self.figures
        return (
            f"{self.name} against {self.against}, {self.measure}: {self.outcome['verdict']} ({difference}, "
            f"95 % interval {interval}, p {p}, {self.outcome['n']} items)"
        )


def change(name: str, after: Values, against: str, before: Values, measure: str) -> Change | None:
    """None where the two share no item."""
    shared = [item for item in before if item in after]
    if not shared:
        return None
    sides = [[side[item] for item in shared] for side in (before, after)]
    return Change(name, against, measure, compare(*sides), *sides)


def against_base(run: Run, row: dict, metric: str) -> Change | None:
    """A row's verdicts (STRICT or FLEXIBLE) against the base's."""
    stage, measure = row["stage"], ACCURACY[metric].removeprefix("heldout/").replace("_", " ")
    if stage == "base":
        return None
    return change(label(row["iteration"]), run.scores(stage, metric), "base", run.scores("base", metric), measure)


def deciding(run: Run) -> str:
    """The reading of accuracy that says something: strict, or flexible where no problem has a strict
    verdict or no stage a strict success."""
    found = {
        reading: [[row["evaluation"][metric]["value"]] for row in run.rows if metric in row["evaluation"]]
        for reading, metric in ACCURACY.items()
    }
    return telling(found) or STRICT


def judge(run: Run) -> str:
    """The metric that the best is chosen by (heldout.verdicts): held-out reward, or where all are 0 an accuracy."""
    rewards = [row["evaluation"].get(REWARD, {}).get("value") for row in run.rows]
    return REWARD if any(rewards) else ACCURACY[deciding(run)]


def best_row(run: Run) -> dict | None:
    """The row that does best, the earliest of equals; None where nothing was scored."""
    metric = judge(run)
    scored = [row for row in run.rows if metric in row["evaluation"]]
    if not scored:
        return None
    return scored[kept([[row["evaluation"][metric]["value"]] for row in scored])]


def reward_change(row: dict) -> str | None:
    """Of a row with rewards: the training reward at first and at last."""
    ends = [row["train"].get(end, {}).get("reward") for end in ("first", "last")]
    return " → ".join(f"{end['value']:.3f}" for end in ends) if all(ends) else None


CONTROLS = {  # what each control of controls.py tells its reader
    "sft": "further SFT on the same real answers, as many steps: would it have done as well?",
    "shuffled": "generated answers dealt to other prompts: does it matter what they answered?",
    "coin": "a coin says which answer counts as real: nothing can be learned, what moves is noise.",
}


def story(run: Run) -> list[str]:
    """The run in a few sentences; what a control is, in one."""
    if run.control:
        return [f"Control of {run.played.name}: {CONTROLS[run.control]}"]
    if not run.rows:
        return ["Nothing was evaluated yet."]
    last, c = label(run.rows[-1]["iteration"]), run.config
    seen = max((row["time"] for row in run.system if "time" in row), default=None)
    moment = f", as of {datetime.fromtimestamp(seen, UTC):%Y-%m-%d %H:%M} UTC" if seen else ""
    state = f"not finished, the last row is {last}'s{moment}"
    if run.finished:
        planned = c["spin"]["iterations"] if "spin" in c["method"] else 0
        early = sum(run.method(stage) == "spin" for stage in run.stages) < planned
        state = f"finished{', early, for want of a held-out gain' if early else ''}"
    sentences = [f"{c['model']['name']} played {source_name(c['data']['source'])}; the run is {state}."]
    for row in run.rows:
        if rewards := reward_change(row):
            n, steps = row["train"]["window"], row["train"]["steps"]
            ends = f"means of the first and the last {n} of {steps}" if n > 1 else f"at first and at last of {steps}"
            sentences.append(f"{label(row['iteration'])}: the training reward went {rewards}, {ends} steps.")
    top = best_row(run)
    if top is None:
        return [*sentences, "The held-out data has no reference results, so there is no accuracy to compare."]
    if len(run.rows) == 1:
        return [*sentences, "Nothing can be compared with it yet."]
    reading, metric = deciding(run), judge(run)
    kind, rewarded = ACCURACY[reading].rpartition("_")[2], metric == REWARD
    judged = "reward" if rewarded else f"{kind} accuracy"
    values = {row["evaluation"].get(metric, {}).get("value") for row in run.rows} - {None}
    if not rewarded and values in ({0.0}, {1.0}):
        share = "none" if values == {0.0} else "all"
        return [
            *sentences,
            f"Every stage answers {share} of the held-out problems correctly ({kind}), so accuracy can show neither "
            "gain nor loss; look at log p(real) and the transcripts, or change the problems.",
        ]
    value = top["evaluation"][metric]["value"]
    shown = f"{value:.3g}" if rewarded else f"{value:.1%}"
    if len(values) == 1:
        return [*sentences, f"All stages did equally well on held-out problems ({judged} {shown})."]
    if top["iteration"] == "base":
        return [*sentences, f"No stage did better than the base on held-out problems ({judged})."]
    sentences.append(f"The best {judged} on held-out problems is {label(top['iteration'])}'s, {shown}.")
    sides = run.rewards(top["stage"]), "base", run.rewards("base")
    verdict = change(label(top["iteration"]), *sides, "reward") if rewarded else against_base(run, top, reading)
    if verdict:
        sentences.append(verdict.sentence()[0].upper() + verdict.sentence()[1:] + ".")
        sentences.append("It was chosen as the best of several, which favours it; a fresh held-out set would not.")
    return sentences


def run_comparisons(runs: Sequence[Run]) -> list[Change]:
    """Each run's last row against its rival's last row, where they share held-out items.

    A control's rival is its own run, any other's the first.
    """
    played = [run for run in runs if run.rows]
    found = []
    for run in played[1:]:
        rival = next(
            (r for r in played if run.control and r.path.resolve() == run.path.resolve().parents[1]), played[0]
        )
        sides = [(f"{r.name} ({label(r.rows[-1]['iteration'])})", r, r.stages[-1]) for r in (run, rival)]
        for measure, read in MEASURES.items():
            (name, *_), (against, *_) = sides
            after, before = (read(side, stage) for _, side, stage in sides)
            found.append(change(name, after, against, before, measure))
    return [comparison for comparison in found if comparison]


def control_table(runs: Sequence[Run]) -> list[tuple[str, str, str, Estimate]]:
    """(control, iteration, metric, run minus control) over seeds, for configs that ran with several seeds."""
    groups = {
        (group[0].control, json.dumps(group[0].config | {"seed": None}, sort_keys=True)): {
            run.config["seed"]: run for run in group
        }
        for group in seeds_apart(runs)
    }
    table = []
    for (control, config), seeds in groups.items():
        played = groups.get((None, config), {})
        shared = sorted(seeds.keys() & played.keys())
        if control is None or len(shared) < 2:
            continue
        for metric in OVER_SEEDS:
            series = [(_by_label(played[seed], metric), _by_label(seeds[seed], metric)) for seed in shared]
            for name in series[0][0]:
                values = [run[name] - other[name] for run, other in series if name in run and name in other]
                if len(values) == len(shared) and name not in ("base", "SFT"):
                    table.append((control, name, metric, over_seeds(values)))
    return table


def _by_label(run: Run, metric: str) -> dict[str, float]:
    rows = ((label(row["iteration"]), row["evaluation"].get(metric)) for row in run.rows)
    return {name: estimate["value"] for name, estimate in rows if estimate}


def seed_table(runs: Sequence[Run]) -> list[tuple[str, str, str, Estimate]]:
    """(runs, iteration, metric, change from the base over seeds) of configs that ran with several seeds."""
    table = []
    for group in seeds_apart(runs):
        if len(group) < 2:
            continue
        names = " + ".join(run.name for run in group)
        for metric in OVER_SEEDS:
            series = [_by_label(run, metric) for run in group]
            for name in series[0]:
                values = [values[name] - values["base"] for values in series if name in values and "base" in values]
                if len(values) == len(group) and name != "base":
                    table.append((names, name, metric, over_seeds(values)))
    return table
