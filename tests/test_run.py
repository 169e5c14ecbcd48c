"""The whole program on a tiny model: what a run computes and leaves, twice the same, against golden losses."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from crossed import crossed
from fixtures import FailingCall
from peft import PeftModel
from transformers import AutoModelForCausalLM

from spinfast import ops, scoring, train
from spinfast.config import load_config
from spinfast.data.pairs import read_pairs
from spinfast.device import profile
from spinfast.fit import check_first_loss
from spinfast.policy.adapters import files as adapters
from spinfast.policy.transformers import load_policy
from spinfast.run import main
from spinfast.scoring import Budget, sequence_logps
from spinfast.store import files

GOLDEN = Path(__file__).parent / "golden" / "tiny_losses.json"


def write_problems(path, first, count):
    rows = [
        {"question": f"What is {i} plus {i + 1}?", "answer": f"The sum is {2 * i + 1}.\n#### {2 * i + 1}"}
        for i in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_config(directory, model, **sections):
    """A config that plays two iterations in seconds."""
    write_problems(directory / "train.jsonl", 0, 12)
    write_problems(directory / "heldout.jsonl", 50, 6)
    tree = {
        "model": {"name": str(model)},
        "data": {"source": str(directory / "train.jsonl")},
        "heldout": {"source": str(directory / "heldout.jsonl")},
        "adapter": {"r": 4, "alpha": 8},
        "spin": {"iterations": 2, "groups_per_step": 4, "lr": 1e-3},
        "generation": {"max_tokens": 12, "batch_size": 5, "backend": "transformers"},
        "train": {"microbatch_tokens": 256, "checkpointing": False},
        "evaluate": {"problems": 6, "pairs": 6, "max_tokens": 12},
        "device": {"dtype": "float32", "profile": "cpu"},
    }
    if "sft" in sections:
        tree["method"] = ["sft", "spin"]
    for name, values in sections.items():
        tree[name] = values and tree.get(name, {}) | values
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def play(directory, model, name="run", **sections):
    run_dir = directory / name
    assert main([str(write_config(directory, model, **sections)), "--run-dir", str(run_dir)]) == 0
    return run_dir


def train_rows(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["phase"] == "train"]


def fingerprints(run_dir):
    """sha256 of all that a run computes; clocks and machine are left out."""
    timed = {"system.jsonl", "log.txt", "environment.json", "results.json", "phases.json", "lock", "README.md"}
    return {
        str(path.relative_to(run_dir)): files.sha256(path)
        for path in sorted(run_dir.rglob("*"))
        if path.is_file() and path.name not in timed and path.parent.name != "tensorboard"
    }


@pytest.fixture(scope="module")
def played(tmp_path_factory, tiny_model):
    return play(tmp_path_factory.mktemp("played"), tiny_model("llama"))


def test_every_iteration_starts_at_ln_2_with_margin_0(played):
    firsts = [row for row in train_rows(played) if row["step"] == 1]
    assert [row["stage"] for row in firsts] == ["iter_000", "iter_001"]
    for row in firsts:
        assert row["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert row["train/margin"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("game", [{"beta": 5.0}, {"beta": 0.1, "loss": "ipo"}])
def test_long_answers_in_a_steep_game_start_at_the_first_loss_to_rounding(tmp_path, tiny_model, game):
    words = {"max_answer_tokens": 400}
    path = write_config(tmp_path, tiny_model("llama"), spin={"iterations": 1, **game}, prompt=words, heldout=None)
    rows = [{"prompt": f"Say {i}.", "completion": f"April is {i} yards. " * 25} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    long = ["generation.max_tokens=300", "train.microbatch_tokens=4096"]
    assert main([str(path), *long, "--run-dir", str(tmp_path / "run")]) == 0


def test_losses_match_the_golden_file(played):
    """Rewrite it deliberately: python tests/test_run.py RUN_DIR > tests/golden/tiny_losses.json"""
    golden = json.loads(GOLDEN.read_text())
    rows = train_rows(played)
    assert [[row["stage"], row["step"]] for row in rows] == [entry[:2] for entry in golden]
    for row, (_, _, loss) in zip(rows, golden, strict=True):
        assert row["train/loss"] == pytest.approx(loss, abs=2e-4)


@pytest.mark.parametrize(("batch_size", "may_differ"), [(5, ()), (3, ("completions.jsonl",))])
def test_one_seed_gives_byte_identical_runs(played, tmp_path, tiny_model, batch_size, may_differ):
    """Another batch size may round the sampler's own log-probs differently, and nothing else."""
    again = play(tmp_path, tiny_model("llama"), generation={"batch_size": batch_size})
    mine, other = fingerprints(played), fingerprints(again)
    assert mine.keys() == other.keys()
    changed = {name for name in mine if mine[name] != other[name]}
    assert {name for name in changed if not name.endswith(("config.yaml", *may_differ))} == set()


def test_another_seed_gives_other_answers(played, tmp_path, tiny_model):
    model = tiny_model("llama")
    config = write_config(tmp_path, model, evaluate={"problems": 0, "pairs": 1}, spin={"iterations": 1})
    assert main([str(config), "seed=1", "--run-dir", str(tmp_path / "run")]) == 0
    mine, other = (read_pairs(run / "iter_000" / "pairs.parquet") for run in (played, tmp_path / "run"))
    assert [pair.real_ids for pair in mine] == [pair.real_ids for pair in other]
    assert all(a.generated_ids != b.generated_ids for a, b in zip(mine, other, strict=True))


def test_pairs_hold_spins_columns_and_the_trained_token_ids(played):
    table = pq.read_table(played / "iter_001" / "pairs.parquet")
    rows = table.to_pylist()
    assert {"real", "generated"} <= set(table.column_names)
    assert [turn["role"] for turn in rows[0]["real"]] == ["user", "assistant"]
    assert rows[0]["real"][:-1] == rows[0]["generated"][:-1]
    assert {row["iteration"] for row in rows} == {0, 1}  # SPIN mixes the previous iteration's pairs
    cut = [row for row in rows if len(row["generated_ids"]) == 12]
    assert all(row["generated_ids"][-1] != 2 for row in cut if row["generated_ids"].count(2) == 0)
    assert cut


@pytest.mark.parametrize(("arch", "init"), crossed(["llama", "qwen2", "qwen3"], ["continue", "merge"]))
def test_each_adapter_loads_with_plain_peft_and_gives_the_policys_logps(tmp_path, tiny_model, arch, init):
    model = tiny_model(arch)
    run_dir = play(tmp_path, model, adapter={"init": init}, sft={"groups_per_step": 6})
    config = load_config(tmp_path / "config.yaml")
    pairs = read_pairs(run_dir / "iter_001" / "pairs.parquet")[:4]
    for stage in ("sft", "iter_000", "iter_001"):
        policy = load_policy(
            model,
            str(model),
            "",
            lora=config.adapter,
            ops=ops.EAGER,
            profile=profile("cpu", "float32"),
            load_in_4bit=False,
            seed=0,
        )
        policy.restore(adapters.load(run_dir / stage / "adapter"))
        ours = sequence_logps(policy, [pair.group for pair in pairs], Budget(512, "sdpa"))
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), run_dir / stage / "adapter")
        for pair, sums in zip(pairs, ours, strict=True):
            for answer, ours_sum in zip((pair.real_ids, pair.generated_ids), sums, strict=True):
                with torch.no_grad():
                    logits = plain(torch.tensor([pair.prompt_ids + answer])).logits[0].log_softmax(-1)
                start = len(pair.prompt_ids) - 1
                theirs = sum(logits[start + i, token].item() for i, token in enumerate(answer))
                assert ours_sum == pytest.approx(theirs, abs=1e-4)
    assert adapters.load(run_dir / "iter_001" / "adapter").config["r"] == (12 if init == "merge" else 4)


@pytest.mark.parametrize(("kind", "first"), [("hinge", 1.0), ("exponential", 1.0), ("ipo", 25.0)])
def test_other_losses_start_at_their_value_for_margin_0(tmp_path, tiny_model, kind, first):
    run_dir = play(
        tmp_path, tiny_model("llama"), spin={"loss": kind, "iterations": 1}, evaluate={"problems": 0, "pairs": 0}
    )
    assert train_rows(run_dir)[0]["train/loss"] == pytest.approx(first, rel=1e-4)


def test_settings_per_iteration_and_rmsprop(tmp_path, tiny_model):
    run_dir = play(
        tmp_path,
        tiny_model("qwen2", tied=False),
        spin={
            "beta": [0.1, 1.0],
            "mix_previous": False,
            "optimizer": "rmsprop",
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "lr": [1e-4, 5e-5],
        },
    )
    rows = train_rows(run_dir)
    assert {(row["stage"], row["train/lr"]) for row in rows} == {("iter_000", 1e-4), ("iter_001", 5e-5)}
    assert {pair.iteration for pair in read_pairs(run_dir / "iter_001" / "pairs.parquet")} == {1}


def test_evaluation_has_the_base_as_its_zero_row(played):
    rows = json.loads((played / "results.json").read_text())
    assert [row["iteration"] for row in rows] == ["base", 0, 1]
    base = rows[0]["evaluation"]
    assert base["heldout/pair_accuracy"]["value"] == 0.5
    assert base["heldout/margin"]["value"] == 0
    assert base["heldout/real_logp_vs_base"]["value"] == 0
    for row in rows:
        for metric in ("accuracy_strict", "accuracy_flexible", "pair_accuracy", "margin", "length", "eos_rate"):
            assert row["evaluation"][f"heldout/{metric}"]["stderr"] is not None
    assert rows[2]["evaluation"]["heldout/real_logp_vs_base"]["value"] > 0  # SPIN pulls the real answers up here


if __name__ == "__main__":
    import sys

    print(json.dumps([[row["stage"], row["step"], row["train/loss"]] for row in train_rows(Path(sys.argv[1]))]))


def run_out_of_memory(monkeypatch, *, training: bool, call: int):
    """The given forward of training, or of scoring, finds no memory."""
    where = train if training else scoring
    failing = FailingCall(where.answer_logps, call, lambda: torch.is_grad_enabled() == training)
    monkeypatch.setattr(where, "answer_logps", failing)


SMALL = {"max_prompt_tokens": 64, "max_answer_tokens": 32}  # so that half of 256 tokens holds any pair


@pytest.mark.parametrize(("training", "call", "scored"), [(True, 1, 256), (False, 3, 128)])
def test_where_memory_runs_out_the_rest_is_smaller(tmp_path, tiny_model, monkeypatch, training, call, scored):
    run_out_of_memory(monkeypatch, training=training, call=call)
    run_dir = play(tmp_path, tiny_model("llama"), spin={"iterations": 1}, heldout=None, prompt=SMALL)
    assert files.read_sealed(run_dir / "plan.json", "plan")["microbatch_tokens"] == 128
    metadata = pq.read_schema(run_dir / "iter_000" / "reference.parquet").metadata
    assert metadata[b"microbatch_tokens"] == str(scored).encode()
    assert {row["train/microbatch_tokens"] for row in train_rows(run_dir)} == {128}


@pytest.mark.parametrize(("step", "fine"), [(256, False), (128, True)])
def test_another_cut_than_scorings_is_equal_to_rounding_only(step, fine):
    metrics = {"train/loss": math.log(2) + 2.65e-2, "train/microbatch_tokens": step}  # measured in bf16 with beta 5
    with nullcontext() if fine else pytest.raises(RuntimeError, match="the first loss is"):
        check_first_loss(metrics, math.log(2), torch.bfloat16, cut=256)
