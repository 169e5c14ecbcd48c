"""Simulated games whose answer is known: a better policy, the same one, a shortcut by length, a falling p(real)."""

import math
import re

import numpy as np
import pytest

from spinfast.evaluate import advice, selfplay, stopping

N = 200


def game(real_gain=0.0, generated_gain=0.0, noise=1.0, seed=0, beta=0.1):
    """Pairs under an opponent, and a policy that moved each side's log-prob by a gain with noise."""
    random = np.random.default_rng(seed)
    real_length, generated_length = random.integers(20, 200, (2, N))
    opponent_real = -0.8 * real_length + random.normal(0, 5, N)
    opponent_generated = -0.5 * generated_length + random.normal(0, 5, N)
    return selfplay.selfplay_metrics(
        opponent_real + real_gain + noise * random.normal(size=N),
        opponent_generated + generated_gain + noise * random.normal(size=N),
        opponent_real,
        opponent_generated,
        real_length,
        generated_length,
        beta,
        base_real_logps=opponent_real - 1.0,
        base_generated_logps=opponent_generated,
    )


def test_first_step_is_ln2():
    metrics = game(noise=0.0)
    assert metrics["heldout/loss"]["value"] == pytest.approx(math.log(2))
    assert metrics["heldout/margin"]["value"] == 0.0
    assert metrics["heldout/pair_accuracy"] == {"value": 0.5, "stderr": 0.0, "n": N}
    assert metrics["heldout/real_logp_change"]["value"] == 0.0
    assert metrics["heldout/real_logp_vs_base"]["value"] == pytest.approx(1.0)


def test_better_policy():
    metrics = game(real_gain=2.0, generated_gain=-1.0)
    assert metrics["heldout/margin"]["value"] == pytest.approx(0.3, abs=0.03)
    assert metrics["heldout/pair_accuracy"]["value"] > 0.95
    assert metrics["heldout/real_logp_change"]["value"] == pytest.approx(2.0, abs=0.3)
    assert metrics["heldout/generated_logp_change"]["value"] == pytest.approx(-1.0, abs=0.3)


def test_margin_is_beta_times_the_log_ratios():
    metrics = selfplay.selfplay_metrics([-10.0], [-30.0], [-12.0], [-25.0], [5], [10], beta=0.5)
    assert metrics["heldout/margin"]["value"] == 0.5 * ((-10 + 12) - (-30 + 25))
    assert metrics["heldout/loss"]["value"] == pytest.approx(math.log1p(math.exp(-3.5)))
    assert metrics["heldout/real_logp_per_token"]["value"] == -2.0
    assert metrics["heldout/perplexity"]["value"] == pytest.approx(math.exp(2.0))
    assert "heldout/real_logp_vs_base" not in metrics


@pytest.mark.parametrize(
    ("kind", "won", "even"),
    [
        ("logistic", math.log1p(math.exp(-0.5)), math.log(2)),
        ("hinge", 0.5, 1.0),
        ("exponential", math.exp(-0.5), 1.0),
        ("ipo", (2.0 - 2.0) ** 2, 4.0),
    ],
)
def test_the_loss_is_the_one_that_was_trained(kind, won, even):
    """Log-ratios of 1 and -1 with beta 1/4: a margin of 1/2, where IPO's target is met."""
    losses = [
        selfplay.selfplay_metrics([-9.0 + c], [-8.0 - c], [-9.0], [-8.0], [5], [5], 0.25, kind)["heldout/loss"]["value"]
        for c in (1.0, 0.0)
    ]
    assert losses == pytest.approx([won, even])


def test_perplexity_error_is_the_spread_over_repeats():
    random = np.random.default_rng(0)
    lengths = random.integers(20, 200, (800, 100))
    logps = -0.7 * lengths + random.normal(size=lengths.shape) * np.sqrt(lengths)
    repeats = [selfplay.perplexity(*case) for case in zip(logps, lengths, strict=True)]
    spread = np.std([r["value"] for r in repeats])
    assert np.mean([r["stderr"] for r in repeats]) == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize(("moved", "told"), [(0.0, False), (-2e-3, True)])
def test_rounding_decides_nothing_and_the_least_real_change_does(moved, told):
    """Log-probs are fp32 sums. All answers' last bits err the same way, which no standard error would show."""
    random = np.random.default_rng(0)
    opponent = -random.uniform(20, 200, (2, N)).astype(np.float32)
    policy = np.nextafter(np.nextafter(opponent, -np.inf), -np.inf)
    policy[0] += np.float32(moved)
    metrics = selfplay.selfplay_metrics(*policy, *opponent, LENGTHS, LENGTHS, 0.1, base_real_logps=opponent[0])
    ratios = [selfplay.log_ratios(*sides) for sides in zip(policy, opponent, strict=True)]
    metrics |= selfplay.fresh_opponent_metrics(*ratios, LENGTHS, LENGTHS, [True] * N, [True] * N)
    for name, even in {
        "heldout/pair_accuracy": 0.5,
        "heldout/margin": 0.0,
        "heldout/real_logp_change": 0.0,
        "heldout/real_logp_vs_base": 0.0,
        "fresh/auc_log_ratio": 0.5,
    }.items():
        assert (metrics[name]["value"] != even) == told, name
    assert metrics["heldout/generated_logp_change"] == {"value": 0.0, "stderr": 0.0, "n": N}
    found = {"iteration": 0, "pairs": N, "rejected": {}, "train": {}, "evaluation": metrics}
    assert bool(advice.warnings([found])) == told


def test_columns_must_match():
    with pytest.raises(ValueError, match=r"one value per sequence everywhere.*\(2,\), \(1,\)"):
        selfplay.perplexity([1.0, 2.0], [3])


def fresh(real_per_token, fresh_per_token, real_lengths, fresh_lengths, eos=(1.0, 1.0), seed=0):
    random = np.random.default_rng(seed)
    return selfplay.fresh_opponent_metrics(
        (real_per_token + 0.05 * random.normal(size=N)) * real_lengths,
        (fresh_per_token + 0.05 * random.normal(size=N)) * fresh_lengths,
        real_lengths,
        fresh_lengths,
        random.random(N) < eos[0],
        random.random(N) < eos[1],
    )


LENGTHS = np.random.default_rng(5).integers(30, 150, N)


def test_fresh_opponent_when_the_game_is_over():
    metrics = fresh(0.0, 0.0, LENGTHS, LENGTHS[::-1])
    for metric in metrics.values():
        assert abs(metric["value"] - 0.5) <= 2.5 * metric["stderr"]


def test_fresh_opponent_when_there_is_something_left():
    metrics = fresh(0.05, 0.0, LENGTHS, LENGTHS[::-1])
    assert metrics["fresh/auc_log_ratio"]["value"] == pytest.approx(0.76, abs=0.06)  # Phi(1 / sqrt 2)
    assert metrics["fresh/auc_length"]["value"] < 0.6


@pytest.mark.parametrize("factor", [3.0, 1 / 3.0])
def test_length_shortcut_is_called_so(factor):
    metrics = fresh(0.05, 0.05, LENGTHS, np.maximum(1, LENGTHS * factor).astype(int))
    assert metrics["fresh/auc_length"]["value"] > 0.9
    assert 0.4 < metrics["fresh/auc_log_ratio"]["value"] < 0.6  # per token, length gives nothing away


def test_end_token_shortcut_is_called_so():
    metrics = fresh(0.0, 0.0, LENGTHS, LENGTHS, eos=(1.0, 0.05))
    assert metrics["fresh/auc_eos"]["value"] > 0.9
    assert metrics["fresh/auc_length"]["value"] == 0.5


def test_generation_metrics():
    metrics = selfplay.generation_metrics([[1, 2, 3, 4], [5] * 8], [2, 4], [True, False])
    assert metrics["heldout/length"]["value"] == 6.0
    assert metrics["heldout/length_ratio"] == {"value": 2.0, "stderr": 0.0, "n": 2}
    assert metrics["heldout/eos_rate"]["value"] == 0.5
    assert metrics["heldout/distinct_1"]["value"] == 5 / 12
    assert metrics["heldout/repeated_4grams"]["value"] == pytest.approx((0 + 4 / 5) / 2)


def test_kl_from_policy_samples():
    random = np.random.default_rng(0)
    x = random.normal(0.5, 1, 50_000)  # policy N(1/2, 1), base N(0, 1): KL = 1/8
    metrics = selfplay.kl_metrics(-((x - 0.5) ** 2) / 2, -(x**2) / 2, np.full(x.shape, 2))
    for name, exact in [("kl_k1", 1 / 8), ("kl_k3", 1 / 8), ("kl_k1_per_token", 1 / 16)]:
        got = metrics[f"heldout/{name}"]
        assert abs(got["value"] - exact) < 4 * got["stderr"], name


def row(iteration, **evaluation):
    values = {k.replace("__", "/"): {"value": v[0], "stderr": v[1], "n": N} for k, v in evaluation.items()}
    return {"iteration": iteration, "pairs": N, "rejected": {}, "train": {"last_loss": 0.5}, "evaluation": values}


HEALTHY = {
    "heldout__real_logp_change": (0.5, 0.2),
    "heldout__length": (100.0, 2.0),
    "heldout__eos_rate": (0.95, 0.01),
    "heldout__repeated_4grams": (0.02, 0.005),
    "heldout__accuracy_strict": (0.40, 0.03),
    "fresh__auc_log_ratio": (0.70, 0.03),
    "fresh__auc_length": (0.55, 0.03),
    "fresh__auc_eos": (0.51, 0.01),
}


def test_a_healthy_run_has_no_warnings():
    assert advice.warnings([row("base", **HEALTHY), row(0, **HEALTHY), row(1, **HEALTHY)]) == []
    assert advice.warnings([row("base"), row(0)]) == []  # nothing measured, nothing said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"heldout__real_logp_change": (-3.0, 0.4)}, r"log p\(real\) fell by 3.00 nats"),
        ({"heldout__length": (300.0, 5.0)}, "answers grew from 100 to 300 tokens"),
        ({"heldout__length": (30.0, 5.0)}, "answers shrank from 100 to 30 tokens"),
        ({"heldout__eos_rate": (0.2, 0.02)}, r"only 20% of the answers end by themselves \(95% before\)"),
        ({"heldout__repeated_4grams": (0.4, 0.02)}, "40% of all 4-grams are repetitions"),
        ({"heldout__accuracy_strict": (0.2, 0.02)}, r"accuracy \(strict\) fell from 40.0% to 20.0%"),
        ({"fresh__auc_length": (0.95, 0.01)}, r"their length alone \(AUC 0.95\)"),
        ({"fresh__auc_eos": (0.97, 0.01)}, "end with the end token"),
        ({"fresh__auc_log_ratio": (0.52, 0.03)}, "the game is over"),
        ({"heldout__chosen_logp_change": (-2.0, 0.4)}, r"log p\(chosen\) is 2.00 nats per answer below"),
    ],
)
def test_each_fault_is_named_once(change, said):
    found = advice.warnings([row("base", **HEALTHY), row(0, **(HEALTHY | change))])
    assert len(found) == 1
    assert re.search(said, found[0]), found[0]
    assert found[0].startswith("Iteration 0: ")


def test_a_shortcut_shows_in_the_base_already():
    (found,) = advice.warnings([row("base", **(HEALTHY | {"fresh__auc_length": (0.95, 0.01)}))])
    assert found.startswith("Base: real and fresh answers can be told apart by their length alone")
    assert advice.warnings([]) == []


def test_what_several_rows_show_is_said_once():
    shortcut = HEALTHY | {"fresh__auc_length": (0.95, 0.01)}
    (found,) = advice.warnings([row("base", **shortcut), row(0, **shortcut), row(1, **shortcut)])
    assert found.startswith("Iteration 1 (as base, iteration 0 before): real and fresh answers can be told apart")


def test_noise_is_no_warning():
    noisy = {"heldout__real_logp_change": (-0.3, 0.4), "heldout__accuracy_strict": (0.36, 0.03)}
    noisy |= {"heldout__length": (60.0, 25.0)}
    assert advice.warnings([row("base", **HEALTHY), row(0, **(HEALTHY | noisy))]) == []


def test_training_faults():
    done = row(0, **HEALTHY) | {"train": {"last_loss": 0.001}, "rejected": {"identical": 250}}
    loss, pairs = advice.warnings([row("base", **HEALTHY), done])
    assert "training loss ended at 0.0010" in loss
    assert "more pairs were rejected (250 identical) than kept (200)" in pairs


def of(method, train=None, **figures):
    return row(0, **(HEALTHY | figures)) | {"method": method, "train": train or {}}


@pytest.mark.parametrize(
    ("bad", "good", "said"),
    [
        (
            of("dpo", heldout__chosen_longer=(0.9, 0.02)),
            of("dpo", heldout__chosen_longer=(0.6, 0.02)),
            "longer one in 90%",
        ),
        (
            of("dpo", heldout__chosen_longer=(0.1, 0.02)),
            of("sft", heldout__chosen_longer=(0.1, 0.02)),
            "shorter one in 90%",
        ),
        (
            of("dpo", {"early_accuracy": 0.99}),
            of("dpo", {"early_accuracy": 0.8}),
            "99% of the pairs were told apart within",
        ),
        (
            of("sft", heldout__nll=(2.0, 0.1)),
            of("sft", heldout__nll=(1.1, 0.1)),
            "held-out loss rose from 1.000 to 2.000",
        ),
        (of("dpo", {"last_loss": 0.001}), of("sft", {"last_loss": 0.001}), "training loss ended at 0.0010"),
    ],
)
def test_faults_of_sft_and_dpo(bad, good, said):
    base = row("base", **HEALTHY, heldout__nll=(1.0, 0.1)) | {"method": "base"}
    (found,) = advice.warnings([base, bad])
    assert said in found
    assert advice.warnings([base, good]) == []


def verdicts(*accuracies, n=500):
    """Nested verdicts: the items a weaker model solves, a stronger one solves too."""
    difficulty = np.random.default_rng(0).permutation(n) / n
    return [(difficulty < accuracy).astype(float) for accuracy in accuracies]


@pytest.mark.parametrize(
    ("accuracies", "patience", "stops"),
    [
        ((0.4,), 1, False),  # the base alone
        ((0.4, 0.5), 1, False),  # a gain
        ((0.4, 0.405), 1, True),  # a gain within noise
        ((0.4, 0.405), 2, False),  # patience left
        ((0.4, 0.405, 0.5), 2, False),
        ((0.4, 0.5, 0.5, 0.45), 2, True),
        ((0.4, 0.5, 0.5, 0.45), 3, False),  # the gain is still within the window
    ],
)
def test_stop_when_no_heldout_gain(accuracies, patience, stops):
    assert (stopping.stop_reason(verdicts(*accuracies), patience) is not None) == stops


@pytest.mark.parametrize(
    ("accuracies", "patience", "said"),
    [
        ((0.4, 0.4), 1, None),  # base and SFT: no iteration was played
        ((0.4, 0.4, 0.4), 2, None),
        ((0.4, 0.4, 0.4, 0.4), 2, "over the base in the last 2 iterations"),
        ((0.4, 0.5, 0.5), 1, "over SFT in the last 1 iteration:"),  # what SFT brought is no gain of self-play
        ((0.4, 0.5, 0.6, 0.6), 1, "over iteration 0 in the last 1 iteration:"),
    ],
)
def test_the_sft_stage_is_no_iteration(accuracies, patience, said):
    reason = stopping.stop_reason(verdicts(*accuracies), patience, starts=("the base", "SFT"))
    assert reason is None if said is None else said in reason


def test_stop_reason_in_words():
    reason = stopping.stop_reason(verdicts(0.4, 0.5, 0.3), 1)
    assert reason.startswith("no held-out gain over iteration 0 in the last 1 iteration: the last one is -0.2000 [")
    assert "on 500 items" in reason
    with pytest.raises(ValueError, match="at least 1 iteration, got 0"):
        stopping.stop_reason(verdicts(0.4), 0)


def test_best_is_the_earliest_of_equals():
    assert stopping.best(verdicts(0.4, 0.5, 0.5, 0.45)) == 1
