"""Which rooms of the house open into which, read from the import statements."""

import ast
from pathlib import Path

import spinfast

ROOT = Path(spinfast.__file__).parent.parent


def module_file(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


def imported(file: Path) -> set[str]:
    """spinfast's modules that `file` imports, at its head, inside its functions, or by name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)  # importlib.import_module("spinfast.policy.unsloth")
    return {name for name in found if name.startswith("spinfast.") and module_file(name)}


def reached(room: str) -> dict[str, list[str]]:
    """module -> the way to it from a file of the room."""
    files = sorted((ROOT / "spinfast" / room).rglob("*.py"))
    ways = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): [] for file in files}
    waiting = list(ways)
    while waiting:
        module = waiting.pop()
        for other in imported(module_file(module)) - ways.keys():
            ways[other] = [*ways[module], module]
            waiting.append(other)
    return ways


def test_policy_does_not_lead_to_generation():
    ways = reached("policy")
    assert {"spinfast.policy", "spinfast.policy.transformers", "spinfast.models"} < ways.keys()
    assert {name: way for name, way in ways.items() if name.startswith("spinfast.generation")} == {}


def test_generation_leads_to_policy():
    """What the test above looks for it would find."""
    assert "spinfast.policy" in reached("generation")
