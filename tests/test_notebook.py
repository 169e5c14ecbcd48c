"""The T4 notebook, executed cell by cell on a CPU with a tiny model: only its parameters are others."""

import ast
import json
import re
import runpy
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import pytest
import torch
from test_grpo import grpo_config
from test_run import write_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from spinfast import doctor

ROOT = Path(__file__).parent.parent
NOTEBOOK = json.loads((ROOT / "notebooks" / "spinfast_t4.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def parameters(cell) -> set[str]:
    return {target.id for line in ast.parse("".join(cell["source"])).body for target in line.targets}


def test_notebook_is_clean():
    """Nothing of an earlier execution is left in it, and one cell holds all that is to be chosen."""
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)
    assert [cell for cell in CODE if "parameters" in cell["metadata"].get("tags", [])] == CODE[:1]


def test_its_kernel_imports_nothing_that_is_installed():
    """What a kernel has may be older than the set, or missing; IPython is the kernel's own."""
    cells = ("".join(cell["source"]) for cell in CODE)
    tree = ast.parse("\n".join(source for source in cells if not source.startswith("%%")))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {name.partition(".")[0] for node in found for name in [getattr(node, "module", node.names[0].name)]}
    assert modules - sys.stdlib_module_names == {"IPython"}


def test_its_files_and_overrides_exist(tmp_path):
    """What the parameters name is in the repository, and the overrides fit the config."""
    from spinfast.config import load_config

    chosen = {}
    exec("".join(CODE[0]["source"]), chosen)
    assert (ROOT / chosen["REQUIREMENTS"]).is_file()
    config = load_config(ROOT / chosen["CONFIG"], chosen["OVERRIDES"])
    assert len(config.spin.beta) in (1, config.spin.iterations)
    assert len(config.spin.lr) in (1, config.spin.iterations)
    assert load_config(ROOT / chosen["GRPO_CONFIG"], chosen["GRPO_OVERRIDES"]).method == ("grpo",)


def run_cell(cell, names):
    """As IPython does, the one magic that the notebook has included."""
    source = "".join(cell["source"])
    magic, _, rest = source.partition("\n")
    if magic.startswith("%%writefile "):
        Path(magic.removeprefix("%%writefile ").format(**names)).write_text(rest)
    else:
        exec(compile(source, f"<cell {cell['id']}>", "exec"), names)


@pytest.fixture
def pictures(monkeypatch):
    """The files that a kernel would show."""
    shown = []
    module = ModuleType("IPython.display")
    module.Image, module.display = lambda path, width: Path(path), shown.append
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


def in_this_process(*words):
    """What Python does with such a command line, without another interpreter that imports everything once more."""
    first, *rest = map(str, words)
    with pytest.MonkeyPatch.context() as patch:
        try:
            if first == "-m":
                patch.setattr(sys, "argv", rest)
                runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
            elif first == "-c":
                patch.setattr(sys, "argv", [first, *rest[1:]])
                exec(rest[0], {"__name__": "__main__"})
            else:
                patch.setattr(sys, "argv", [first, *rest])
                runpy.run_path(first, run_name="__main__")
        except SystemExit as done:
            if done.code:
                raise AssertionError(f"{words}: exit code {done.code}") from done


@pytest.mark.filterwarnings("ignore:.* found in sys.modules")
@pytest.mark.skipif(torch.cuda.is_available(), reason="its last cells would use the GPU in fp16")
@pytest.mark.parametrize("by", ["this process", pytest.param("processes", marks=pytest.mark.slow)])
def test_every_cell_runs(tiny_model, tmp_path, monkeypatch, capsys, backends, pictures, by):
    (tmp_path / "spinfast").symlink_to(ROOT)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grpo").mkdir()
    changed = {
        "REPOSITORY": "",
        "REQUIREMENTS": "",
        "ENVIRONMENT": "",
        "CARDS": 1,
        "CONFIG": str(write_config(tmp_path, tiny_model("qwen2"))),
        "OVERRIDES": ["spin.iterations=1", "evaluate.pairs=0"],
        "RUN": str(tmp_path / "run"),
        "EXPORT": str(tmp_path / "export"),
        "QUESTION": "What is 2 plus 3?",
        "GRPO_CONFIG": str(grpo_config(tmp_path / "grpo", tiny_model("qwen2"), {"steps": 2})),
        "GRPO_OVERRIDES": [],
        "GRPO_RUN": str(tmp_path / "rewarded"),
        "REWARDS": str(tmp_path / "my_rewards.py"),
    }
    assert parameters(CODE[0]) == changed.keys()
    if by == "this process":
        changed["show"] = in_this_process
        monkeypatch.setattr(doctor, "backend_findings", lambda: backends)
    names = {}
    for cell in CODE:
        run_cell(cell, names)
        names |= changed
    out = capsys.readouterr().out
    assert re.search(r"\| yes \| config .*config.yaml +\| can run here", out)
    assert "MiB at the fullest moment" in out
    assert "round base:" in out
    assert "round 0:" in out
    assert "--- generated\n" in out
    assert (tmp_path / "run" / "report" / "index.html").is_file()
    assert "short: " in out
    assert re.search(r"group +sample +rewards/gsm8k +rewards/format +rewards/short +reward +advantage", out)
    assert (tmp_path / "rewarded" / "report" / "index.html").is_file()
    assert [path.stem for path in pictures] == [
        *("train-loss", "train-pair_accuracy", "heldout-accuracy_strict"),
        *("reward", "reward_std", "completions-mean_length"),
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert re.search("before: .*\n\nafter: ", out, re.DOTALL)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    prompt = AutoTokenizer.from_pretrained(tmp_path / "export")("What is 2 plus 3?", return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained(tiny_model("qwen2"))
    with torch.no_grad():
        moved = (exported(**prompt).logits - base(**prompt).logits).abs().max()
    assert moved > 1e-3, "the exported model is the base"


def installed(place, monkeypatch, **chosen):
    """The names that the cells of parameters and of installation leave, run in this place."""
    monkeypatch.chdir(place)
    names = {}
    run_cell(CODE[0], names)
    names |= {"REQUIREMENTS": ""} | chosen
    run_cell(CODE[1], names)
    return names


@pytest.mark.parametrize(("package", "inherits"), [("torch", "false"), ("beside", "true")])
def test_the_set_goes_into_an_environment_of_its_own(tmp_path, monkeypatch, capsys, package, inherits):
    """One without torch stands on what the kernel has, as Colab's."""
    wheel, about = tmp_path / f"{package}-1.0-py3-none-any.whl", f"{package}-1.0.dist-info"
    with ZipFile(wheel, "w") as archive:
        archive.writestr("spun.py", "where = __file__")
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    lock = tmp_path / "set.lock"
    lock.write_text(f"{package}==1.0 --hash=sha256:{sha256(wheel.read_bytes()).hexdigest()}\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (tmp_path / "spinfast").symlink_to(ROOT)
    show = installed(tmp_path, monkeypatch, REQUIREMENTS=str(lock))["show"]
    assert f"Successfully installed {package}-1.0" in capsys.readouterr().out
    show("-c", "import spun, spinfast, spinfast_kernels; print(spun.where)")
    assert capsys.readouterr().out.startswith(str(tmp_path / "environment"))
    with pytest.raises(AssertionError, match=r"exit code 1; its last words:[^$]*No module named 'unheard_of'"):
        show("-c", "import unheard_of")
    settings = (tmp_path / "environment" / "pyvenv.cfg").read_text()
    assert f"include-system-site-packages = {inherits}" in settings


def test_an_address_is_asked_for_where_there_is_no_checkout(tmp_path, monkeypatch):
    source, place = tmp_path / "source", tmp_path / "elsewhere" / "notebook"
    (source / "configs").mkdir(parents=True)
    place.mkdir(parents=True)
    (source / "configs" / "one.yaml").write_text("{}")
    git = ["git", "-C", source, "-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr("builtins.input", lambda question: "file:///no/such/place")
    with pytest.raises(AssertionError, match="exit code 128"):
        installed(place, monkeypatch)
    monkeypatch.setattr("builtins.input", lambda question: f" file://{source} ")
    assert installed(place, monkeypatch)["ROOT"] == place / "spinfast"
    monkeypatch.delattr("builtins.input")
    assert installed(place, monkeypatch)["ROOT"] == place / "spinfast"  # the cell run again
