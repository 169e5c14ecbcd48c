"""A user's first commands on a T4: the doctor, --dry-run of every config for it, and the notebook as far as its engine
starts, with the set's own packages.
"""

import importlib
import subprocess
import sys

import pytest
from test_configs import SHAPES, T4, stand_in  # noqa: F401, a fixture
from test_notebook import CODE, ROOT, in_this_process, run_cell

from spinfast import doctor, session
from spinfast.config import load_config
from spinfast.device import profile
from spinfast.dry_run import dry_run
from spinfast.progress import open_console
from spinfast.run import main

REACHED = """spinfast.run spinfast.session spinfast.generation.vllm spinfast.policy.transformers spinfast.memory.planner
spinfast.methods.run spinfast.report.page spinfast_kernels.triton_ops transformers peft
datasets triton numba bitsandbytes gguf math_verify tensorboard vllm trl xformers.ops"""


@pytest.mark.parametrize("module", REACHED.split())
def test_imports(module):
    importlib.import_module(module)


def test_libraries_say_nothing_as_they_are_imported():
    """torchao and bitsandbytes have notes on other versions of torch than theirs."""
    words = "from spinfast.run import quiet_libraries, refuse_remote_code\nrefuse_remote_code()\nquiet_libraries()\n"
    words += "import bitsandbytes, peft, spinfast.opening, spinfast.session"
    ended = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_profile_is_a_t4s(t4):
    found = profile()
    assert (found.name, found.capability, str(found.dtype)) == ("t4", (7, 5), "torch.float16")
    assert found.attention in ("xformers", "aten_efficient")


def test_doctor_names_this_set(t4, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_start_import", lambda module: None)  # a process of its own would see no card
    assert main(["doctor", str(T4[0])]) == 2  # its model and data are on the hub, which is off here
    table = capsys.readouterr().out
    assert "as tested" in table
    assert "| yes | device.kernels: triton" in table
    assert "| yes | generation.backend: vllm" in table
    assert "| yes | model.load_in_4bit: true" in table
    assert "float16: capability < 8.0" in table


@pytest.mark.parametrize("path", T4, ids=lambda path: path.stem)
def test_dry_run(t4, path, stand_in, capsys):  # noqa: F811
    config = load_config(path, stand_in())
    planned = dry_run(config, open_console())
    assert planned.peak <= planned.budget
    text = capsys.readouterr().out
    assert "Tesla T4, capability 7.5" in text
    assert f"of {SHAPES[config.model.name][2]} layers checkpointed" in text


class Started(Exception):
    """Where vLLM's engine would take the card."""


@pytest.mark.filterwarnings("ignore:.* found in sys.modules")
def test_the_notebook_up_to_the_engine(vllm_on_t4, stand_in, tmp_path, monkeypatch, capsys):  # noqa: F811
    """As it is shipped, but for model and data, which are on the hub: doctor, plan, and the run to its first kernel."""
    (tmp_path / "spinfast").symlink_to(ROOT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "_start_import", lambda module: None)  # a process of its own would see no card
    names, started = {}, []
    run_cell(CODE[0], names)
    model = load_config(ROOT / names["CONFIG"]).model.name
    here = str(tmp_path / "model")
    monkeypatch.setitem(SHAPES, here, SHAPES[model])
    local = [*stand_in(), f"model.name={here}"]
    session.resolve_model(here)  # makes the directory, which the doctor looks for
    names |= {"REQUIREMENTS": "", "CONFIG": ROOT / names["CONFIG"], "RUN": tmp_path / "run"}
    names["OVERRIDES"] = [word for word in names["OVERRIDES"] if not word.startswith("data.")] + local

    def start(arguments, **_):
        started.append(arguments)
        raise Started

    monkeypatch.setattr(vllm_on_t4.LLMEngine, "from_engine_args", start)
    run_cell(CODE[1], names)
    names["show"] = in_this_process
    for cell in CODE[2:4]:
        run_cell(cell, names)
    out = capsys.readouterr().out
    assert "can run here" in out
    assert "MiB at the fullest moment" in out
    with pytest.raises(Started):
        run_cell(CODE[4], names)
    assert started[0].model == here
