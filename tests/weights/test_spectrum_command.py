"""`spinfast spectrum` from its line to its files."""

import json
from pathlib import Path

import pytest
import yaml
from fixtures import tiny_model_dir
from test_spectrum import AXOLOTL, BOTH, LIST, LLAMA, ROOT, TYPES

from spinfast.config import load_config
from spinfast.progress import heard, open_console
from spinfast.run import main
from spinfast.store import files
from spinfast.weights.spectrum import METHOD, read_list, read_scores, scan, select


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command(*words) -> (exit code, stdout, stderr), in a directory and with a cache of its own, on 80 columns."""
    monkeypatch.setenv("SPINFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = main(["spectrum", *map(str, words)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("models"), layers=4)


def test_command(command, model, tmp_path):
    code, out, err = command(model)
    assert code == 0
    assert "spectrum: 28/28 matrices in " in err
    assert "7 of 28 matrices, 0.0 M of 0.1 M parameters: 1 mlp.down_proj" in err
    assert "tok/s" not in err
    lines, file = out.splitlines(), Path(f"{model.name}-spectrum-25.yaml")
    assert max(map(len, lines)) <= 80
    for kind in TYPES:
        assert sum(kind in line and "1 of 4" in line for line in lines) == 1
    assert lines[-2] == f"{file}: 7 matrices; to train them:"
    setting = yaml.safe_load(lines[-1])
    assert setting == {"adapter": {"kind": "full", "target_modules": str(file)}}
    with heard(open_console()) as display:
        expected = select(scan(model, display, tmp_path), 25)
    assert read_list(file) == tuple(module for modules in expected.values() for module in modules)
    assert str(model) in file.read_text().splitlines()[0]
    assert len([*(tmp_path / "cache" / "spectrum").iterdir()]) == 28
    for kept in (tmp_path / "cache" / "spectrum").iterdir():  # what is kept is what is taken
        files.write_sealed(kept, {"score": 42.0}, f"{kept.stem} {METHOD}")
    assert command(model, "--top", 50, "--out", "new/other.yaml")[0] == 0
    assert read_list(Path("new/other.yaml")) == tuple(f"model.layers.{i}.{kind}" for kind in TYPES for i in (0, 1))


def test_results_as_json_are_read_again(command, model):
    code, out, _ = command(model, "--json", "--top", 50)
    assert code == 0
    Path("snr.json").write_text(out)
    results, scores = json.loads(out), read_scores(Path("snr.json"))
    first = read_list(Path(f"{model.name}-spectrum-50.yaml"))
    assert {module for module, given in results.items() if given["chosen"]} == {*first}
    assert read_list(Path("snr.json"), 50) == first
    assert len(scores) == 28
    code, out, err = command(model, "--from", "snr.json", "--top", 75, "--out", "75.yaml")
    assert code == 0
    assert "spectrum: " not in err  # no scan
    assert read_list(Path("75.yaml")) == read_list(Path("snr.json"), 75)
    assert out.count("3 of 4") == 7


def test_a_list_of_others_is_held_against_the_model(command, model):
    Path("axolotl.yaml").write_text(AXOLOTL)
    code, out, err = command(model, "--from", "axolotl.yaml")
    assert code == 0
    assert "warning: the list names model.embed_tokens.weight: left out" in err
    chosen = [f"model.layers.{i}.self_attn.{kind}_proj" for kind in "kv" for i in (2, 3)]
    file = Path(f"{model.name}-spectrum.yaml")
    assert read_list(file) == ("model.layers.1.mlp.down_proj", *chosen)
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = command(model, "--from", "axolotl.yaml", "--embeddings", "--json")
    assert {*json.loads(out)} == {"model.layers.1.mlp.down_proj", *chosen}
    assert read_list(file)[:2] == tuple(BOTH)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--top", "10"], "--top 10: of at most 4 matrices per layer type it chooses none; give 25 or more"),
        (["--top", "0"], "--top: expected per cent"),
        (["--top", "nan"], "--top: expected per cent"),
        (["--top", "many"], "argument --top: invalid float value: 'many'"),
        (["--from", LIST], "match nothing in the model, first model.layers.4.input_layernorm"),
        (["--from", LLAMA], "match nothing in the model, first model.layers.4.input_layernorm"),
        (["--from", LIST, "--top", "5"], "--top: goes with a scan or Spectrum's .json"),
        (["--from", "none.yaml"], "spinfast: none.yaml: no such file"),
        (["--out", "mine.yaml"], "--out mine.yaml: is there and is no list of spinfast spectrum; name another file"),
        (["--out", "."], "--out .: is there and is no list of spinfast spectrum"),
        (["--tpo", "5"], "unknown option --tpo: did you mean --top?"),
    ],
)
def test_wrong_lines_are_told(command, model, words, said):
    Path("mine.yaml").write_text(AXOLOTL)
    code, out, err = command(model, *words)
    assert (code, out) == (2, "")
    assert said in err.splitlines()[-1]
    assert Path("mine.yaml").read_text() == AXOLOTL
    assert [*Path().glob("*spectrum*.yaml")] == []


@pytest.mark.slow
def test_smollm2(command):
    demo = load_config(ROOT / "configs" / "smollm2-135m-sums-cpu.yaml").model.name
    code, out, err = command(demo, "--out", "list.yaml")
    assert code == 0
    assert "49 of 210 matrices, 24.8 M of 106.2 M parameters: 7 mlp.down_proj, 7 mlp.gate_proj, 7 mlp.up_proj" in err
    assert out.count("7 of 30") == 7
    assert max(map(len, out.splitlines())) <= 80
    assert len(read_list(Path("list.yaml"))) == 49
