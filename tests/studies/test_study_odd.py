"""Studies of people in a hurry: what fails, what changed since, what is too little to compare."""

import csv
import json
import random

import pytest
import torch
import yaml
from fixtures import FailingCall
from test_run import write_problems
from test_study import study, write_study

from spinfast.errors import UserError
from spinfast.evaluate.answers import same_math
from spinfast.policy.adapters.full import FullLayer
from spinfast.studies import outcomes

REWARD = """
calls = []


def once(completions, **_):
    calls.append(1)
    return [1.0] * (len(calls) == 1) * len(completions)
"""
LITTLE = {"forgetting": {"own": 0}, "seeds": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SPINFAST_CACHE", str(tmp_path_factory.getbasetemp() / "frames"))


def little(directory, model, **keys):
    """A study that writes nothing."""
    learning = {"sums": {"source": str(directory / "items.jsonl"), "split": "train"}}
    return write_study(directory, model, **{"learning": learning, **LITTLE, **keys})


def measured(path, cell):
    return json.loads((path.parent / "out" / "cells" / cell / "outcomes.json").read_text())


def test_a_cell_is_what_it_is_after_some_that_failed(tmp_path, tiny_model, capsys):
    """One could not put its adapter on the base, one failed with an adapter of its own there."""
    (tmp_path / "reward.py").write_text(REWARD)
    grpo = {"method": ["grpo"], "grpo.rewards": f"{tmp_path}/reward.py:once", "grpo.steps": 1, "grpo.samples": 2}
    axes = {
        "kind": {
            "a": {},
            "b nowhere": {"adapter.target_modules": ["nowhere"]},
            "c": {"sft.weight_decay": 0.0},
            "d failing": grpo | {"adapter.r": 8, "grpo.prompts_per_step": 2},
            "e": {"sft.weight_decay": 0.0},
        }
    }
    path = little(tmp_path, tiny_model("llama"), axes=axes, seeds=1)
    assert study(path) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "2 of 5 cells failed; the first, b-nowhere.0" in said
    assert (tmp_path / "out" / "cells" / "d-failing.0" / "base").exists()
    assert not (tmp_path / "out" / "cells" / "d-failing.0" / "outcomes.json").exists()
    a, c, e = (measured(path, f"{name}.0")["sums/worked"] for name in "ace")
    assert a == c == e


def test_a_cell_whose_memory_runs_out_is_one_that_failed(tmp_path, tiny_model, capsys, monkeypatch):
    """In the middle of putting its layers on the base, and in the middle of its outcomes; the next start plays it."""
    full = {"adapter": {"kind": "full", "target_modules": ["q_proj", "v_proj"]}}
    path = little(tmp_path, tiny_model("llama"), axes={"kind": {"a": {}, "b": full, "c": {"adapter.r": 2}, "d": {}}})
    put, wrapped = FailingCall(FullLayer.__init__, 3), outcomes.measured
    monkeypatch.setattr(FullLayer, "__init__", lambda *words: put(*words))
    scored = []

    def measure(probes, player):
        if player.session.config.adapter.largest_rank == 2:
            scored.append(1)
            raise torch.OutOfMemoryError("injected")
        return wrapped(probes, player)

    monkeypatch.setattr(outcomes, "measured", measure)
    assert study(path) == 2
    said = capsys.readouterr()
    assert "3 of 8 cells failed; the first, b.0: memory ran out (injected)" in " ".join(said.err.split())
    assert len(scored) == 2
    out = tmp_path / "out"
    assert measured(path, "a.0")["sums/worked"] == measured(path, "d.0")["sums/worked"]
    rows = {row["setting"]: row for row in csv.DictReader((out / "scores.csv").open())}
    assert {name: int(row["seeds"]) for name, row in rows.items()} == {"a": 1, "b": 1, "d": 1, "c": 0}
    assert "Failed in every seed: c: memory ran out" in (out / "scores.md").read_text()
    assert "Left out, since not all cells have outcomes: seed 0" in (out / "scores.md").read_text()
    monkeypatch.setattr(outcomes, "measured", wrapped)
    before = {cell: (out / "cells" / cell / "outcomes.json").stat().st_mtime_ns for cell in ("a.0", "b.1", "d.1")}
    assert study(path) == 0
    assert before == {cell: (out / "cells" / cell / "outcomes.json").stat().st_mtime_ns for cell in before}
    assert {row["seeds"] for row in csv.DictReader((out / "scores.csv").open())} == {"2"}
    assert "failed" not in (out / "scores.md").read_text()


def test_a_setting_whose_control_failed_has_no_score(tmp_path, tiny_model, capsys):
    nowhere = {"data.source": str(tmp_path / "nowhere.jsonl")}
    axes = {"data": {"a": {}, "twin of a": nowhere, "b": {}, "twin of b": {"sft.lr": 1e-3}}}
    path = little(tmp_path, tiny_model("llama"), axes=axes, controls={"a": "twin of a", "b": "twin of b"}, seeds=1)
    assert study(path) == 2
    rows = {row["setting"]: row for row in csv.DictReader((tmp_path / "out" / "scores.csv").open())}
    assert {name: row["seeds"] for name, row in rows.items()} == {
        "a": "0",
        "twin of a": "0",
        "b": "1",
        "twin of b": "1",
    }
    assert rows["a"]["score"] == ""
    assert "a: its control failed: " in (tmp_path / "out" / "scores.md").read_text()


def test_changed_data_are_told(tmp_path, tiny_model, capsys):
    path = little(tmp_path, tiny_model("llama"), seeds=1)
    assert study(path) == 0
    write_problems(tmp_path / "train.jsonl", 30, 12)
    assert study(path) == 2
    assert "not what the run started with" in capsys.readouterr().err


def test_another_models_base_is_measured_anew(tmp_path, tiny_model, capsys):
    path = little(tmp_path, tiny_model("llama"), seeds=1)
    assert study(path) == 0
    before = (tmp_path / "out" / "base.json").read_text()
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["device"]["dtype"] = "bfloat16"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    study(path)
    assert (tmp_path / "out" / "base.json").read_text() != before


def test_heldout_problems_are_answered(tmp_path, tiny_model, capsys):
    assert (
        study(
            little(tmp_path, tiny_model("llama"), seeds=1, set={"heldout": {"source": str(tmp_path / "heldout.jsonl")}})
        )
        == 0
    )


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"axes": {"adapter.r": []}}, "axes"),
        ({"axes": {"a": {}}}, "axes"),
        ({"axes": {"adapter.r": [4, 4]}}, "twice"),
        ({"set": {"seed": 3}}, "seeds: lists them"),
        ({"axes": {"adapter.r": [4, 100000]}}, "is more than the width"),
        ({"learning": {"sums": {"source": "items.jsonl", "split": "train", "size": 1}}}, "expected two"),
        ({"forgetting": {"own": 1, "max_tokens": 4}}, "expected two"),
        ({"axes": {"rank": {4: {"adapter.r": 4}}}}, "quote"),
        ({"axes": {"adapter.r": 4}}, "axes"),
        ({"axes": {"adapter.r": [4, 8]}, "controls": {8: 4}}, "controls"),
        ({"learning": {"a": {"task": "nothing"}}}, "expected"),
        ({"axes": [4]}, "axes"),
        ({"set": {"sft.evaluate_every": 3}, "axes": {"x": {"y": None}}}, "axes"),
    ],
)
def test_a_wrong_study_is_one_line(tmp_path, tiny_model, capsys, keys, complaint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = little(tmp_path, tiny_model("llama"), **keys)
    code = study(path)
    err = capsys.readouterr().err
    print(err)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("spinfast: ")
    assert complaint in last


def test_seed_in_a_list(tmp_path, tiny_model):
    from spinfast.studies.design import cells_of, load_design

    path = little(tmp_path, tiny_model("llama"), set={"data.source": [{"source": "a.{seed}.jsonl"}]})
    cells = cells_of(load_design(path), tmp_path)
    assert "a.1.jsonl" in str(cells[1].config.data)


@pytest.mark.parametrize("reference", ["0", "7", "-3", "120", "007", "1/2", "0.5", "yes"])
def test_false_results_are_false(reference):
    pool = ["0", "7", "0.5", "1/2", "yes", "no", "2.5"]
    found = outcomes.false_results(reference, pool, random.Random(0))
    assert len({*found}) == outcomes.FALSE
    assert not any(same_math(each, reference) for each in found)


def test_two_results_have_one_false_one():
    assert outcomes.false_results("yes", ["no", "yes"], random.Random(0)) == ["no"]
    with pytest.raises(UserError, match="the result of all items"):
        outcomes.false_results("yes", ["yes"], random.Random(0))


def test_items_of_yes_and_no_and_of_lost_results(tmp_path, tiny_model, capsys):
    rows = [{"question": f"Is {n} even?", "answer": f"See.\n#### {'no' if n % 2 else 'yes'}"} for n in range(6)]
    rows.append({"question": "And 4?", "answer": "It is 14 I think, or no?", "reference": "4"})
    path = little(tmp_path, tiny_model("llama"), seeds=1)
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert study(path) == 0
    assert len(measured(path, "run.0")["sums/choice"]) == 6
    assert "do not end in their results: 1 of 7" in " ".join(capsys.readouterr().out.split())


def test_a_plan_speaks_of_the_score_that_ranks(tmp_path, tiny_model, capsys):
    path = little(tmp_path, tiny_model("llama"), score="sums/margin")
    assert study(path, "--plan") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "what it could find is not told" in said
    assert "found in 80" not in said
    path.write_text(path.read_text().replace("sums/margin", "sum/margin"))
    assert study(path, "--plan") == 2
