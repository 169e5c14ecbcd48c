"""What is said of a GRPO run's figures: each rule on its case, none on a healthy run, none by noise or by accident."""

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinfast.evaluate import advice, learning
from spinfast.fit import _shown, summary

STEPS = 200
HEALTHY = {  # metric -> (at the first step, at the last, noise of a step)
    "reward": (0.3, 0.7, 0.05),
    "reward_std": (0.4, 0.35, 0.03),
    "frac_reward_zero_std": (0.2, 0.25, 0.1),
    "groups/dead": (0.2, 0.25, 0.1),
    "rewards/gsm8k/mean": (0.3, 0.7, 0.05),
    "rewards/gsm8k/std": (0.46, 0.46, 0.02),
    "rewards/format/mean": (0.95, 1.0, 0.02),
    "rewards/format/std": (0.5, 0.0, 0.0),
    "completions/mean_length": (150.0, 160.0, 10.0),
    "completions/clipped_ratio": (0.1, 0.02, 0.01),
    "entropy": (0.4, 0.2, 0.02),
    "kl": (0.001, 0.05, 0.005),
    "clip_ratio/region_mean": (0.0, 0.02, 0.005),
    "sampling/sampling_logp_difference/mean": (0.01, 0.012, 0.002),
}
LOOKS = {"heldout/reward": (0.3, 0.65), "heldout/accuracy_strict": (0.3, 0.6)}


def run(steps=STEPS, looks=LOOKS, **changes):
    """Metrics lines of a stage whose figures go in straight lines, with noise; a change to None leaves one out."""
    draw, rows = random.Random(0), []
    lines = {name: line for name, line in (HEALTHY | changes).items() if line}
    for step in range(1, steps + 1):
        along = (step - 1) / max(1, steps - 1)
        row = {"stage": "grpo", "phase": "train", "step": step, "train/loss": 0.001}
        row |= {name: a + (b - a) * along + draw.gauss(0, noise) for name, (a, b, noise) in lines.items()}
        if step == 1 or step == steps:
            row |= {name: pair[step > 1] for name, pair in looks.items()} | {f"{name}_stderr": 0.02 for name in looks}
        rows.append(row)
    return rows


CASES = {
    "_constant": (
        {"rewards/gsm8k/mean": (0.0, 0.0, 0.0), "rewards/gsm8k/std": (0.0, 0.0, 0.0), "rewards/format/mean": None},
        LOOKS,
        "never fires teaches nothing: gsm8k (always 0)",
    ),
    "_cut": ({"completions/clipped_ratio": (0.95, 0.95, 0.0)}, LOOKS, "95% of the answers are cut"),
    "_dead": ({"groups/dead": (0.6, 0.8, 0.02)}, LOOKS, "never: problems in between"),
    "_only_form": (
        {"rewards/gsm8k/mean": (0.3, 0.3, 0.05), "rewards/format/mean": (0.5, 1.0, 0.02)},
        LOOKS,
        "only the form improves (format), not gsm8k",
    ),
    "_hacked": (
        {"completions/mean_length": (150.0, 400.0, 5.0)},
        {"heldout/reward": (0.3, 0.31)},
        "length may be what is paid for",
    ),
    "_heldout_falls": ({}, {"heldout/accuracy_strict": (0.5, 0.3)}, "held-out accuracy, strict fell on the way"),
    "_entropy": ({"entropy": (0.4, 0.01, 0.002)}, LOOKS, "the entropy collapsed from 0.38"),
    "_kl": ({"kl": (0.001, 4.0, 0.01)}, LOOKS, "the KL to the reference ran away"),
    "_mismatch": ({"sampling/sampling_logp_difference/mean": (0.4, 0.4, 0.0)}, LOOKS, "differ by 0.4 nats per token"),
    "_clipped": ({"clip_ratio/region_mean": (0.5, 0.5, 0.0)}, LOOKS, "50% of the tokens are clipped"),
    "_falls": ({"reward": (0.6, 0.3, 0.05)}, LOOKS, "the training reward fell from 0.5"),
}


def test_each_rule_has_a_case():
    assert CASES.keys() == {rule.__name__ for rule in (*learning.RULES, *learning.LATE)}


@pytest.mark.parametrize("rule", CASES)
def test_each_rule_speaks_on_its_case_alone_once_on_the_way_and_at_the_end(rule):
    changes, looks, words = CASES[rule]
    rows = run(looks=looks, **changes)
    said = learning.advise(learning.summary(rows))
    assert list(said) == [rule]
    assert words in said[rule]
    on_the_way = [sentence for n in range(1, len(rows) + 1) for sentence in advice.on_the_way(rows[:n])]
    assert len(on_the_way) == (rule != "_constant")  # which rewards.ConstantWatch is for
    row = {"iteration": "grpo", "method": "grpo", "pairs": 0, "rejected": {}, "evaluation": {}, "train": summary(rows)}
    assert advice.warnings([row]) == [f"GRPO: {said[rule]}"]


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 55, 200, 505])
def test_a_healthy_run_hears_nothing(steps):
    rows = run(steps)
    assert learning.advise(learning.summary(rows)) == {}
    assert all(advice.on_the_way(rows[:n]) == [] for n in range(1, steps + 1))


def test_a_reward_that_goes_nowhere_hears_what_to_try_unless_a_rule_knows_better():
    flat = {"reward": (0.3, 0.3, 0.05), "rewards/gsm8k/mean": (0.3, 0.3, 0.05), "rewards/format/mean": (0.6, 0.6, 0.05)}
    said = learning.advise(learning.summary(run(**flat)))
    assert list(said) == ["_flat"]
    assert "did not rise beyond noise (0.3" in said["_flat"]
    assert list(learning.advise(learning.summary(run(**flat, **CASES["_cut"][0])))) == ["_cut"]


def test_a_penalty_that_is_never_due_is_no_fault():
    never = {"rewards/repetition/mean": (0.0, 0.0, 0.0), "rewards/repetition/std": (0.0, 0.0, 0.0)}
    assert learning.advise(learning.summary(run(**never))) == {}


@pytest.mark.parametrize(
    ("mean", "spread", "words"),
    [
        (0.02, 0.14, "too hard"),
        (2 * 0.02, 2 * 0.14, "too hard"),  # a right answer pays 2
        (0.98, 0.14, "too easy"),
        (2 * 0.98, 2 * 0.14, "too easy"),
        (0.5, 0.5, "some prompts are always solved"),
        (-0.9, 0.3, "too hard"),
        (0.0, 0.0, "too hard"),
    ],
)
def test_dead_groups_are_too_easy_or_too_hard(mean, spread, words):
    changes = {"groups/dead": (0.9, 0.9, 0.0), "rewards/gsm8k/mean": (mean, mean, 0.0)}
    said = learning.advise(learning.summary(run(**changes, **{"rewards/gsm8k/std": (spread, spread, 0.0)})))
    assert words in said["_dead"].lower()
    assert "90% of the groups are dead" in said["_dead"]


@pytest.mark.parametrize("steps", [1, 3, 12, 60])
def test_a_reward_that_is_always_0_is_named_and_the_problems_are_not_blamed(steps):
    nothing = {f"rewards/gsm8k/{what}": (0.0, 0.0, 0.0) for what in ("mean", "std")}
    nothing |= {"rewards/format/mean": None, "rewards/format/std": None, "groups/dead": (1.0, 1.0, 0.0)}
    said = learning.advise(learning.summary(run(steps, **nothing)))
    assert list(said) == ["_constant"]
    assert "never fires teaches nothing: gsm8k (always 0). Look at some answers" in said["_constant"]


def test_a_reward_that_came_once_is_not_called_constant():
    rows = run(3, **{f"rewards/gsm8k/{what}": (0.0, 0.0, 0.0) for what in ("mean", "std")})
    rows[1] |= {"rewards/gsm8k/mean": 0.06, "rewards/gsm8k/std": 0.2}  # neither at first nor at last
    assert "_constant" not in learning.advise(learning.summary(rows))


def test_noise_is_no_reason():
    noisy = {"reward": (0.34, 0.3, 0.3), "kl": (0.0, 1.0, 30.0), "entropy": (0.2, 0.03, 1.0)}
    said = learning.advise(learning.summary(run(looks={"heldout/reward": (0.4, 0.36)}, **noisy)))
    assert set(said) <= {"_flat"}


def test_the_summary_is_means_of_the_ends_with_errors_over_steps():
    rows = run(100)
    rows[3]["reward"] = "nan"  # as a line of metrics.jsonl has it
    seen = learning.summary(rows)
    first = [row["reward"] for row in rows[:10] if row["step"] != 4]
    assert seen["window"] == 10
    assert seen["first"]["reward"]["value"] == pytest.approx(sum(first) / 9)
    assert seen["first"]["reward"]["n"] == 9
    assert seen["last"]["groups/dead"]["n"] == 10
    assert seen["heldout"]["heldout/reward"] == [
        {"value": v, "stderr": 0.02, "n": None} for v in LOOKS["heldout/reward"]
    ]
    assert learning.functions(seen) == ["gsm8k", "format"]
    assert learning.summary(rows[:30])["window"] == 10
    assert learning.summary(rows[:6])["window"] == 3  # the ends do not overlap
    assert learning.summary(rows[:1])["first"]["reward"]["stderr"] is None


def test_the_live_line_is_of_rewards():
    step = {"train/loss": 0.0, "reward": 0.41234, "completions/mean_length": 151.4, "groups/dead": 0.125}
    assert _shown(step) == "reward 0.412  length 151  dead 12%"
    assert _shown({"train/loss": 0.5}) == "loss 0.5000"


def test_of_a_stage_without_rewards_nothing_is_said():
    assert advice.on_the_way([{"stage": "sft", "step": n, "train/loss": 1.0} for n in range(10)]) == []
    assert advice.on_the_way([]) == []


NAMES = [*HEALTHY, *LOOKS, *(f"{name}_stderr" for name in LOOKS), "rewards/a/b/mean", "rewards//std", "rewards/x/mean"]
VALUES = st.one_of(st.floats(), st.sampled_from(["nan", "inf", "-inf", None, 0, 1, True, -0.0, 5e-324, 1e308]))
LINES = st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES), min_size=1, max_size=4)


@settings(deadline=None)
@given(LINES, st.integers(1, 8))
def test_no_lines_make_it_fail(lines, repeat):
    rows = [line | {"reward": line.get("reward", 0.0)} for line in lines] * (5 * repeat)
    seen = learning.summary(rows)
    json.dumps(seen, allow_nan=False)
    assert all(isinstance(sentence, str) and "nan" not in sentence for sentence in learning.advise(seen).values())
    for n in (1, 10, len(rows)):
        assert isinstance(advice.on_the_way(rows[:n]), list)
    correlation = seen["length_correlation"]
    assert correlation is None or (math.isfinite(correlation) and abs(correlation) <= 1 + 1e-9)
