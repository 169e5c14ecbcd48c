"""A row's birth certificate: the tree counts as changed by a change of code, not by the rows written before it."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from bench import rows


def git(root, *args):
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *args], cwd=root, check=True, capture_output=True
    )


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "bench" / "results").mkdir(parents=True)
    shutil.copy(rows.__file__, tmp_path / "bench" / "rows.py")
    (tmp_path / "bench" / "__init__.py").touch()
    (tmp_path / "bench" / "results" / "kernels.jsonl").write_text("{}\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "a")
    return tmp_path


def certificate(repository, **environment: str) -> dict:
    code = "import json; from bench import rows; print(json.dumps(rows.certificate()))"
    path = os.pathsep.join([str(repository), *sys.path])
    env = os.environ | {"PYTHONPATH": path} | environment
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=repository, env=env, text=True, capture_output=True, check=True)
    return json.loads(done.stdout)


def test_rows_do_not_make_the_tree_dirty_but_code_does(repository):
    with (repository / "bench" / "results" / "kernels.jsonl").open("a") as file:
        file.write("{}\n")
    assert certificate(repository)["dirty"] is False
    with (repository / "bench" / "rows.py").open("a") as file:
        file.write("# changed\n")
    assert certificate(repository)["dirty"] is True


@pytest.mark.parametrize("missing", ["history", "program"])
def test_without_git_nobody_knows_the_tree_unless_its_commit_was_carried(repository, missing):
    environment = {"PATH": ""} if missing == "program" else {}
    if missing == "history":
        shutil.rmtree(repository / ".git")
    found = certificate(repository, **environment)
    assert (found["commit"], found["dirty"]) == ("unknown", None)
    environment["BENCH_COMMIT"] = "0123456789abcdef"
    found = certificate(repository, **environment)
    assert (found["commit"], found["dirty"]) == ("0123456789ab", False)
