"""Every entry of the command table runs, on tiny shapes, and writes rows that carry what a reader of them needs."""

from __future__ import annotations

import json
import shutil
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from fixtures import tiny_model_dir

import bench.__main__ as table
from bench import export, kernels, merging, operators, results_page, rows, scaling, shapes
from bench import memory as memory_bench
from bench.peers import child, compare, end_to_end
from spinfast import ops as spinfast_ops
from spinfast import run as spinfast_run

cuda_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs `python -m bench NAME ARGS` in this process; returns the rows it wrote. No file of the checkout changes."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")

    def run(name: str, *arguments: str, expected: int = 0) -> list[dict]:
        assert table.main([name, *arguments]) == expected
        files = sorted((tmp_path / "results").glob("*.jsonl"))
        found = [json.loads(line) for path in files for line in path.read_text().splitlines()]
        assert all({"date", "device", "versions", "commit", "dirty", "command"} <= row.keys() for row in found)
        return found

    return run


@pytest.fixture
def here(monkeypatch, capsys):
    """Processes of a benchmark run in this one: half a minute less of imports for each. test_scaling starts one."""

    def finished(command: list[str], environment: dict) -> str:
        module, *arguments = command[2:]
        capsys.readouterr()
        if module == "bench.peers.child":
            return json.dumps(child.play(*arguments))
        assert {"bench": table.main, "spinfast.run": spinfast_run.main}[module](arguments) == 0
        return capsys.readouterr().out

    monkeypatch.setattr(child, "finished", finished)


@pytest.fixture
def config(tmp_path):
    """A run of one iteration on a tiny model and four made-up questions."""
    data = [{"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"method: [sft, spin]\nmodel: {{name: {tiny_model_dir(tmp_path)}}}\n"
        f"data: {{source: {tmp_path / 'data.jsonl'}}}\n"
        "spin: {iterations: 1}\ngeneration: {max_tokens: 8, backend: transformers}\ndevice: {profile: cpu}\n"
    )
    return path


def test_every_entry_is_tested_here_or_in_a_file_of_its_name():
    names = [*globals(), *(path.stem for path in Path(__file__).parent.glob("test_*.py"))]
    assert {*table.COMMANDS} <= {name.removeprefix("test_") for name in names if name.startswith("test_")}


@pytest.mark.slow
def test_studies(command):
    (row,) = command("studies", "2")
    assert row["cells"] == len(row["rss_mib"]) == 2
    assert row["times_the_processes"] > 0


def test_a_studys_session_holds_on_to_nothing(command):
    """Between two rounds of all kinds of adapters on one base the tensors stay as many, and nearly all objects do."""
    (row,) = command("studies", "--memory", "10")
    assert row["cells"] == 10
    assert row["tensors"]["10"] == row["tensors"]["5"] > 0
    assert row["tensors_mib"]["10"] == row["tensors_mib"]["5"]
    assert row["objects"]["10"] - row["objects"]["5"] < 5 * 20  # a cell's figures stay known


def test_scale(command):
    """What is predicted says so."""
    two, eight = command("scale", "--predict")
    assert (two["cards"], eight["cards"]) == (2, 8)
    assert {row["kind"] for row in (two, eight)} == {"predicted"}
    assert 1 < two["speedup"] <= 2 < eight["speedup"] <= 8
    assert two["bytes_per_step"]["tiny_lora u 13, tie all"] == 52


@pytest.mark.slow
def test_scale_of_ranks(command, config):
    one, two, gain = command("scale", "--config", str(config), "--size", "4", "--tokens", "8")
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert one["steps"] == two["steps"]
    assert one["computed_bytes_per_step"] == 0 < two["computed_bytes_per_step"]
    assert two["wire_bytes_per_step"] > two["computed_bytes_per_step"]
    assert gain["generate_speedup"] > 0


def test_unknown_names_are_told(capsys):
    assert table.main(["nothing"]) == 2
    assert "peers" in capsys.readouterr().err


def test_iteration(command, config):
    (row,) = command("iteration", str(config), "train.save_every_steps=1")
    assert {"base.save", "sft.train", "0.generate", "0.score", "0.train"} <= row["phase_s"].keys()
    assert row["tokens_per_second"].keys() == {"sft.train", "0.generate", "0.train"}
    assert row["wall_s"] > row["phases_s"] > 0


def test_iteration_refuses_what_it_does_not_measure(command, config, capsys):
    command("iteration", str(config), "--dry-run", expected=2)
    assert "--dry-run" in capsys.readouterr().err


@pytest.mark.slow
def test_kernels(command, monkeypatch):
    """Every operator; torch.compile needs a compiler and half a minute."""
    monkeypatch.setattr(kernels, "gate", lambda: None)
    monkeypatch.setenv("BENCH_OPERATORS", "tiny,64,32")
    for name, value in {"MODEL": "tiny", "LONG_TOKENS": 256}.items():
        monkeypatch.setattr(kernels, name, value)
    found = command("kernels", "--rounds", "2", "--laps", "1", "--model", "tiny", "--operators", "not compile")
    assert {row["op"] for row in found} == {
        *operators.operators(shapes.shape("tiny"), 4, 4), "decoder layer", "train step",
    }  # fmt: skip
    heads = {row["what"]: row["peak_extra_mib"] for row in found if "peak_extra_mib" in row}
    assert heads["triton"] < heads["plain eager"]
    kept = {row["what"]: row["of_peft_eager"] for row in found if row["op"] == "decoder layer"}
    assert kept["eager twin"] < 1


def test_kernels_without_a_green_gate_measure_nothing(command, monkeypatch):
    monkeypatch.setattr(kernels.subprocess, "run", lambda *_, **__: type("Done", (), {"returncode": 1}))
    with pytest.raises(SystemExit, match="is red"):
        command("kernels")


@pytest.mark.slow
def test_compile(command, capsys):
    assert not command("compile", "tiny")
    assert "| sm_75 | rope._rope_kernel |" in capsys.readouterr().out


def test_memory(command, monkeypatch, tmp_path):
    monkeypatch.setattr(memory_bench, "PLOT", tmp_path / "memory.svg")
    found = command("memory", "--model", "tiny")
    assert (tmp_path / "memory.svg").exists()
    held = {row["what"]: row["tensors_gib"] for row in found if "tensors_gib" in row and not row["checkpointed_layers"]}
    assert held["step, TRL-shaped eager, padded [2B, L]"] > held["step, fastest plan"]
    (rollout,) = (row for row in found if row["what"].startswith("GRPO"))
    assert rollout["prompt_tokens_saved"] == 0.875  # 7 of 8 answers find the prompt there


@pytest.fixture
def small_merges(monkeypatch):
    small = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    monkeypatch.setattr(merging, "SHAPE", merging.SHAPE | small | {"num_attention_heads": 4})


def test_export(command, monkeypatch, tiny_model, small_merges):
    monkeypatch.setattr(export, "SMOLLM2", str(tiny_model("llama")))
    (row,) = command("export", "memory", "q4_0")
    assert 0 < row["mb"] < row["start_mib"] <= row["peak_anon_mib"]
    pytest.importorskip("cyllama")
    pytest.importorskip("xllamacpp")
    row = command("export", "q8_0")[-1]
    assert min(row["perplexity"], row["tokens_per_s"], row["prompt_tokens_per_s"]) > 1
    assert 0 < row["apart"] < 0.02


def test_merging(command, small_merges):
    (row,) = command("merging", "linear", "2")
    assert row["output_mib"] < row["peak_anon_mib"]


@pytest.mark.parametrize("models", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_rollouts_fit_beside_the_engines_cache(models):
    """8 prompts x 8 answers of 512 tokens: 0.5B within 6 GiB, 1.5B within 10; who does not fit is refused."""
    ops = spinfast_ops.choose("triton", "cuda")[0]
    for row in islice(memory_bench.rollouts("Qwen2.5-0.5B", ops), models):
        assert row["peak_gib"] <= float(row["target"].split()[1])
        assert row["kv_cache_gib"] > 0.5
        assert row["prompt_tokens_saved"] >= 0.75  # a group is cut in two at the most
        assert row["gradients_mib"] > 0  # a step of several microbatches


@pytest.mark.slow
def test_scaling(command, monkeypatch):
    monkeypatch.setattr(scaling, "AXES", {"tokens": [(None, 2, 16, 4)]})
    (row,) = command("scaling", "--model", "tiny", "--device", "cpu")
    assert row["step_tokens"] == 2 * (128 + 15 + 15)
    assert row["steady_step_ms"] > 0 < row["predicted_tensors_mib"]


def test_limits(command, monkeypatch):
    monkeypatch.setattr(scaling, "LONGEST", 16)
    (row,) = command("limits", "--model", "tiny", "--gib", "0.05", "--device", "cpu")
    assert row["kind"] == "simulated"
    assert row["largest_batch"] >= 1


@pytest.fixture
def tiny_gate(monkeypatch):
    """The gate starts two processes a peer; test_peers.py has its parts, this file the rest."""
    monkeypatch.setattr(compare, "gate", lambda names, *_: dict.fromkeys(names, 1.0))


@pytest.mark.parametrize("method", [*(pytest.param(m, marks=pytest.mark.slow) for m in ("spin", "sft")), "grpo"])
def test_peers(command, here, tiny_gate, method):
    """grpo: the training part beside the others, then a whole step, sampled by the policy's own module."""
    only = "bare GEMMs,spinfast,eager"
    shape = ("--model", "random:tiny", "--device", "cpu", "--dtype", "float32", "--count", "4", "--pairs-per-step", "2")
    sampling = ("--samples", "2", "--max-tokens", "4", "--engine", "transformers")
    rows = command("peers", "--method", method, *shape, *sampling, "--only", only, "--rounds", "1")
    if method == "grpo":
        *rows, whole = rows
        assert (whole["what"], whole["peer"], whole["engine"]) == ("whole step", "spinfast", "transformers")
        assert whole["answer_tokens"] == 4 * 2 * 4
        assert min(*whole["generate_s"], *whole["train_s"]) > 0
    found = {row["peer"]: row for row in rows}
    assert [*found] == only.split(",")
    assert found["eager"]["spinfast_speedup"] > 0
    assert found["spinfast"]["share_of_roofline"] > 0
    assert {row["method"] for row in rows} == {method}
    assert (found["eager"]["scored_positions"], found["spinfast"]["scored_positions"]) == ("all", "answers")


@pytest.mark.parametrize("name", ["limits", "end_to_end"])
def test_only_peers_have_methods(command, name, capsys):
    """What is not acted upon is refused: these are of pairs."""
    with pytest.raises(SystemExit):
        command(name, "--method", "sft")
    assert "--method" in capsys.readouterr().err


@pytest.mark.slow
def test_peers_gate(command):
    """The whole gate, as a command."""
    command("peers", "--model", "random:tiny", "--device", "cpu", "--only", "spinfast,eager", "--rounds", "1")


def test_end_to_end(command, here, monkeypatch):
    """TRL's and vLLM's side stands in; ours is a run."""
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(end_to_end, "script", lambda *_: 1000.0)
    monkeypatch.setattr(end_to_end, "MAX_TOKENS", 8)
    shape = ("--model", "random:tiny", "--device", "cpu", "--count", "2", "--pairs-per-step", "2", "--rounds", "1")
    theirs, ours = command("end_to_end", *shape)
    assert ours["wall_s"] > 0
    assert theirs["spinfast_speedup"] > 1


@pytest.mark.slow
def test_end_to_end_script(command):
    """With vLLM and TRL for true; TRL 1.15's head runs on GPUs only."""
    for name in ("reasoning_gym", "vllm", "trl"):
        pytest.importorskip(name)
    if not torch.cuda.is_available() and sys.modules["trl"].__version__.startswith("1.15"):
        pytest.skip("TRL 1.15's head runs on GPUs only")
    command("end_to_end", "--model", "random:tiny", "--count", "2", "--pairs-per-step", "2", "--rounds", "1")


def test_profile(command):
    ours, theirs = command("profile", "--model", "random:tiny", "--count", "4")
    assert (ours["peer"], theirs["peer"]) == ("spinfast", "eager")
    assert ours["self_ms"]["GEMMs"] > 0


def test_roofline(command):
    (row,) = command("roofline", "--model", "random:tiny", "--tokens", "8")
    assert row["best_gflops"] > 0 < row["copy_gb_per_s"]


@cuda_only
def test_rehearse(command):
    assert {row["what"] for row in command("rehearse", "--model", "tiny")} >= {"sft", "spin", "score", "generate"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU is told")
def test_rehearse_without_a_gpu(command, capsys):
    command("rehearse", "--model", "tiny", expected=2)
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_generation(command, here):
    """spinfast's own generator against the library's, gate and ceiling; without vLLM, which takes half a minute."""
    sides = ("--only", "spinfast-transformers", "model.generate")
    short = ("--prompts", "3", "--max-tokens", "4", "--rounds", "1")
    ours, theirs = command("generation", "--model", "random:tiny", *short, *sides)
    assert ours["ceiling_tokens_per_s"] > 0 < theirs["p50_tokens_per_s"]


@pytest.mark.slow
def test_generation_of_vllm(command):
    pytest.importorskip("vllm")
    short = ("--prompts", "3", "--max-tokens", "4", "--rounds", "1", "--stop")
    found = command("generation", "--model", "random:tiny", *short, "--only", "spinfast-vllm", "bare-vllm")
    assert found[1]["spinfast_vllm_ratio"] > 0


def test_results(command, monkeypatch, tmp_path):
    """Written from whatever rows there are, plots included."""
    monkeypatch.setattr(results_page, "PAGE", tmp_path / "RESULTS.md")
    monkeypatch.setattr(results_page, "IMAGES", tmp_path)
    shutil.copytree(results_page.ROOT / "bench" / "results", tmp_path / "results")
    command("results")
    assert (tmp_path / "RESULTS.md").read_text() == results_page.page()
    assert {path.name for path in tmp_path.glob("*.svg")} == {"profile.svg", "scaling.svg"}


def test_a_hub_model_needs_its_commit(tmp_path):
    with pytest.raises(shapes.UserError, match="@COMMIT"):
        shapes.resolve("someone/model", tmp_path)


def test_a_child_that_fails_says_why():
    with pytest.raises(RuntimeError, match="broken"):
        child.finished([sys.executable, "-c", "raise SystemExit('broken')"], {})
