"""Who is scored in the held-out game, what is taken from an earlier look, and that it is what scoring anew gives."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_cases import tiny_policy
from safetensors.numpy import load_file, save_file
from test_run import fingerprints, play

from spinfast.evaluate import game, heldout
from spinfast.objectives import Pairwise
from spinfast.scoring import Budget
from spinfast.types import Adapter, Completion

ROUNDS = {"spin": {"iterations": 2, "mix_previous": False}}
SIDES = ("real", "rival", "sample")


@contextmanager
def phase(total, unit):
    yield SimpleNamespace(advance=lambda count, tokens: None)


class Counted:
    """game.logps_in_cut, and how many answers it was asked for."""

    def __init__(self, monkeypatch):
        self.answers, self.function = 0, game.logps_in_cut
        monkeypatch.setattr(game, "logps_in_cut", self)

    def __call__(self, policy, groups, budget):
        self.answers += sum(len(group.answers) for group in groups)
        return self.function(policy, groups, budget)


# Whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def played(tmp_path_factory, tiny_model):
    return play(tmp_path_factory.mktemp("played"), tiny_model("llama"), **ROUNDS)


def test_only_what_is_not_known_is_scored(tmp_path, tiny_model, monkeypatch):
    """Columns of 6 answers each: the base two; the first round's opponent is the base, the second's is no one known."""
    counted, evaluate, columns = Counted(monkeypatch), heldout.evaluate, []

    def looked(*args):
        before = counted.answers
        evaluate(*args)
        columns.append((counted.answers - before) / 6)

    monkeypatch.setattr(heldout, "evaluate", looked)
    run_dir = play(tmp_path, tiny_model("llama"), **ROUNDS)
    assert columns == [2, 4, 5]
    log = (run_dir / "log.txt").read_text()
    assert [f"{name} score held-out: {n}/{n} answers" in log for name, n in
            (("base", 12), ("iter_000", 24), ("iter_001", 30))] == [True] * 3  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"adapter": {"init": "merge"}}, {"sft": {"groups_per_step": 6}}])
def test_what_is_taken_from_the_last_look_is_what_scoring_anew_gives(tmp_path, tiny_model, monkeypatch, changes):
    """Byte by byte; a merge rounds the opponent's weights, so there its old scores are not taken."""
    taken, look_up = [], game.Known.__call__

    def counted(known, key):
        column = look_up(known, key)
        taken.append(column is not None)
        return column

    monkeypatch.setattr(game.Known, "__call__", counted)
    one = fingerprints(play(tmp_path, tiny_model("llama"), "one", **ROUNDS | changes))
    assert sum(taken) >= 4
    monkeypatch.setattr(game.Known, "__call__", lambda known, key: None)
    assert fingerprints(play(tmp_path, tiny_model("llama"), "other", **ROUNDS | changes)) == one
    assert any(path.endswith(heldout.LOGPS) for path in one)


@pytest.mark.parametrize("harm", ["of another run", "of another stage", "unsealed", "values changed", "no file at all"])
def test_a_foreign_or_harmed_file_is_found_out_and_scored_anew(played, tmp_path, tiny_model, monkeypatch, harm):
    """What the last look left is another file at the moment it is read."""
    known = game.Known.__init__

    def harmed(self, path):
        if path.parent.name == "iter_000" and path.exists():
            if harm == "of another run":
                path = tmp_path / "other" / "iter_000" / heldout.LOGPS
            elif harm == "of another stage":
                path = path.parent.parent / "base" / heldout.LOGPS
            elif harm == "no file at all":
                path = path.with_name("none")
            else:
                columns = load_file(path)
                with game.safe_open(path, "np") as file:
                    metadata = file.metadata()
                if harm == "values changed":
                    columns = {name: np.nextafter(column, 0.0) for name, column in columns.items()}
                path = tmp_path / "harmed.safetensors"
                save_file(columns, path, metadata if harm == "values changed" else None)
        known(self, path)

    if harm == "of another run":
        play(tmp_path, tiny_model("llama"), "other", spin={"iterations": 1, "lr": 2e-3})
    monkeypatch.setattr(game.Known, "__init__", harmed)
    counted, evaluate, answers = Counted(monkeypatch), heldout.evaluate, {}

    def looked(run, stage, *args):
        before = counted.answers
        evaluate(run, stage, *args)
        answers.setdefault((run.directory.path.name, stage.name), counted.answers - before)

    monkeypatch.setattr(heldout, "evaluate", looked)
    mine, other = (fingerprints(run) for run in (play(tmp_path, tiny_model("llama"), **ROUNDS), played))
    assert {path for path in mine.keys() | other if mine.get(path) != other.get(path)} <= {"config.yaml"}
    assert answers["run", "iter_001"] > 30


# Columns -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tiny_model):
    return tiny_policy(tiny_model("llama"))


PROMPTS = [(5, 6, 7, i) for i in range(20, 28)]
ANSWERS = {side: [(9 + k, i, 2) for i in range(8)] for k, side in enumerate(SIDES)}


def scored(policy, known=lambda key: None, tokens=48, **sides):
    return game.scored(policy, policy.adapter(), PROMPTS, ANSWERS | sides, Budget(tokens, "sdpa"), known, phase)


def known_by(path, policy, **changes):
    game.write(path, *scored(policy, **changes))
    return game.Known(path)


def test_columns_are_taken_by_what_they_follow_from(policy, tmp_path, monkeypatch):
    known = known_by(tmp_path / "logps", policy)
    counted = Counted(monkeypatch)
    columns, keys = scored(policy, known)
    assert counted.answers == 0
    anew, _ = scored(policy)
    assert all(np.array_equal(columns[who][side], anew[who][side]) for who in anew for side in SIDES)
    for changed in ({"tokens": 40}, {"real": ANSWERS["rival"]}, {"sample": [(3, i) for i in range(8)]}):
        counted.answers = 0
        scored(policy, known, **changed)
        assert counted.answers >= 16, changed
    with torch.no_grad():  # one bit of the adapter
        parameter = next(iter(policy.trainable_parameters().values()))
        parameter.view(torch.int32)[0, 0] ^= 1
        counted.answers = 0
        columns, _ = scored(policy, known)
        parameter.view(torch.int32)[0, 0] ^= 1
    assert counted.answers == 24  # policy and opponent are one, the base is what it was
    assert keys.keys() == {(who, side) for who in columns for side in SIDES}


def test_a_player_that_is_another_one_is_scored_once(policy, monkeypatch):
    counted = Counted(monkeypatch)
    columns, _ = scored(policy)
    assert counted.answers == 2 * 3 * 8
    counted.answers, adapter = 0, policy.adapter()
    policy.load_adapter(Adapter(adapter.config, {name: 0 * tensor for name, tensor in adapter.tensors.items()}))
    columns, _ = scored(policy, rival=ANSWERS["sample"])
    policy.load_adapter(adapter)
    assert counted.answers == 2 * 8  # an adapter that changes nothing is the base, equal sides are one
    for side in SIDES:
        assert np.array_equal(columns["policy"][side], columns["base"][side])
        assert np.array_equal(columns["policy"][side], columns["opponent"][side])
    assert np.array_equal(columns["policy"]["rival"], columns["policy"]["sample"])


def test_an_answer_that_both_sides_gave_has_one_score(policy, monkeypatch):
    """At the game's fixed point the opponent answers as the data does; rounding by place would choose a winner."""
    random = np.random.default_rng(0)
    drawn = lambda policy, groups, budget: [[*-random.random(len(group.answers))] for group in groups]  # noqa: E731
    monkeypatch.setattr(game, "logps_in_cut", drawn)
    players = [SimpleNamespace(real_ids=ids) for ids in ANSWERS["real"]]
    answers = [Completion(i, ids, "stop") for i, ids in enumerate(ANSWERS["real"])]
    other = Adapter(policy.adapter().config, {name: 2 * tensor for name, tensor in policy.adapter().tensors.items()})
    sides = dict.fromkeys(SIDES, ANSWERS["real"])
    columns, _ = game.scored(policy, other, PROMPTS, sides, Budget(48, "sdpa"), lambda key: None, phase)
    metrics = game.metrics(columns, players, answers, answers, Pairwise())
    assert metrics["heldout/pair_accuracy"] == metrics["fresh/auc_log_ratio"] == {"value": 0.5, "stderr": 0.0, "n": 8}
    assert metrics["heldout/margin"] == {"value": 0.0, "stderr": 0.0, "n": 8}
    assert metrics["heldout/real_logp_change"]["stderr"] > 0


COLUMNS = {"policy": {"real": np.array([-1.5, -2.25]), "sample": np.array([-0.5, -4.0])}}
KEYS = {("policy", "real"): "ab" * 32, ("policy", "sample"): "cd" * 32}


@given(st.integers(0, 2**20))
def test_a_flipped_bit_of_a_column_is_never_read(tmp_path_factory, place):
    path = tmp_path_factory.mktemp("columns") / heldout.LOGPS
    game.write(path, COLUMNS, KEYS)
    harmed = bytearray(path.read_bytes())
    harmed[place // 8 % len(harmed)] ^= 1 << place % 8
    path.write_bytes(harmed)
    known = game.Known(path)
    for (who, side), key in KEYS.items():
        column = known(key)
        assert column is None or np.array_equal(column, COLUMNS[who][side])


def test_a_file_of_columns_is_read_by_its_names_and_torn_ones_are_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(game.log, "propagate", True)
    path = tmp_path / heldout.LOGPS
    game.write(path, COLUMNS, KEYS)
    assert {name: column.tolist() for name, column in load_file(path).items()} == {
        "policy.real": [-1.5, -2.25],
        "policy.sample": [-0.5, -4.0],
    }
    content = path.read_bytes()
    game.write(path, COLUMNS, KEYS)
    assert path.read_bytes() == content
    assert game.Known(path)("ab" * 32).tolist() == [-1.5, -2.25]
    for length in (0, 5, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert game.Known(path)("ab" * 32) is None
        assert "is not as it was written; its log-probs are made again" in caplog.text
        caplog.clear()
