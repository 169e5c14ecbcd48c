"""inf and NaN put into loss, gradient and weights of a real run; memory that runs out at every forward of a step."""

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from fixtures import FailingCall
from packed_cases import tiny_policy
from test_grpo import grpo_config
from test_run import play, train_rows, write_config

from spinfast import fit, scoring, train
from spinfast.generation.transformers import TransformersGenerator
from spinfast.objectives import Nll, Pairwise, Surrogate
from spinfast.policy.adapters import files as adapters
from spinfast.run import main
from spinfast.scoring import Budget
from spinfast.store import files, rollouts
from spinfast.train import start_training, train_step
from spinfast.types import Group

pytestmark = pytest.mark.faults
SHORT = {"spin": {"iterations": 1}, "evaluate": {"problems": 0, "pairs": 1}}


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


def spoil_loss(monkeypatch, calls, value):
    """The loss of these microbatches (numbered from 1) becomes `value`."""
    original, count = Pairwise.__call__, 0

    def spoiled(self, batch, logps_N, ops):
        nonlocal count
        count += 1
        loss = original(self, batch, logps_N, ops)
        return type(loss)(loss.total * value, loss.metrics) if count in calls else loss

    monkeypatch.setattr(Pairwise, "__call__", spoiled)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_non_finite_loss_is_skipped_counted_and_shown(tmp_path, model, monkeypatch, step, value):
    spoil_loss(monkeypatch, {step}, value)
    run_dir = play(tmp_path, model, **SHORT)
    rows = train_rows(run_dir)
    assert [row["train/overflows"] for row in rows] == [int(row["step"] >= step) for row in rows]
    assert rows[step - 1]["train/loss"] in ("nan", "inf")
    assert all(t.isfinite().all() for t in adapters.load(run_dir / "iter_000" / "adapter").tensors.values())
    assert f"step {step} skipped" in (run_dir / "log.txt").read_text()


def spoil_parameters(monkeypatch, spoil):
    """Call spoil(parameter, number of its gradient) for one parameter whenever it got one."""
    original = fit.start_training

    def start(policy, *args):
        state, count = original(policy, *args), 0
        parameter = next(p for name, p in policy.trainable_parameters().items() if "lora_B" in name)

        def hook(parameter):
            nonlocal count
            count += 1
            spoil(parameter, count)

        parameter.register_post_accumulate_grad_hook(hook)
        return state

    monkeypatch.setattr(fit, "start_training", start)


def test_one_infinite_gradient_is_skipped_and_counted(tmp_path, model, monkeypatch):
    def spoil(parameter, count):
        if count == 2:
            parameter.grad[0, 0] = float("inf")

    spoil_parameters(monkeypatch, spoil)
    rows = train_rows(play(tmp_path, model, **SHORT))
    assert [row["train/overflows"] for row in rows] == [0, 1, 1]
    assert rows[1]["train/grad_norm"] in ("nan", "inf")


def test_nan_in_the_weights_stops_the_run_with_what_reproduces_it(tmp_path, model, monkeypatch, capsys):
    def spoil(parameter, count):
        if count == 2:
            parameter.data[0, 0] = float("nan")

    spoil_parameters(monkeypatch, spoil)
    longer = SHORT | {"spin": {"iterations": 1, "epochs": 3}}
    config = write_config(tmp_path, model, train={"max_overflows": 3}, **longer)
    assert main([str(config), "--run-dir", str(tmp_path / "run")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spinfast: ")]
    assert "3 steps in a row had a non-finite loss or gradient" in line
    assert f"replay {tmp_path / 'run' / 'failed_step'}" in line
    assert main(["replay", str(tmp_path / "run" / "failed_step")]) == 0
    said = capsys.readouterr().out
    assert "log-probs not finite: group" in said
    assert "first output not finite: base_model.model.model.layers.0" in said
    assert "loss nan" in said
    (tmp_path / "run" / "failed_step" / "step.json").write_text("{}")
    assert main(["replay", str(tmp_path / "run" / "failed_step")]) == 2


def test_a_run_whose_every_step_is_skipped_is_no_result(tmp_path, model, monkeypatch, capsys):
    spoil_loss(monkeypatch, set(range(1, 100)), float("nan"))
    config = write_config(tmp_path, model, **SHORT)  # 3 steps, fewer than max_overflows
    assert main([str(config), "--run-dir", str(tmp_path / "run")]) == 2
    assert "3 steps in a row" in capsys.readouterr().err
    assert not (tmp_path / "run" / "iter_000" / "adapter").exists()
    monkeypatch.undo()
    assert main(["replay", str(tmp_path / "run" / "failed_step")]) == 0
    assert "gradients not finite: 0 of" in capsys.readouterr().out  # the fault was not in the step's inputs


def test_a_gradient_spike_is_logged(tmp_path, model, monkeypatch):
    def spoil(parameter, count):
        if count == 3:
            parameter.grad.mul_(1e4)

    spoil_parameters(monkeypatch, spoil)
    run_dir = play(tmp_path, model, **SHORT)
    assert "times its median" in (run_dir / "log.txt").read_text()
    assert train_rows(run_dir)[2]["train/grad_spike"] > 10


def test_training_draws_no_random_numbers(tmp_path, model, monkeypatch):
    """So a checkpoint needs no generator's state."""
    states = []
    original = train.accumulate

    def watched(*args):
        before = torch.get_rng_state()
        result = original(*args)
        states.append(torch.equal(before, torch.get_rng_state()))
        return result

    monkeypatch.setattr(train, "accumulate", watched)
    play(tmp_path, model, **SHORT)
    assert states == [True] * 3


def test_deterministic_mode_runs_and_gives_the_same(tmp_path, model):
    plain = play(tmp_path, model, name="plain", **SHORT)
    strict = play(tmp_path, model, name="strict", device={"deterministic": True}, **SHORT)
    assert torch.are_deterministic_algorithms_enabled()
    again = play(tmp_path, model, name="again", **SHORT)
    assert not torch.are_deterministic_algorithms_enabled()
    losses = [[row["train/loss"] for row in train_rows(run_dir)] for run_dir in (plain, strict, again)]
    assert losses[0] == losses[1] == losses[2]


def test_memory_runs_out_at_every_forward_of_a_step(model, monkeypatch):
    """The same gradient, within fp32 rounding of another split into microbatches."""
    groups = [Group(tuple(range(5, 15 + i)), (tuple(range(20, 30 + i)),)) for i in range(8)]

    def gradient(fails_at):
        policy = tiny_policy(model)
        state, kept = start_training(policy, "adamw", 0.0, scaled=False), {}
        failing = FailingCall(train.answer_logps, fails_at)

        def step():
            kept.update({n: p.grad.clone() for n, p in policy.trainable_parameters().items()})

        with monkeypatch.context() as patch:
            patch.setattr(train, "answer_logps", failing)
            patch.setattr(state.optimizer, "step", step)
            _, after = train_step(policy, groups, Nll(), 1e9, Budget(64, "sdpa"), state)
        return kept, failing.calls, after

    expected, calls, _ = gradient(fails_at=0)
    assert calls > 2
    for fails_at in range(1, calls + 1):
        found, _, after = gradient(fails_at)
        assert after.microbatch_tokens < 64
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_base_weights_with_nan_are_told(tmp_path, tmp_path_factory, capsys):
    from fixtures import tiny_model_dir
    from safetensors.torch import load_file, save_file

    broken = tiny_model_dir(tmp_path_factory.mktemp("nan"), "llama")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    config = write_config(tmp_path, broken, **SHORT)
    assert main([str(config), "--run-dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "expected finite" in said
    assert json.dumps(said).count("spinfast: ") == 1


def test_a_checkpoint_that_is_not_finite_is_not_saved(tmp_path, model, monkeypatch, capsys):
    """Step 2 spoils the weights and its own gradient is finite, so only the save can tell."""

    def spoil(parameter, count):
        if count == 2:
            parameter.data[0, 0] = float("nan")

    spoil_parameters(monkeypatch, spoil)
    config = write_config(tmp_path, model, train={"save_every_steps": 1}, **SHORT)
    assert main([str(config), "--run-dir", str(tmp_path / "run")]) == 2
    assert "is not finite, so nothing is saved from here" in capsys.readouterr().err
    (kept,) = (tmp_path / "run" / "iter_000" / "checkpoints").glob("step_*")
    assert kept.name == "step_000001"
    assert adapters.not_finite(adapters.load(kept).tensors) is None


def test_an_adapter_that_is_not_finite_is_no_result(tmp_path, model, monkeypatch, capsys):
    """The last step spoils the weights: no checkpoint is due and no step is left to be skipped."""

    def spoil(parameter, count):
        if count == 3:
            parameter.data[0, 0] = float("inf")

    spoil_parameters(monkeypatch, spoil)
    config = write_config(tmp_path, model, **SHORT)
    assert main([str(config), "--run-dir", str(tmp_path / "run")]) == 2
    assert "is not finite" in capsys.readouterr().err
    assert not (tmp_path / "run" / "iter_000" / "adapter").exists()


@pytest.mark.parametrize("fails_at", range(1, 12))
def test_memory_runs_out_while_scoring_and_evaluating(tmp_path, model, monkeypatch, fails_at):
    """Every forward that scores, the opponent's pairs and held-out ones, is made again of smaller microbatches."""
    plain = play(tmp_path, model, name="plain", spin={"iterations": 1}, evaluate={"problems": 1})
    failing = FailingCall(scoring.batch_sequence_logps, fails_at)
    monkeypatch.setattr(scoring, "batch_sequence_logps", failing)
    starved = play(tmp_path, model, name="starved", spin={"iterations": 1}, evaluate={"problems": 1})
    assert failing.calls >= fails_at
    mine, other = (
        {row["iteration"]: row["evaluation"] for row in json.loads((run / "results.json").read_text())}
        for run in (plain, starved)
    )
    assert mine.keys() == other.keys()
    for stage in mine:
        for name, estimate in mine[stage].items():
            assert other[stage][name]["value"] == pytest.approx(estimate["value"], rel=1e-3, abs=1e-4), (stage, name)
    assert "memory ran out" in (starved / "log.txt").read_text()


def test_memory_runs_out_while_generating(tmp_path, model, monkeypatch, capsys):
    """One line; what was done stays, and the same command goes on."""

    def failing(*args):
        raise torch.OutOfMemoryError("fake")

    config = write_config(tmp_path, model, **SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(TransformersGenerator, "generate", failing)
        assert main([str(config), "--run-dir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("spinfast: memory ran out")
    assert main([str(config), "--run-dir", str(tmp_path / "run")]) == 0


# -- grpo: its rewards need no more than a function ------------------------------------------------------------------


def grpo_play(tmp_path, model, grpo=(), **sections):
    config = grpo_config(tmp_path, model, {"steps": 4, **dict(grpo)}, **sections)
    return main([str(config), "--run-dir", str(tmp_path / "run")]), tmp_path / "run"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_surrogate_is_skipped_and_the_next_rollout_is_by_the_same_policy(
    tmp_path, model, monkeypatch, value
):
    """As with a loss scale that is too large: it halves, and nothing moves."""
    original, count = Surrogate.__call__, 0

    def spoiled(self, batch, logps_N, ops):
        nonlocal count
        count += 1
        loss = original(self, batch, logps_N, ops)
        return replace(loss, total=loss.total * value) if count == 2 else loss

    monkeypatch.setattr(Surrogate, "__call__", spoiled)
    start = fit.start_training
    monkeypatch.setattr(fit, "start_training", lambda *args: start(*args[:3], True))  # as fp16 has it
    code, run_dir = grpo_play(tmp_path, model, train={"microbatch_tokens": 1024})
    assert code == 0
    assert [row["train/overflows"] for row in train_rows(run_dir)] == [0, 1, 1, 1]
    assert [row["train/loss_scale"] for row in train_rows(run_dir)] == [4096, 4096, 2048, 2048]
    writers = [pq.read_schema(path).metadata[b"adapter"] for path in rollouts.kept(run_dir / "grpo")]
    assert writers[1] == writers[2]
    assert len({*writers}) == 3


def test_a_kept_grpo_step_is_replayed_with_its_constants_per_token(tmp_path, model, monkeypatch, capsys):
    def spoil(parameter, count):
        if count == 2:
            parameter.data[0, 0] = float("nan")

    spoil_parameters(monkeypatch, spoil)
    code, run_dir = grpo_play(
        tmp_path,
        model,
        {"num_iterations": 4, "beta": 0.1, "loss": "cispo"},
        train={"max_overflows": 2, "microbatch_tokens": 1024},
    )
    assert code == 2
    assert "2 steps in a row had a non-finite loss or gradient" in capsys.readouterr().err
    kept = json.loads((run_dir / "failed_step" / "step.json").read_text())
    assert kept["objective"]["loss"] == "cispo"
    assert kept["objective"]["beta"] == 0.1
    for group in kept["groups"]:
        lengths = [len(answer) for answer in group["answers"]]
        for name in ("sampler_logps", "old_logps", "reference_logps"):
            assert [len(of_answer) for of_answer in group["given"][name]] == lengths
    monkeypatch.undo()
    assert main(["replay", str(run_dir / "failed_step")]) == 0
    said = capsys.readouterr().out
    assert "log-probs not finite: group" in said
    assert "loss nan" in said


def test_a_policy_that_is_nan_where_a_rollout_is_sampled_is_one_line(tmp_path, model, monkeypatch, capsys):
    def spoil(parameter, count):
        if count == 2:
            parameter.data[0, 0] = float("nan")

    spoil_parameters(monkeypatch, spoil)
    code, run_dir = grpo_play(tmp_path, model, train={"microbatch_tokens": 1024})
    said = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in said
    assert said.count("spinfast: ") == 1
    assert not (run_dir / "grpo" / "adapter").exists()


@pytest.mark.parametrize("fails_at", [1, 3, 5, 7])
def test_memory_runs_out_in_a_grpo_run(tmp_path, model, monkeypatch, fails_at):
    """Groups are cut finer, in scoring as in training; the run learns the same to rounding."""
    grpo = {"num_iterations": 2, "beta": 0.1}
    (tmp_path / "plain").mkdir()
    code, plain = grpo_play(tmp_path / "plain", model, grpo, train={"microbatch_tokens": 512})
    assert code == 0
    failing = FailingCall(train.answer_logps, fails_at)
    for module in (scoring, train):
        monkeypatch.setattr(module, "answer_logps", failing)
    code, starved = grpo_play(tmp_path, model, grpo, train={"microbatch_tokens": 512})
    assert code == 0
    assert failing.calls > fails_at
    assert "memory ran out at 512 tokens; microbatches have 256" in (starved / "log.txt").read_text()
    assert files.read_sealed(starved / "plan.json", "plan")["microbatch_tokens"] == 256
    for mine, other in zip(train_rows(starved), train_rows(plain), strict=True):
        assert mine["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=1e-3)


def test_memory_runs_out_where_a_later_rollout_is_sampled(tmp_path, model, monkeypatch, capsys):
    """What was trained until then is saved, though no checkpoint was due."""
    generate, calls = TransformersGenerator.generate, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("fake")
        return generate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersGenerator, "generate", failing)
        code, run_dir = grpo_play(tmp_path, model)
    assert code == 2
    assert capsys.readouterr().err.startswith("spinfast: memory ran out")
    assert [path.name for path in (run_dir / "grpo" / "checkpoints").glob("step_*")] == ["step_000002"]
    assert grpo_play(tmp_path, model)[0] == 0
    assert "training continues after step 2" in (run_dir / "log.txt").read_text()
