"""What a borrowed machine lacks: the set's versions, with what they need, from a directory instead of an index."""

import zipfile

import pytest

from bench import wheels
from bench.__main__ import main


def write_wheel(directory, name, version, padding=0):
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(directory / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
        file.writestr(f"{name}.py", " " * padding)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Where pip looks instead: wheels of the set's pins for rich and what it needs."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    pins = wheels.pinned("t4")
    for name in ("rich", "pygments", "markdown-it-py", "mdurl"):
        write_wheel(tmp_path / "index", name.replace("-", "_"), pins[name], 1000)
    return tmp_path


def test_what_it_needs_comes_with_it(index, capsys):
    assert main(["wheels", str(index / "got"), "rich"]) == 0
    assert {path.name for path in (index / "got").iterdir()} == {path.name for path in (index / "index").iterdir()}
    assert "MB in 4 wheels" in capsys.readouterr().out
    assert main(["wheels", str(index / "fewer"), "rich", "--has", "pygments,markdown_it_py"]) == 0
    assert [path.name.partition("-")[0] for path in (index / "fewer").iterdir()] == ["rich"]


def test_more_than_may_be_brought_is_told(index, capsys, monkeypatch):
    monkeypatch.setattr(wheels, "LIMIT", 1000.0)
    assert main(["wheels", str(index / "got"), "rich"]) == 2
    assert "leave out the largest" in capsys.readouterr().err


def test_names_are_import_names_too_and_others_are_refused(capsys, tmp_path):
    pins = wheels.pinned("t4")
    assert wheels.needed(["yaml", "typing_inspection"], pins, ["typing-extensions"]).keys() == {
        "pyyaml",
        "typing-inspection",
    }
    assert main(["wheels", str(tmp_path), "rihc"]) == 2
    assert "rihc is not in the set" in capsys.readouterr().err


def test_a_wheel_that_is_nowhere_is_told(index, capsys):
    assert main(["wheels", str(index / "got"), "psutil"]) == 2
    assert "pip could not get all of them" in capsys.readouterr().err
