"""The step that stopped a run: its inputs are kept, and `spinfast replay RUN/failed_step` makes it again.

A step's gradient is a function of the base, the adapter, the groups with the opponent's log-probs, and the loss scale.
RUN/failed_step holds all of these but the base, as safetensors and JSON. The replay says what is not finite: answers,
the first layer whose output is not, parameters by their gradients.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from spinfast import ops
from spinfast.config import parse_config
from spinfast.device import profile
from spinfast.errors import UserError
from spinfast.models import resolve_model
from spinfast.objectives import Objective
from spinfast.objectives.sft import Sft
from spinfast.objectives.spin import Spin
from spinfast.policy.adapters import files as adapters
from spinfast.policy.transformers import load_policy
from spinfast.store import files
from spinfast.train import NonFinite, TrainPlan, accumulate, batch_sequence_logps, start_training, step_batches
from spinfast.types import Group

STEP, OPPONENT = "step.json", "opponent_logps.safetensors"


def keep(game, stage, groups: Sequence[Group], objective: Objective, error: NonFinite) -> UserError:
    """Write RUN/failed_step and return the error to raise, which names it."""
    spin = isinstance(objective, Spin)
    step = {
        "stage": stage.name,
        "rows": error.rows,
        "loss_scale": error.loss_scale,
        "microbatch_tokens": error.microbatch_tokens,
        "objective": {"beta": objective.beta, "kind": objective.kind} if spin else None,
        "groups": [{"prompt_ids": groups[row].prompt_ids, "answers": groups[row].answers} for row in error.rows],
        "model_revision": game.model.revision,
        "config": game.config.model_dump(mode="json"),
    }

    def fill(path: Path) -> None:
        game.policy.save_adapter(path)
        (path / STEP).write_text(json.dumps(step) + "\n")
        if spin:
            save_file({"logps": objective.opponent_logps[error.rows].cpu().contiguous()}, path / OPPONENT)

    directory = game.run.path / "failed_step"
    files.write_directory(directory, fill)
    return UserError(
        f"{stage.name}: {error}; lower train.lr, or look at the step with: python -m spinfast.run replay {directory}"
    )


def main(argv: Sequence[str]) -> int:
    """`spinfast replay DIR`"""
    if len(argv) != 1:
        raise UserError(f"replay: expected one directory, RUN/failed_step, got {len(argv)}")
    for line in replay(Path(argv[0])):
        print(line)
    return 0


def replay(directory: Path) -> list[str]:
    """Make the kept step again and say what of it is not finite."""
    if reason := files.damage(directory):
        raise UserError(f"replay {directory}: expected the failed_step directory of a run, but {reason}")
    step = json.loads((directory / STEP).read_text())
    config = parse_config(step["config"])
    device = profile(config.device.profile, config.device.dtype, config.device.attention)
    model = resolve_model(config.model.name, config.model.revision)
    if model.revision != step["model_revision"]:
        raise UserError(
            f"replay {directory}: {config.model.name} is not the model of the run; put that one in its place"
        )
    table, _ = ops.choose(config.device.kernels, device.device)
    policy = load_policy(
        model.path,
        model.name,
        model.revision,
        lora=config.lora,
        ops=table,
        profile=device,
        load_in_4bit=config.model.load_in_4bit,
        seed=config.seed,
    )
    policy.restore(adapters.load(directory, finite=False))
    groups = [Group(tuple(g["prompt_ids"]), tuple(map(tuple, g["answers"]))) for g in step["groups"]]
    objective: Objective = Sft()
    if step["objective"]:
        objective = Spin(load_file(directory / OPPONENT)["logps"].to(policy.device), **step["objective"], ops=table)
    plan = TrainPlan(len(groups), step["microbatch_tokens"], epochs=1, seed=0, attention=device.attention, lr=0.0)
    batches = step_batches(plan, groups, range(len(groups)))
    lines = []
    for batch in batches:
        logps_S = batch_sequence_logps(policy, batch)
        owners = [row for row in batch.rows for _ in groups[row].answers]
        bad = sorted({step["rows"][owners[i]] for i in (~logps_S.isfinite()).nonzero().flatten().tolist()})
        lines += [f"log-probs not finite: group {row} of {step['stage']}" for row in bad]
    state = start_training(policy, "adamw", 0.0, device.scaled_loss)
    state.loss_scale = step["loss_scale"]
    broken: list[str] = []
    hooks = [module.register_forward_hook(_watch(name, broken)) for name, module in policy.model.named_modules()]
    metrics, _ = accumulate(policy, batches, objective, sum(map(objective.weight, groups)), state)
    for hook in hooks:
        hook.remove()
    lines += [f"first output not finite: {broken[0]}"] if broken else []
    lines.append(f"loss {metrics['train/loss']:g} at loss scale {state.loss_scale:g}")
    gradients = {name: p.grad for name, p in policy.trainable_parameters().items()}
    bad = [name for name, grad in gradients.items() if grad is not None and not grad.isfinite().all()]
    lines.append(f"gradients not finite: {len(bad)} of {len(gradients)}" + (f", first {bad[0]}" if bad else ""))
    return lines


def _watch(name: str, broken: list[str]) -> Callable:
    def look(module, args, output) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        if any(isinstance(t, torch.Tensor) and t.is_floating_point() and not t.isfinite().all() for t in tensors):
            broken.append(name)

    return look
