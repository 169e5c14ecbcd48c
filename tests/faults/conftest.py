"""What the fault tests share: the kill count, one undisturbed run to compare with."""

from __future__ import annotations

import subprocess

import pytest
from started import grpo_runs, kills, preference_runs, runs  # noqa: F401


@pytest.fixture
def small_disk(tmp_path):
    """mount(size) -> an empty file system of that size"""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size):
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        return place

    yield mount
    subprocess.run(["umount", "-l", str(place)], capture_output=True)
