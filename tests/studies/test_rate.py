"""`spinfast rate`: equal budgets, twins, controls; a preset's base; what is said of a text that holds the items."""

import csv
import json
from collections import Counter

import pyarrow.parquet as pq
import pytest
import yaml
from test_study import write_study

from spinfast.run import main


@pytest.fixture(scope="module")
def rated(tmp_path_factory, tiny_model):
    """Two texts, one of them short and one that holds an item."""
    directory = tmp_path_factory.mktemp("rate")
    preset = write_study(directory, tiny_model("llama"), set={"prompt.max_prompt_tokens": 128})
    (directory / "whale.txt").write_text("The whale swam on and on. ")
    item = json.loads((directory / "items.jsonl").read_text().splitlines()[0])
    (directory / "book.txt").write_text("".join(f"Page {n}. " for n in range(400)) + item["question"] + item["answer"])
    texts = [str(directory / name) for name in ("whale.txt", "book.txt")]
    words = [
        "rate",
        *texts,
        "--preset",
        str(preset),
        "--dir",
        str(directory / "out"),
        "--tokens",
        "192",
        "--length",
        "48",
    ]
    assert main(words) == 0
    return directory


def rows(directory, name):
    return pq.read_table(directory / "out" / "texts" / f"{name}.parquet")["input_ids"].to_pylist()


def test_every_text_and_its_twin_train_as_many_tokens(rated):
    names = ("whale", "book", "sums-right", "sums-wrong", "mixture")
    for name in names:
        for seed in (0, 1):
            own, twin = rows(rated, f"{name}.{seed}"), rows(rated, f"{name}.shuffled.{seed}")
            assert sum(len(row) - 1 for row in own) == 192
            assert [*map(len, own)] == [*map(len, twin)]
            inner, shuffled = (Counter(token for row in of for token in row) for of in (own, twin))
            assert sum((inner - shuffled).values()) <= len(own)
            assert own != twin
    assert rows(rated, "book.0") != rows(rated, "book.1")


def test_a_text_is_scored_over_its_twin(rated):
    lines = csv.DictReader((rated / "out" / "scores.csv").open())
    named = "text sha256 tokens passes seeds score ci_low ci_high p_holm group forgetting floor_flag reliability"
    assert lines.fieldnames[:13] == named.split()
    table = {row["text"]: row for row in lines}
    assert {name for name, row in table.items() if row["p_holm"]} == {
        *("whale", "book", "sums-right", "sums-wrong", "mixture")
    }
    for name in ("whale", "book"):
        assert table[name]["control"] == f"{name}, shuffled"
        own, twin = (float(table[of]["sums/worked"]) for of in (name, f"{name}, shuffled"))
        assert float(table[name]["score"]) == pytest.approx(own - twin)
        assert len(table[name]["sha256"]) == 64
        assert int(table[name]["tokens"]) == 192
    assert float(table["whale"]["passes"]) > 5 > 1 > float(table["book"]["passes"])


def test_a_text_that_holds_an_item_is_named(rated):
    said = (rated / "out" / "scores.md").read_text()
    assert "book shares runs of 13 words with 12% of the items of sums; 1 are in it whole, of item 1 100%" in said
    assert "whale shares" not in said


def test_the_study_can_be_played_as_one(rated, capsys):
    assert main(["study", str(rated / "out" / "study.yaml"), "--dir", str(rated / "out")]) == 0
    assert "whale" in capsys.readouterr().out
    assert yaml.safe_load((rated / "out" / "study.yaml").read_text())["controls"]["book"] == "book, shuffled"


def test_a_text_too_short_for_its_budget_is_refused(rated, capsys):
    """Its rows would be equal, of which a run takes one: it would train less than the others."""
    preset = ["--preset", str(rated / "study.yaml"), "--dir", str(rated / "short")]
    (rated / "tiny.txt").write_text("The whale.")
    assert main(["rate", str(rated / "tiny.txt"), *preset, "--tokens", "8192", "--length", "48"]) == 2
    assert "text tiny: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nowhere.txt"], "no such file"),
        (["sums:right", "--tokens", "0"], "--tokens"),
        (["sums:right", "--length", "1"], "--length"),
        (["sums:right", "--seeds", "0"], "--seeds: expected at least 1"),
        (["sums:right", "--preset", "none.yaml"], "no such file"),
    ],
)
def test_what_cannot_be_rated_is_one_line(rated, capsys, words, complaint):
    preset = [] if "--preset" in words else ["--preset", str(rated / "study.yaml")]
    assert main(["rate", *words, *preset, "--dir", str(rated / "other")]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("spinfast: ")
    assert complaint in last


def rate(rated, *words):
    where = ["--preset", str(rated / "study.yaml"), "--dir", str(rated / "other")]
    return main(["rate", *words, *where, "--tokens", "192", "--length", "48"])


def test_two_texts_of_one_file_are_refused(rated, capsys):
    (rated / "whale.shuffled").mkdir()
    (rated / "whale.shuffled" / "a.txt").write_text("Another whale. ")
    assert rate(rated, str(rated / "whale.txt"), str(rated / "whale.shuffled")) == 2
    assert "two texts would have one file, whale.shuffled.0.parquet" in capsys.readouterr().err


def test_another_budget_in_the_same_directory_is_told(rated, capsys):
    """The cells that are there trained another one."""
    texts = [str(rated / name) for name in ("whale.txt", "book.txt")]
    before = (rated / "out" / "scores.csv").read_text()
    words = ["--preset", str(rated / "study.yaml"), "--dir", str(rated / "out"), "--length", "48"]
    assert main(["rate", *texts, *words, "--tokens", "96"]) == 2
    assert "data is not what the run started with" in " ".join(capsys.readouterr().err.split())
    assert (rated / "out" / "scores.csv").read_text() == before


def test_a_text_that_is_trained_and_tells_forgetting_is_named(rated, capsys):
    assert rate(rated, str(rated / "other.txt"), "--plan") == 0
    assert "other is trained on and tells forgetting" in " ".join(capsys.readouterr().out.split())


def test_how_the_base_config_reads_its_own_data_is_not_asked_of_texts(rated, tmp_path, capsys):
    config = yaml.safe_load((rated / "config.yaml").read_text())
    config["data"] |= {"turns": "all", "columns": {"question": "q", "answer": "a"}, "subset": "main", "split": "test"}
    preset = yaml.safe_load((rated / "study.yaml").read_text()) | {"base": "own.yaml"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(preset))
    assert rate(tmp_path, str(rated / "whale.txt"), "--plan") == 0, capsys.readouterr().err
