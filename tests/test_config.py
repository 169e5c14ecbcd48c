"""Config: files, overrides, and the one line a wrong key or value gets."""

from pathlib import Path

import pytest
import yaml

from spinfast.config import at, load_config, parse_config, reference_table
from spinfast.errors import UserError

SMALL = {"model": {"name": "m"}, "data": {"source": "d.jsonl"}}
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.fixture
def path(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(SMALL))
    return tmp_path / "c.yaml"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_are_valid_and_survive_a_dump(config):
    loaded = load_config(config)
    assert parse_config(yaml.safe_load(loaded.dump())) == loaded
    assert loaded.heldout is not None


def test_overrides_reach_the_tree_with_yaml_types(path):
    config = load_config(path, ["train.lr=[1e-4, 2e-5]", "spin.iterations=2", "lora.init=merge", "heldout.source=x"])
    assert config.train.lr == (1e-4, 2e-5)
    assert config.spin.iterations == 2
    assert config.heldout.source == "x"
    assert at(config.train.lr, 0) == 1e-4
    assert at(config.train.lr, 7) == 2e-5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.larning_rate=1", ["unknown key 'train.larning_rate'"]),
        ("train.epoch=1", ["unknown key 'train.epoch'", "did you mean 'epochs'"]),
        ("trian.lr=1", ["unknown key 'trian'", "did you mean 'train'"]),
        ("train.epochs=many", ["train.epochs", "integer", "'many'"]),
        ("train.epochs=0", ["train.epochs", "greater than 0", "0"]),
        ("lora.init=restart", ["lora.init", "'continue' or 'merge'", "'restart'"]),
        ("spin.beta=[]", ["spin.beta", "at least 1"]),
        ("model.name.x=1", ["name is a value, not a section"]),
        ("train.lr", ["expected section.key=value"]),
        ("train.lr=[1", ["not valid YAML"]),
        ("train=3", ["train", "got 3"]),
    ],
)
def test_a_wrong_override_names_key_expectation_and_value(path, override, words):
    with pytest.raises(UserError) as error:
        load_config(path, [override])
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {name: m", "not valid YAML"),
        ("- a\n- b", "expected sections"),
        ("model: {name: m}", "data: this key is required"),
        ("", "expected sections"),
        ("\xff", "expected sections"),
    ],
)
def test_a_wrong_file_gets_one_line(tmp_path, text, words):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        load_config(tmp_path / "c.yaml")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file"):
        load_config("nowhere.yaml")


def test_the_hash_names_the_computation(path):
    assert load_config(path).hash() == load_config(path).hash()
    assert load_config(path).hash() != load_config(path, ["seed=1"]).hash()


def test_every_key_is_described():
    lines = reference_table().splitlines()[2:]
    assert len(lines) > 50
    assert not [line for line in lines if line.endswith("| None |") or "|  |" in line]


def test_the_printed_reference_is_in_the_docs():
    assert reference_table() in (Path(__file__).parent.parent / "docs" / "config.md").read_text()
