"""What the program uses of torch, by name. Every torch that pyproject.toml allows has it: make check-torch asks each.

It can't be asked of methods and keywords; there the tests that check-torch runs must fail.
"""

import ast
from pathlib import Path
from pkgutil import resolve_name

ROOT = Path(__file__).parent.parent
SEEN = (ROOT / "tests/torch_names.txt").read_text().split()
ASKED_FOR = {"torch.cpu.get_capabilities", "torch.cpu._is_amx_tile_supported", "torch.cpu._is_avx512_bf16_supported"}


def written(node: ast.AST) -> str:
    """a.b.c of an attribute, "" of what does not begin with a name."""
    if isinstance(node, ast.Attribute):
        return f"{owner}.{node.attr}" if (owner := written(node.value)) else ""
    return node.id if isinstance(node, ast.Name) else ""


def used(source: str) -> set[str]:
    """torch's full names that a file reaches, or imports and reaches no further."""
    nodes = list(ast.walk(ast.parse(source)))
    meant = {"torch": "torch"}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            meant |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            meant |= {alias.asname: alias.name for alias in node.names if alias.asname and "torch." in alias.name}
    reached = {written(node) for node in nodes if isinstance(node, ast.Attribute)}
    starts = [(meant[first], rest) for first, _, rest in (name.partition(".") for name in reached) if first in meant]
    names = sorted({*meant.values(), *(f"{module}.{rest}" for module, rest in starts)})
    return {name for name in names if not any(other.startswith(f"{name}.") for other in names)}


def missing(names) -> list[str]:
    found = []
    for name in names:
        try:
            resolve_name(name)
        except (AttributeError, ImportError):
            found.append(name)
    return found


def test_every_name_is_one_that_older_torch_was_asked_for():
    paths = [path for part in ("spinfast", "kernels") for path in (ROOT / part).rglob("*.py")]
    names = set().union(*(used(path.read_text(encoding="utf-8")) for path in paths))
    assert names == {*SEEN}, "write it into torch_names.txt and run make check-torch, or choose what torch 2.9 has"


def test_this_torch_has_them():
    assert {*missing(SEEN)} <= ASKED_FOR


def test_a_name_that_is_not_there_is_seen():
    source = "import torch.nn.functional as F\nfrom torch import cpu as c\nF.relu(c.nothing.at_all(torch.mm))"
    names = {"torch.nn.functional.relu", "torch.cpu.nothing.at_all", "torch.mm"}
    assert used(source) == names
    assert missing(names) == ["torch.cpu.nothing.at_all"]
