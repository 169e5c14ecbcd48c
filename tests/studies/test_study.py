"""Studies whole, on a tiny model: cells in one session are runs of their own; what is measured; what is said of it."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_run import fingerprints, write_config, write_problems

from spinfast.models import resolve_model
from spinfast.policy.adapters import files as adapters
from spinfast.report import page
from spinfast.run import main
from spinfast.studies import outcomes, outputs, scores, statistics
from spinfast.studies.design import cells_of, load_design

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "study.ipynb"
KINDS = {
    "lora": {"adapter.r": 4, "adapter.alpha": 8},
    "merged": {"method": ["sft", "spin"], "adapter.init": "merge", "spin.iterations": 1},
    "xs": {"adapter": {"kind": "lora_xs", "r": 4, "alpha": 8}},
    "full": {"adapter": {"kind": "full", "target_modules": ["q_proj"]}},
    "wide": {"adapter.r": 8},
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SPINFAST_CACHE", str(tmp_path_factory.getbasetemp() / "frames"))


def write_study(directory, model, **keys):
    """A study on a tiny model, beside its base config."""
    path = write_config(directory, model, sft={"lr": 1e-2, "epochs": 1, "groups_per_step": 4}, heldout=None)
    tree = yaml.safe_load(path.read_text())
    tree["method"] = ["sft"]
    del tree["spin"]
    path.write_text(yaml.safe_dump(tree))
    write_problems(directory / "items.jsonl", 100, 8)
    (directory / "other.txt").write_text("The whale swam on. " * 80)
    study = {
        "base": "config.yaml",
        "seeds": 2,
        "learning": {
            "sums": {"source": str(directory / "items.jsonl"), "split": "train", "exact": True, "max_tokens": 8}
        },
        "forgetting": {"texts": [str(directory / "other.txt")], "tokens": 256, "own": 2, "max_tokens": 8},
    }
    (directory / "study.yaml").write_text(yaml.safe_dump(study | keys))
    return directory / "study.yaml"


def study(path, *options):
    return main(["study", str(path), "--dir", str(path.parent / "out"), *options])


@pytest.fixture(scope="module")
def played(tmp_path_factory, tiny_model):
    """A study of every kind of adapter, one after the other on one base, and back."""
    directory = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPINFAST_CACHE", str(tmp_path_factory.getbasetemp() / "frames"))
        path = write_study(directory, tiny_model("llama"), axes={"kind": KINDS}, curve=2)
        assert study(path) == 0
    return path


def test_a_cell_is_the_run_that_its_config_would_be(played, tmp_path):
    """Whatever was on the base before it: the same adapters, bit for bit."""
    for cell in ("full.0", "merged.1", "lora.1", "xs.1"):
        config = played.parent / "out" / "cells" / cell / "config.yaml"
        assert main([str(config), "--run-dir", str(tmp_path / cell)]) == 0
        alone, found = fingerprints(tmp_path / cell), fingerprints(config.parent)
        assert {name: found[name] for name in alone} == alone


def test_a_study_says_what_it_found(played):
    out = played.parent / "out"
    rows = list(csv.DictReader((out / "scores.csv").open()))
    assert {row["setting"] for row in rows} == {*KINDS}
    base = json.loads((out / "base.json").read_text())
    for row in rows:
        cells = [json.loads((out / "cells" / f"{row['setting']}.{s}" / "outcomes.json").read_text()) for s in (0, 1)]
        change = np.mean([np.subtract(cell["sums/worked"], base["sums/worked"]).mean() for cell in cells])
        assert float(row["score"]) == pytest.approx(change)
        assert float(row["ci_low"]) < float(row["score"]) < float(row["ci_high"])
        lost = [np.subtract(cell[name], base[name]) for cell in cells for name in ("other/nll", "own answers/nll")]
        assert float(row["forgetting"]) == pytest.approx(np.mean(np.concatenate(lost)))
    assert len((out / "runs.jsonl").read_text().splitlines()) == 2 * len(KINDS)
    text = (out / "index.html").read_text()
    assert all(name in text for name in KINDS)
    assert 'data-plot="forest"' in text
    assert "seeds" in (out / "scores.md").read_text()


def test_the_notebook_reads_the_scores(played, capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    exec(code.replace("studies/rate", str(played.parent / "out")), {})
    said = capsys.readouterr().out
    assert all(name in said for name in KINDS)


def test_what_is_there_is_not_played_again(played, capsys):
    out = played.parent / "out"
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*/adapter/*.safetensors")}
    found = {name: out / "cells" / name / "outcomes.json" for name in ("full.0", "merged.0", "wide.1", "xs.1")}
    outcomes_before = {name: json.loads(path.read_text()) for name, path in found.items()}
    for path in found.values():
        path.unlink()
    assert study(played) == 0
    assert {name: json.loads(path.read_text()) for name, path in found.items()} == outcomes_before
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "worked" in capsys.readouterr().out


def test_a_curve_ends_where_the_outcomes_are(played):
    """Measured between two steps of a training that it does not change (as the test above has it)."""
    out = played.parent / "out"
    for cell in ("lora.0", "xs.1", "full.0"):
        points = json.loads((out / "cells" / cell / "curve.json").read_text())["points"]
        outcome = json.loads((out / "cells" / cell / "outcomes.json").read_text())
        assert [point["step"] for point in points] == [2, 3]
        assert points[0]["tokens"] < points[1]["tokens"]
        assert points[-1]["readings"] == {name: outcome[name] for name in points[-1]["readings"]}
        assert points[0]["readings"] != points[1]["readings"]
    rows = list(csv.DictReader((out / "curves.csv").open()))
    merged = [float(row["trained tokens"]) for row in rows if row["series"] == "merged"]
    assert len(merged) == 5  # the start, two of each method
    assert merged == sorted(merged)
    ends = {row["series"]: row for row in rows}  # the last of each
    scores_of = {row["setting"]: row for row in csv.DictReader((out / "scores.csv").open())}
    effect = next(name for name in rows[0] if name.startswith("effect"))
    for name in KINDS:
        assert float(ends[name][effect]) == pytest.approx(float(scores_of[name]["score"]))
        assert float(ends[name]["low"]) == pytest.approx(float(scores_of[name]["ci_low"]))
    assert (out / "curves_forgetting.csv").exists()
    assert 'data-plot="curves"' in (out / "index.html").read_text()


def test_adapters_are_listed_for_those_who_serve_them(played):
    out = played.parent / "out"
    rows = {row["name"]: row for row in json.loads((out / "index.json").read_text())}
    assert {*rows} == {f"{kind}.{seed}" for kind in ("lora", "merged", "wide") for seed in (0, 1)}
    assert [rows[f"{kind}.0"]["rank"] for kind in ("lora", "wide", "merged")] == [4, 8, 8]
    for name, row in rows.items():
        assert adapters.load(out / row["path"]).config["r"] == row["rank"]
        found = json.loads((out / "cells" / name / "outcomes.json").read_text())
        assert row["scores"]["sums/worked"] == pytest.approx(np.mean(found["sums/worked"]))
    assert rows["merged.0"]["path"] == "cells/merged.0/iter_000/adapter"


@pytest.mark.slow
def test_two_processes_share_a_study(tmp_path, tiny_model):
    path = write_study(tmp_path, tiny_model("llama"), axes={"adapter.r": [2, 4, 8]})
    command = [sys.executable, "-m", "spinfast.run", "study", str(path), "--dir", str(tmp_path / "out")]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert 0 in [process.returncode for process in both], said
    cells = list(tmp_path.glob("out/cells/*"))
    assert len(cells) == 6
    assert all((cell / "outcomes.json").exists() for cell in cells)
    begun = [sum("data: 12 examples" in line for line in (cell / "log.txt").open()) for cell in cells]
    assert begun == [1] * 6  # each by one of them


def test_a_cell_that_fails_does_not_end_the_others(tmp_path, tiny_model, capsys):
    axes = {"lr": {"good": {"sft.lr": 1e-3}, "bad": {"data.source": str(tmp_path / "nowhere.jsonl")}}}
    assert study(write_study(tmp_path, tiny_model("llama"), axes=axes)) == 2
    assert "2 of 4 cells failed; the first, bad.0: " in " ".join(capsys.readouterr().err.split())
    assert sorted(path.parent.name for path in tmp_path.glob("out/cells/*/outcomes.json")) == ["good.0", "good.1"]


def test_cells_of_other_augmenting_models(tmp_path, tiny_model, capsys):
    """Each has its own, which is checked and noted like a run's; a cell without has none."""
    small, strange = (
        tiny_model("qwen2", hidden=32),
        shutil.copytree(tiny_model("qwen2", hidden=32), tmp_path / "strange"),
    )
    file = strange / "tokenizer.json"
    vocabulary = json.loads(file.read_text())
    words = vocabulary["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(vocabulary))
    augmenting = {"own": tiny_model("llama"), "small": small, "strange": strange}
    calm = {
        name: {"adapter": {"kind": "calm", "augmenting": str(path), "connections": 1}}
        for name, path in augmenting.items()
    }
    path = write_study(tmp_path, tiny_model("llama"), seeds=1, axes={"with": {"none": {"adapter.r": 4}} | calm})
    assert study(path) == 2
    assert "the first, strange.0: adapter.augmenting: " in " ".join(capsys.readouterr().err.split())
    cells = path.parent / "out" / "cells"
    noted = {
        name: json.loads((cells / f"{name}.0" / "inputs.json").read_text()).get("augmenting")
        for name in ("none", "own", "small")
    }
    assert noted == {"none": None} | {name: resolve_model(str(augmenting[name])).revision for name in ("own", "small")}
    assert main([str(cells / "small.0" / "config.yaml"), "--run-dir", str(tmp_path / "alone")]) == 0
    alone, found = fingerprints(tmp_path / "alone"), fingerprints(cells / "small.0")
    assert {name: found[name] for name in alone} == alone


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"axes": {"adapter.rr": [4]}}, "unknown key 'adapter.rr'"),
        ({"axes": {"model.name": ["a", "b"]}}, "changes model"),
        ({"axes": {"a": {"x": {}}, "b": {"x": {}}}}, "is a level of two axes"),
        ({"axes": {"a": {"x 1": {}, "x-1": {}}}}, "one directory"),
        ({"controls": {"x": "y"}}, "expected two levels of one axis"),
        ({"seeds": [1, 1]}, "each seed once"),
        ({"learning": {}}, "learning"),
        ({"learning": {"a": {"source": "x", "task": "boolq"}}}, "one of them"),
        ({"score": "sums/fun"}, "expected one of sums/worked"),
        ({"base": "none.yaml"}, "no such file"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"forgetting": {"own": 999}}, "lower it"),
    ],
)
def test_a_wrong_study_is_one_line(tmp_path, tiny_model, capsys, keys, complaint):
    assert study(write_study(tmp_path, tiny_model("llama"), **keys)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("spinfast: ")
    assert complaint in last


def test_a_plan_plays_nothing(tmp_path, tiny_model, capsys):
    assert study(write_study(tmp_path, tiny_model("llama"), axes={"adapter.r": [2, 4]}), "--plan") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "4 cells: 2 settings, 2 seeds" in said
    assert "found in 80 of 100 studies" in said
    assert not (tmp_path / "out" / "cells").exists()


def test_results_are_cut_out_of_worked_answers(tmp_path, tiny_model):
    """Question, reasoning and result put together are the answer as it is trained; false results differ in it alone."""
    path = write_study(tmp_path, tiny_model("llama"))
    design = load_design(path)
    from spinfast.session import look

    config = cells_of(design, tmp_path)[0].config
    renderer = look(config).renderer
    probe = outcomes.probe_of("sums", design.learning["sums"], config.prompt, renderer)
    for example, group in zip(probe.examples, probe.results, strict=True):
        before = group.prompt_ids[len(example.prompt_ids) :]
        texts = [renderer.text(before + answer) for answer in group.answers]
        assert texts[0] == example.answer
        assert len({*texts}) == outcomes.FALSE + 1
        stem = example.answer.rpartition("#### ")[0] + "#### "
        assert all(text.startswith(stem) and text.removeprefix(stem).lstrip("-").isdigit() for text in texts)


def made_up(tmp_path, tiny_model, effects, seeds=5, items=60, noise=0.05):
    """Cells of levels a, b, ... with planted effects over their controls A, B, ...; what was measured, and the base."""
    names = [chr(ord("a") + n) for n in range(len(effects))]
    axes = {"text": {level: {"sft.lr": 1e-3 * (n + 1)} for n, level in enumerate([*names, *map(str.upper, names)])}}
    keys = {"axes": axes, "controls": {name: name.upper() for name in names}, "seeds": seeds}
    design = load_design(write_study(tmp_path, tiny_model("llama"), **keys))
    cells, random = cells_of(design, tmp_path), np.random.default_rng(1)
    base = {"sums/worked": random.normal(size=items).tolist(), "x/nll": [1.0] * 4}
    found = {}
    for cell in cells:
        gain = dict(zip(names, effects, strict=True)).get(cell.levels[0], 0.0)
        drawn = np.array(base["sums/worked"]) + 1.0 + gain + random.normal(scale=noise, size=items)
        found[cell.name] = {"sums/worked": drawn.tolist(), "x/nll": [1.1] * 4}
    return design, cells, found, base


def test_effects_are_those_over_the_controls(tmp_path, tiny_model):
    design, cells, measured, base = made_up(tmp_path, tiny_model, [0.0, 0.3, 0.3])
    found = scores.compare(design, cells, measured, base)
    ranked = {score.setting: score for score in found.scores if score.p_holm is not None}
    assert {*ranked} == {"a", "b", "c"}
    assert {s.setting for s in found.scores} - {*ranked} == {"A", "B", "C"}
    assert [ranked[name].control for name in "abc"] == ["A", "B", "C"]
    assert ranked["b"].p_holm < 0.001
    assert ranked["a"].p_holm > 0.05
    assert ranked["b"].group == ranked["c"].group != ranked["a"].group
    assert ranked["b"].score == pytest.approx(0.3, abs=0.02)
    assert ranked["b"].changes["sums/worked"] == pytest.approx(1.3, abs=0.02)
    own = np.array([[measured[f"b.{s}"]["sums/worked"], measured[f"B.{s}"]["sums/worked"]] for s in range(5)])
    effect = statistics.effects((own[:, 0] - own[:, 1])[None])
    assert (ranked["b"].low, ranked["b"].high) == pytest.approx((float(effect.low[0]), float(effect.high[0])))
    assert all(score.forgetting == pytest.approx(0.1) for score in found.scores)


def test_the_front_is_drawn_and_settings_are_told_apart(tmp_path, tiny_model):
    """Ten settings and colours for seven: their numbers stand beside points and in the legend."""
    design, cells, measured, base = made_up(tmp_path, tiny_model, [0.1 * n for n in range(5)])
    for n, cell in enumerate(cells):
        measured[cell.name]["x/nll"] = [1.0 + 0.1 * (n % 10)] * 4
    found = scores.compare(design, cells, measured, base)
    (plot,) = outputs.tradeoff(found)
    front, origin, *points = plot.series
    best = sorted((score.forgetting, score.learning) for score in found.scores if score.pareto)
    assert len(best) > 1
    assert [*zip(front.x, front.y, strict=True)] == best
    assert (origin.label, origin.x, origin.y) == ("base", [0.0], [0.0])
    assert [series.tag for series in points] == [str(n) for n in range(1, 11)]
    assert all(series.slot != origin.slot for series in points)
    assert [series.label.endswith(" (Pareto)") for series in points] == [score.pareto for score in found.scores]
    drawn = page.figure(plot, True)
    assert all(f">{n}</text>" in drawn and f"</i>{n} " in drawn for n in range(1, 11))


@pytest.mark.parametrize(("gained", "whose"), [((), ""), (("a", "B"), " of b, A")])
def test_only_who_is_at_the_floor_is_said_to_be(tmp_path, tiny_model, gained, whose):
    design, cells, measured, base = made_up(tmp_path, tiny_model, [0.3, 0.1])
    base["sums/exact"] = [0.0] * 4
    for cell in cells:
        measured[cell.name]["sums/exact"] = [float(cell.levels[0] in gained)] * 4
    (said,) = [line for line in outputs.sentences(scores.compare(design, cells, measured, base)) if "floor" in line]
    assert said.startswith(f"Exact answers{whose} are below 2 % with and without training: ")


def test_seeds_that_are_not_whole_are_left_out(tmp_path, tiny_model):
    design, cells, measured, base = made_up(tmp_path, tiny_model, [0.2])
    del measured["A.3"]
    found = scores.compare(design, cells, measured, base)
    assert found.scores[0].seeds == 4
    assert outputs.sentences(found)[0] == "Left out, since not all cells have outcomes: seed 3."
    alone = {name: found for name, found in measured.items() if name.endswith(".0")}
    (one, other) = scores.compare(design, cells, alone, base).scores
    assert one.p_holm is None
    assert np.isnan(one.low)
    assert other.setting == "A"
