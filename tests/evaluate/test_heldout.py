"""The held-out look after a round, in runs of the whole program on a tiny model."""

import json

import pytest
from test_run import play


def evaluations(run_dir):
    return {row["iteration"]: row["evaluation"] for row in json.loads((run_dir / "results.json").read_text())}


@pytest.mark.parametrize(
    ("problems", "pairs", "left"),
    [
        (0, 4, set()),  # evaluation is off
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
