"""`python -m bench wheels DIR NAME ...`: what a borrowed GPU machine lacks, as wheels that fit into 60 MB.

    python -m bench wheels wheels yaml rich peft --set t4 --python 3.12     # names as gpu_suite.sh says them
    pip install --no-index --no-deps wheels/*.whl                           # on that machine

With them come what they need, at the set's versions, except what `--has` names: what every machine with torch has.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from spinfast.errors import UserError

REQUIREMENTS = Path(__file__).parents[1] / "requirements"
NAMED_OTHERWISE = {"yaml": "pyyaml"}  # import name -> distribution, where they differ by more than a dash
HAS = "torch,triton,numpy,setuptools,packaging,filelock,sympy,networkx,jinja2,fsspec,typing-extensions"
LIMIT = 60e6  # bytes


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m bench wheels", description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("names", nargs="+", help="packages, by their import names or by pip's")
    parser.add_argument("--set", choices=["t4", "cuda13", "cpu"], default="t4")
    parser.add_argument("--python", default="3.12", help="version on that machine")
    parser.add_argument("--has", default=HAS, help="what is there, separated by commas")
    arguments = parser.parse_args(argv)
    wanted = needed(arguments.names, pinned(arguments.set), arguments.has.split(","))
    platforms = [f"--platform=manylinux_2_{glibc}_x86_64" for glibc in (28, 27, 26, 24, 17)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", f"--python-version={arguments.python}", *platforms, "-d", arguments.directory]
    if subprocess.run([*command, *(f"{name}=={version}" for name, version in wanted.items())]).returncode:
        raise UserError("pip could not get all of them (above)")
    sizes = {path.name: path.stat().st_size for path in arguments.directory.glob("*.whl")}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size / 1e6:7.1f} MB  {name}")
    print(f"{sum(sizes.values()) / 1e6:7.1f} MB in {len(sizes)} wheels")
    if sum(sizes.values()) > LIMIT:
        raise UserError(f"more than {LIMIT / 1e6:.0f} MB; leave out the largest, or name what the machine has by --has")
    return 0


def pinned(name: str) -> dict[str, str]:
    """Distribution -> version of a set."""
    return dict(re.findall(r"^([a-z0-9][a-z0-9.-]*)==(\S+)", (REQUIREMENTS / f"{name}.lock").read_text(), re.MULTILINE))


def needed(names: Iterable[str], pins: Mapping[str, str], has: Iterable[str]) -> dict[str, str]:
    """The pins of these packages and of what they need, as this environment's metadata has it, beyond `has`."""
    there, found = {canonicalize_name(name) for name in has}, {}
    waiting = [canonicalize_name(NAMED_OTHERWISE.get(name, name)) for name in names]
    if strangers := [name for name in waiting if name not in pins]:
        raise UserError(f"{strangers[0]} is not in the set; expected a name that gpu_suite.sh says")
    while waiting:
        name = waiting.pop()
        if name in found or name in there or name not in pins:
            continue
        found[name] = pins[name]
        try:
            entries = [Requirement(entry) for entry in requires(name) or ()]
        except PackageNotFoundError:
            continue
        waiting += [canonicalize_name(e.name) for e in entries if not e.marker or e.marker.evaluate({"extra": ""})]
    return dict(sorted(found.items()))
