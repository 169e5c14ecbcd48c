"""GRPO end to end on a tiny model: what a rollout holds, that a reward is learnt, that a run stops and goes on."""

import json
import os
import signal

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from test_run import fingerprints, train_rows, write_config

from spinfast.config import load_config
from spinfast.errors import UserError
from spinfast.interrupt import EXIT_CODE
from spinfast.methods.grpo import load
from spinfast.run import main
from spinfast.store import rollouts

REWARDS = '''
def vowels(completions, **kwargs):
    """The share of vowels: dense, and learnable by a model that knows no words."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in texts]

def nothing(completions, answer, log_extra, log_metric):
    log_extra("answer", answer)
    log_metric("seen", len(completions))
    return [None] * len(completions)
'''


def grpo_config(directory, model, grpo, method="grpo", **sections):
    path = write_config(directory, model, heldout=None, **sections)
    (directory / "rewards.py").write_text(REWARDS)
    tree = yaml.safe_load(path.read_text())
    del tree["spin"]
    tree["method"] = method
    own = {"rewards": f"{directory}/rewards.py:vowels", "prompts_per_step": 3, "samples": 4, "steps": 4, "lr": 1e-3}
    tree["grpo"] = own | grpo
    path.write_text(yaml.safe_dump(tree))
    return path


def play(directory, model, name="run", method="grpo", grpo=(), **sections):
    config = grpo_config(directory, model, dict(grpo), method, **sections)
    assert main([str(config), "--run-dir", str(directory / name)]) == 0
    return directory / name


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


def answers(run):
    return [row for path in rollouts.kept(run / "grpo") for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def played(tmp_path_factory, model):
    return play(tmp_path_factory.mktemp("grpo"), model)


def test_a_step_on_its_own_answers_has_ratio_1_and_figures_under_trls_names(played):
    rows = train_rows(played)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        assert row["clip_ratio/region_mean"] == row["frac_reward_zero_std"] == 0
        assert row["reward"] == row["rewards/vowels/mean"] > 0
    assert rows[-1]["num_tokens"] == sum(row["train/tokens"] for row in rows)


def test_a_rollout_is_a_table_of_what_was_sampled_and_how_it_was_rated(played):
    found = answers(played)
    assert len(found) == 4 * 3 * 4
    for row in found:
        assert len(row["sampler_logps"]) == len(row["completion_ids"]) > 0
        assert row["reward"] == row["rewards/vowels"]
        assert [row["old_logps"], row["reference_logps"]] == [None, None]
    for group in (found[i : i + 4] for i in range(0, len(found), 4)):
        rewards = torch.tensor([row["reward"] for row in group])
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        assert torch.tensor([row["advantage"] for row in group]).tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    prompts = [row["index"] for row in found[::4]]
    assert sorted(prompts) == list(range(12))  # an epoch: each once


def test_a_dense_reward_is_learnt(tmp_path, model):
    run = play(tmp_path, model, grpo={"steps": 30, "lr": 0.01, "samples": 8, "schedule": "constant"})
    rewards = [row["reward"] for row in train_rows(run)]
    assert sum(rewards[-5:]) / 5 > 2 * sum(rewards[:5]) / 5


@pytest.mark.parametrize(
    "grpo",
    [
        {"steps": 6, "steps_per_generation": 2, "num_iterations": 2, "beta": 0.1, "loss": "grpo"},
        {"steps": 3, "loss": "gspo", "scale_rewards": "batch", "beta": 0.1, "reference": "base"},
        {"steps": 3, "loss": "cispo", "baseline": "leave_one_out", "mask_truncated": True},
        {"steps": 3, "num_iterations": 3, "old_logps": "sampler", "loss": "dr_grpo", "scale_rewards": "none"},
        {"steps": 2, "prompts_per_step": 13, "samples": 3, "loss": "sapo"},  # more prompts than there are
    ],
)
def test_every_way_to_go_trains_and_goes_on_to_the_bit(tmp_path, model, grpo, monkeypatch):
    """Stopped in the middle of a rollout's steps, it goes on with the same rollout."""
    quick = {"train": {"save_every_steps": 1}}
    expected = fingerprints(play(tmp_path, model, "whole", grpo=grpo, **quick))
    rows = train_rows(tmp_path / "whole")
    on_policy = [
        row
        for row in rows
        if (row["step"] - 1) % (grpo.get("steps_per_generation", 1) * grpo.get("num_iterations", 1)) == 0
    ]
    assert all(row["kl"] < 1e-5 for row in rows[:1] if "kl" in row)
    assert all(row["clip_ratio/region_mean"] == 0 for row in on_policy if "clip_ratio/region_mean" in row)
    assert all(row.get("sampling/sampling_logp_difference/mean", 0) < 1e-4 for row in rows)  # not the policy's steps
    config = grpo_config(tmp_path, model, grpo, **quick)
    write, calls = rollouts.write, []

    def stopping(*arguments):
        calls.append(write(*arguments))
        os.kill(os.getpid(), signal.SIGTERM)
        return calls[-1]

    monkeypatch.setattr(rollouts, "write", stopping)
    codes = []
    while not codes or codes[-1] == EXIT_CODE:
        codes.append(main([str(config), "--run-dir", str(tmp_path / "run")]))
    assert codes == [EXIT_CODE] * len(calls) + [0]
    assert calls
    assert fingerprints(tmp_path / "run") == expected


@pytest.mark.parametrize("harm", ["flipped", "cut", "another's"])
def test_a_harmed_rollout_is_made_again(tmp_path, model, harm, caplog):
    run = play(tmp_path, model)
    expected, rows = fingerprints(run), answers(run)
    first, second = rollouts.kept(run / "grpo")[:2]
    content = bytearray(second.read_bytes())
    content[len(content) // 2] ^= 1
    second.write_bytes({"flipped": content, "cut": content[:-9], "another's": first.read_bytes()}[harm])
    play(tmp_path, model)
    assert answers(run) == rows  # a bit of the file that holds nothing may stay flipped
    found = fingerprints(run)
    assert {name for name in found if found[name] != expected[name]} <= {f"grpo/rollouts/{second.name}"}


def test_dead_groups_are_counted_and_refilled(tmp_path, model):
    (tmp_path / "own.py").write_text(
        "def even(prompts, completions, completion_ids, **kwargs):\n"
        "    return [float(len(p) > 17 and ids[0] % 2) for p, ids in zip(prompts, completion_ids)]\n"
    )
    grpo = {"rewards": f"{tmp_path}/own.py:even", "steps": 4}
    plain = train_rows(play(tmp_path, model, "plain", grpo=grpo))
    filled = train_rows(play(tmp_path, model, "filled", grpo=grpo | {"refill": 3}))
    assert sum(row["groups/dead"] for row in filled) < sum(row["groups/dead"] for row in plain)
    assert sum(row["groups/refilled"] for row in filled) > 0 == sum(row["groups/refilled"] for row in plain)


def test_a_reward_that_is_always_equal_trains_nothing(tmp_path, model):
    (tmp_path / "own.py").write_text("def same(completions):\n    return [1] * len(completions)\n")
    run = play(tmp_path, model, grpo={"rewards": f"{tmp_path}/own.py:same"})
    assert all(row["groups/dead"] == 1 and row["train/grad_norm"] == 0 for row in train_rows(run))
    base, trained = (run / stage / "adapter" / "adapter_model.safetensors" for stage in ("base", "grpo"))
    assert base.read_bytes() == trained.read_bytes()


def test_columns_extras_and_metrics_reach_the_files(tmp_path, model):
    names = {f"{tmp_path}/rewards.py:vowels": 1.0, f"{tmp_path}/rewards.py:nothing": {"weight": 0.5}}
    run = play(tmp_path, model, grpo={"rewards": names, "steps": 1})
    row = answers(run)[0]
    assert row["rewards/nothing"] is None
    assert row["reward"] == row["rewards/vowels"]
    assert json.loads(row["extra"])["answer"].startswith("The sum is")
    assert train_rows(run)[0]["seen"] == 12


def test_a_base_that_merging_ends_is_refused_before_anything_is_trained(tmp_path, model):
    asked = {"beta": 0.1, "reference": "base"}
    path = grpo_config(tmp_path, model, asked, method=["sft", "grpo"], sft={}, adapter={"init": "merge"})
    with pytest.raises(UserError, match=r"grpo.reference base: .* merged"):
        load(load_config(path), [])


def test_an_rl_stage_after_sft_starts_from_its_adapter(tmp_path, model):
    run = play(tmp_path, model, method=["sft", "grpo"], sft={"groups_per_step": 6}, grpo={"steps": 1, "beta": 0.1})
    assert [row["stage"] for row in json.loads((run / "results.json").read_text())] == ["base", "sft", "grpo"]
    (first,) = [row for row in train_rows(run) if row["stage"] == "grpo"]
    assert first["kl"] == pytest.approx(0, abs=1e-5)


def test_groups_longer_than_a_microbatch_are_cut(tmp_path, model):
    whole = play(tmp_path, model, "whole", train={"microbatch_tokens": 256})
    cut = play(tmp_path, model, "cut", train={"microbatch_tokens": 48})
    ours, theirs = ([row["train/grad_norm"] for row in train_rows(run)] for run in (whole, cut))
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert sum(row["train/tokens"] for row in train_rows(cut)) > sum(row["train/tokens"] for row in train_rows(whole))


def test_held_out_problems_are_looked_at_though_rewards_apply_to_some_answers_only(tmp_path, model):
    (tmp_path / "own.py").write_text(
        "def even(prompts, completions, completion_ids, trainer_state):\n"
        "    assert all(isinstance(prompt, str) for prompt in prompts)\n"
        "    first = [ids[trainer_state.global_step % len(ids)] for ids in completion_ids]\n"
        "    return [None if token % 3 == 0 else token / 384 for token in first]\n"
    )
    grpo = {"rewards": f"{tmp_path}/own.py:even", "completions": "text", "steps": 8, "lr": 0.01}
    config = grpo_config(tmp_path, model, grpo | {"evaluate_every": 2, "patience": 9, "keep": "best"})
    tree = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(tree | {"heldout": {**tree["data"]}}))
    assert main([str(config), "--run-dir", str(tmp_path / "run")]) == 0
    looks = [row for row in train_rows(tmp_path / "run") if "heldout/reward" in row]
    assert [row["step"] for row in looks] == [2, 4, 6, 8]
    best = max(looks, key=lambda row: row["heldout/reward"])
    rows = json.loads((tmp_path / "run" / "results.json").read_text())
    start, kept = (row["evaluation"]["heldout/reward"]["value"] for row in rows)
    assert kept == pytest.approx(max(start, best["heldout/reward"]))
    said = (tmp_path / "run" / "log.txt").read_text()
    whose = f"step {best['step']}" if kept > start else "the start"
    assert best is looks[-1] or f"adapter of {whose} is kept, its held-out reward is greatest" in said


def test_what_only_equals_the_start_is_not_kept_as_the_best(tmp_path, model):
    (tmp_path / "own.py").write_text("def same(completions):\n    return [1] * len(completions)\n")
    watched = {"evaluate_every": 1, "patience": 2, "keep": "best"}
    config = grpo_config(tmp_path, model, {"rewards": f"{tmp_path}/own.py:same"} | watched)
    tree = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(tree | {"heldout": {**tree["data"]}}))
    assert main([str(config), "--run-dir", str(tmp_path / "run")]) == 0
    assert [row["step"] for row in train_rows(tmp_path / "run")] == [1, 2]  # neither look gained on the start
    assert "grpo: the adapter of the start is kept" in (tmp_path / "run" / "log.txt").read_text()


def test_keys_without_a_use_are_named(tmp_path, model):
    run = play(tmp_path, model, grpo={"steps": 1, "epsilon_high": 0.28, "evaluate_every": 1})
    said = (run / "log.txt").read_text()
    assert "grpo.epsilon_high has no use: with one step per rollout" in said
    assert "grpo.evaluate_every, patience and keep have no use: there are no held-out problems" in said
