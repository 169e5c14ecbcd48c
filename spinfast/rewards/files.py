"""The config's `grpo.rewards` -> functions: ready ones by name, others from a file of the user's."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from spinfast.errors import UserError
from spinfast.rewards import ready
from spinfast.rewards.contract import GIVEN, Reward, Rewards, arguments

# how other tools' ready functions begin -> ours
ELSEWHERE = {
    "accuracy": "math", "reasoning_accuracy": "math", "correctness": "gsm8k", "int": "integer",
    "xmlcount": "tag_count", "soft_format": "format", "match_format": "format", "get_cosine": "cosine",
    "get_repetition": "repetition", "get_soft_overlong": "soft_overlong",
}  # fmt: skip


def load(spec: Mapping[str, float | Mapping], *, timeout: float, max_tokens: int) -> Rewards:
    """The functions of `grpo.rewards`: {name: weight} or {name: {weight: w, option: value ...}}.

    A name is a ready one (ready.READY) or FILE.py:function. timeout: seconds per call; max_tokens: the longest answer.
    """
    modules: dict[Path, ModuleType] = {}
    functions = []
    for name, given in spec.items():
        options = dict(given) if isinstance(given, Mapping) else {"weight": given}
        weight = _weight(name, options.pop("weight", 1.0))
        if name in ready.READY:
            call = ready.make(name, options, max_tokens)
            functions.append(Reward(name, weight, call))
        else:
            functions.append(_own(name, weight, options, modules))
    if not any(each.weight for each in functions):
        raise UserError("grpo.rewards: all weights are 0, so that nothing is learnt; expected one that is not")
    return Rewards(_named_apart(functions), timeout)


def _weight(name: str, weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise UserError(f"grpo.rewards: weight of {name}: expected a finite number, got {weight!r}")
    return float(weight)


def _own(name: str, weight: float, options: dict[str, Any], modules: dict[Path, ModuleType]) -> Reward:
    """A function of a user's file."""
    file, _, attribute = name.rpartition(":")
    if not file.endswith(".py") or not attribute:
        near = [ours for theirs, ours in ELSEWHERE.items() if name.startswith(theirs)]
        near = near or difflib.get_close_matches(name, ready.READY, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"ready ones are {', '.join(ready.READY)}"
        raise UserError(f"grpo.rewards: expected a ready reward or FILE.py:function, got {name!r}; {hint}")
    path = Path(file).expanduser().resolve()
    if path not in modules:
        modules[path] = _module(path, file)
    module = modules[path]
    if (call := getattr(module, attribute, None)) is None:
        there = [n for n, value in vars(module).items() if callable(value) and value.__module__ == module.__name__]
        near = difflib.get_close_matches(attribute, there, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(there) or 'no functions'}"
        raise UserError(f"grpo.rewards: {file} has no {attribute!r}; {hint}")
    label = f"grpo.rewards: {name}"
    if isinstance(call, torch.nn.Module) or not callable(call):
        raise UserError(f"{label}: expected a function, got a {type(call).__name__}; write a function that uses it")
    wants = arguments(call)
    _check_options(label, options, wants[0], given=() if inspect.isclass(call) else GIVEN)
    if inspect.isclass(call):
        call, options = _instance(label, call, options, path), {}
    return Reward(attribute, weight, call, str(path), options)


def _instance(label: str, kind: type, options: dict[str, Any], path: Path) -> Any:
    """An object of a class whose objects are functions; its options are its constructor's."""
    try:
        made = kind(**options)
    except Exception as error:
        raise UserError(f"{label}: {_where(error, path)}{type(error).__name__}: {error}") from error
    if not callable(made):
        raise UserError(f"{label}: expected a class with __call__, got {kind.__name__} without it")
    return made


def _check_options(label: str, options: Mapping[str, Any], accepted: frozenset[str] | None, given: tuple) -> None:
    for option in options:
        if option in given:
            raise UserError(f"{label}: option {option!r} has the name of an argument that the trainer gives")
        if accepted is not None and option not in accepted:
            raise UserError(f"{label}: takes no option {option!r}; it takes {', '.join(sorted(accepted)) or 'none'}")


def _module(path: Path, shown: str) -> ModuleType:
    """A file as a module of its own, its directory importable for its helpers."""
    if not path.is_file():
        raise UserError(f"grpo.rewards: {shown}: no such file (looked for {path})")
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    directory = str(path.parent)
    _forget_helpers_of_others(path.parent)
    sys.path.insert(0, directory)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        line = f"line {error.lineno}: " if isinstance(error, SyntaxError) else _where(error, path)
        what = error.msg if isinstance(error, SyntaxError) else error
        raise UserError(f"grpo.rewards: {shown}, {line}{type(error).__name__} on import: {what}") from error
    finally:
        sys.path.remove(directory)
        if directory not in sys.path:
            sys.path.append(directory)  # for what functions import when they are called
            _directories.add(path.parent)
    return module


_directories: set[Path] = set()  # of reward files, at the end of sys.path


def _forget_helpers_of_others(directory: Path) -> None:
    """Two directories may each have a helpers.py: the second file must not be given the first one's."""
    for name, module in [*sys.modules.items()]:
        file = getattr(module, "__file__", None)
        path = Path(file or "")
        if path.stem == name and path.parent in _directories - {directory} and (directory / path.name).is_file():
            del sys.modules[name]


def _where(error: BaseException, path: Path) -> str:
    """The line of a file that an error went through last."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"line {lines[-1]}: " if lines else ""


def _named_apart(functions: list[Reward]) -> list[Reward]:
    """Functions of one name get their file's before it, and where that does not tell them apart, a number behind."""
    often, seen, apart = Counter(each.name for each in functions), Counter(), []
    for each in functions:
        name = f"{Path(each.file).stem}.{each.name}" if each.file and often[each.name] > 1 else each.name
        seen[name] += 1
        apart.append(replace(each, name=name if seen[name] == 1 else f"{name}_{seen[name]}"))
    return apart
