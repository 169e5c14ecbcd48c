"""What a run says at its end, from the files of a real run whose verdicts are rewritten."""

import io
import json
import re
import shlex
import shutil

import pytest
from rich.console import Console

from spinfast.report import closing
from spinfast.report.read import read_run
from spinfast.run import main

RIGHT, HALF = [1.0] * 60, [float(i % 2) for i in range(60)]


def printed(width, write):
    console = Console(file=io.StringIO(), width=width)
    write(console)
    return console.file.getvalue()


def test_a_gain_is_told_from_noise_and_from_a_loss(judged):
    for stage in ("base", "sft", "iter_000"):
        judged(stage, HALF)
    strict, flexible, *rest = closing.gains(read_run(judged("iter_001", RIGHT)))
    assert strict.startswith(
        "Strict accuracy went from 50.0 to 100.0 % on 60 held-out rows (base to iteration 1): +50.0, "
    )
    low, high = map(float, re.search(r"95 % interval \+([\d.]+) to \+([\d.]+), p < 0.001", strict).groups())
    assert low < 50 < high
    assert strict.endswith("That is a gain, not noise.")
    assert flexible == strict.replace("Strict", "Flexible")
    assert "flatters" in rest[0]  # the best of three
    one_more = [1.0, *HALF[1:]]
    strict, *_ = closing.gains(read_run(judged("iter_001", one_more)))
    assert "from 50.0 to 51.7 %" in strict
    assert strict.endswith("p = 1. That is within noise: no gain is shown.")
    worse = [0.0] * 40 + HALF[40:]
    first, strict, *_ = closing.gains(read_run(judged("iter_001", worse)))
    judged("sft", worse)
    first, strict, *_ = closing.gains(read_run(judged("iter_000", worse)))
    assert first == "No stage did better than the base on held-out problems."
    assert strict.endswith("That is a loss, not noise.")


def test_nothing_gained_and_nothing_held_out_are_said(played, run_copy):
    assert closing.gains(read_run(played[0]))[0].startswith("Strict accuracy stayed at 0.0 % on 8 held-out rows")
    for path in run_copy.glob("*/heldout.jsonl"):  # as without references
        rows = [json.loads(line) | {"scores": {}} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = [row | {"evaluation": {}} for row in json.loads((run_copy / "results.json").read_text())]
    (run_copy / "results.json").write_text(json.dumps(results))
    lacking, sentence = closing.gains(read_run(run_copy))
    assert lacking == "No held-out row states a result, so there is no accuracy."
    assert sentence.startswith("The log-probability of the data's answers, in nats, went from -")
    for path in run_copy.glob("*/heldout*"):
        path.unlink()
    assert "cannot tell whether it helped" in closing.gains(read_run(run_copy))[0]
    for row in results[1:]:
        row["evaluation"] = {"heldout/preference_accuracy": {"value": 0.75, "stderr": 0.04, "n": 100}}
    (run_copy / "results.json").write_text(json.dumps(results))
    (sentence,) = closing.gains(read_run(run_copy))
    assert sentence.startswith(
        "Preference accuracy is 75.0 % on 100 held-out rows (iteration 1), 95 % interval 65.7 to "
    )
    assert sentence.endswith("That is better than a coin, not noise.")
    (run_copy / "results.json").write_text(json.dumps(results[:1]))
    assert closing.gains(read_run(run_copy)) == ["Nothing was trained, so there is nothing to compare."]
    config = run_copy / "config.yaml"
    config.write_text(re.sub(r"(?ms)^heldout:.*?(?=^\S)", "heldout: null\n", config.read_text()))
    assert "Nothing was held out" in closing.gains(read_run(run_copy))[0]
    assert [*closing.transcripts(read_run(run_copy))] == []


@pytest.mark.parametrize("width", [160, 80, 40])
def test_the_same_problem_before_and_after(judged, width):
    for stage in ("base", "sft", "iter_000"):
        judged(stage, [0.0, 0.0, 1.0])
    run = judged("iter_001", [0.0, 1.0, 1.0])
    path = run / "iter_001" / "heldout.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1] |= {"text": "It\n\n is 105.\x1b[2J\n#### 105", "finish_reason": "stop"}
    lines[0] |= {"text": "words " * 100, "finish_reason": "length"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = printed(width, lambda console: closing.closing(read_run(run), console))
    assert max(len(line) for line in text.splitlines() if "spinfast " not in line) <= width
    assert "\x1b" not in text
    tables = closing.transcripts(read_run(run))
    gained, failed = (" ".join(printed(160, lambda console, t=t: console.print(t)).split()) for t in tables)
    asked = [line["prompt"][-1]["content"] for line in lines]
    assert f"problem {asked[1]} expected {lines[1]['reference']} base (wrong" in gained  # first what was gained
    assert gained.endswith("iteration 1 (right) It is 105. [2J #### 105")
    assert asked[0] in failed  # then what is still wrong
    assert "iteration 1 (wrong, cut)" in failed
    assert failed.count("words") == 40
    assert failed.endswith("…")


def test_what_is_named_next_can_be_done(run_copy, monkeypatch, capsys):
    monkeypatch.chdir(run_copy.parent)
    named = shutil.copytree(run_copy, run_copy.parent / "a run's")
    commands = closing.what_next(read_run(named)).values()
    report, evaluation, own = map(shlex.split, commands)
    assert main([*report[report.index("report") :], "--no-png"]) == 0
    assert (named / "report" / "index.html").is_file()
    assert evaluation[1:] == ["eval", "--adapter", "a run's", "--tasks", "mine.jsonl"]
    assert own[-2:] == ["run", "mine.yaml"]
