"""Every file of an iteration and of the run, harmed: found out, never used, made again or refused in one line."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_saves import harm_file
from warm import computed, differing

from spinfast.run import main
from spinfast.store import files

pytestmark = pytest.mark.faults
HARMS = ["truncated", "emptied", "bit flipped", "swapped", "removed"]
ITERATION = [
    "adapter/README.md",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "adapter/manifest.json",
    "completions.jsonl",
    "eval.json",
    "heldout.jsonl",
    "heldout_logps.safetensors",
    "heldout_samples.jsonl",
    "metrics.jsonl",
    "pairs.parquet",
    "phases.json",
    "reference.parquet",
    "rejected.json",
    "stage.json",
    "train.json",
]
PREFERENCES = [
    "adapter/README.md",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "adapter/manifest.json",
    "eval.json",
    "heldout_logps.safetensors",
    "heldout_reference.parquet",
    "metrics.jsonl",
    "phases.json",
    "reference.parquet",
    "stage.json",
    "train.json",
]
GRPO = [
    "adapter/README.md",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "adapter/manifest.json",
    "eval.json",
    "heldout.jsonl",
    "heldout_logps.safetensors",
    "metrics.jsonl",
    "phases.json",
    "rollouts/000000.parquet",
    "rollouts/000001.parquet",
    "stage.json",
    "train.json",
]
OF_THE_RUN = [
    "best.json",
    "environment.json",
    "inputs.json",
    "lock",
    "log.txt",
    "metrics.jsonl",
    "results.json",
    "system.jsonl",
]


@pytest.fixture(scope="module")
def played(runs, tmp_path_factory):
    """(a copy of a finished run to harm, what it computed); mended after each test."""
    copy = tmp_path_factory.mktemp("harmed") / "run"
    expected = computed(runs.undisturbed)

    def fresh():
        shutil.rmtree(copy, ignore_errors=True)
        return shutil.copytree(runs.undisturbed, copy)

    return fresh, expected, [str(runs.config), "--run-dir", str(copy)]


def test_every_file_of_an_iteration_is_on_the_list(runs):
    stage = runs.undisturbed / "iter_001"
    assert sorted(str(path.relative_to(stage)) for path in stage.rglob("*") if path.is_file()) == ITERATION


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", ITERATION)
def test_a_harmed_file_of_an_iteration_is_made_again(played, name, harm, capsys):
    fresh, expected, arguments = played
    run_dir = fresh()
    harm_file(run_dir / "iter_001" / name, harm, other=run_dir / "iter_000" / name)
    (run_dir / "log.txt").unlink()
    assert main(arguments) == 0
    assert "Traceback" not in capsys.readouterr().err
    assert differing(computed(run_dir), expected) == set()
    if name not in ("adapter/README.md", "stage.json") and (name, harm) != ("phases.json", "removed"):
        said = (run_dir / "log.txt").read_text()
        assert "is not as it was written" in said or "was made again" in said


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", PREFERENCES)
def test_a_harmed_file_of_a_dpo_stage_is_made_again(preference_runs, tmp_path, name, harm, capsys):
    stage = preference_runs.undisturbed / "dpo"
    assert sorted(str(path.relative_to(stage)) for path in stage.rglob("*") if path.is_file()) == PREFERENCES
    run_dir = shutil.copytree(preference_runs.undisturbed, tmp_path / "run")
    other = run_dir / "sft" / name
    harm_file(run_dir / "dpo" / name, harm, other=other if other.exists() else run_dir / "sft" / "train.json")
    assert main([str(preference_runs.config), "--run-dir", str(run_dir)]) == 0
    assert "Traceback" not in capsys.readouterr().err
    assert differing(computed(run_dir), computed(preference_runs.undisturbed)) == set()


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", GRPO)
def test_a_harmed_file_of_a_grpo_stage_is_made_again(grpo_runs, tmp_path, name, harm, capsys):
    stage = grpo_runs.undisturbed / "grpo"
    assert sorted(str(path.relative_to(stage)) for path in stage.rglob("*") if path.is_file()) == GRPO
    run_dir = shutil.copytree(grpo_runs.undisturbed, tmp_path / "run")
    others = {"rollouts/000000.parquet": "rollouts/000001.parquet", "rollouts/000001.parquet": GRPO[-4]}
    harm_file(run_dir / "grpo" / name, harm, other=run_dir / "grpo" / others.get(name, "train.json"))
    assert main([str(grpo_runs.config), "--run-dir", str(run_dir)]) == 0
    assert "Traceback" not in capsys.readouterr().err
    assert differing(computed(run_dir), computed(grpo_runs.undisturbed)) <= {f"grpo/{name}"} & ROLLOUTS


ROLLOUTS = {"grpo/rollouts/000000.parquet", "grpo/rollouts/000001.parquet"}  # a bit that holds no value may stay


def test_an_early_file_harmed_leaves_later_rounds_as_they_are(played):
    """The round is made again and comes out the same, so what was made from it stands."""
    fresh, expected, arguments = played
    run_dir = fresh()
    (run_dir / "iter_000" / "completions.jsonl").write_bytes(b"")
    later = (run_dir / "iter_001" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert main(arguments) == 0
    assert differing(computed(run_dir), expected) == set()
    assert (run_dir / "iter_001" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == later


def test_what_was_made_from_something_else_is_made_again(played):
    """Pairs that are whole but other than those the later phases saw: nothing of the old ones stays in use."""
    fresh, expected, arguments = played
    run_dir = fresh()
    stage = run_dir / "iter_001"
    phases = files.read_sealed(stage / "phases.json", "iter_001")
    shutil.copy(run_dir / "iter_000" / "rejected.json", stage / "rejected.json")
    (stage / "rejected.json").write_text('{"identical": 1}\n')
    phases["pair"]["files"]["rejected.json"] = files.sha256(stage / "rejected.json")
    files.write_sealed(stage / "phases.json", phases, "iter_001")
    before = (stage / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert main(arguments) == 0
    assert "was made from was made again" in (run_dir / "log.txt").read_text()
    assert (stage / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns > before
    assert differing(computed(run_dir), expected) == {"results.json", "iter_001/rejected.json"}


@pytest.mark.parametrize("harm", ["truncated", "emptied", "bit flipped", "removed"])
@pytest.mark.parametrize("name", OF_THE_RUN)
def test_a_harmed_file_of_the_run_is_made_again(played, name, harm, capsys):
    fresh, expected, arguments = played
    run_dir = fresh()
    if (run_dir / name).stat().st_size == 0 and harm != "removed":
        (run_dir / name).write_bytes(b"some words")
    harm_file(run_dir / name, harm, other=run_dir / name)
    assert main(arguments) == 0
    assert "Traceback" not in capsys.readouterr().err
    assert differing(computed(run_dir), expected) == set()


@pytest.mark.parametrize("harm", ["truncated", "emptied", "bit flipped"])
def test_a_harmed_config_is_refused(played, harm, capsys):
    fresh, _, arguments = played
    run_dir = fresh()
    harm_file(run_dir / "config.yaml", harm, other=run_dir / "config.yaml")
    harmed = (run_dir / "config.yaml").read_bytes()
    assert main(arguments) == 2
    assert "config.yaml" in capsys.readouterr().err
    assert (run_dir / "config.yaml").read_bytes() == harmed


LINES = [{"index": i, "token_ids": [i, 7], "text": "<é> ✓" * i} for i in range(4)]
CONTENT = "".join(json.dumps(files.seal(row, "iter_000 owner")) + "\n" for row in LINES).encode()


@given(st.integers(0, len(CONTENT) * 8 - 1))
def test_a_flipped_bit_of_unfinished_completions_is_never_read(tmp_path_factory, position):
    harmed = bytearray(CONTENT)
    harmed[position // 8] ^= 1 << position % 8
    path = tmp_path_factory.mktemp("lines") / "completions.jsonl"
    path.write_bytes(harmed)
    assert files.sealed_lines(path, "iter_000 owner") == LINES[: CONTENT[: position // 8].count(b"\n")]


@given(st.integers(0, len(CONTENT)))
def test_a_torn_line_of_unfinished_completions_is_never_read(tmp_path_factory, length):
    path = tmp_path_factory.mktemp("lines") / "completions.jsonl"
    path.write_bytes(CONTENT[:length])
    assert files.sealed_lines(path, "iter_000 owner") == LINES[: (CONTENT[:length] + b"\n").count(b"}\n")]
    assert files.sealed_lines(path, "iter_001 owner") == []
