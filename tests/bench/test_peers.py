"""bench peers: the gate refuses what disagrees, every peer does the same work, rows say what they must."""

from __future__ import annotations

import importlib.util
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from bench.peers import compare, eager_loop, spinfast_loop
from bench.peers import work as given
from bench.peers.child import ALL, PEERS
from bench.peers.watch import Watch
from bench.scaling import largest
from spinfast.errors import UserError
from spinfast.train import train as true_train


@pytest.fixture(scope="module", params=ALL)
def work(request, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("work")
    recipe = {"device": "cpu", "dtype": "float32", "pairs_per_step": 3, "max_grad_norm": 1e9, "lr": 1e-3}
    count = 9 if request.param == "grpo" else 8  # GRPOTrainer leaves out a step that is not full
    return given.prepare(scratch, "random:tiny", count, method=request.param, samples=2, **recipe)


def played(play, work, path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of all steps and the gradients of the first."""
    watch = Watch("cpu", path)
    play(work, watch)
    return watch.losses, load_file(path)


@pytest.fixture(scope="module")
def ours(work, tmp_path_factory):
    return played(spinfast_loop.play, work, tmp_path_factory.mktemp("ours") / "gradients")


def agree(ours, theirs):
    """Same pairs in the same order: step by step the same losses; the last step has 2 pairs of 3.

    A log-prob is a sum of 1,300 nats in fp32, of which beta's tenth counts.
    """
    assert len(ours[0]) == 3
    assert ours[0] == pytest.approx(theirs[0], abs=5e-5)
    assert compare.cosine(ours[1], theirs[1]) > 0.99999


def test_peers_take_the_same_steps(work, ours, tmp_path):
    """Of pairs from ln 2 on; both factors get a gradient."""
    agree(ours, played(eager_loop.play, work, tmp_path / "theirs"))
    losses, gradients = ours
    assert work.method in ("sft", "grpo") or losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(losses[1] - losses[0]) > 1e-3  # the adapter moved
    assert all(gradients[name].abs().max() > 0 for name in gradients if "lora_A" in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trl", "trl-precomputed", "trl-padding-free"])
def test_trl_takes_the_same_steps(name, work, ours, tmp_path):
    """In this process; put a TRL whose head runs here on the path."""
    if work.method not in PEERS[name].methods:
        pytest.skip(f"not {work.method}")
    if reason := compare.obstacle(name, SimpleNamespace(device="cpu", method=work.method, trl=None)):
        pytest.skip(reason)
    module, function = PEERS[name].play.split(":")
    agree(ours, played(getattr(importlib.import_module(f"bench.{module}"), function), work, tmp_path / "theirs"))


def whole_steps(play, scratch) -> tuple[dict, Watch]:
    recipe = {"device": "cpu", "dtype": "float32", "pairs_per_step": 2, "samples": 2, "max_tokens": 5}
    work = given.prepare(scratch, "random:tiny", 4, method="grpo", whole=True, **recipe)
    watch = Watch("cpu")
    return play(work, watch), watch


def test_whole_steps_sample_before_they_train(tmp_path, monkeypatch):
    """Every answer at its full length, with its sampler's log-probs; the second of two shares the prompt."""
    trained: list = []
    monkeypatch.setattr(spinfast_loop, "train", recording(trained))
    found, watch = whole_steps(spinfast_loop.whole, tmp_path)
    assert found["engine"] == "transformers"
    assert 0.4 < found["prompt_tokens_cached"] <= 0.5
    assert len(watch.losses) == 2
    assert watch.seconds.keys() == {"generate", "train"}
    for group in (group for step in trained for group in step):
        assert [len(answer) for answer in group.answers] == [5, 5]
        assert group.answers[0] != group.answers[1]
        assert all(logp < 0 for logps in group.given["sampler_logps"] for logp in logps)
        assert group.given["advantage"][0] < 0 < group.given["advantage"][1]


def recording(trained: list):
    """spinfast's own train, with a list of the groups of its steps."""

    def train(policy, steps, *rest, **more):
        class Kept(type(steps)):
            def __getitem__(self, step):
                trained.append(super().__getitem__(step))
                return trained[-1]

        steps.__class__ = Kept
        return true_train(policy, steps, *rest, **more)

    return train


@pytest.mark.slow
def test_trl_samples_whole_answers(tmp_path):
    if reason := compare.obstacle("trl", SimpleNamespace(device="cpu", method="grpo", trl=None)):
        pytest.skip(reason)
    from bench.peers import trl_trainers

    found, watch = whole_steps(trl_trainers.plain, tmp_path)
    assert found["engine"] == "transformers"
    assert len(watch.losses) == 2
    assert watch.seconds.keys() == {"generate", "train"}


def test_a_phase_within_another_is_none_of_its_seconds(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 6.0, 7.0])  # outer begins, inner begins and ends, a step, outer ends
    monkeypatch.setattr("bench.peers.watch.now", lambda device: next(clock))
    watch = Watch("cpu")
    with watch.phase("train"):
        with watch.phase("generate"):
            pass
        watch.step(0.5)
    assert watch.seconds == {"generate": 3.0, "train": 4.0}
    assert watch.steps == [3.0]


def test_whole_steps_count_sampling():
    sides = {"spinfast": (1.0, 1.0, "vllm"), "trl": (6.0, 4.0, "transformers")}
    results = {
        name: [{"seconds": {"generate": g, "train": t}, "engine": engine, "threads": 2, "peak_rss_mib": 100.0}] * 2
        for name, (g, t, engine) in sides.items()
    }
    ours, trl = compare.whole_steps(results, {"answer_tokens": 200})
    assert (ours["p50_answer_tokens_per_s"], trl["p50_answer_tokens_per_s"]) == (100.0, 20.0)
    assert (ours["engine"], trl["engine"]) == ("vllm", "transformers")
    assert trl["spinfast_whole_speedup"] == 5.0


@pytest.mark.parametrize("loss", [math.log(2), 6.9])
def test_gate_refuses(loss):
    good = {"trl": 1.0, "spinfast": 0.9995}
    start = {"trl": loss, "spinfast": loss}
    compare.check_gate(good, start, loss)
    with pytest.raises(SystemExit, match=r"spinfast: gradient cosine 0\.998000"):
        compare.check_gate(good | {"spinfast": 0.998}, start, loss)
    with pytest.raises(SystemExit, match=r"spinfast: first loss 0\.701400"):
        compare.check_gate(good, start | {"spinfast": 0.7014}, loss)
    with pytest.raises(SystemExit, match="nan"):
        compare.check_gate(good | {"spinfast": math.nan}, start, loss)


def test_cosine_needs_the_same_parameters():
    a, b = {"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([1.0, 1.0])}
    assert compare.cosine(a, b) == pytest.approx(math.sqrt(0.5))
    with pytest.raises(SystemExit, match="different parameters"):
        compare.cosine(a, {"y": a["x"]})


def result(score: float, train: float, above: float, **more) -> dict:
    return {
        "seconds": {"score": score, "train": train}, "steps_s": [train / 2, train / 4, train / 4], "losses": [0.7] * 3,
        "threads": 2, "model_mib": 100.0, "above_model_mib": above, **more,
    }  # fmt: skip


def test_table_takes_ratios_round_by_round():
    """The machine was half as fast in the second round: the ratios of neighbours do not see it."""
    floor = {"work": {"score": {"flop": 1e9, "bytes": 1e9}, "train": {"flop": 3e9, "bytes": 1e6}}}
    floor |= {"gemm_gflops": {"a": 1.0, "b": 2.0}, "copy_gb_per_s": 0.5}
    results = {
        "bare GEMMs": [result(1, 2, 0, **floor), result(2, 4, 0, **floor)],
        "spinfast": [result(2, 4, 50), result(4, 8, 50)],
        "trl": [result(0, seconds, 200, trl="1.16.0", scored_positions="all") for seconds in (30, 60)],
    }
    facts = {"pairs": 12, "tokens": 1200, "answer_tokens": 600}
    floor_row, ours, trl = compare.table(results, facts)
    assert trl["spinfast_speedup"] == 5.0
    assert trl["spinfast_memory_ratio"] == 0.25
    assert (trl["trl"], trl["scored_positions"]) == ("1.16.0", "all")
    assert ours["share_of_bare_gemms"] == 0.5
    assert ours["share_of_roofline"] == pytest.approx((3.5 / 6 + 3.5 / 12) / 2, abs=1e-3)  # bytes bound scoring: 2 s
    assert ours["first_step_s"] == pytest.approx(3.0)
    assert ours["steady_step_s"] == pytest.approx(1.5)
    assert "above_model_mib" not in floor_row


def test_peers_that_cannot_run_are_named(monkeypatch, capsys):
    arguments = SimpleNamespace(only=None, device="cpu", trl=None, method="spin")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert compare.contestants(arguments) == ["bare GEMMs", "spinfast", "eager"]
    said = capsys.readouterr().err
    assert "unsloth: not measured, it needs a CUDA GPU" in said
    assert "trl: not measured, not installed: trl" in said
    assert "trl-padding-free" not in said
    for only in ("trl-liger", "trl-padding-free"):
        with pytest.raises(UserError, match="cannot run here"):
            compare.contestants(SimpleNamespace(only=only, device="cpu", trl=None, method="dpo"))
    with pytest.raises(UserError, match=", ".join(PEERS)):
        compare.contestants(SimpleNamespace(only="nobody", device="cpu", trl=None, method="sft"))


@pytest.mark.parametrize("limit", [0, 1, 3, 100, 1000])
def test_largest_finds_the_limit_to_an_eighth(limit):
    found = largest(lambda size: size <= limit, 4)
    assert found <= limit
    assert found >= limit - max(1, limit // 8)
