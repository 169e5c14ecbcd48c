"""From a YAML file and overrides to a validated tree, or one line: where, which key, expected, got."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from spinfast.config.sections import Section, listed
from spinfast.config.tree import Config
from spinfast.config.wrong import one_line
from spinfast.errors import UserError
from spinfast.names import FILE_SUFFIXES, suffix_of

Kind = TypeVar("Kind", bound=Section)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read, override, validate. Raises UserError with one line: where, expected, got."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config {path}: no such file")
    if suffix_of(path) in {*FILE_SUFFIXES} - {".json"}:
        raise UserError(f"config {path}: a data file, expected a YAML file; after a config give data.source={path}")
    tree = plain_yaml(path, f"config {path}")
    if not isinstance(tree, dict):
        raise UserError(f"config {path}: expected sections (model:, data:, ...), got {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    if any(override.startswith("method=") for override in overrides):  # the file's other methods are not meant
        named = listed(tree["method"])
        given = {override.partition("=")[0].partition(".")[0] for override in overrides}
        left_out = [name for name in Config.methods() if name not in named and name not in given]
        tree = {key: value for key, value in tree.items() if key not in left_out}
    return parse_config(tree, where=f"config {path}")


def parse_config(tree: dict, where: str = "config", kind: type[Config] = Config) -> Config:
    """Validate a plain tree."""
    config = validated(tree, where, kind)
    for name in kind.methods():
        if name in tree and name not in config.method:
            raise UserError(
                f"{where}: section {name} has no use, method is [{', '.join(config.method)}]; "
                f"name {name} there too, or leave the section out"
            )
    return config


def validated(tree: dict, where: str, kind: type[Kind]) -> Kind:
    """The section of a plain tree. Raises UserError with one line: where, which key, expected, got."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {one_line(error, kind)}") from None


def plain_yaml(path: Path, where: str) -> Any:
    """The plain values of a YAML file. Raises UserError where it is none."""
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or a number that is none
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _override(tree: dict, override: str) -> None:
    dotted, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not dotted or not text:
        raise UserError(f"override {override!r}: expected section.key=value, without spaces around the =")
    *parents, key = dotted.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section")
    try:
        node[key] = yaml.load(text, PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"override {override!r}: the value is not valid YAML") from None


class PlainLoader(yaml.SafeLoader):
    """YAML's plain values: no objects, no aliases, by which a short file can stand for an endless one, no key twice."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"alias *{self.peek_event().anchor}: write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = next(key for number, key in enumerate(keys) if key in keys[:number])
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {twice} is there twice, and only one would count")
        return found
