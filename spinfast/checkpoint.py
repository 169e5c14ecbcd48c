"""Training checkpoints: safetensors and JSON only, whole or absent, the newest whole one is loaded.

A checkpoint directory holds the trainable adapter, the optimizer's tensors and state.json; training draws no random
numbers (no dropout), so the step number restores the data order.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from spinfast import adapter as adapters
from spinfast import files
from spinfast.policy import Policy
from spinfast.train import TrainState

log = logging.getLogger("spinfast")
KEPT = 2
COUNTERS = ("step", "loss_scale", "good_steps", "overflows", "overflows_in_a_row")


def save(directory: Path, policy: Policy, state: TrainState, identity: dict[str, str]) -> Path:
    """Write directory/step_NNNNNN and keep the two newest. `identity` names what the state belongs to."""

    def fill(path: Path) -> None:
        adapters.save(policy.adapter(), path)
        tensors = {
            f"{name}.{key}": value.detach().cpu().contiguous()
            for name, parameter in zip(state.names, state.optimizer.param_groups[0]["params"], strict=True)
            for key, value in state.optimizer.state.get(parameter, {}).items()
        }
        save_file(tensors, path / "optimizer.safetensors")
        counters = {name: getattr(state, name) for name in COUNTERS}
        (path / "state.json").write_text(json.dumps(counters | {"identity": identity}, indent=2) + "\n")

    target = directory / f"step_{state.step:06d}"
    files.write_directory(target, fill)
    for old in sorted(directory.glob("step_*"))[:-KEPT]:
        shutil.rmtree(old)
    return target


def load_latest(directory: Path, policy: Policy, state: TrainState, identity: dict[str, str]) -> bool:
    """Load the newest whole checkpoint that belongs to `identity` into policy and state; False if there is none."""
    for path in sorted(directory.glob("step_*"), reverse=True):
        reason = files.damage(path) or _foreign(path, identity)
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
        return True
    return False


def _foreign(path: Path, identity: dict[str, str]) -> str | None:
    stored = json.loads((path / "state.json").read_text())["identity"]
    other = [key for key, value in identity.items() if stored.get(key) != value]
    return f"{path.name} belongs to another {other[0]}" if other else None


def clear(directory: Path) -> None:
    """Remove the checkpoints of a finished phase."""
    shutil.rmtree(directory, ignore_errors=True)
