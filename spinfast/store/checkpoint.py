"""Training checkpoints: safetensors and JSON only, whole or absent, the newest whole one is loaded.

A checkpoint directory holds the trainable adapter, the optimizer's tensors, the counters in state.json, the stage's
lines of metrics.jsonl so far and what a watch has seen (watch.py). Training draws no random numbers (there is no
dropout) and the data order is a function of seed and step number, so there is no generator's state to keep.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from spinfast import spread
from spinfast.errors import UserError
from spinfast.policy import Policy
from spinfast.policy.adapters import files as adapters
from spinfast.policy.adapters.compact import SUFFIXES
from spinfast.store import files, room
from spinfast.train import TrainState
from spinfast.types import Adapter
from spinfast.watch import Watched

log = logging.getLogger("spinfast")
KEPT = 2
COUNTERS = ("step", "loss_scale", "good_steps", "overflows", "overflows_in_a_row", "recent_norms")
SEEN = ("step", "loss", "stale")
LAST_GAIN = "last_gain"
READ = {".safetensors", ".json", ".jsonl", *SUFFIXES}


def save(directory: Path, policy: Policy, state: TrainState, identity: dict[str, str], rows: list[dict]) -> Path:
    """Write directory/step_NNNNNN and keep the two newest. `identity` names what the state belongs to.

    `rows` are the stage's lines of metrics.jsonl.
    """
    target = directory / f"step_{state.step:06d}"
    if not spread.first():
        return target
    adapter = finite_adapter(policy, state)
    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, parameter in zip(state.names, state.optimizer.param_groups[0]["params"], strict=True)
        for key, value in state.optimizer.state.get(parameter, {}).items()
    }
    seen = dict(state.watched.tensors)
    if state.watched.last_gain is not None:
        seen[LAST_GAIN] = state.watched.last_gain
    room.check(directory, room.of([*adapter.tensors.values(), *tensors.values(), *seen.values()]), "a checkpoint")

    def fill(path: Path) -> None:
        adapters.save(adapter, path)
        save_file(tensors, path / "optimizer.safetensors")
        counters = {name: getattr(state, name) for name in COUNTERS}
        save_file(seen, path / "watched.safetensors")
        counters["watched"] = {name: getattr(state.watched, name) for name in SEEN}
        (path / "state.json").write_text(json.dumps(counters | {"identity": identity}, indent=2) + "\n")
        (path / "metrics.jsonl").write_text(files.jsonl(rows))

    files.write_directory(target, fill)
    for old in sorted(directory.glob("step_*"))[:-KEPT]:
        shutil.rmtree(old)
    return target


def finite_adapter(policy: Policy, state: TrainState) -> Adapter:
    """The adapter, if it may be saved: what is not finite would spoil every step and round made from it."""
    adapter = policy.adapter()
    if name := adapters.not_finite(adapter.tensors):
        raise UserError(
            f"step {state.step}: {name} is not finite, so nothing is saved from here; the checkpoint before it stands. "
            "Lower the learning rate and give another --run-dir"
        )
    return adapter


def load_latest(directory: Path, policy: Policy, state: TrainState, identity: dict[str, str]) -> list[dict]:
    """Load the newest whole checkpoint that belongs to `identity` into policy and state, if there is one.

    Returns the stage's lines of metrics.jsonl up to there.
    """
    for path in sorted(directory.glob("step_*"), reverse=True):
        reason = _unreadable(path) or files.damage(path) or _foreign(path, identity)
        if reason:
            log.warning("checkpoint passed over: %s", reason)
            continue
        policy.load_adapter(adapters.load(path))
        stored = json.loads((path / "state.json").read_text())
        for name in COUNTERS:
            setattr(state, name, stored[name])
        tensors = load_file(path / "optimizer.safetensors")
        for name, parameter in zip(state.names, state.optimizer.param_groups[0]["params"], strict=True):
            entries = {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}
            state.optimizer.state[parameter] = {
                key: tensor if key == "step" else tensor.to(parameter.device) for key, tensor in entries.items()
            }
        seen = load_file(path / "watched.safetensors")
        state.watched = Watched(**stored["watched"], last_gain=seen.pop(LAST_GAIN, None), tensors=seen)
        return files.read_jsonl(path / "metrics.jsonl")
    return []


def _unreadable(path: Path) -> str | None:
    """Pickles run code when they are read, so a directory with anything but numbers and JSON is not touched."""
    strangers = [file.name for file in path.rglob("*") if file.suffix not in READ]
    return f"{path.name} holds {strangers[0]}; only safetensors and JSON are read" if strangers else None


def _foreign(path: Path, identity: dict[str, str]) -> str | None:
    stored = json.loads((path / "state.json").read_text())["identity"]
    other = [key for key, value in identity.items() if stored.get(key) != value]
    return f"{path.name} belongs to another {other[0]}" if other else None


def clear(directory: Path) -> None:
    """Remove the checkpoints of a finished phase."""
    if spread.first():
        shutil.rmtree(directory, ignore_errors=True)
