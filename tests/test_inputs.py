"""What a user gets wrong gets one line that names the file and the remedy, exit code 2, and nothing half-written."""

import errno
import fcntl
import json
import shutil
import socket

import pytest
import yaml
from test_run import play, write_config

from spinfast.run import main


def complaint(capsys, arguments):
    """The one line on stderr of a refused start."""
    capsys.readouterr()
    assert main([str(word) for word in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spinfast: ")]
    assert len(lines) == 1
    return lines[0]


def edit(path, **sections):
    tree = yaml.safe_load(path.read_text())
    for name, values in sections.items():
        tree[name] |= values
    path.write_text(yaml.safe_dump(tree))


def no_template(model):
    for name in ("chat_template.jinja",):
        (model / name).unlink(missing_ok=True)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))


def other_architecture(model):
    config = json.loads((model / "config.json").read_text()) | {"architectures": ["MambaForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))


DATA_FAULTS = {
    "empty file": ("", ["train.jsonl"]),
    "no answer": ('{"question": "a", "answer": "b"}\n{"question": "c"}\n', ["train.jsonl", "2", "answer"]),
    "not json": ('{"question": "a", "answer": "b"}\n{"question": \n', ["train.jsonl", "2"]),
    "unknown columns": ('{"foo": "a", "bar": "b"}\n', ["foo", "bar", "question"]),
    "long prompts": ('{"question": "' + "word " * 3000 + '", "answer": "b"}\n', ["max_prompt_tokens"]),
}


@pytest.mark.parametrize(("content", "words"), DATA_FAULTS.values(), ids=DATA_FAULTS)
def test_data_faults(tmp_path, tiny_model, capsys, content, words):
    config = write_config(tmp_path, tiny_model("llama"))
    (tmp_path / "train.jsonl").write_text(content)
    line = complaint(capsys, [config, "--run-dir", tmp_path / "run"])
    for word in words:
        assert word in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("harm", "words"),
    [(no_template, ["chat template"]), (other_architecture, ["MambaForCausalLM", "Qwen2"])],
    ids=["no chat template", "unknown architecture"],
)
def test_model_faults(tmp_path, tmp_path_factory, capsys, harm, words):
    from fixtures import tiny_model_dir

    model = tiny_model_dir(tmp_path_factory.mktemp("harmed"), "llama")
    harm(model)
    line = complaint(capsys, [write_config(tmp_path, model), "--run-dir", tmp_path / "run"])
    for word in words:
        assert word in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"name": "/nowhere/model"}}, ["/nowhere/model"]),
        ({"model": {"name": "someone/unknown-model"}}, ["someone/unknown-model"]),
        ({"data": {"source": "missing.jsonl"}}, ["missing.jsonl"]),
        ({"device": {"profile": "h100"}}, ["h100", "CUDA"]),
        ({"device": {"profile": "tpu"}}, ["tpu", "auto, cpu"]),
        ({"device": {"kernels": "triton"}}, ["triton"]),
        ({"device": {"attention": "xformers"}}, ["xformers"]),
        ({"train": {"microbatch_tokens": 20}}, ["microbatch", "20"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_cannot_be_met(tmp_path, tiny_model, capsys, sections, words):
    config = write_config(tmp_path, tiny_model("llama"))
    edit(config, **sections)
    line = complaint(capsys, [config, "--run-dir", tmp_path / "run"])
    for word in words:
        assert word in line


def test_a_missing_config_and_an_unknown_key(tmp_path, tiny_model, capsys):
    assert "no such file" in complaint(capsys, [tmp_path / "none.yaml"])
    config = write_config(tmp_path, tiny_model("llama"))
    assert "did you mean 'epochs'" in complaint(capsys, [config, "spin.epochz=2"])


def test_a_run_directory_belongs_to_one_config(tmp_path, tiny_model, capsys):
    run_dir = play(tmp_path, tiny_model("llama"), spin={"iterations": 1}, evaluate={"problems": 0, "pairs": 1})
    before = (run_dir / "config.yaml").read_text()
    line = complaint(capsys, [tmp_path / "config.yaml", "seed=5", "--run-dir", run_dir])
    assert "another config" in line
    assert (run_dir / "config.yaml").read_text() == before


def test_a_directory_of_something_else_is_left_alone(tmp_path, tiny_model, capsys):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    config = write_config(tmp_path, tiny_model("llama"))
    assert "not a run of spinfast" in complaint(capsys, [config, "--run-dir", tmp_path / "home"])
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["letter.txt"]


def test_the_directory_of_ones_own_config_is_no_run_directory(tmp_path, tiny_model, capsys):
    """Its config.yaml is the very config, and a data file that is refused must not take the directory with it."""
    config = write_config(tmp_path, tiny_model("llama"))
    (tmp_path / "train.jsonl").write_text('{"question": 3}\n')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "not a run of spinfast" in complaint(capsys, [config, "--run-dir", tmp_path])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "lock").touch()
    complaint(capsys, [config, "--run-dir", tmp_path])
    assert before.keys() <= {path.name for path in tmp_path.iterdir()}


def test_changed_data_is_not_mixed_into_a_run(tmp_path, tiny_model, capsys):
    play(tmp_path, tiny_model("llama"), spin={"iterations": 1}, evaluate={"problems": 0, "pairs": 1})
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"question": "What is 3 plus 4?", "answer": "7"}\n')
    line = complaint(capsys, [tmp_path / "config.yaml", "--run-dir", tmp_path / "run"])
    assert "data is not what the run started with" in line


def test_a_file_system_without_locks_is_told(tmp_path, tiny_model, capsys, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    line = complaint(capsys, [write_config(tmp_path, tiny_model("llama")), "--run-dir", tmp_path / "run"])
    assert "its file system has no locks" in line


def test_a_run_writes_into_its_directory_only_and_opens_no_connection(tmp_path, tiny_model, monkeypatch):
    """No telemetry, no look-up at a hub: local model, local data, and whoever connects fails."""

    def refuse(*args):
        raise AssertionError(f"a connection was opened: {args[1:]}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    config = write_config(tmp_path, model)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main([str(config), "--run-dir", str(tmp_path / "here" / "run")]) == 0
    after = {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if "run" not in path.relative_to(tmp_path).parts
    }
    here = tmp_path / "here"
    assert after.keys() == before.keys()
    assert {path for path in after if after[path] != before[path]} <= {here}
