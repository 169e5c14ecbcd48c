"""Every key as docs/config.md has it."""

from __future__ import annotations

from typing import Any

from spinfast.config.adapters import KINDS
from spinfast.config.methods import Optimisation
from spinfast.config.sections import section_of
from spinfast.config.tree import Config


def reference_table() -> str:
    """Every key with its default and meaning, as Markdown; of a method's keys its own first."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in Config.model_fields.items():
        if section_of(field.annotation) is None:
            lines.append(f"| `{name}` | `{_shown(field.default)}` | {field.description} |")
            continue
        keys = section_of(field.annotation).model_fields
        for key, inner in sorted(keys.items(), key=lambda item: item[0] in Optimisation.model_fields):
            lines.append(_row(f"{name}.{key}", inner, inner.description))
        for tag, section in KINDS.items() if name == "adapter" else ():
            for key, inner in section.model_fields.items():
                if key != "kind" and (key not in keys or inner.default != keys[key].default):
                    lines.append(_row(f"{name}.{key}", inner, f"of {tag[1:-1]}: {inner.description}"))
    return "\n".join(lines)


def _row(name: str, field: Any, meaning: str) -> str:
    default = "required" if field.is_required() else f"`{_shown(field.get_default(call_default_factory=True))}`"
    return f"| `{name}` | {default} | {meaning} |"


def _shown(value: Any) -> Any:
    if isinstance(value, tuple):
        return value[0] if len(value) == 1 else list(value)
    return "null" if value is None else value
