"""A stage's training, whatever the method: from the newest checkpoint to the end, checked, saved, resumable."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Sequence

import torch

from spinfast.config import Optimisation
from spinfast.errors import UserError
from spinfast.evaluate import learning
from spinfast.evaluate.advice import on_the_way
from spinfast.interrupt import Stopped, finishing_steps, stop_if_asked
from spinfast.objectives import Objective
from spinfast.steps import Steps
from spinfast.store import checkpoint, failed_step, files
from spinfast.store.record import Stage
from spinfast.train import NonFinite, start_training, train
from spinfast.watch import Watch, best_adapter

log = logging.getLogger("spinfast")


def fit(
    run,
    stage: Stage,
    steps: Steps,
    objective: Objective,
    settings: Optimisation,
    lr: float,
    cut: int | None = None,
    watch: Watch | None = None,
) -> None:
    """Train the adapter to the end of the stage and save it; one metrics line per step.

    `cut` is the size of the microbatches, in tokens, in which the policy was scored as the reference that it starts
    from; None if it does not start from its reference. `watch` looks at held-out data on the way.
    """
    if stage.finished("train"):
        return
    config, policy, device = run.config, run.policy, run.session.machine.device
    run.session.rest()
    identity = {"stage": stage.name, "basis": stage.basis("train")}
    identity |= {"config": config.hash(), "model": run.session.machine.model.revision}
    saves = stage.path("checkpoints")
    state = start_training(policy, settings.optimizer, settings.weight_decay, device.scaled_loss)
    rows = checkpoint.load_latest(saves, policy, state, identity)
    run.directory.restore_metrics(stage, rows)
    if state.step:
        log.info("%s: training continues after step %d", stage.name, state.step)
    saved, saved_at = state.step, time.monotonic()

    def save() -> None:
        nonlocal saved, saved_at
        if saved < state.step:
            checkpoint.save(saves, policy, state, identity, rows)
        saved, saved_at = state.step, time.monotonic()

    with (
        finishing_steps(),
        stage.phase("train", "adapter", "train.json", "metrics.jsonl", *steps.files),
        run.display.phase(f"{stage.name} train", len(steps), "steps") as tick,
    ):
        tick.advance(state.step)
        try:
            if watch and not rows and watch.due(0, len(steps)):
                watch.look(0, policy, state.watched)
            ended = watch is not None and watch.stops(state.watched)
            made = train(policy, steps, objective, settings, lr, run.budget, state, config.train.max_overflows)
            for metrics in () if ended else made:
                untouched = (rows[-1]["train/overflows"] if rows else 0) == state.step - 1  # all before were skipped
                if untouched and cut is not None:
                    groups = steps[state.step - 1]
                    check_first_loss(metrics, objective.at_start(groups), device.dtype, cut, objective.rounding(groups))
                if watch and watch.due(state.step, len(steps)):
                    metrics |= watch.look(state.step, policy, state.watched)
                metrics |= steps.figures(state.step - 1)
                metrics["num_tokens"] = metrics["train/tokens"] + (rows[-1].get("num_tokens", 0) if rows else 0)
                rows.append(run.directory.metrics(stage.name, "train", state.step, metrics))
                if run.each_step:
                    run.each_step(stage, state.step, len(steps), rows[-1])
                tick.advance(tokens=int(metrics["train/tokens"]), metrics=_shown(metrics))
                run.directory.system(stage.name, "train", {"step": state.step, "tokens_per_second": tick.rate})
                for sentence in on_the_way(rows):
                    log.warning("%s: %s", stage.name, sentence)
                due = state.step % config.train.save_every_steps == 0
                if due or time.monotonic() - saved_at > config.train.save_every_seconds:
                    save()
                if watch and watch.stops(state.watched):
                    log.info(
                        "%s: stopped after step %d of %d: no significant held-out gain in %d looks",
                        *(stage.name, state.step, len(steps), watch.patience),
                    )
                    save()
                    break
                stop_if_asked(save)
        except NonFinite as error:
            raise failed_step.keep(run, stage, objective, error) from None
        except (Stopped, UserError, torch.OutOfMemoryError):
            if len(rows) == state.step:  # it came where the groups of the next step were made
                save()
            raise
        if watch and watch.keeps_best and state.watched.tensors and state.watched.step != state.step:
            whose = f"adapter of step {state.watched.step}" if state.watched.step else "adapter of the start"
            log.info("%s: the %s is kept, %s", stage.name, whose, watch.best)
            policy.load_adapter(best_adapter(policy, state.watched))
        checkpoint.finite_adapter(policy, state)
        files.write_directory(stage.path("adapter"), policy.save_adapter)
        files.write_json(stage.path("train.json"), summary(rows))
        files.write_text(stage.path("metrics.jsonl"), files.jsonl(rows))


def check_first_loss(
    metrics: dict[str, float], expected: float, dtype: torch.dtype, cut: int | None, rounding: float = 0.0
) -> None:
    """The free invariant of a reference: the policy starts as it. A skipped step says nothing yet.

    Equal microbatches give equal log-probs; where memory made the step's smaller, they are equal to rounding only.
    """
    if not math.isfinite(metrics["train/loss"]):
        return
    bound = 1e-5 if dtype == torch.float32 else 1e-3
    if metrics["train/microbatch_tokens"] != cut:
        bound *= 100
    bound = bound * max(1.0, expected) + rounding
    if not abs(metrics["train/loss"] - expected) <= bound:
        raise RuntimeError(
            f"the first loss is {metrics['train/loss']:.6f}, expected {expected:.6f} ± {bound:g}: policy and reference "
            "differ before the first step. Usual causes: another adapter than the one that was scored, dropout left "
            "on, another chat template or packing between scoring and training. Delete reference.parquet to "
            "score again; if it stays, please report it with the run's log.txt"
        )


def summary(rows: Sequence[dict]) -> dict[str, float]:
    """The training phase in a few figures, from its metrics lines; losses are those of steps that were made.

    Where answers have rewards, learning.summary is part of it.
    """
    made = [row["train/loss"] for row in rows if "train/empty" not in row and not isinstance(row["train/loss"], str)]
    losses = made or [0.0]  # "nan" was skipped
    last, early = rows[-1], rows[1 : len(rows) // 4]
    names = [name for name in last if name.startswith("train/")]
    accuracies = [row["rewards/accuracies"] for row in early if "rewards/accuracies" in row]
    return {
        "steps": last["step"],
        **({"early_accuracy": statistics.mean(accuracies)} if len(accuracies) > 2 else {}),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        **{f"last/{name.removeprefix('train/')}": last[name] for name in names if name != "train/loss"},
        **(learning.summary(rows) if "reward" in last else {}),
    }


SHOWN = {  # of a step with rewards: metric -> (word, how it is written)
    "reward": ("reward", ".3f"),
    "completions/mean_length": ("length", ".0f"),
    "groups/dead": ("dead", ".0%"),
}


def _shown(metrics: dict[str, float]) -> str:
    if "reward" in metrics:
        return "  ".join(f"{word} {metrics[name]:{look}}" for name, (word, look) in SHOWN.items() if name in metrics)
    parts = [f"loss {metrics['train/loss']:.4f}"]
    if "train/margin" in metrics:
        parts += [f"margin {metrics['train/margin']:.3f}", f"accuracy {metrics['train/pair_accuracy']:.2f}"]
    return "  ".join(parts)
