"""The controls: what each changes in the pairs, and a whole run with all of them, interrupted and not."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_run import fingerprints, write_config

from spinfast.data.pairs import read_pairs
from spinfast.interrupt import EXIT_CODE, Stopped
from spinfast.methods import controls
from spinfast.methods.controls import CONTROLS, keep, shuffle, toss
from spinfast.report import study
from spinfast.report.cli import write_report
from spinfast.report.read import read_runs
from spinfast.run import main
from spinfast.types import Pair

PAIRS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 30)), unique=True, max_size=40).map(
    lambda keys: [Pair(index, iteration, (1, index), (2, index), (3, index)) for iteration, index in keys]
)


@given(PAIRS, st.integers(0, 5))
def test_shuffling_moves_every_answer_within_its_iteration(pairs, seed):
    dealt = shuffle(pairs, seed)
    assert [replace(new, generated_ids=old.generated_ids) for new, old in zip(dealt, pairs, strict=True)] == pairs
    for iteration in (0, 1):
        before = [pair.generated_ids for pair in pairs if pair.iteration == iteration]
        after = [pair.generated_ids for pair in dealt if pair.iteration == iteration]
        assert sorted(before) == sorted(after)
        assert len(before) < 2 or all(a != b for a, b in zip(after, before, strict=True))


@given(PAIRS, st.integers(0, 5))
def test_the_coin_swaps_whole_pairs_and_falls_alike_in_every_round(pairs, seed):
    tossed = toss(pairs, seed)
    for new, old in zip(tossed, pairs, strict=True):
        assert new in (old, replace(old, real_ids=old.generated_ids, generated_ids=old.real_ids))
    assert toss(pairs[::-1], seed) == tossed[::-1]


def test_the_coin_is_fair():
    pairs = [Pair(i, 0, (1,), (2,), (3,)) for i in range(2000)]
    swapped = sum(pair.real_ids == (3,) for pair in toss(pairs, 0))
    assert abs(swapped - 1000) < 5 * 500**0.5


@pytest.fixture(scope="module")
def with_controls(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("controls")
    command = [str(write_config(folder, tiny_model("llama"))), "--run-dir", str(folder / "run"), "--controls"]
    assert main(command) == 0
    return folder / "run"


def results(run_dir):
    return {row["iteration"]: row for row in json.loads((run_dir / "results.json").read_text())}


def test_every_control_has_the_runs_steps_and_real_answers(with_controls):
    run = results(with_controls)
    for name, dealt in CONTROLS.items():
        arm = with_controls / "controls" / name
        rows = results(arm)
        assert rows["base"]["evaluation"] == run["base"]["evaluation"]
        for iteration in (0, 1):
            assert rows[iteration]["train"]["steps"] == run[iteration]["train"]["steps"]
            assert rows[iteration]["evaluation"]["heldout/perplexity"]["n"] == 6
            parquet = f"iter_{iteration:03d}/pairs.parquet"
            assert read_pairs(arm / parquet) == dealt(read_pairs(with_controls / parquet), 0)
        assert rows[1]["train"]["first_loss"] == pytest.approx(0.6931, abs=1e-3) or dealt is keep


def test_controls_train_to_different_adapters(with_controls):
    arms = [with_controls, *(with_controls / "controls" / name for name in CONTROLS)]
    assert len({(arm / "iter_001/adapter/adapter_model.safetensors").read_bytes() for arm in arms}) == 4


def test_controls_added_to_a_finished_run_and_stopped_in_between(with_controls, tmp_path, tiny_model, monkeypatch):
    command = [str(write_config(tmp_path, tiny_model("llama"))), "--run-dir", str(tmp_path / "run")]
    assert main(command) == 0
    finished = fingerprints(tmp_path / "run")
    whole = controls.train_policy

    def stopped(game, stage, iteration):
        whole(game, stage, iteration)
        raise Stopped

    monkeypatch.setattr(controls, "train_policy", stopped)
    assert main([*command, "--controls"]) == EXIT_CODE
    monkeypatch.setattr(controls, "train_policy", whole)
    assert main([*command, "--controls"]) == 0
    made, expected = fingerprints(tmp_path / "run"), fingerprints(with_controls)
    assert finished.items() <= made.items()
    skipped = {"config.yaml", "inputs.json"}  # they name the folder
    assert {k: v for k, v in made.items() if not k.endswith(tuple(skipped))} == {
        k: v for k, v in expected.items() if not k.endswith(tuple(skipped))
    }


def test_what_follows_self_play_is_played_from_the_controls_own_adapter(tmp_path, tiny_model, capsys):
    few = {"spin": {"iterations": 1}, "evaluate": {"problems": 2, "pairs": 2}, "sft": {"lr": 1e-3}}
    config = write_config(tmp_path, tiny_model("llama"), **few)
    command = [str(config), "method=[spin, sft]", "--run-dir", str(tmp_path / "run"), "--controls"]
    assert main(command) == 0
    arms = [tmp_path / "run", *(tmp_path / "run" / "controls" / name for name in CONTROLS)]
    assert len({(arm / "sft/adapter/adapter_model.safetensors").read_bytes() for arm in arms}) == 4
    assert [row["stage"] for row in results(arms[1]).values()] == ["base", "iter_000", "sft"]
    before = fingerprints(tmp_path / "run")
    assert main(command) == 0
    assert fingerprints(tmp_path / "run") == before
    assert "made again" not in capsys.readouterr().err


def test_without_self_play_there_are_no_controls(tmp_path, tiny_model, capsys):
    config = write_config(tmp_path, tiny_model("llama"), spin=None)
    config.write_text(config.read_text().replace("spin: null", "method: sft"))
    assert main([str(config), "--run-dir", str(tmp_path / "run"), "--controls"]) == 2
    assert "--controls: they are of self-play, method is [sft]" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_report_shows_the_controls_beside_their_run(with_controls, tmp_path):
    runs = read_runs([with_controls])
    assert [run.name for run in runs] == ["run", "run/coin", "run/sft", "run/shuffled"]
    against = {(change.name.split(" ")[0], change.against.split(" ")[0]) for change in study.run_comparisons(runs)}
    assert against == {(f"run/{name}", "run") for name in CONTROLS}
    path, finished = write_report([with_controls], tmp_path / "report.html", png=False)
    assert finished
    line = "<td>run/shuffled (iteration 1)</td><td>run (iteration 1)</td><td>log p(real)</td>"
    assert line in path.read_text()
    card = (with_controls / "controls/coin/iter_000/adapter/README.md").read_text()
    assert "not a model to use" in card
