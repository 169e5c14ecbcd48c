"""Whole runs on the real engine: the same game as on the policy's own module; killed in the middle of generation."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from fixtures import tiny_model_dir
from scipy import stats
from test_run import write_config

from spinfast.evaluate.answers import score_gsm8k
from spinfast.generation.transformers import TransformersGenerator
from spinfast.store.files import read_jsonl
from spinfast.types import Request, Sampling

RARE = 1e-3  # a true hypothesis is rejected once in a thousand; the seeds are fixed, so it is rejected always or never


def same_distribution(a, b) -> float:
    """The smaller p-value of Kolmogorov-Smirnov and Mann-Whitney."""
    return min(stats.ks_2samp(a, b).pvalue, stats.mannwhitneyu(a, b).pvalue)


def command(config, run_dir, *overrides):
    return [sys.executable, "-m", "spinfast.run", str(config), *overrides, "--run-dir", str(run_dir)]


def play(config, run_dir, *overrides):
    done = subprocess.run(command(config, run_dir, *overrides), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return run_dir


@pytest.mark.slow
def test_both_generators_draw_from_one_distribution(generator, trained, prompts):
    """96 short answers each to four prompts, with other seeds: how long they are, and where they start."""
    ids, stop_ids = prompts
    common = (*stop_ids, *trained_stops(generator, trained, prompts))
    own = TransformersGenerator(trained, batch_size=8)

    def drawn(player, temperature, seed):
        requests = [Request(i, tuple(ids[i % 4]), seed + i) for i in range(96)]
        sampling = Sampling(temperature, 1.0, 6, common)
        return {c.index: c.token_ids for c in player.generate(requests, sampling, trained.adapter())}

    theirs, ours = drawn(generator, 1.0, 0), drawn(own, 1.0, 10_000)
    lengths = [[len(answer) for answer in side.values()] for side in (theirs, ours)]
    assert len(set(lengths[0])) > 3, "the case is too easy: all answers are equally long"
    assert same_distribution(*lengths) > RARE
    assert homogeneous(theirs, ours) > RARE
    colder = drawn(own, 0.3, 20_000)
    assert homogeneous(theirs, colder) < RARE, "the case is too easy: another temperature passes for the same"


def trained_stops(generator, trained, prompts):
    """Tokens that end an answer early: the likeliest second tokens."""
    greedy = Sampling(0.0, 1.0, 4, prompts[1])
    requests = [Request(i, tuple(p), i) for i, p in enumerate(prompts[0])]
    return {token for c in generator.generate(requests, greedy, trained.adapter()) for token in c.token_ids[1:4]}


def homogeneous(a, b) -> float:
    """p-value of a chi-square test that first tokens of both sides come from one table per prompt."""
    statistic = freedom = 0
    for prompt in range(4):
        first = [[answer[0] for index, answer in side.items() if index % 4 == prompt] for side in (a, b)]
        common = [token for token in set(first[0] + first[1]) if sum(f.count(token) for f in first) >= 8]
        table = [[f.count(token) for token in common] for f in first]
        table = [[*row, len(f) - sum(row)] for row, f in zip(table, first, strict=True)]
        filled = [column for column in zip(*table, strict=True) if sum(column)]
        if len(filled) > 1:
            found = stats.chi2_contingency(list(zip(*filled, strict=True)), correction=False)
            statistic, freedom = statistic + found.statistic, freedom + found.dof
    return float(stats.chi2.sf(statistic, freedom))


@pytest.mark.slow
def test_two_iterations_by_either_generator_give_the_same_pairs(smollm2, tmp_path):
    """Lengths and accuracy of the generated answers, iteration by iteration (SmolLM2, worked problems)."""
    if importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("reasoning-gym is not installed")
    config = tmp_path / "config.yaml"
    tree = {
        "model": {"name": str(smollm2.path)},
        "data": {"source": "reasoning_gym:gsm_symbolic", "size": 64, "seed": 1},
        "prompt": {"max_prompt_tokens": 384, "max_answer_tokens": 320},
        "spin": {"iterations": 2, "lr": 5e-5},
        "generation": {"max_tokens": 96},
        "train": {"microbatch_tokens": 2048, "checkpointing": False},
    }
    config.write_text(yaml.safe_dump(tree))
    runs = {name: play(config, tmp_path / name, f"generation.backend={name}") for name in ("vllm", "transformers")}
    references = {str(e["question"]): str(e["answer"]) for e in problems()}
    for iteration in range(2):
        rows = {name: read_jsonl(run / f"iter_{iteration:03d}" / "completions.jsonl") for name, run in runs.items()}
        assert [row["index"] for row in rows["vllm"]] == [row["index"] for row in rows["transformers"]]
        lengths = [[len(row["token_ids"]) for row in side] for side in rows.values()]
        assert same_distribution(*lengths) > RARE
        answers = list(references.values())
        right = [
            sum(score_gsm8k(row["text"], answers[row["index"]])["exact_match,flexible-extract"] for row in side)
            for side in rows.values()
        ]
        assert stats.fisher_exact([[n, len(rows["vllm"]) - n] for n in map(int, right)]).pvalue > RARE


@pytest.mark.slow
def test_a_window_that_no_sequence_reaches_is_none_to_the_engine(tmp_path):
    """vLLM refuses windows in some layers, so it is told of none; the run's canary compares the two."""
    window = {"use_sliding_window": True, "sliding_window": 160, "max_window_layers": 1}
    model = tiny_model_dir(tmp_path, "qwen2", hidden=128, **window)
    limits = {"max_prompt_tokens": 64, "max_answer_tokens": 64}
    generation = {"backend": "vllm", "max_tokens": 16, "kv_cache_gib": 0.1}
    config = write_config(tmp_path, model, prompt=limits, generation=generation, spin={"iterations": 1})
    assert "canary: engine and policy differ by" in (play(config, tmp_path / "run") / "log.txt").read_text()


def problems():
    import reasoning_gym

    return reasoning_gym.create_dataset("gsm_symbolic", size=64, seed=1)


@pytest.mark.faults
def test_killed_while_vllm_generates(tiny_model, tmp_path):
    """SIGKILL in the middle: no prompt is answered twice or lost. A prompt beyond the limit is counted, not played."""
    config = write_config(
        tmp_path,
        tiny_model("qwen2", hidden=128),
        prompt={"max_prompt_tokens": 64},
        generation={"backend": "vllm", "max_tokens": 32, "batch_size": 4, "kv_cache_gib": 0.1},
        spin={"iterations": 1, "groups_per_step": 50},
        evaluate={"problems": 0, "pairs": 0},
    )
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(48)]
    rows.insert(7, {"question": "What is " + "1 + " * 100, "answer": "#### 100"})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dir, path = tmp_path / "run", tmp_path / "run" / "iter_000" / "completions.jsonl"

    process = subprocess.Popen(command(config, run_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (path.exists() and path.read_bytes().count(b"\n") >= 8):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = [json.loads(line) for line in path.read_text().splitlines()[:8]]
    assert path.read_bytes().count(b"\n") < 48

    play(config, run_dir)
    after = read_jsonl(path)
    assert sorted(row["index"] for row in after) == [i for i in range(49) if i != 7]
    kept = {row["index"]: row["token_ids"] for row in after}
    assert all(kept[row["index"]] == row["token_ids"] for row in before)
    assert "1 of 49 rows rejected (prompt longer than 64 tokens: 1)" in " ".join(
        (run_dir / "log.txt").read_text().split()
    )
