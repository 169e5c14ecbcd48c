"""Config: files, overrides, and the one line a wrong key or value gets."""

import re
from pathlib import Path

import pytest
import yaml

from spinfast.config import Config, at, load_config, parse_config, reference_table
from spinfast.errors import UserError
from spinfast.methods import METHODS

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
    config = load_config(path, ["spin.lr=[1e-4, 2e-5]", "spin.iterations=2", "adapter.init=merge", "heldout.source=x"])
    assert config.spin.lr == (1e-4, 2e-5)
    assert config.spin.iterations == 2
    assert config.heldout.source == "x"
    assert config.adapter.init == "merge"
    assert at(config.spin.lr, 0) == 1e-4
    assert at(config.spin.lr, 7) == 2e-5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.larning_rate=1", ["unknown key 'train.larning_rate'"]),
        ("spin.epoch=1", ["unknown key 'spin.epoch'", "did you mean 'epochs'"]),
        ("trian.checkpointing=1", ["unknown key 'trian'", "did you mean 'train'"]),
        ("spin.epochs=many", ["spin.epochs", "integer", "'many'"]),
        ("spin.epochs=0", ["spin.epochs", "greater than 0", "0"]),
        ("iterations=2", ["unknown key 'iterations'", "did you mean 'spin.iterations'?"]),
        ("lr=1", ["did you mean 'sft.lr' or 'spin.lr' or 'dpo.lr' or 'grpo.lr'?"]),
        ("adapter.init=restart", ["adapter.init", "'continue' or 'merge'", "'restart'"]),
        ("adapter.kind=dora", ["adapter.kind", "lora, lora_xs, tiny_lora, full", "'dora'"]),
        ("lora.r=8", ["lora: is now adapter"]),
        ("method=ppo", ["method: expected sft, spin, dpo, grpo, got 'ppo'; did you mean 'dpo'?"]),
        ("method=stf", ["method: expected sft, spin, dpo, grpo, got 'stf'; did you mean 'sft'?"]),
        ("base_model=x", ["unknown key 'base_model'; it is model: {name: ...} here"]),
        ("method=GRPO", ["got 'GRPO'; did you mean 'grpo'?"]),
        ("method=kto", ["got 'kto'; it is a dpo.loss"]),
        ("method=[spin, sft, spin]", ["method", "each method once"]),
        ("sft.lr=1e-4", ["section sft has no use", "method is [spin]", "name sft there too"]),
        ("spin.beta=[]", ["spin.beta", "at least 1"]),
        ("spin.beta=0", ["spin.beta", "greater than 0"]),
        ("sft.lr=[1e-4, 1e-5]", ["sft.lr", "at most 1"]),
        ("model.name.x=1", ["name is a value, not a section"]),
        ("spin.lr", ["expected section.key=value"]),
        ("spin.lr=", ["expected section.key=value"]),
        ("spin.lr=[1", ["not valid YAML"]),
        ("train=3", ["train", "got 3"]),
        (
            "grpo.num_generations=4",
            ["unknown key 'grpo.num_generations'", "it is grpo.samples here"],
        ),
        ("num_generations=4", ["is grpo.samples here"]),
        ("grpo.max_completion_length=200", ["is generation.max_tokens here"]),
        ("sft.learning_rate=1e-5", ["it is lr here"]),
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
    ("overrides", "words"),
    [
        (["generation.temperature=0"], "gives one and the same answer"),
        (["grpo.correction=token_mask", "grpo.correction_max=0.5"], "correction_max: input should be greater than 1"),
        (["grpo.aggregation=normalize_then_sum", "grpo.scale_rewards=none"], "scale_rewards has no use"),
        (["grpo.loss=cispo", "grpo.epsilon_high=0.28"], "of cispo it bounds the ratio itself"),
        (["grpo.epsilon=1.5"], "epsilon: input should be less than 1"),
    ],
)
def test_what_grpo_would_train_nothing_by_or_ignore_is_refused(path, overrides, words):
    with pytest.raises(UserError, match=words):
        load_config(path, ["method=grpo", *overrides])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {name: m", "not valid YAML"),
        ("model: {name: m}\nmodel: {name: n}", "not valid YAML: line 1: model is there twice"),
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


def test_spaces_around_the_equals_sign_of_a_quoted_override_are_nothing(path):
    assert load_config(path, ["spin.lr = 1e-4"]).spin.lr == (1e-4,)


@pytest.mark.parametrize("name", ["tr.jsonl", "tr.csv", "tr.parquet", "tr.jsonl.gz"])
def test_data_in_the_place_of_a_config_is_told_apart(tmp_path, name):
    (tmp_path / name).write_text('{"question": "a"}\n{"question": "b"}\n')
    with pytest.raises(UserError, match=rf"a data file, expected a YAML file; .* data.source=.*{name}"):
        load_config(tmp_path / name)


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file"):
        load_config("nowhere.yaml")


def test_the_hash_names_the_computation(path):
    assert load_config(path).hash() == load_config(path).hash()
    assert load_config(path).hash() != load_config(path, ["seed=1"]).hash()


MACHINERY = {"save_every_steps": 7, "save_every_seconds": 9.0, "max_overflows": 3}


@pytest.mark.parametrize(
    "changes",
    [
        {"report_to": ["trackio"]},
        {"train": MACHINERY},
        {"train": {"microbatch_tokens": "auto"}},
        {"spin": {"iterations": 3, "beta": 0.1, "lr": [1e-5], "groups_per_step": 16}},
        {"adapter": {"kind": "lora", "r": 16, "alpha": 32}, "seed": 0, "heldout": None},
        {"method": "spin"},
        {"method": ["spin"], "spin": {}},
    ],
    ids=str,
)
def test_the_hash_is_the_same_where_the_results_are(changes):
    assert parse_config(SMALL | changes).hash() == parse_config(SMALL).hash()


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"spin": {"groups_per_step": 8}},
        {"adapter": {"r": 8}},
        {"train": {"microbatch_tokens": 512}},
        {"method": "sft"},
        {"method": ["sft", "spin"]},
        {"heldout": {"source": "d.jsonl"}},
    ],
    ids=str,
)
def test_the_hash_is_another_where_the_results_may_be(changes):
    assert parse_config(SMALL | changes).hash() != parse_config(SMALL).hash()


def test_saves_and_trackers_do_not_change_a_config_that_has_other_machinery():
    fixed = {"train": {"microbatch_tokens": 512}}
    assert parse_config(SMALL | {"train": fixed["train"] | MACHINERY}).hash() == parse_config(SMALL | fixed).hash()


def test_methods_are_the_sections_with_optimisation_keys():
    assert Config.methods() == [*METHODS]


def test_every_key_is_described():
    lines = reference_table().splitlines()[2:]
    assert len(lines) > 50
    keys = [line.split("`")[1] for line in lines]
    plain = [line.split("`")[1] for line in lines if "| of " not in line]  # of another kind: another default
    assert len({*plain}) == len(plain)
    assert {"method", "adapter.kind", "sft.groups_per_step", "spin.lr", "spin.groups_per_step"} <= {*keys}
    assert not [line for line in lines if line.endswith("| None |") or "|  |" in line]


def test_the_printed_reference_is_in_the_docs():
    assert reference_table() in (Path(__file__).parent.parent / "docs" / "config.md").read_text()


def test_a_method_on_the_command_line_leaves_the_files_other_methods_out(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {name: x}\ndata: {source: y}\nspin: {iterations: 2}\n")
    assert load_config(path, ["method=sft"]).method == ("sft",)
    assert load_config(path, ["method=[sft, spin]"]).spin.iterations == 2
    with pytest.raises(UserError, match="section spin has no use"):  # what is said there itself is meant
        load_config(path, ["method=sft", "spin.lr=1e-5"])


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"generation": {"temperature": 0}}, "config: generation.temperature: 0 gives one and the same answer"),
        ({"generation": {"top_p": 0.9}}, "must sample from it; expected 1, got 0.9"),
        ({"grpo": {"scale_rewards": "none", "aggregation": "normalize_then_sum"}}, "scale_rewards has no use"),
        ({"grpo": {"old_logps": "sampler", "correction_max": 3}}, "correction_max has no use with old_logps sampler"),
        ({"grpo": {"loss": "sapo", "epsilon": 0.1}}, "epsilon has no use with loss sapo"),
    ],
)
def test_what_grpo_cannot_train_by_is_refused(sections, words):
    with pytest.raises(UserError, match=re.escape(words)):
        parse_config(SMALL | {"method": "grpo"} | sections)
