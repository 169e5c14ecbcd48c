"""SFT and DPO as methods: whole runs on a tiny model, of every kind of data, stopped and gone on."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_adapters import lora, saved
from test_data import RENDERER, load
from test_methods import configured
from test_run import fingerprints, train_rows

from spinfast.data.pairs import read_pairs
from spinfast.interrupt import Stopped
from spinfast.progress import Tick
from spinfast.report.cli import write_report
from spinfast.run import main


def asked(i, *answers):
    """A question and its answers as turns, a doubt between them."""
    turns = [{"role": "user", "content": f"What is {i} plus {i}?"}]
    for answer in answers:
        turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Sure?"}]
    return turns[:-1]


def pairs(first, count):
    return [
        {"prompt": f"What is {i} plus {i}?", "chosen": f"It is {2 * i}.", "rejected": f"Nobody knows {i}, not even I."}
        for i in range(first, first + count)
    ]


def ranked(first, count):
    answers = ["It is so.", "Maybe so.", "Who knows?", "No."]
    return [
        {"prompt": f"What is {i} plus {i}?", "responses": [f"{2 * i}! {answer}" for answer in answers[: 2 + i % 3]]}
        for i in range(first, first + count)
    ]


def labelled(first, count):
    return [
        {"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i + i % 3}.", "label": i % 3 == 0}
        for i in range(first, first + count)
    ]


def spins(first, count):
    return [{"real": asked(i, f"{2 * i}"), "generated": asked(i, "No.")} for i in range(first, first + count)]


def conversations(first, count):
    return [{"messages": asked(i, f"It is {2 * i}.", f"Yes, {2 * i}.")} for i in range(first, first + count)]


def texts(first, count):
    return [{"text": f"The sum of {i} and {i} is {2 * i}."} for i in range(first, first + count)]


def prepared(directory, model, rows, method="dpo", **changes):
    """A config of these methods on 12 rows of data and 6 held-out ones; nothing is generated."""
    names = [method] if isinstance(method, str) else method
    sections = {name: {"groups_per_step": 4, "lr": 1e-2, "epochs": 2, **changes.pop(name, {})} for name in names}
    sections |= {"spin": None, "method": names, "evaluate": {"problems": 0, "pairs": 6}}
    config = configured(directory, model, **(sections | changes))
    for name, first, count in (("train", 0, 12), ("heldout", 50, 6)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(first, count)))
    return config


def play(directory, *overrides, run="run") -> int:
    return main([str(directory / "config.yaml"), *overrides, "--run-dir", str(directory / run)])


def results(run_dir) -> dict[str, dict]:
    return {row["stage"]: row for row in json.loads((run_dir / "results.json").read_text())}


def steps_of(run_dir, stage) -> list[dict]:
    return [row for row in train_rows(run_dir) if row["stage"] == stage]


LOSSES = {
    "pairs": (pairs, "sigmoid"),
    "mpo": (pairs, {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}),
    "no-reference": (pairs, "simpo"),
    "ranked": (ranked, "ipo"),
    "spin": (spins, "hinge"),
    "kto": (labelled, "kto"),
    "taken-apart": (pairs, "apo_zero_unpaired"),
}


@pytest.mark.parametrize(("rows", "loss"), LOSSES.values(), ids=LOSSES)
def test_dpo_learns_what_is_preferred_of_every_kind_of_data(tmp_path, tiny_model, rows, loss):
    prepared(tmp_path, tiny_model("llama"), rows, dpo={"loss": loss})
    run_dir = tmp_path / "run"
    assert play(tmp_path) == 0
    first, *_, last = [row for row in steps_of(run_dir, "dpo") if "rewards/margins" in row]
    assert last["rewards/margins"] > first["rewards/margins"]
    assert (run_dir / "dpo" / "reference.parquet").exists() == (loss != "simpo")
    assert "generation: none" in (run_dir / "log.txt").read_text()
    if loss != "simpo":
        assert results(run_dir)["dpo"]["evaluation"]["heldout/preference_accuracy"]["value"] > 0.6
    assert write_report([run_dir], tmp_path / "report.html", png=False)[1]
    before = fingerprints(run_dir)
    assert play(tmp_path) == 0
    assert fingerprints(run_dir) == before


@pytest.mark.parametrize(
    ("rows", "turns"),
    [(conversations, "first"), (conversations, "all"), (texts, "first"), (pairs, "last"), (labelled, "last")],
)
def test_sft_learns_what_stands_in_the_data(tmp_path, tiny_model, rows, turns):
    prepared(tmp_path, tiny_model("llama"), rows, "sft", data={"turns": turns})
    assert play(tmp_path) == 0
    evaluated = results(tmp_path / "run")
    before, after = (evaluated[stage]["evaluation"]["heldout/perplexity"] for stage in ("base", "sft"))
    assert after["value"] + 2 * after["stderr"] < before["value"]
    first, *_, last = steps_of(tmp_path / "run", "sft")
    assert last["train/loss"] < first["train/loss"]


def test_dpo_after_sft_has_the_sft_stage_as_its_reference(tmp_path, tiny_model):
    prepared(tmp_path, tiny_model("llama"), pairs, ["sft", "dpo"])
    assert play(tmp_path) == 0
    assert [*results(tmp_path / "run")] == ["base", "sft", "dpo"]
    first = steps_of(tmp_path / "run", "dpo")[0]
    assert first["train/loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["rewards/accuracies"] == 0


# The reference -----------------------------------------------------------------------------------------------------


def test_a_reference_is_taken_from_another_run_or_scored_by_base_or_adapter(tmp_path, tiny_model):
    """All of them are the start's, so every run trains the same adapter; after SFT the base is another reference."""
    prepared(tmp_path, tiny_model("llama"), pairs)
    assert play(tmp_path) == 0
    scored = tmp_path / "run" / "dpo" / "reference.parquet"
    adapter = (tmp_path / "run" / "dpo" / "adapter" / "adapter_model.safetensors").read_bytes()
    both = pq.read_table(scored)
    heldout = pq.read_table(scored.with_name("heldout_reference.parquet")).cast(both.schema)
    pq.write_table(pa.concat_tables([heldout, both]), tmp_path / "any order.parquet")
    for number, of in enumerate([tmp_path / "any order.parquet", "base", tmp_path / "run" / "base" / "adapter"]):
        assert play(tmp_path, f"dpo.reference={of}", run=f"again {number}") == 0
        again = tmp_path / f"again {number}" / "dpo"
        assert (again / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
        assert pq.read_table(again / scored.name).select(["tokens", "logp"]) == both.select(["tokens", "logp"])


def test_after_sft_the_base_is_another_reference(tmp_path, tiny_model):
    prepared(tmp_path, tiny_model("llama"), pairs, ["sft", "dpo"], dpo={"reference": "base"})
    assert play(tmp_path) == 0
    assert abs(steps_of(tmp_path / "run", "dpo")[0]["rewards/chosen"]) > 0.1


@pytest.mark.parametrize(
    ("of", "line"),
    [
        ("nowhere", "dpo.reference nowhere: no such file; expected start, base"),
        ("reference.parquet", "12 of 12 groups are not in it, of 24 answers"),
        ("rows.parquet", "expected a reference.parquet of a run"),
    ],
)
def test_a_reference_that_does_not_fit_is_told_in_one_line(tmp_path, tiny_model, capsys, of, line):
    (tmp_path / "first").mkdir()
    prepared(tmp_path / "first", tiny_model("llama"), lambda first, count: pairs(first + 100, count))
    assert play(tmp_path / "first") == 0
    shutil.copy(tmp_path / "first" / "run" / "dpo" / "reference.parquet", tmp_path)
    pq.write_table(pa.table({"tokens": ["x"]}), tmp_path / "rows.parquet")
    prepared(tmp_path, tiny_model("llama"), pairs, dpo={"reference": of if of == "nowhere" else str(tmp_path / of)})
    capsys.readouterr()
    assert play(tmp_path) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1


def test_another_runs_reference_serves_its_heldout_rows_too(tmp_path, tiny_model, caplog):
    prepared(tmp_path, tiny_model("llama"), pairs)
    assert play(tmp_path) == 0
    assert play(tmp_path, f"dpo.reference={tmp_path / 'run' / 'dpo' / 'reference.parquet'}", run="again") == 0
    first, again = (
        (tmp_path / run / "dpo" / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("run", "again")
    )
    assert first == again


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kto_starts_at_its_first_loss_however_steep(tmp_path, tiny_model, dtype):
    """Answers and strangers are scored in the very batches that training and z run."""
    changes = {"dpo": {"loss": "kto", "beta": 1.0}, "device": {"dtype": dtype}}
    prepared(tmp_path, tiny_model("llama"), labelled, **changes)
    assert play(tmp_path) == 0
    first = steps_of(tmp_path / "run", "dpo")[0]
    assert first["train/loss"] == pytest.approx(0.5, abs=1e-6)
    assert first["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_heldout_rows_may_be_longer_than_any_that_is_trained_on(tmp_path, tiny_model, method):
    def rows(first, count):
        longer = {"rejected": "No. " * 60} if first else {}
        return [row | longer for row in pairs(first, count)]

    automatic = {"microbatch_tokens": "auto", "checkpointing": "auto"}
    prepared(tmp_path, tiny_model("llama"), rows, method, train=automatic, **{method: {"groups_per_step": 1}})
    assert play(tmp_path) == 0


def test_heldout_answers_labelled_undesirable_are_not_taken_for_real_ones(tmp_path, tiny_model):
    prepared(tmp_path, tiny_model("llama"), labelled, "sft", sft={"evaluate_every": 3})
    assert play(tmp_path) == 0
    evaluated = results(tmp_path / "run")["sft"]["evaluation"]["heldout/nll"]
    assert evaluated["n"] == 2
    assert evaluated["value"] == pytest.approx(steps_of(tmp_path / "run", "sft")[-1]["heldout/loss"], rel=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
def test_one_statistic_has_one_name(tmp_path, tiny_model, loss):
    """The held-out loss of the last step and the stage's evaluation, of groups of two to four answers."""
    prepared(tmp_path, tiny_model("llama"), ranked, dpo={"loss": loss, "evaluate_every": 3})
    assert play(tmp_path) == 0
    last, evaluated = steps_of(tmp_path / "run", "dpo")[-1], results(tmp_path / "run")["dpo"]["evaluation"]
    assert evaluated["heldout/loss"]["value"] == pytest.approx(last["heldout/loss"], rel=1e-5)
    assert evaluated["heldout/loss"]["stderr"] == pytest.approx(last["heldout/loss_stderr"], rel=1e-4)
    assert 0 <= evaluated["heldout/preference_accuracy"]["value"] <= 1


# Held-out losses on the way ----------------------------------------------------------------------------------------


def unlearnt(first, count):
    """Held-out rows say the opposite of the training rows, so every step makes them worse."""
    rows = pairs(first, count)
    return [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows] if first else rows


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_stage_stops_and_keeps_the_adapter_of_the_least_heldout_loss(tmp_path, tiny_model, method):
    watched = {"evaluate_every": 1, "patience": 3, "keep": "best", "epochs": 6, "lr": 3e-2}
    prepared(tmp_path, tiny_model("llama"), unlearnt, method, **{method: watched})
    assert play(tmp_path) == 0
    run_dir = tmp_path / "run"
    steps = steps_of(run_dir, method)
    losses = [row["heldout/loss"] for row in steps]
    assert len(steps) < 18
    assert "no significant held-out gain in 3 looks" in (run_dir / "log.txt").read_text()
    assert ("heldout/perplexity" in steps[0]) == (method == "sft")
    name = {"sft": "heldout/nll", "dpo": "heldout/loss"}[method]
    start = results(run_dir)["base"]["evaluation"][name]["value"] if method == "sft" else math.log(2)
    assert results(run_dir)[method]["evaluation"][name]["value"] == pytest.approx(min(start, *losses), rel=1e-4)
    assert min(start, *losses) < losses[-1]


@pytest.mark.parametrize("at", [3, 4])
@pytest.mark.parametrize(("method", "loss"), [("sft", None), ("dpo", "sigmoid"), ("dpo", "kto")])
def test_a_stopped_run_goes_on_to_the_same_end(tmp_path, tiny_model, monkeypatch, method, loss, at):
    watched = {"evaluate_every": 2, "patience": 2, "keep": "best", "epochs": 2} | ({"loss": loss} if loss else {})
    rows = labelled if loss == "kto" else pairs
    train = {"save_every_steps": 2}
    prepared(tmp_path, tiny_model("llama"), rows, method, train=train, evaluate={"problems": 0}, **{method: watched})
    assert play(tmp_path, run="whole") == 0
    advance = Tick.advance

    def stopping(tick, *args, **kwargs):
        advance(tick, *args, **kwargs)
        if tick.name == f"{method} train" and tick.done == at:
            raise Stopped

    monkeypatch.setattr(Tick, "advance", stopping)
    assert play(tmp_path) == 75
    monkeypatch.setattr(Tick, "advance", advance)
    assert play(tmp_path) == 0
    assert fingerprints(tmp_path / "run") == fingerprints(tmp_path / "whole")


# What does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "method", "section", "line"),
    [
        (conversations, "dpo", {}, "the data has no such rows; expected prompt, chosen and rejected"),
        (labelled, "dpo", {}, "dpo.loss kto takes labelled answers"),
        (conversations, "dpo", {"loss": "kto"}, "expected prompt, completion and label"),
        (lambda f, n: labelled(f, n)[:1], "dpo", {"loss": "kto"}, "of two prompts or more"),
        (
            lambda f, n: [r | {"label": False} for r in labelled(f, n)],
            "sft",
            {},
            "all are missing or labelled undesirable",
        ),
    ],
)
def test_data_that_a_method_cannot_learn_from_is_told_in_one_line(
    tmp_path, tiny_model, capsys, rows, method, section, line
):
    prepared(tmp_path, tiny_model("llama"), rows, method, **{method: section})
    assert play(tmp_path) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_row_longer_than_the_models_context_is_refused(tmp_path, tiny_model, capsys):
    long = {"prompt": {"max_answer_tokens": 2000}}
    prepared(tmp_path, tiny_model("llama"), lambda first, count: [{"text": "a b " * 400}], "sft", **long)
    assert play(tmp_path) == 2
    assert "has a context of 1024; lower" in capsys.readouterr().err


@pytest.mark.parametrize(("rows", "turns"), [(texts, "first"), (conversations, "all")])
def test_spin_refuses_rows_that_are_no_prompt_and_answer(tmp_path, tiny_model, capsys, rows, turns):
    prepared(tmp_path, tiny_model("llama"), rows, "spin", data={"turns": turns}, spin={"iterations": 1})
    assert play(tmp_path) == 2
    assert "needs one prompt and one answer a row" in capsys.readouterr().err


def test_spin_plays_no_answer_that_is_labelled_undesirable(tmp_path, tiny_model):
    changes = {"spin": {"iterations": 1, "epochs": 1}, "heldout": None, "generation": {"max_tokens": 4}}
    prepared(tmp_path, tiny_model("llama"), labelled, "spin", **changes)
    assert play(tmp_path) == 0
    assert [pair.index % 3 for pair in read_pairs(tmp_path / "run" / "iter_000" / "pairs.parquet")] == [0] * 4
    assert "answers labelled undesirable are not learnt from" in " ".join(
        (tmp_path / "run/log.txt").read_text().split()
    )


def test_what_of_the_data_has_no_use_is_said(tmp_path, tiny_model):
    def rows(first, count):
        return [row | {"messages": asked(7, "No."), "score": 1} for row in pairs(first, count)]

    prepared(tmp_path, tiny_model("llama"), rows, "sft")
    assert play(tmp_path) == 0
    said = " ".join((tmp_path / "run" / "log.txt").read_text().split())
    assert "read as chosen + rejected; messages is not used" in said
    assert said.count("sft learns the answers in 'chosen'; those in 'rejected' are not used") == 1


def test_rows_of_another_format_than_the_loss_takes_are_counted(tmp_path, tiny_model):
    prepared(tmp_path, tiny_model("llama"), pairs)
    other = [{"prompt": f"Q{i}", "completion": "A"} for i in range(5)]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    assert play(tmp_path, f"data.source=[{tmp_path / 'train.jsonl'}, {tmp_path / 'more.jsonl'}]") == 0
    said = " ".join((tmp_path / "run" / "log.txt").read_text().split())
    assert "dpo leaves out 5 of 17 rows: they are not compared with another answer" in said


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        (pairs, {"data": {"turns": "all"}}, "data.turns: all has no use"),
        (texts, {"prompt": {"system": "Be brief."}}, "prompt.system has no use"),
        (pairs, {"generation": {"temperature": 0.5}}, "generation.max_tokens has no use"),
    ],
)
def test_settings_that_the_data_or_the_method_cannot_use_are_named(tmp_path, tiny_model, rows, changes, said):
    prepared(tmp_path, tiny_model("llama"), rows, "sft", **changes)
    assert play(tmp_path) == 0
    assert said in " ".join((tmp_path / "run" / "log.txt").read_text().split())


def test_answers_of_one_label_are_told(tmp_path, tiny_model):
    def wanted(first, count):
        return [row | {"label": True} for row in labelled(first, count)]

    prepared(tmp_path, tiny_model("llama"), wanted, dpo={"loss": "kto"})
    assert play(tmp_path) == 0
    assert "all answers are labelled True" in " ".join((tmp_path / "run" / "log.txt").read_text().split())


@pytest.mark.parametrize(("method", "stage"), [("sft", "sft"), (["sft", "dpo"], "dpo")])
def test_accuracy_that_says_nothing_does_not_choose_the_base(tmp_path, tiny_model, method, stage):
    """A random model answers none of the held-out problems, before and after: the last stage is kept."""

    def rows(first, count):
        return [row | {"reference": "12345"} for row in pairs(first, count)]

    prepared(tmp_path, tiny_model("llama"), rows, method, evaluate={"problems": 2, "max_tokens": 2})
    assert play(tmp_path) == 0
    assert json.loads((tmp_path / "run" / "best.json").read_text())["stage"] == stage
    assert f"best: {stage}/adapter" in " ".join((tmp_path / "run" / "log.txt").read_text().split())


def test_what_cannot_be_held_out_is_said(tmp_path, tiny_model):
    prepared(tmp_path, tiny_model("llama"), pairs, dpo={"evaluate_every": 2, "keep": "best"})
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations(50, 3)))
    assert play(tmp_path) == 0
    said = " ".join((tmp_path / "run" / "log.txt").read_text().split())
    assert "preferences are not held out" in said
    assert "evaluate_every, patience and keep have no use" in said


def test_a_reference_that_will_be_merged_away_is_refused_before_anything_is_trained(tmp_path, tiny_model, capsys):
    prepared(tmp_path, tiny_model("llama"), pairs, ["sft", "dpo"], dpo={"reference": "base"}, adapter={"init": "merge"})
    assert play(tmp_path) == 2
    assert "are merged into the base" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_base_model_without_a_chat_template_learns_plain_text_and_nothing_else(tmp_path, tiny_model, capsys):
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base-model")
    (base / "chat_template.jinja").unlink()
    prepared(tmp_path, base, texts, "sft")
    assert play(tmp_path) == 0
    first, *_, last = steps_of(tmp_path / "run", "sft")
    assert last["train/loss"] < first["train/loss"]
    prepared(tmp_path, base, conversations, "sft")
    capsys.readouterr()
    assert play(tmp_path, run="other") == 2
    assert "no chat template, which questions and answers need" in capsys.readouterr().err


def test_every_turn_of_a_completion_is_learnt(tmp_path, tiny_model):
    rows = [{"prompt": "Rain?", "completion": asked(1, "Soon.")[1:] + asked(2, "Yes.")} for _ in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (example,) = load(tmp_path / "rows.jsonl").examples
    learnt = [token for token, used in zip(example.real_ids, example.scored, strict=True) if used]
    assert RENDERER.text(learnt) == "Soon.Yes."


def test_any_adapter_that_fits_is_a_reference(tmp_path, tiny_model):
    """Of a lower rank and fewer modules; what a run that starts from it has for its own start."""
    other = saved(tiny_model("llama"), tmp_path / "other", lora(r=2, use_rslora=True, target_modules=["q_proj"]))
    found = {}
    for name, changes in {
        "of": {"dpo": {"reference": str(other)}},
        "start": {"adapter": {"start": str(other)}},
        "base": {},
    }.items():
        prepared(tmp_path, tiny_model("llama"), pairs, **changes)
        assert play(tmp_path, run=name) == 0
        found[name] = np.stack(pq.read_table(tmp_path / name / "dpo" / "reference.parquet")["logp"].to_numpy())
    assert found["of"] == pytest.approx(found["start"], rel=1e-5)
    assert np.abs(found["of"] - found["base"]).max() > 0.1


def test_an_adapter_is_no_reference_to_a_merged_base(tmp_path, tiny_model, capsys):
    other = saved(tiny_model("llama"), tmp_path / "other", lora())
    changes = {"dpo": {"reference": str(other)}, "adapter": {"init": "merge"}}
    prepared(tmp_path, tiny_model("llama"), pairs, ["sft", "dpo"], **changes)
    assert play(tmp_path) == 2
    assert "are merged into the base" in capsys.readouterr().err
