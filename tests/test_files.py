"""Whole or absent: replaced files, manifest directories, and what is told when one was touched."""

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spinfast.store import files


def fill(path):
    (path / "a.bin").write_bytes(b"0123456789")
    (path / "sub").mkdir()
    (path / "sub" / "b.txt").write_text("hello")


def test_a_failed_write_leaves_the_old_file_and_no_leftovers(tmp_path):
    files.write_text(tmp_path / "x", "old")
    with pytest.raises(RuntimeError), files.replacing(tmp_path / "x") as beside:
        beside.write_text("half")
        raise RuntimeError
    assert (tmp_path / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_failed_directory_leaves_the_old_one(tmp_path):
    files.write_directory(tmp_path / "d", fill)
    with pytest.raises(ZeroDivisionError):
        files.write_directory(tmp_path / "d", lambda path: 1 / 0)
    assert files.damage(tmp_path / "d") is None
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_files_are_for_whoever_may_read_the_directory(tmp_path):
    """safetensors makes its own readable for nobody else."""

    def private(path):
        fill(path)
        (path / "sub" / "b.txt").chmod(0o600)

    files.write_directory(tmp_path / "d", private)
    found = {file.stat().st_mode & 0o777 for file in (tmp_path / "d").rglob("*") if file.is_file()}
    assert found == {(tmp_path / "d").stat().st_mode & 0o666}


@pytest.mark.parametrize("name", ["a.bin", "sub/b.txt", files.MANIFEST])
@pytest.mark.parametrize(
    "harm",
    [
        lambda p: p.write_bytes(p.read_bytes()[:-1]),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(bytes([p.read_bytes()[0] ^ 1]) + p.read_bytes()[1:]),
        lambda p: p.unlink(),
        lambda p: shutil.copy(p, p.with_name("stranger.pkl")),
    ],
    ids=["truncated", "emptied", "bit flipped", "removed", "stranger added"],
)
def test_damage_is_found(tmp_path, name, harm):
    files.write_directory(tmp_path / "d", fill)
    harm(tmp_path / "d" / name)
    assert files.damage(tmp_path / "d")


@given(st.binary(min_size=1, max_size=200), st.data())
def test_any_flipped_bit_is_found(tmp_path_factory, content, data):
    directory = tmp_path_factory.mktemp("flip") / "d"
    files.write_directory(directory, lambda path: (path / "f").write_bytes(content))
    position = data.draw(st.integers(0, len(content) * 8 - 1))
    changed = bytearray(content)
    changed[position // 8] ^= 1 << position % 8
    (directory / "f").write_bytes(changed)
    assert files.damage(directory)
