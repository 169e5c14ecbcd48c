"""The report's figures against the run's files, its page as text, its card; test_browser.py looks at it."""

import csv
import json
import math
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import yaml
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image

from spinfast.errors import UserError
from spinfast.report import plots, study, training
from spinfast.report.card import write_card
from spinfast.report.cli import main, write_report
from spinfast.report.page import page
from spinfast.report.plots import Plot, Series
from spinfast.report.read import read_run, read_runs


@pytest.fixture(scope="module")
def made(played):
    """name -> plot of one finished run."""
    return {plot.name: plot for plot in study.plots([read_run(played[0])])}


def test_every_plot_is_there(made):
    expected = {name.replace("/", "-") for name in (*training.TRAINING, *study.HELDOUT)} - {
        "train-loss_scale",
        "heldout-reward",
    }
    expected -= {"train-chosen_logp_change", "train-rejected_logp_change", "heldout-loss"}  # of SFT and DPO
    expected -= {"heldout-preference_accuracy", "heldout-chosen_likelier"}
    expected |= {"log-ratio-sft", "log-ratio-iter_000", "log-ratio-iter_001", "memory", "time"}
    assert set(made) == expected


def test_training_curve_is_the_metrics_file(made, played):
    rows = [json.loads(line) for line in (played[0] / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["stage"].startswith("iter_")]
    series = made["train-loss"].series
    assert [y for s in series for y in s.y] == [row["train/loss"] for row in rows]
    assert [x for s in series for x in s.x] == list(range(1, len(rows) + 1))
    assert [s.y[0] for s in series] == pytest.approx([math.log(2)] * 2, abs=1e-5)
    assert made["train-loss"].marks == ((1.0, "iteration 0"), (4.0, "iteration 1"))


@pytest.mark.parametrize(
    ("config", "level"),
    [
        ("loss: logistic", (math.log(2), "ln 2")),
        ("loss: hinge", (1.0, "l(0)")),
        ("loss: ipo", (pytest.approx(25.0), "l(0)")),
        ("loss: ipo\n  beta: [0.1, 0.2]", None),  # another one in each iteration
        ("loss: hinge\n  beta: [0.1, 0.2]", (1.0, "l(0)")),
    ],
)
def test_the_first_loss_is_expected_where_the_runs_loss_puts_it(run_copy, config, level):
    path = run_copy / "config.yaml"
    path.write_text(path.read_text().replace("  beta:\n  - 0.1\n", "" if "beta" in config else "  beta: [0.1]\n"))
    path.write_text(path.read_text().replace("loss: logistic", config))
    runs = read_runs([run_copy])
    assert next(plot for plot in study.plots(runs) if plot.name == "train-loss").level == level


def test_a_loss_without_a_value_at_margin_0_is_no_runs(run_copy):
    path = run_copy / "config.yaml"
    path.write_text(path.read_text().replace("  - 0.1\n", "  - 0.0\n").replace("loss: logistic", "loss: ipo"))
    with pytest.raises(UserError, match=r"spin\.beta\.0: input should be greater than 0"):
        write_report([run_copy], png=False)


def test_runs_of_two_losses_have_no_common_first_loss(played, run_copy):
    path = run_copy / "config.yaml"
    path.write_text(path.read_text().replace("loss: logistic", "loss: hinge"))
    drawn = {plot.name: plot for plot in study.plots(read_runs([played[0], run_copy]))}
    assert drawn["train-loss"].level is None
    assert drawn["train-margin"].level == (0.0, "")


def test_heldout_points_are_the_results_with_intervals(made, played):
    rows = json.loads((played[0] / "results.json").read_text())
    series = made["heldout-margin"].series[0]
    assert series.y == [row["evaluation"]["heldout/margin"]["value"] for row in rows]
    assert math.isnan(series.low[0])  # the base against itself: all margins are 0
    last = rows[-1]["evaluation"]["heldout/margin"]
    assert series.high[-1] - series.low[-1] == pytest.approx(2 * 1.959964 * last["stderr"])
    accuracy = made["heldout-accuracy_strict"].series[0]
    assert accuracy.high[0] > 0  # Wilson's interval of 0 of 8 is not a point
    assert [text for _, text in made["heldout-margin"].x_ticks] == ["base", "SFT", "iter. 0", "iter. 1"]


def test_log_ratios_count_every_held_out_pair(made):
    for name in ("log-ratio-sft", "log-ratio-iter_000", "log-ratio-iter_001"):
        assert [sum(s.y) for s in made[name].series] == [8, 8]
        assert [s.label for s in made[name].series] == ["real", "generated"]
    assert made["log-ratio-iter_000"].series[0].x == made["log-ratio-iter_001"].series[0].x


def test_time_adds_up(made, played):
    rows = json.loads((played[0] / "results.json").read_text())
    assert sum(y for s in made["time"].series for y in s.y) * 60 == pytest.approx(
        sum(sum(row["seconds"].values()) for row in rows)
    )


def test_twenty_runs_are_told_apart_on_the_page_and_in_the_png():
    drawn = [Series("run", slot, [0.0], [0.0]) for slot in range(20)]
    assert len({s.look for s in drawn}) == len({(s.colour, s.lap) for s in drawn}) == 20


@pytest.mark.parametrize("kind", ["line", "band", "points", "steps", "bars"])
def test_a_plot_in_three_forms(kind, tmp_path):
    edges = [0.0, 1.0, 2.0]
    y = [1.0, 3.0] if kind == "steps" else [1.0, float("nan"), 3.0] if kind == "line" else [1.0, 2.0, 3.0]
    low = [0.5, float("nan"), 2.5] if kind in ("points", "band") else None
    high = [v + 1 for v in y] if low else None
    series = [Series("a & <b>", 0, edges, y, low, high), Series("b", 1, edges, y, *[low, high] * (kind == "band"))]
    plot = Plot("p", "A <title>", "x", "y", kind, series, marks=((1.0, "<m>"),), level=(2.0, "level"))
    root = ElementTree.fromstring(plots.svg(plot))
    assert all(any((node.get("class") or "").endswith(s.look) for node in root) for s in series)
    for node in root.iter():  # everything is drawn inside the frame
        for name, size in (("x1", plots.WIDTH), ("x2", plots.WIDTH), ("y1", plots.HEIGHT), ("cy", plots.HEIGHT)):
            assert 0 <= float(node.get(name, 0)) <= size
    rows = list(csv.reader(plots.to_csv(plot).splitlines()))
    assert rows[0] == ["series", "x", "y", "low", "high"]
    assert [float(row[2]) for row in rows[1:]] == pytest.approx(y + y, nan_ok=True)
    plots.write_png(plot, tmp_path / "p.png")
    picture = Image.open(tmp_path / "p.png").convert("RGB")
    wanted = tuple(int(plots.COLOURS[1][i : i + 2], 16) for i in (1, 3, 5))
    near = [
        sum(abs(a - b) for a, b in zip(pixel, wanted, strict=True)) < 250 for _, pixel in picture.getcolors(1 << 22)
    ]
    assert picture.width > 600
    assert any(near)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
@example(0.1, 0.2)  # 0.3 is 0.30000000000000004
@example(879609.9999999999, 0.01)
def test_ticks_are_few_and_inside(low, size):
    assume(size > 1e-8 * abs(low))  # a finer range is beyond what doubles can divide
    got = plots.ticks(low, low + size)
    assert 1 <= len(got) <= 12
    assert all(low - 1e-6 * size <= y <= low + size * (1 + 1e-6) for y in got)


def test_long_lines_are_thinned_and_kept_whole_in_the_csv():
    x = [float(i) for i in range(5000)]
    plot = Plot("p", "t", "x", "y", "line", [Series("s", 0, x, x)])
    assert 400 < plots.svg(plot).count("L") <= plots.SVG_POINTS + 1
    assert plots.to_csv(plot).count("\n") == 5001


class Page(HTMLParser):
    """Addresses and embedded JSON of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.addresses, self.tags, self.attributes, self.json, self._id = [], [], set(), {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.attributes |= attrs.keys()
        self.addresses += [attrs[name] for name in ("src", "href", "srcset", "action") if name in attrs]
        self._id = attrs.get("id") if attrs.get("type") == "application/json" else None

    def handle_data(self, data):
        if self._id:
            self.json[self._id] = json.loads(data)
            self._id = None


def test_page_refers_to_nothing_outside(played):
    text = page(read_runs(played))
    assert all(address.startswith(("#", "data:")) for address in Page(text).addresses)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "@import" not in text
    assert "url(" not in text


def test_page_of_several_runs(played):
    text = page(read_runs(played))
    assert "Run against run" in text
    assert "Over seeds" in text
    assert 'id="run"' in text
    parsed = Page(text)
    assert len(parsed.json["transcript-data"]) == 2
    assert {s["label"] for s in parsed.json["plot-data"]["heldout-margin"]["series"]} == {"seed0", "seed1"}


def test_transcripts_hold_every_stage(played):
    problem = Page(page(read_runs(played[:1]))).json["transcript-data"][0][0]
    assert problem["prompt"].startswith("user: What is 5")
    assert [answer["stage"] for answer in problem["answers"]] == ["base", "SFT", "iteration 0", "iteration 1"]
    assert problem["real"].startswith("It is ")


def test_text_of_a_model_stays_text(run_copy):
    path = run_copy / "base" / "heldout.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    evil = "</script><img src=x onerror=alert(1)><!-- <script>\u2028"
    row |= {"text": evil, "prompt": [{"role": "user", "content": evil}], "real": evil}
    path.write_text(json.dumps(row) + "\n")
    parsed = Page(page([read_run(run_copy)]))
    assert "img" not in parsed.tags
    assert parsed.json["transcript-data"][0][0]["answers"][0]["text"] == evil


def test_names_of_a_run_stay_text(run_copy):
    """Whoever sends a run directory chooses its name, its phases and what results.json calls an iteration."""
    evil = '"><img src=x onerror=alert(1)>'
    results = json.loads((run_copy / "results.json").read_text())
    results[1] |= {"iteration": evil, "seconds": {evil: 1.0}, "rejected": {evil: 1}}
    (run_copy / "results.json").write_text(json.dumps(results))
    (run_copy / evil).mkdir()
    for name in ("heldout.jsonl", "heldout_logps.safetensors"):
        shutil.copy(run_copy / "sft" / name, run_copy / evil)
    with (run_copy / "system.jsonl").open("a") as file:
        file.write(json.dumps({"time": 0.0, "stage": evil, "phase": evil, "memory/rss_mib": 1.0}) + "\n")
    other = shutil.copytree(run_copy, run_copy.with_name(f"{evil}run"))
    for paths in ([other], [run_copy, other]):
        parsed = Page(page(read_runs(paths)))
        assert "img" not in parsed.tags
        assert not any(name.startswith("on") for name in parsed.attributes)


def test_a_stage_cannot_lead_out_of_the_reports_folder(run_copy):
    results = json.loads((run_copy / "results.json").read_text())
    results[1] |= {"stage": "../run/sft", "iteration": "../run/sft"}
    (run_copy / "results.json").write_text(json.dumps(results))
    (run_copy / "report" / "log-ratio-..").mkdir(parents=True)
    write_report([run_copy], png=False)
    run = read_run(run_copy)
    assert run.transcripts.keys() == {"base", "iter_000", "iter_001"}  # nor is anything read outside the run
    assert [*(run_copy / "report" / "log-ratio-..").iterdir()] == []


def test_better_worse_and_noise_are_marked(judged):
    base = [float(i % 2) for i in range(60)]
    judged("base", base)
    judged("sft", [1.0 - b if i < 2 else b for i, b in enumerate(base)])
    judged("iter_000", [1.0] * 60)
    run = read_run(judged("iter_001", [b if i % 3 else 0.0 for i, b in enumerate(base)]))
    verdicts = [study.against_base(run, row, study.STRICT) for row in run.rows]
    assert [v and v.outcome["verdict"] for v in verdicts] == [None, "within noise", "better", "worse"]
    text = page([run])
    assert text.count('class="better"') == text.count('class="worse"') == 2  # strict and flexible
    assert "The best strict accuracy on held-out problems is iteration 0's, 100.0%." in study.story(run)[1]
    assert "better (+50.0 points" in study.story(run)[2]


def test_where_nobody_is_strictly_right_the_flexible_reading_decides(judged):
    """A model that learns by a reward never writes the data's form."""
    for stage, solved in {"base": 8, "sft": 8, "iter_000": 9, "iter_001": 19}.items():
        run = read_run(judged(stage, [float(i < solved) for i in range(20)], strict=0.0))
    assert "The best flexible accuracy on held-out problems is iteration 1's, 95.0%." in study.story(run)[1]
    problems = Page(page([run])).json["transcript-data"][0]
    assert [problem["answers"][-1]["right"] for problem in problems] == [True] * 19 + [False]


def test_accuracy_at_the_floor_is_called_so(played, judged):
    assert "Every stage answers none of the held-out problems" in study.story(read_run(played[0]))[1]
    for stage in ("base", "sft", "iter_000"):
        judged(stage, [0.0, 1.0] * 10)
    run = read_run(judged("iter_001", [0.0] * 20))
    assert "No stage did better than the base" in study.story(run)[1]


def test_unfinished_run(run_copy):
    results = json.loads((run_copy / "results.json").read_text())
    (run_copy / "results.json").write_text(json.dumps(results[:2]))
    with (run_copy / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "iter_001", "phase": "tr')  # torn by a crash
    run = read_run(run_copy)
    assert not run.finished
    assert re.search(r"not finished, the last row is SFT's, as of 20\d\d-", study.story(run)[0])
    assert 'http-equiv="refresh" content="30"' in page([run], refresh=30)
    (run_copy / "results.json").unlink()
    assert "Nothing was evaluated yet" in page([read_run(run_copy)])


def test_a_run_that_stopped_early_is_finished_and_so_are_its_controls(run_copy, capsys):
    control = shutil.copytree(run_copy, run_copy / "controls" / "coin")
    (control / "best.json").unlink()  # only a run names its best
    for path in (run_copy, control):
        config = path / "config.yaml"
        config.write_text(config.read_text().replace("iterations: 2", "iterations: 5"))
    assert all(run.finished for run in read_runs([run_copy]))
    assert "the run is finished, early, for want of a held-out gain." in study.story(read_run(run_copy))[0]
    assert main([str(run_copy), "--watch", "1", "--no-png"]) == 0
    results = json.loads((run_copy / "results.json").read_text())
    for path in (run_copy, control):  # as while they are played, or looked at again
        (path / "results.json").write_text(json.dumps(results[:-1]))
    assert not any(run.finished for run in read_runs([run_copy]))


def test_run_without_references(run_copy):
    for path in run_copy.glob("*/heldout.jsonl"):
        rows = [json.loads(line) | {"scores": {}, "reference": None} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = json.loads((run_copy / "results.json").read_text())
    for row in results:
        for metric in ("heldout/accuracy_strict", "heldout/accuracy_flexible"):
            del row["evaluation"][metric]
    (run_copy / "results.json").write_text(json.dumps(results))
    run = read_run(run_copy)
    assert "no reference results" in study.story(run)[1]
    parsed = Page(page([run]))
    assert parsed.json["transcript-data"][0][0]["answers"][0]["right"] is None
    assert "heldout-accuracy_strict" not in parsed.json["plot-data"]


def test_a_loss_that_is_not_finite_is_a_gap(run_copy):
    path = run_copy / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[4]["train/loss"] = "nan"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot = next(plot for plot in study.plots([read_run(run_copy)]) if plot.name == "train-loss")
    assert math.isnan(plot.series[0].y[1])
    assert "nan" not in plots.svg(plot)
    assert None in Page(page([read_run(run_copy)])).json["plot-data"]["train-loss"]["series"][0]["y"]


def test_predicted_memory_stands_beside_the_measured(run_copy):
    assert "predicted, MiB" in page([read_run(run_copy)])  # as the run's own plan has it
    (run_copy / "plan.json").unlink()
    assert "predicted, MiB" not in page([read_run(run_copy)])
    (run_copy / "plan.json").write_text('{"predicted_mib": {"train": 1234.4}}')
    text = page([read_run(run_copy)])
    assert "predicted, MiB" in text
    assert "<td>1,234</td>" in text


def test_cli_writes_html_png_and_csv(run_copy, capsys):
    assert main([str(run_copy), "--watch", "1"]) == 0  # a finished run is written once
    folder = run_copy / "report"
    assert capsys.readouterr().out.strip() == str(folder / "index.html")
    names = {plot.name for plot in study.plots([read_run(run_copy)])}
    assert {path.stem for path in folder.glob("*.png")} == names
    assert {path.stem for path in folder.glob("*.csv")} == names


def test_not_a_run(tmp_path):
    with pytest.raises(UserError, match=r"expected a run directory with config\.yaml"):
        write_report([tmp_path])


def test_runs_of_one_name_are_told_apart(run_copy, tmp_path, played):
    other = shutil.copytree(played[1], tmp_path / "other" / "run")
    assert [run.name for run in read_runs([run_copy, other])] == [f"{tmp_path.name}/run", "other/run"]


def test_a_run_named_twice_is_shown_once(run_copy):
    assert len(read_runs([run_copy, run_copy.parent / "." / run_copy.name])) == 1


def test_of_many_runs_the_title_gives_the_number(run_copy, tmp_path):
    copies = [shutil.copytree(run_copy, tmp_path / f"copy{i}") for i in range(3)]
    assert "<title>spinfast: 4 runs</title>" in page(read_runs([run_copy, *copies]))


def test_runs_on_other_problems_are_not_compared(played, run_copy):
    assert len(study.run_comparisons(read_runs(played))) == 2  # accuracy, log p(real)
    for path in run_copy.glob("*/heldout.jsonl"):
        path.write_text(path.read_text().replace("What is", "How much is"))
    assert study.run_comparisons(read_runs([played[1], run_copy])) == []


def test_seeds_are_combined_only_within_one_config(played, run_copy):
    table = study.seed_table(read_runs(played))
    assert {(name, of["n"]) for _, name, _, of in table} == {("SFT", 2), ("iteration 0", 2), ("iteration 1", 2)}
    config = run_copy / "config.yaml"
    config.write_text(config.read_text().replace("r: 16", "r: 8"))
    assert study.seed_table(read_runs([played[1], run_copy])) == []


def test_card(run_copy):
    path = write_card(run_copy / "iter_001" / "adapter", run_copy, "iter_001")
    text = path.read_text()
    assert text.startswith("---\nlibrary_name: peft\n")
    run = read_run(run_copy)
    margin = run.rows[-1]["evaluation"]["heldout/real_logp_vs_base"]
    assert f"| {margin['value']:.2f} [" in text
    assert "LoRA, r = 16, alpha = 32" in text
    assert "iteration 1 of 2 iterations, beta 0.1" in text
    assert "| accuracy, strict (%) | 0.0 [0.0, 32.4] | 0.0 [0.0, 32.4] | 8 |" in text
    assert "within noise" in text
    config = json.loads((run_copy / "iter_001" / "adapter" / "adapter_config.json").read_text())
    assert f"revision {config['revision']}" in text


def test_the_sources_of_a_mixture_are_named(run_copy):
    path = run_copy / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["data"]["source"] = ["a.jsonl", {"source": "b.csv", "split": "test"}]
    config["heldout"]["source"] = [{"source": "c.jsonl", "weight": 2}, {"source": "d.csv", "weight": 0.5}]
    path.write_text(yaml.safe_dump(config))
    page = write_report([run_copy], png=False)[0].read_text()
    card = write_card(run_copy / "sft" / "adapter", run_copy, "sft").read_text()
    for names in ("a.jsonl + b.csv (split test)", "c.jsonl (weight 2.0) + d.csv (weight 0.5)"):
        assert names in page
        assert names in card


def test_card_of_an_adapter_that_was_not_evaluated(run_copy):
    results = json.loads((run_copy / "results.json").read_text())
    (run_copy / "results.json").write_text(json.dumps([row | {"evaluation": {}} for row in results]))
    assert "It was not evaluated." in write_card(run_copy / "sft" / "adapter", run_copy, "sft").read_text()
