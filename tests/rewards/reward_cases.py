"""What the tests of rewards share: batches of either form, and a function out of a file's text."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

from spinfast.rewards import Batch, Rewards, TrainerState, load

HERE = Path(__file__).parent
STATE = TrainerState(global_step=3, max_steps=12, epoch=0.25)


def batch(*texts: str, messages: bool = False, ids: list[list[int]] | None = None, **columns) -> Batch:
    prompts = [f"question {i}" for i in range(len(texts))]
    completions = [*texts]
    if messages:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    return Batch(prompts, completions, ids or [[*text.encode()] for text in texts], columns, STATE)


def one(name: str, timeout: float = 20.0, max_tokens: int = 100, **options) -> Rewards:
    return load({name: options}, timeout=timeout, max_tokens=max_tokens)


def values(rewards: Rewards, of: Batch) -> list:
    """Of the only function."""
    (found,) = rewards(of).values.values()
    return found


def written(tmp_path: Path, code: str, name: str = "own.py") -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(code))
    return path


def own(tmp_path: Path, code: str, timeout: float = 20.0, **options) -> Rewards:
    """The function `f` of a file with this code."""
    return one(f"{written(tmp_path, code)}:f", timeout, **options)
