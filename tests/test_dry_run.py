"""--dry-run on a machine without the GPU it plans for, and the planner's choices and refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from fixtures import tiny_tokenizer
from rich.console import Console
from transformers import Qwen2Config

from spinfast import ops, session
from spinfast.config import Sft, load_config, parse_config
from spinfast.data.renderer import Renderer
from spinfast.device import GIB, profile
from spinfast.dry_run import dry_run, sample_text
from spinfast.errors import UserError
from spinfast.memory.planner import HEAD_CHUNKS, plan, worst_batch
from spinfast.methods import METHODS
from spinfast.methods.run import loads, open_run
from spinfast.packing import packed_length
from spinfast.progress import Display
from spinfast.run import main
from spinfast.store.record import RunDir
from spinfast.types import Example

MIDDLING = Qwen2Config(
    vocab_size=8000, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip


def config(**changes):
    tree = {
        "model": {"name": "none"},
        "data": {"source": "none.jsonl"},
        "generation": {"backend": "transformers", "batch_size": 4, "max_tokens": 128},
        "prompt": {"max_prompt_tokens": 128, "max_answer_tokens": 128},
        "spin": {"groups_per_step": 8},
    }
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values
    return parse_config(tree)


def planned(memory, **changes):
    device = replace(profile("t4", plan_only=True), memory=int(memory))
    return planned_for(config(**changes), device)


def planned_for(c, device, shape=MIDDLING, table=ops.EAGER, engine="transformers"):
    return plan(c, device, shape, table, loads(c, ()), engine)


def test_less_memory_means_smaller_microbatches_then_checkpointing():
    plans = [planned(memory * GIB) for memory in (8, 0.58, 0.55)]
    assert plans[0].checkpoint_layers == 0
    seconds = [each.step_seconds for each in plans]
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[-1]
    assert plans[-1].microbatch_tokens < plans[0].microbatch_tokens
    for each in plans:
        assert each.peak <= each.budget
        assert each.peak == max(usage.peak for usage in each.phases.values()) + each.reserve
    tight = planned(0.7 * GIB, prompt={"max_prompt_tokens": 8192})
    assert tight.checkpoint_layers > 0
    assert tight.peak <= tight.budget


def test_the_heads_chunk_is_the_largest_that_fits():
    device = profile("t4", plan_only=True)
    wide = Qwen2Config(**MIDDLING.to_dict() | {"vocab_size": 100_000})
    fixed = config(train={"microbatch_tokens": 1024, "checkpointing": True}, generation={"batch_size": 1})
    ample = planned_for(fixed, device, wide, ops.compiled("triton"))
    assert ample.head_chunk == max(HEAD_CHUNKS)
    less = 50 * wide.vocab_size * 2  # 50 tokens' logits
    tight = planned_for(fixed, replace(device, memory=ample.peak - less), wide, ops.compiled("triton"))
    assert tight.head_chunk < ample.head_chunk
    assert tight.peak <= tight.budget


def test_a_prompt_alone_is_shown_as_one():
    renderer = Renderer(tiny_tokenizer())
    ids = renderer.prompt_ids([{"role": "user", "content": "How many?"}])
    shown = sample_text(renderer, Example(0, ({"role": "user", "content": "How many?"},), "", ids, ()), ("grpo",))
    assert shown.plain == f"[prompt]\n{renderer.tokenizer.decode(ids)}".rstrip("\n")


def test_what_the_config_fixes_stays():
    fixed = planned(8 * GIB, train={"microbatch_tokens": 1024, "checkpointing": True})
    assert (fixed.microbatch_tokens, fixed.checkpoint_layers) == (1024, 6)


def test_refusal_says_what_would_fit():
    with pytest.raises(UserError, match=r"one pair of 382 tokens needs 0\.\d\d GiB with 6 layers checkpointed, 0\.50"):
        planned(0.5 * GIB)
    with pytest.raises(UserError, match=r"a pair of \d+ tokens would fit .*max_prompt_tokens"):
        planned(0.6 * GIB, prompt={"max_prompt_tokens": 8192})


def test_generation_that_does_not_fit_is_named():
    with pytest.raises(UserError, match=r"the generate phase needs .* lower generation.batch_size"):
        planned(0.75 * GIB, generation={"batch_size": 1500})


def test_a_vllm_cache_is_resident_and_not_larger_than_useful():
    device = profile("t4", plan_only=True)
    result = planned_for(config(generation={"backend": "vllm", "kv_cache_gib": 4.0}), device, engine="vllm")
    assert result.kv_cache_bytes == 2 * 6 * 2 * 32 * 2 * 4 * 256  # k and v, layers, heads, dim, fp16, slots, tokens
    assert "generate" not in result.phases


@pytest.mark.parametrize("names", [["sft"], ["sft", "spin"]])
def test_a_vllm_cache_is_resident_while_sft_is_the_fullest_load(names):
    c = config(generation={"backend": "vllm"}).model_copy(update={"method": names, "sft": Sft(groups_per_step=64)})
    assert planned_for(c, profile("t4", plan_only=True), engine="vllm").kv_cache_bytes > 0


def rows(*lengths):
    return [Example(i, ({},), "", (0,) * prompt, (0,) * answer) for i, (prompt, answer) in enumerate(lengths)]


def test_worst_batch_is_the_fullest_the_data_can_make():
    (load,) = [METHODS[name].load(config(), rows((100, 20), (10, 120), (128, 128))) for name in config().method]
    assert [len(group.prompt_ids) for group in load.groups] == [128, 10, 100]
    batch = worst_batch(load.groups, 400)
    assert sum(map(packed_length, batch)) <= 400
    assert any(len(group.prompt_ids) == 128 for group in batch)
    prompts = METHODS["spin"].load(
        config(), rows(*[(100, 5)] * 8)
    )  # more pairs fit where generated answers end at once
    assert [len(group.answers[1]) for group in worst_batch(prompts.groups, 400)] == [1, 1, 1]


@pytest.fixture
def run_config(tiny_model, tmp_path):
    rows = [{"question": f"What is {i} + {i}?", "answer": f"The sum is {2 * i}.\n#### {2 * i}"} for i in range(12)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"name": str(tiny_model("qwen2"))},
        "data": {"source": str(data)},
        "generation": {"backend": "transformers", "batch_size": 4, "max_tokens": 32},
        "spin": {"groups_per_step": 4},
    }


@pytest.mark.parametrize("name", ["t4", "cpu"])
def test_dry_run_shows_everything(run_config, name):
    console = Console(record=True, width=160, force_terminal=True)
    result = dry_run(parse_config(run_config | {"device": {"profile": name}}), console)
    text = console.export_text()
    assert text.index("data: 12 examples; prompts of ") < text.index("spin: 12 groups") < text.index("MiB at the full")
    assert text.index("MiB at the full") < text.index("groups_per_step: 4")
    assert "warmup_ratio" not in text  # a default
    assert f"microbatches of {result.microbatch_tokens} tokens" in text
    assert "spin: 12 groups" in text
    assert "3 steps, 6 in each of 2 later rounds" in text
    assert "The sum is" in text
    assert ("published figures" in text) == (name == "t4")
    for phase in ("spin", "score", "generate"):
        assert phase in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"generation": {"max_tokens": 1000}}, "but .* has a context of 1024; lower them"),
        ({"adapter": {"r": 65}}, "adapter.r: 65 is more than the width"),
    ],
)
def test_what_a_run_would_refuse_is_refused(run_config, changes, words):
    with pytest.raises(UserError, match=words):
        dry_run(parse_config(run_config | {"device": {"profile": "t4"}} | changes), Console(record=True))


def test_trained_tokens_are_coloured(run_config):
    console = Console(record=True, width=160, force_terminal=True)
    dry_run(parse_config(run_config | {"device": {"profile": "t4"}}), console)
    coloured = console.export_text(styles=True)
    green = [part.split("\x1b[0m")[0] for part in coloured.split("\x1b[1;32m")[1:]]
    assert any("The sum is" in part for part in green)
    assert not any("What is" in part for part in green)


def test_of_preferences_the_answer_that_is_not_learnt_is_called_so_where_there_are_no_colours(run_config, tmp_path):
    row = {"prompt": "How many?", "chosen": "Twelve.", "rejected": "Who knows?"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    sections = {"method": "sft", "data": {"source": str(tmp_path / "pairs.jsonl")}, "device": {"profile": "t4"}}
    console = Console(record=True, width=200)
    dry_run(parse_config({name: s for name, s in run_config.items() if name != "spin"} | sections), console)
    text = console.export_text()
    assert "[learnt]\nTwelve." in text
    assert "[not used]\nWho knows?" in text


GRPO = {"prompts_per_step": 4, "samples": 3, "steps": 7, "steps_per_generation": 2, "num_iterations": 2, "refill": 1}


def grpo(run_config, rewards, **data):
    tree = {name: section for name, section in run_config.items() if name != "spin"} | data
    return parse_config(tree | {"method": "grpo", "grpo": GRPO | {"rewards": rewards}, "device": {"profile": "t4"}})


def test_grpo_shows_its_batches_and_rates_the_datas_answers(run_config):
    console = Console(record=True, width=200)
    dry_run(grpo(run_config, {"gsm8k": {"weight": 2, "reading": "strict"}, "format": 0.5}), console)
    text = console.export_text()
    assert "4 prompts x 3 answers = 12 answers a step; a rollout of 8 prompts feeds 4 steps" in text
    assert "2 rollouts: 16 prompts = 1.33 times the data's 12; 48 answers, 1,536 tokens to generate at the most" in text
    assert "73% at 10%, 37% at 30%, 25% at 50%, 73% at 90% right; up to 1 times fresh prompts" in text
    assert "[an answer of the data's, which the model does not see]\nThe sum is" in text
    assert "gsm8k: 1, 1 (weight 2)" in text
    assert "format: 0, 0 (weight 0.5)" in text


def test_grpo_without_answers_in_the_data_says_so(run_config, tmp_path):
    (tmp_path / "asked.jsonl").write_text('{"problem": "What is 1 + 1?", "solution": "2"}\n')
    console = Console(record=True, width=200)
    dry_run(grpo(run_config, "gsm8k", data={"source": str(tmp_path / "asked.jsonl")}), console)
    text = console.export_text()
    assert "rewards, of the prompts' own words (the data has no answers)" in text
    assert "gsm8k: 0 (weight 1)" in text


FAULTY = {  # what a function gives -> what is said of it
    "[len(None) for _ in completions]": "line 2: TypeError",
    "[1.0]": "expected 6 values, one per completion, got 1",
    "['good'] * len(completions)": "expected a finite number or None, got 'good'",
    "[1.0] * len(completions) if len(completions) % 3 == 0 else None": "",  # it may count on whole groups
}


@pytest.mark.parametrize("given", FAULTY)
@pytest.mark.parametrize("answers", ["", ', "answer": "It is 2.\\n#### 2"'], ids=["prompts alone", "answered"])
def test_a_reward_that_fails_is_told_before_anything_is_loaded(run_config, tmp_path, given, answers, monkeypatch):
    monkeypatch.setattr(session, "open_players", None)  # nothing comes so far
    source = tmp_path / "asked.jsonl"
    source.write_text("".join(f'{{"question": "What is {i} + 1?"{answers}}}\n' for i in range(4)))
    (tmp_path / "mine.py").write_text(f"def mine(completions):\n    return {given}\n")
    c = grpo(run_config, f"{tmp_path}/mine.py:mine", data={"source": str(source)})
    if not FAULTY[given]:
        dry_run(c, Console(record=True))
        return
    with pytest.raises(UserError, match=rf"reward mine \(mine.py\): {FAULTY[given]}.*; tried before the run on"):
        dry_run(c, Console(record=True))
    c = c.model_copy(update={"device": c.device.model_copy(update={"profile": "cpu"})})
    with pytest.raises(UserError, match=rf"{FAULTY[given]}.*; tried before the run on"):
        with open_run(c, RunDir(tmp_path / "run", c), Display()):
            pass


def test_command_line(run_config, tmp_path, capsys, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(run_config))
    monkeypatch.chdir(tmp_path)
    before = [entry.name for entry in tmp_path.iterdir() if entry.is_dir()]
    assert main([str(path), "device.profile=t4", "--dry-run"]) == 0
    assert "MiB at the fullest moment" in capsys.readouterr().out
    assert main([str(path), "spin.beta=0.5", "--show-config"]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "whole.yaml").write_text(shown)
    assert "warmup_ratio: 0.1" in shown  # every value, and a config again
    assert load_config(tmp_path / "whole.yaml") == load_config(path, ["spin.beta=0.5"])
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == before
    if not torch.cuda.is_available():
        assert main([str(path), "device.profile=t4"]) == 2
        assert "needs a CUDA GPU" in capsys.readouterr().err
