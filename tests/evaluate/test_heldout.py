"""The held-out look after a round, in runs of the whole program on a tiny model."""

import json
from types import SimpleNamespace

import pytest
from fixtures import FailingCall
from safetensors.torch import load_file
from test_methods import configured, opened
from test_run import SMALL, fingerprints, play

from spinfast import methods, scoring
from spinfast.config import Data, Source
from spinfast.data import load_data
from spinfast.evaluate import heldout
from spinfast.evaluate.references import FLEXIBLE, STRICT
from spinfast.methods import spin
from spinfast.report.cli import write_report
from spinfast.report.read import read_run
from spinfast.run import main


def evaluations(run_dir):
    return {row["iteration"]: row["evaluation"] for row in json.loads((run_dir / "results.json").read_text())}


@pytest.mark.parametrize(
    ("problems", "pairs", "left"),
    [
        (0, 0, set()),  # evaluation is off
        (4, 0, {"heldout/accuracy_strict", "heldout/accuracy_flexible"}),  # no game is played
    ],
)
def test_what_is_turned_off_is_left_out_and_done_again_by_no_resume(tmp_path, tiny_model, problems, pairs, left):
    settings = {"evaluate": {"problems": problems, "pairs": pairs}, "spin": {"iterations": 1}}
    run_dir = play(tmp_path, tiny_model("llama"), **settings)
    assert {name: set(found) for name, found in evaluations(run_dir).items()} == {"base": left, 0: left}
    assert {path.name for path in run_dir.glob("*/heldout*")} == ({"heldout.jsonl"} if problems else set())
    play(tmp_path, tiny_model("llama"), **settings)
    assert " again" not in (run_dir / "log.txt").read_text()


def test_an_early_stop_waits_for_the_iterations_it_was_asked_for_and_ends_the_run(tmp_path, tiny_model):
    spin = {"iterations": 4, "stop_patience": 2}
    run_dir = play(tmp_path, tiny_model("llama"), spin=spin, sft={"groups_per_step": 6})
    assert [*evaluations(run_dir)] == ["base", "sft", 0, 1]  # a random model's accuracy stays 0
    assert "no held-out gain over the base in the last 2 iterations" in (run_dir / "log.txt").read_text()
    assert read_run(run_dir).finished


def test_settings_of_the_game_that_cannot_have_an_effect_are_told(tmp_path, tiny_model):
    spin = {"iterations": 1, "stop_patience": 1, "lr": [1e-3, 1e-4], "beta": [0.1]}
    run_dir = play(tmp_path, tiny_model("llama"), spin=spin, evaluate={"problems": 0, "pairs": 0})
    log = (run_dir / "log.txt").read_text()
    assert "spin.stop_patience has no use" in log
    assert "spin.lr has 2 values, only the first 1" in log
    assert "spin.beta has" not in log


def test_the_bases_loss_is_that_of_a_margin_of_0(tmp_path, tiny_model):
    run_dir = play(tmp_path, tiny_model("llama"), spin={"iterations": 1, "loss": "hinge"})
    assert evaluations(run_dir)["base"]["heldout/loss"] == {"value": 1.0, "stderr": 0.0, "n": 6}


def test_prompts_alone_are_answered_and_compared_and_no_likelihood_is_taken(tmp_path, tiny_model):
    config = configured(tmp_path, tiny_model("llama"), method="sft", spin=None, sft={"groups_per_step": 6})
    prompts = [{"prompt": f"What is {i} plus 1?", "reward_model": {"ground_truth": str(i + 1)}} for i in range(3)]
    for name in ("train", "heldout"):
        rows = "".join(json.dumps(row | {"set": name}) + "\n" for row in prompts)
        (tmp_path / f"{name}-prompts.jsonl").write_text(rows)
    update = {
        "method": ("sft", "grpo"),
        "data": Data(source=[Source(source=str(tmp_path / name)) for name in ("train.jsonl", "train-prompts.jsonl")]),
        "heldout": Data(source=str(tmp_path / "heldout-prompts.jsonl")),
    }
    with opened(config, tmp_path / "run") as run:
        loaded = load_data(config.model_copy(update=update), run.session.machine.renderer)
        run.examples, run.heldout = loaded["data"].examples, loaded["heldout"].examples
        run.examples.sort(key=lambda example: len(example.real_ids))  # the canary reads the first
        rows = list(methods.play(run))
    assert len(run.examples) == 15
    for row in rows:
        assert {*row["evaluation"]} == {"heldout/accuracy_strict", "heldout/accuracy_flexible"}
        assert {metric["n"] for metric in row["evaluation"].values()} == {3}
    assert not list((tmp_path / "run").glob("*/heldout_logps*"))
    assert json.loads((tmp_path / "run/sft/train.json").read_text())["steps"] == 2  # of the 12 answers
    transcripts = read_run(tmp_path / "run").transcripts["sft"]
    assert [(row["real"], row["reference"]) for row in sorted(transcripts, key=lambda row: row["index"])] == [
        ("", str(i + 1)) for i in range(3)
    ]


@pytest.mark.parametrize("fails_at", range(1, 7))
def test_who_is_compared_is_scored_in_one_cut(tmp_path, tiny_model, monkeypatch, fails_at):
    """Memory runs out at any forward; a policy that did not move (lr 0) has its opponent's log-probs, bit for bit."""
    monkeypatch.setattr(scoring, "batch_sequence_logps", FailingCall(scoring.batch_sequence_logps, fails_at))
    settings = {"spin": {"lr": 0.0, "iterations": 1}, "prompt": SMALL}
    run_dir = play(tmp_path, tiny_model("llama"), **settings)
    log = (run_dir / "log.txt").read_text()
    assert "memory ran out" in log
    assert "the game is over" not in " ".join(log.split())
    for name, found in evaluations(run_dir).items():
        assert found["heldout/pair_accuracy"] == found["fresh/auc_log_ratio"] == {"value": 0.5, "stderr": 0.0, "n": 6}
        assert found["heldout/margin"] == found["heldout/real_logp_change"] == {"value": 0.0, "stderr": 0.0, "n": 6}
        logps = load_file(run_dir / ("base" if name == "base" else "iter_000") / "heldout_logps.safetensors")
        for answer in ("real", "sample", "rival"):
            assert logps[f"policy.{answer}"].equal(logps[f"opponent.{answer}"])
            assert logps[f"policy.{answer}"].equal(logps[f"base.{answer}"])


def test_the_best_is_kept_by_a_reading_that_says_something(tmp_path):
    """A model that learns by a reward need never write the data's form: its strict verdicts are all 0."""
    stages = []
    for name, strict, flexible in (("base", "000", "100"), ("grpo", "000", "110"), ("more", "000", "010")):
        stages.append(SimpleNamespace(name=name, path=(tmp_path / name).joinpath))
        scores = [{STRICT: float(s), FLEXIBLE: float(f)} for s, f in zip(strict, flexible, strict=True)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "heldout.jsonl").write_text("".join(json.dumps({"scores": s}) + "\n" for s in scores))
    heldout.keep_best(SimpleNamespace(path=tmp_path), stages)
    assert json.loads((tmp_path / "best.json").read_text())["stage"] == "grpo"
    scores = [{STRICT: 1.0, FLEXIBLE: 0.0}] * 3
    (tmp_path / "base" / "heldout.jsonl").write_text("".join(json.dumps({"scores": s}) + "\n" for s in scores))
    assert heldout.verdicts(stages) == [[1.0] * 3, [0.0] * 3, [0.0] * 3]
    for stage, paid in zip(stages, (0.5, 0.25, 0.75), strict=True):  # with rewards these decide
        lines = [json.dumps({"scores": s, "reward": paid}) + "\n" for s in scores]
        stage.path("heldout.jsonl").write_text("".join(lines))
    heldout.keep_best(SimpleNamespace(path=tmp_path), stages)
    assert json.loads((tmp_path / "best.json").read_text())["stage"] == "more"


def test_where_all_did_equally_well_the_last_stage_is_kept_and_called_so(tmp_path, caplog):
    stages = [SimpleNamespace(name=name, path=(tmp_path / name).joinpath) for name in ("base", "sft")]
    for stage in stages:
        stage.path("").mkdir()
        stage.path("heldout.jsonl").write_text(json.dumps({"scores": {STRICT: 0.0}}) + "\n")
    with caplog.at_level("INFO", logger="spinfast"):
        heldout.keep_best(SimpleNamespace(path=tmp_path), stages)
    assert "best: sft/adapter, the last stage: all did equally well" in caplog.text


# evaluate.every ---------------------------------------------------------------------------------------------------

FOUR = {"iterations": 4, "mix_previous": False}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory, tiny_model):
    """Four iterations, all looked at, and the same with a look at every third."""
    folder = tmp_path_factory.mktemp("sparse")
    return [play(folder, tiny_model("llama"), f"every{n}", spin=FOUR, evaluate={"every": n}) for n in (1, 3)]


def test_only_every_nth_iteration_and_the_last_are_evaluated_and_no_figure_of_theirs_depends_on_it(sparse):
    """An iteration whose opponent was not looked at draws that one's samples for itself."""
    all_of_them, some = map(fingerprints, sparse)
    looks = [name for name in ("base", "iter_000", "iter_001", "iter_002", "iter_003") if f"{name}/eval.json" in some]
    assert looks == ["base", "iter_002", "iter_003"]
    assert {path for path in all_of_them if path not in some} == {
        f"iter_00{t}/{name}" for t in (0, 1) for name in heldout.OUTPUTS
    }
    assert {path for path in some if some[path] != all_of_them[path]} <= {"config.yaml", "best.json"}
    rows = evaluations(sparse[1])
    assert rows == evaluations(sparse[0]) | {0: {}, 1: {}}


def test_a_run_that_is_not_looked_at_everywhere_is_resumed_reported_and_has_a_best(sparse, tmp_path):
    before = fingerprints(sparse[1])
    assert main([str(sparse[1].parent / "config.yaml"), "--run-dir", str(sparse[1])]) == 0
    assert fingerprints(sparse[1]) == before
    assert " again" not in (sparse[1] / "log.txt").read_text()
    best = json.loads((sparse[1] / "best.json").read_text())
    assert best["of"] == ["base", *(f"iter_00{t}" for t in range(4))]
    assert best["stage"] in ("base", "iter_002", "iter_003")
    assert write_report(sparse, tmp_path / "report.html")


def test_patience_counts_the_iterations_that_were_looked_at(tmp_path, tiny_model):
    spin = FOUR | {"iterations": 6, "stop_patience": 2}
    run_dir = play(tmp_path, tiny_model("llama"), spin=spin, evaluate={"every": 2, "pairs": 0})
    assert [*evaluations(run_dir)] == ["base", 0, 1, 2, 3]
    assert "no held-out gain over the base in the last 2 iterations" in (run_dir / "log.txt").read_text()


def test_the_last_iteration_of_a_game_that_is_won_is_evaluated(tmp_path, tiny_model, monkeypatch):
    make = spin.make_pairs
    monkeypatch.setattr(spin, "make_pairs", lambda *args: ([], {}) if args[2] == 2 else make(*args))
    settings = {"spin": FOUR, "evaluate": {"every": 3}, "adapter": {"init": "merge"}}
    run_dir = play(tmp_path, tiny_model("llama"), **settings)
    assert {name: bool(found) for name, found in evaluations(run_dir).items()} == {"base": True, 0: False, 1: True}
    assert json.loads((run_dir / "best.json").read_text())["of"] == ["base", "iter_000", "iter_001"]
    before = fingerprints(run_dir)
    play(tmp_path, tiny_model("llama"), **settings)
    assert fingerprints(run_dir) == before


def test_a_stride_of_looks_without_iterations_is_told(tmp_path, tiny_model):
    config = configured(tmp_path, tiny_model("llama"), method="sft", spin=None, sft={}, evaluate={"every": 2})
    with opened(config, tmp_path / "run"):
        assert "evaluate.every has no use" in (tmp_path / "run/log.txt").read_text()
