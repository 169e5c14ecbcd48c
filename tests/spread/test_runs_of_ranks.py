"""Whole runs on one, two and four ranks: the same files, to the bit where shares are fixed."""

import json
import os
import re
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from fixtures import FailingCall
from ranks import become, free_port
from safetensors.torch import load_file
from test_run import train_rows
from warm import computed, differing

FIXED = "train.virtual_shards=3"  # no multiple of the ranks; 4 groups a step, so shares are uneven
WRITTEN = ("pairs.parquet", "heldout_samples.jsonl")  # token ids alone


@pytest.fixture(scope="module")
def alone(games):
    """The run of one rank, by fixed shares."""
    return computed(games.play("fixed-1", 1, FIXED))


def test_one_rank_plays_the_run_that_it_always_did(games, alone):
    """Dealing into shares rounds otherwise; nothing else."""
    assert close(games.directory / "fixed-1", games.runs.undisturbed)


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_by_fixed_shares_a_game_is_the_same_to_the_bit_on_any_number_of_ranks(games, alone, world):
    assert differing(computed(games.play(f"fixed-{world}", world, FIXED)), alone) == set()


@pytest.fixture(scope="module")
def two(games):
    return games.play("two", 2)


def test_two_ranks_play_the_run_of_one_to_rounding(games, two):
    assert close(two, games.runs.undisturbed)
    log = (two / "log.txt").read_text()
    assert log.count("finished in") == 1
    assert "ranks: 2" in log
    assert not [*two.rglob(".*")]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        pytest.param("preferences", ["method=[dpo]", "dpo.loss=kto", "dpo.evaluate_every=4"], marks=pytest.mark.slow),
        ("rollouts", ["grpo.steps=4"]),
        pytest.param("preferences", ["method=[sft, dpo]"], marks=pytest.mark.slow),
        pytest.param("preferences", ["method=[dpo]", "dpo.loss=orpo"], marks=pytest.mark.slow),
    ],
    ids=["kto", "grpo", "sft-dpo", "orpo"],
)
def test_other_methods_by_fixed_shares(request, kind, words):
    ranks = request.getfixturevalue(kind)
    one = computed(ranks.play("one", 1, FIXED, *words))
    assert differing(computed(ranks.play("two", 2, FIXED, *words)), one) == set()


@pytest.mark.slow
def test_grpo_on_two_ranks_to_rounding(rollouts):
    assert close(rollouts.play("two", 2), rollouts.runs.undisturbed)


ADAPTERS = {
    "full": ["adapter={kind: full, target_modules: [q_proj, down_proj]}", "sft.optimizer=adafactor"],
    "merge": ["adapter.init=merge"],
    "lora_xs": ["adapter={kind: lora_xs, r: 4, alpha: 8}"],
    "tiny_lora": ["adapter={kind: tiny_lora, u: 13, tie: all}"],
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow if k != "full" else ()) for k in ADAPTERS])
def test_every_kind_of_adapter(games, kind):
    words = [*ADAPTERS[kind], "method=[sft]", "evaluate.problems=0"]
    one = computed(games.play("kind-1", 1, FIXED, *words))
    assert differing(computed(games.play("kind-2", 2, FIXED, *words)), one) == set()


def test_world_size_is_no_part_of_a_runs_identity_and_fixed_shares_are(games, two):
    """`two` is the run of two ranks: one rank finds it finished, and fixed shares are another run."""
    games.runs.output.write_text("")
    before = computed(two)
    assert games.finish(games.start("two", 1)) == [0]
    assert differing(computed(two), before) == set()
    assert games.finish(games.start("two", 2, FIXED))[0] == 2
    (line,) = games.said()
    assert "made by another config" in line


def test_a_dry_run_says_what_each_rank_will_do(games):
    games.play("dry", 2, "--dry-run")
    said = " ".join(games.runs.output.read_text().split())
    assert "of 4 groups a step each takes 2 on average, and 1 of 2 prompts" in said
    assert said.count("settings that are not the defaults") == 1  # rank 0 alone speaks
    assert not (games.directory / "dry").exists()


def threads() -> None:
    """In a rank's process: it has more cores than the other."""
    torch.set_num_threads(2)


@pytest.mark.slow  # two threads that spin on the other worker's core
def test_ranks_that_compute_otherwise_still_know_what_is_scored(games):
    """Of 3 cores one rank has 1 and the other 2."""
    games.play("uneven", 2, "method=[spin]", "spin.iterations=1", hooks={1: threads})


def two_words(games, *of_ranks) -> list[int]:
    """The exit codes of two ranks, for each (run directory, a word of its command line)."""
    port = free_port()
    return games.finish(
        [
            games.runs.start(name, word, before=partial(become, rank, 2, port, 60))
            for rank, (name, word) in enumerate(of_ranks)
        ]
    )


def test_ranks_that_were_started_with_other_words_or_directories_do_not_play(games, two):
    games.runs.new("here")
    assert two_words(games, ("here", "seed=1"), ("here", "seed=2"))[1] == 2
    (line,) = games.said()
    assert "rank 1: run directory" in line
    assert "made by another config" in line
    games.runs.new("here")
    assert two_words(games, ("here", "method=[sft, spin]"), (two.name, "method=[sft, spin]"))[1] == 2
    (line,) = games.said()
    assert "rank 1 does not see what rank 0 writes there" in line


def test_ranks_that_find_other_data_do_not_play(games):
    games.runs.new("here")
    codes = games.finish(games.start("here", 2, hooks={1: other_data}))
    assert codes[1] == 2
    (line,) = games.said()
    assert "rank 1: data: not the same on rank 1 as on rank 0" in line


def other_data() -> None:
    """In a rank's process: the file is another one on its machine."""
    from spinfast.methods import run

    load = run.load_data
    run.load_data = lambda *given: {k: replace(v, fingerprint="other") for k, v in load(*given).items()}


def dies_in_training() -> None:
    """In a rank's process: once the reference is scored."""
    from spinfast.methods import spin

    spin.fit = lambda *_args: os.kill(os.getpid(), signal.SIGKILL)


def another_cut() -> None:
    """In a process: the first loss is compared as one of another cut is."""
    from spinfast import fit

    check = fit.check_first_loss

    def checked(metrics, expected, dtype, cut, rounding):
        assert metrics["train/microbatch_tokens"] != cut
        check(metrics, expected, dtype, cut, rounding)

    fit.check_first_loss = checked


def test_a_reference_that_two_ranks_scored_is_gone_on_with_by_one(games):
    """Other microbatches round otherwise, in 16 bits by more than the first loss may be off from l(0) else."""
    words = ["method=[spin]", "spin.iterations=1"]
    directory = games.runs.new("scored")
    games.finish(games.start("scored", 2, *words, hooks={1: dies_in_training}))
    assert (directory / "iter_000" / "reference.parquet").exists()
    code = games.runs.finish(games.runs.start("scored", *words, before=another_cut))
    assert code == 0, games.runs.output.read_text()[-3000:]


def close(mine, other) -> bool:
    """Losses and gradients to 1e-6, what was written to the token, adapters as Adam makes of such gradients."""
    for row, same in zip(train_rows(mine), train_rows(other), strict=True):
        for name in ("train/loss", "train/grad_norm", "train/lr"):
            assert row[name] == pytest.approx(same[name], rel=2e-6, abs=2e-6), (row["stage"], row["step"], name)
    for path in other.rglob("*"):
        if path.name in WRITTEN:
            assert (mine / path.relative_to(other)).read_bytes() == path.read_bytes(), path
    for path in other.rglob("adapter_model.safetensors"):
        found = load_file(mine / path.relative_to(other))
        for name, tensor in load_file(path).items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-4)
    return True


# Memory ------------------------------------------------------------------------------------------------------------


def out_of_memory(at: int | None) -> None:
    """In a rank's process: the forward number `at`, or every one, finds no memory."""
    from spinfast import scoring, train

    if at is None:

        def never(*_args, **_keys):
            raise torch.OutOfMemoryError("injected")

        scoring.answer_logps = train.answer_logps = never
        return
    train.answer_logps = FailingCall(train.answer_logps, at, torch.is_grad_enabled)


def test_memory_that_runs_out_on_one_rank_shrinks_the_microbatches_of_all(games):
    small = ["prompt.max_prompt_tokens=64", "prompt.max_answer_tokens=32"]  # so that half of 256 tokens holds any pair
    directory = games.play("starved", 2, "spin.iterations=1", *small, hooks={1: partial(out_of_memory, 4)})
    assert json.loads((directory / "plan.json").read_text())["microbatch_tokens"] == 128
    assert len(re.findall("memory ran out at 256 tokens", (directory / "log.txt").read_text())) == 1


def test_memory_that_never_suffices_on_one_rank_ends_all_with_one_line(games):
    games.runs.new("starved")
    codes = games.finish(games.start("starved", 2, hooks={1: partial(out_of_memory, None)}))
    assert codes == [2, 2]
    (line,) = games.said()
    assert "memory ran out with microbatches of" in line
    assert "(rank 1: injected)" in line
