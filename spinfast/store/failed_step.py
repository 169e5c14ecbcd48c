"""The step that stopped a run: its inputs are kept, and `spinfast replay RUN/failed_step` makes it again.

A step's gradient is a function of the base, the adapter, the groups with their constants, the objective and the loss
scale. RUN/failed_step holds all of these but the base, as safetensors and JSON. The replay says what is not finite:
answers, the first layer whose output is not, parameters by their gradients.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from spinfast.config import parse_config
from spinfast.errors import UserError
from spinfast.objectives import Objective, described, restored
from spinfast.policy.adapters import files as adapters
from spinfast.scoring import Budget, batch_sequence_logps, batches, sequence_logps
from spinfast.store import files
from spinfast.train import NonFinite, accumulate, combined, start_training
from spinfast.types import Group

STEP = "step.json"


def keep(run, stage, objective: Objective, error: NonFinite) -> UserError:
    """Write RUN/failed_step and return the error to raise, which names it."""
    plan = replace(run.session.plan, microbatch_tokens=error.microbatch_tokens)
    step = {
        "stage": stage.name,
        "loss_scale": error.loss_scale,
        "plan": asdict(plan),
        "objective": described(objective),
        "groups": [
            {"prompt_ids": g.prompt_ids, "answers": g.answers, "given": dict(g.given), "scored": g.scored}
            for g in error.groups
        ],
        "model_revision": run.session.machine.model.revision,
        "config": run.config.identity(),
    }

    def fill(path: Path) -> None:
        run.policy.save_adapter(path, exact=True)
        (path / STEP).write_text(json.dumps(step) + "\n")

    directory = run.directory.path / "failed_step"
    files.write_directory(directory, fill)
    return UserError(
        f"{stage.name}: {error}; lower {stage.method}.lr, or look at the step with: "
        f"python -m spinfast.run replay {directory}"
    )


def replay(directory: Path) -> list[str]:
    """Make the kept step again, as the run made it, and say what of it is not finite."""
    from spinfast.memory.planner import StepPlan
    from spinfast.session import look, open_session

    if reason := files.damage(directory):
        raise UserError(f"replay {directory}: expected the failed_step directory of a run, but {reason}")
    step = json.loads((directory / STEP).read_text())
    config = parse_config(step["config"])
    machine = look(config)
    if machine.model.revision != step["model_revision"]:
        raise UserError(
            f"replay {directory}: {config.model.name} is not the model of the run; put that one in its place"
        )
    groups = [
        Group(
            tuple(g["prompt_ids"]),
            _tuples(g["answers"]),
            {name: _tuples(values) for name, values in g["given"].items()},
            _tuples(g["scored"]),
        )
        for g in step["groups"]
    ]
    with open_session(config, machine, StepPlan(**step["plan"]), generate=False) as session:
        session.policy.restore(adapters.load(directory, finite=False))
        return list(_diagnosis(session, step, groups))


def _diagnosis(session, step: dict, groups: Sequence[Group]):
    policy, objective, device = session.policy, restored(step["objective"]), session.machine.device
    budget = Budget(step["plan"]["microbatch_tokens"], device.attention)
    weight = sum(map(objective.weight, groups))
    objective, groups = objective.for_step(groups, partial(sequence_logps, policy, budget=budget))
    groups = objective.cut(groups, budget.microbatch_tokens)
    packed = batches(groups, budget)
    for batch in packed:
        logps_S = batch_sequence_logps(policy, batch)
        owners = [row for row in batch.rows for _ in groups[row].answers]
        bad = sorted({owners[i] for i in (~logps_S.isfinite()).nonzero().flatten().tolist()})
        yield from (f"log-probs not finite: group {row} of the step in {step['stage']}" for row in bad)
    state = start_training(policy, "adamw", 0.0, device.scaled_loss)
    state.loss_scale = step["loss_scale"]
    broken: list[str] = []
    hooks = [module.register_forward_hook(_watch(name, broken)) for name, module in policy.model.named_modules()]
    metrics, _ = combined([accumulate(policy, packed, objective, weight, state)], weight)
    for hook in hooks:
        hook.remove()
    if broken:
        yield f"first output not finite: {broken[0]}"
    yield f"loss {metrics['train/loss']:g} at loss scale {state.loss_scale:g}"
    gradients = {name: p.grad for name, p in policy.trainable_parameters().items()}
    bad = [name for name, grad in gradients.items() if grad is not None and not grad.isfinite().all()]
    yield f"gradients not finite: {len(bad)} of {len(gradients)}" + (f", first {bad[0]}" if bad else "")


def _tuples(values: Sequence) -> tuple:
    """JSON's lists as a group's constants: numbers, or a tuple of numbers per answer."""
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)


def _watch(name: str, broken: list[str]) -> Callable:
    def look(module, args, output) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        if any(isinstance(t, torch.Tensor) and t.is_floating_point() and not t.isfinite().all() for t in tensors):
            broken.append(name)

    return look
