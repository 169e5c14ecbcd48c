"""The report as one HTML file: no request leaves it, data stands in it as JSON, its script makes no HTML from data."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files as package_files

import yaml

from spinfast.evaluate.advice import warnings
from spinfast.names import amount, label, rewards_named, source_name
from spinfast.report import plots as plotting
from spinfast.report import rollouts, study
from spinfast.report.bounds import bounds
from spinfast.report.plots import Plot
from spinfast.report.read import Run

MAX_TRANSCRIPTS = 300  # problems shown per run, so that the file stays small
COLUMNS = {  # metric -> (heading, digits, factor)
    "heldout/reward": ("held-out reward", 3, 1),
    "heldout/accuracy_strict": ("accuracy strict, %", 1, 100),
    "heldout/accuracy_flexible": ("accuracy flexible, %", 1, 100),
    "heldout/preference_accuracy": ("preference accuracy", 2, 1),
    "heldout/chosen_likelier": ("chosen likelier", 2, 1),
    "heldout/perplexity": ("perplexity", 3, 1),
    "heldout/pair_accuracy": ("pair accuracy", 2, 1),
    "heldout/margin": ("margin", 3, 1),
    "heldout/chosen_logp_change": ("Δ log p(chosen)", 2, 1),
    "heldout/rejected_logp_change": ("Δ log p(rejected)", 2, 1),
    "heldout/real_logp_vs_base": ("Δ log p(real)", 2, 1),
    "heldout/generated_logp_vs_base": ("Δ log p(generated)", 2, 1),
    "fresh/auc_log_ratio": ("fresh AUC", 2, 1),
    "fresh/auc_length": ("AUC length", 2, 1),
    "heldout/kl_k1": ("KL to base", 2, 1),
    "heldout/length": ("tokens", 0, 1),
    "heldout/eos_rate": ("ended, %", 0, 100),
}
SECTIONS = {
    "rewards": (
        "Rewards and answers",
        "Of the answers that were sampled for training, step by step. Lines are running means over a twentieth of the "
        "steps (at least 5), bands are ± 2 standard errors of these means; of fewer than 20 steps each is drawn. Every "
        "step is in metrics.jsonl. Points are "
        "looks at held-out problems, greedy answers with 95 % intervals.",
    ),
    "training": (
        "Training",
        "What the optimizer saw in the run's last method. Where the stage starts from its reference the first loss is "
        "that of margin 0 (ln 2 if it is logistic), or something is wrong. GRPO's loss hovers about 0, whatever is "
        "learnt: its reward tells.",
    ),
    "heldout": ("Held-out problems", "Never trained on; whiskers are 95 % intervals."),
    "ratios": (
        "Log-ratios of held-out pairs",
        "How far a round moved each answer: real against the opponent's. The game is won as the two come apart; "
        "it is won the wrong way when both move left. The outer 1 % is drawn at the edges.",
    ),
    "machine": ("Time and memory", "As measured while the run went on."),
}

PLAYED = {  # method -> what it is told beside its optimizer
    "spin": lambda c: f"{c['iterations']} iterations, beta = {c['beta']}, {c['loss']} loss",
    "dpo": lambda c: f"loss {' + '.join(f'{w:g} {name}' for name, w in c['loss'].items())}, beta = {c['beta']}",
    "grpo": lambda c: (
        f"rewards {rewards_named(c)}, {c['samples']} answers to each prompt, {c['loss']} loss, "
        f"{c['scale_rewards']} scaling, beta = {c['beta']}"
    ),
}
VERDICTS = {"better": ("better", "▲"), "worse": ("worse", "▼"), "within noise": ("noise", "≈")}  # CSS class, sign
NAMED = 3  # runs that the title names; of more it gives the number


def page(runs: Sequence[Run], refresh: int | None = None) -> str:
    """The whole document. `refresh` makes an open page load itself again every so many seconds."""
    made = study.plots(runs)
    title = f"spinfast: {', '.join(run.name for run in runs) if len(runs) <= NAMED else f'{len(runs)} runs'}"
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    groups = {key: [plot for plot in made if plot.group == key] for key in SECTIONS}
    contents = {"story": "Story", "stages": "Stages"}
    contents |= {key: SECTIONS[key][0] for key, members in groups.items() if members}
    sampled = rollouts.section(runs)
    contents |= {"rollouts": "Rollouts"} if sampled else {}
    contents |= {"transcripts": "Transcripts", "setup": "Setup"}
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name in contents.items())
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<nav>{links}</nav>",
        _story(runs),
        _stages(runs),
        *(_plots(key, members, runs) for key, members in groups.items() if members),
        sampled,
        _transcripts(runs),
        _setup(runs),
    ]
    after = [
        _data("plot-data", {plot.name: _hover(plot) for plot in made}),
        _data("transcript-data", [_problems(run) for run in runs]),
        f"<script>{_resource('page.js')}</script>",
    ]
    return document(title, body, again, after)


def document(title: str, body: Sequence[str], head: str = "", after: Sequence[str] = ()) -> str:
    """A page that needs no other file; `head` and `after` are elements beside its body's."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{head}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_resource("page.css")}</style></head>'
        f"<body><main>{''.join(body)}</main>{''.join(after)}</body></html>"
    )


def _resource(name: str) -> str:
    return (package_files("spinfast.report") / name).read_text(encoding="utf-8")


def _data(name: str, value) -> str:
    """JSON that cannot end its own script element; non-finite numbers become null."""
    text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _story(runs: Sequence[Run]) -> str:
    parts = ['<section id="story"><h2>Story</h2>']
    for run in runs:
        heading = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 and not run.control else ""
        parts.append(heading + "".join(f"<p>{escape(sentence)}</p>" for sentence in study.story(run)))
        parts += [f'<p class="warning">⚠ {escape(warning)}</p>' for warning in warnings(run.rows) if not run.control]
    parts.append(_run_against_run(study.run_comparisons(runs)))
    parts.append(_over_seeds("Over seeds", "Change from the base", "runs", study.seed_table(runs)))
    parts.append(_over_seeds("Against controls", "Run minus control", "control", study.control_table(runs)))
    return "".join(parts) + "</section>"


def _run_against_run(comparisons: Sequence[study.Change]) -> str:
    """A table with a line per comparison, or nothing."""
    if not comparisons:
        return ""
    rows = []
    for c in comparisons:
        difference, interval, p = c.figures
        cells = c.name, c.against, c.measure, difference, interval, p.removeprefix("= "), c.outcome["n"]
        verdict = c.outcome["verdict"]
        rows.append(
            f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in cells)}"
            f"<td class='{VERDICTS[verdict][0]}'>{verdict}</td></tr>"
        )
    return (
        "<h3>Run against run</h3><p class='soft'>The last stages on the same held-out problems.</p>"
        "<div class='scroll'><table><tr><th>run</th><th>against</th><th>measure</th><th>difference</th>"
        f"<th>95 % interval</th><th>p</th><th>items</th><th>verdict</th></tr>{''.join(rows)}</table></div>"
    )


def _over_seeds(title: str, what: str, column: str, table: Sequence[tuple]) -> str:
    """A table of study.seed_table's form, or nothing."""
    rows = [
        f"<tr><td>{escape(names)}</td><td>{escape(name)}</td><td>{escape(metric)}</td>"
        f"<td>{value['value']:+.3f} ± {value['stderr']:.3f}</td><td>{value['n']}</td></tr>"
        for names, name, metric, value in table
    ]
    if not rows:
        return ""
    return (
        f"<h3>{title}</h3><p class='soft'>{what}; ± is the standard error between seeds.</p><div class='scroll'><table>"
        f"<tr><th>{column}</th><th>stage</th><th>metric</th><th>change</th><th>seeds</th></tr>"
        f"{''.join(rows)}</table></div>"
    )


def _stages(runs: Sequence[Run]) -> str:
    """A table per run with a column per stage: there are few of them, and many measures."""
    parts = ['<section id="stages"><h2>Stages</h2>']
    parts.append(
        "<p class='soft'>Held-out results with 95 % intervals. ▲ better and ▼ worse than the base on the same problems "
        "(McNemar's exact test, p &lt; 0.05); ≈ is within noise.</p>"
    )
    for run in runs:
        heads = "".join(f"<th>{escape(label(row['iteration']))}</th>" for row in run.rows)
        lines = {"pairs": _pairs, "loss, first → last": _losses, "reward in training": _reward}
        cells = {name: [cell(row) for row in run.rows] for name, cell in lines.items()}
        cells |= {name: [_cell(run, row, m, *look) for row in run.rows] for m, (name, *look) in COLUMNS.items()}
        body = "".join(
            f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>"
            for name, line in cells.items()
            if any(line)
        )
        parts.append(f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else "")
        parts.append(f"<div class='scroll'><table class='stages'><tr><th></th>{heads}</tr>{body}</table></div>")
    return "".join(parts) + "</section>"


def _pairs(row: dict) -> str:
    rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(row["rejected"].items()))
    note = f'<span class="interval">rejected: {escape(rejected)}</span>' if rejected else ""
    return f"{row['pairs'] or ''}{note}"


def _losses(row: dict) -> str:
    """Of a stage with rewards its loss says nothing."""
    train = row["train"]
    return f"{train['first_loss']:.3f} → {train['last_loss']:.3f}" if train and "window" not in train else ""


def _reward(row: dict) -> str:
    return study.reward_change(row) or ""


def _cell(run: Run, row: dict, metric: str, digits: int, factor: float) -> str:
    of = row["evaluation"].get(metric)
    if of is None:
        return ""
    low, high = (factor * bound for bound in bounds(run, metric, of))
    interval = f'<span class="interval">{low:.{digits}f} to {high:.{digits}f}</span>' if math.isfinite(low) else ""
    judged = {shown: reading for reading, shown in study.ACCURACY.items()}
    mark = _mark(study.against_base(run, row, judged[metric])) if metric in judged else ""
    return f"{factor * of['value']:.{digits}f}{mark}{interval}"


def _mark(change: study.Change | None) -> str:
    if change is None:
        return ""
    kind, sign = VERDICTS[change.outcome["verdict"]]
    return f' <span class="{kind}" title="{escape(change.sentence())}">{sign}</span>'


def _plots(key: str, members: Sequence[Plot], runs: Sequence[Run]) -> str:
    title, text = SECTIONS[key]
    figures = "".join(figure(plot, len(runs) > 1) for plot in members)
    table = "".join(_memory_table(run, len(runs) > 1) for run in runs) if key == "machine" else ""
    return (
        f'<section id="{key}"><h2>{title}</h2><p class="soft">{escape(text)}</p>'
        f'<div class="plots">{figures}</div>{table}</section>'
    )


def figure(plot: Plot, several: bool) -> str:
    looks = {f"{s.tag} {s.label}".lstrip(): s.look for s in plot.series}
    entries = [f'<span><i class="{look}"></i>{escape(name)}</span>' for name, look in looks.items()]
    told = plot.kind != "forest" and (several or len(looks) > 1)
    legend = f'<div class="legend">{"".join(entries)}</div>' if told else ""
    data = base64.b64encode(plotting.to_csv(plot).encode()).decode()
    link = f'<a download="{escape(plot.name)}.csv" href="data:text/csv;base64,{data}">CSV</a>'
    return (
        f"<figure><h3>{escape(plot.title)}</h3>{legend}{plotting.svg(plot)}"
        f"<figcaption><span>{escape(plot.y_label)}</span>{link}</figcaption></figure>"
    )


def _hover(plot: Plot) -> dict:
    """What page.js needs to find the values under the pointer."""
    x0, x1, _, _ = plot.bounds
    series = []
    for s in plot.series:
        x = s.x if plot.kind != "steps" else [(a + b) / 2 for a, b in zip(s.x, s.x[1:], strict=False)]
        stride = max(1, math.ceil(len(x) / plotting.SVG_POINTS))
        thin = {name: values[::stride] for name, values in (("low", s.low), ("high", s.high)) if values}
        series.append({"label": s.label, "look": s.look, "x": x[::stride], "y": s.y[::stride], **thin})
    return {
        **{"x0": x0, "x1": x1, "left": plotting.LEFT, "right": plotting.WIDTH - plotting.RIGHT},
        **{"top": plotting.TOP, "bottom": plot.height - plotting.BOTTOM, "width": plotting.WIDTH},
        **{"x_label": plot.x_label, "ticks": {_key(x): text for x, text in plot.x_ticks}, "series": series},
    }


def _key(x: float) -> str:
    """A number as JavaScript writes it as a key."""
    return str(int(x)) if x == int(x) else str(x)


def _memory_table(run: Run, several: bool) -> str:
    rows = study.memory_table(run)
    if not rows:
        return ""
    name = f"<h3>{escape(run.name)}</h3>" if several else ""
    head, body = ["phase", "highest measured, MiB"], [[phase, f"{measured:,.0f}"] for phase, measured, _ in rows]
    if run.predicted_mib:
        head.append("predicted, MiB")
        for line, (_, _, predicted) in zip(body, rows, strict=True):
            line.append("" if predicted is None else f"{predicted:,.0f}")
    lines = [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in body]
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    note = "Predicted: a phase's tensors. Measured without a GPU: the whole process, Python and libraries included."
    note = f"<p class='soft'>{note}</p>" if run.predicted_mib else ""
    return f"<div class='scroll'>{name}{note}<table><tr>{heads}</tr>{''.join(lines)}</table></div>"


def _transcripts(runs: Sequence[Run]) -> str:
    if not any(run.transcripts for run in runs):
        return '<section id="transcripts"><h2>Transcripts</h2><p>No held-out answers were written yet.</p></section>'
    options = "".join(f'<option value="{i}">{escape(run.name)}</option>' for i, run in enumerate(runs))
    chooser = f'<select id="run" aria-label="run">{options}</select>' if len(runs) > 1 else ""
    return f"""<section id="transcripts"><h2>Transcripts</h2>
<p class="soft">Greedy answers to held-out problems; ✓ and ✗ are the strict verdict, or the flexible one where no
stage has a strict success.
At most {MAX_TRANSCRIPTS} a run.</p>
<div class="controls"><input type="search" id="search" placeholder="search" aria-label="search">
<select id="which" aria-label="filter"><option value="all">all</option>
<option value="changed">verdict changed</option><option value="gained">wrong in the base, right at last</option>
<option value="lost">right in the base, wrong at last</option><option value="wrong">wrong at last</option>
<option value="cut">cut at the length limit</option></select>{chooser}<span id="count" class="soft"></span></div>
<div id="answers"></div><button id="more" hidden>more</button></section>"""


def _problems(run: Run) -> list[dict]:
    """Held-out problems with every stage's answer, in the order of the base's file."""
    stages = {stage: {row["index"]: row for row in rows} for stage, rows in run.transcripts.items()}
    if not stages:
        return []
    names = {stage: label(row["iteration"]) for stage, row in zip(run.stages, run.rows, strict=True)}
    first, reading = next(iter(stages.values())), study.deciding(run)
    return [
        {
            "index": index,
            "prompt": "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in row["prompt"]),
            "real": row["real"] or row["reference"] or "",
            "answers": [_answer(names[stage], rows[index], reading) for stage, rows in stages.items() if index in rows],
        }
        for index, row in list(first.items())[:MAX_TRANSCRIPTS]
    ]


def _answer(stage: str, row: dict, reading: str) -> dict:
    verdict = row["scores"].get(reading)
    return {
        "stage": stage,
        "text": row["text"],
        "right": None if verdict is None else bool(verdict),
        "tokens": row["tokens"],
        "cut": row["finish_reason"] == "length",
    }


def _setup(runs: Sequence[Run]) -> str:
    parts = ['<section id="setup"><h2>Setup</h2>']
    for run in runs:
        c, e, a = run.config, run.environment, run.config["adapter"]
        versions = ", ".join(f"{name} {version}" for name, version in e.get("versions", {}).items())
        facts = {
            "model": f"{c['model']['name']} {c['model']['revision'] or ''}",
            "training data": f"{source_name(c['data']['source'])} ({c['data']['size'] or 'all'} examples)",
            "held-out data": source_name(c["heldout"]["source"]) if c["heldout"] else "none",
            "adapter": ", ".join(f"{key} = {value}" for key, value in a.items() if value not in (None, False, {})),
            **{name: fact(c[name]) for name, fact in PLAYED.items() if name in c["method"]},
            **{
                f"optimizer, {method}": f"{c[method]['optimizer']}, lr = {c[method]['lr']}, {amount(c[method])}"
                for method in c["method"]
            },
            "seed": c["seed"],
            "machine": f"{e.get('device', '?')}, {e.get('platform', '')}",
            "versions": f"spinfast {e.get('spinfast', '?')}, Python {e.get('python', '?')}, {versions}",
        }
        parts.append(f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else "")
        listed = "".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
        text = escape(yaml.safe_dump(c, sort_keys=False))
        parts.append(f"<dl>{listed}</dl><details><summary>config.yaml</summary><pre>{text}</pre></details>")
    return "".join(parts) + "</section>"
