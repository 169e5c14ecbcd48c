"""The verbs that methods share: base_stage, rollout, epochs, with_reference, conclude. They leave files in a stage."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from spinfast import objectives, spread
from spinfast.config import Config, Optimisation, Watched
from spinfast.data.pairs import read_pairs
from spinfast.errors import UserError
from spinfast.evaluate import heldout
from spinfast.generation import prompt_seed
from spinfast.generation.canary import amplified
from spinfast.interrupt import stop_if_asked
from spinfast.methods.run import Run
from spinfast.objectives import Nll, Objective, Pairwise, Preference, Unpaired
from spinfast.policy.adapters import files as adapters
from spinfast.report.card import write_card
from spinfast.scoring import as_step, score, with_room
from spinfast.steps import Epochs
from spinfast.store import checkpoint, files
from spinfast.store import reference as references
from spinfast.store.record import Stage
from spinfast.store.reference import Reference
from spinfast.types import Adapter, Completion, Example, Group, Request, Sampling
from spinfast.watch import Figures, Losses, Watch, loss_figures

log = logging.getLogger("spinfast")
REFERENCE = "reference.parquet"


def base_stage(run: Run) -> Stage:
    """The adapter before any training (B = 0, or adapter.start), so that every stage starts from a file."""
    stage, start = run.stage("base", None, "base"), run.session.machine.start
    if not stage.finished("save"):
        if start:
            run.policy.load_adapter(run.policy.grown(start, run.policy.adapter()))
        with stage.phase("save", "adapter"):
            files.write_directory(stage.path("adapter"), run.policy.save_adapter)
    run.policy.load_adapter(adapters.load(stage.path("adapter")))
    return stage


def rollout(run: Run, stage: Stage, examples: Sequence[Example], sampling: Sampling) -> list[Completion]:
    """The policy as it stands answers every prompt; answers are kept as they come, sorted at the end."""
    path = stage.path("completions.jsonl")
    own = path if spread.first() else path.with_name(f".{path.name}.rank{spread.rank()}")
    if not stage.finished("generate"):
        adapter = run.policy.adapter()
        owner = f"{stage.name} {run.config.seed} {adapters.fingerprint(adapter)}"
        rows = {row["index"]: row for row in spread.told("answers so far", partial(_answers, path, owner))}
        requests = [
            Request(example.index, example.prompt_ids, prompt_seed(run.config.seed, stage.number, example.index))
            for example in examples
            if example.index not in rows
        ]
        answers = run.generate(requests, sampling, adapter)
        with (
            stage.phase("generate", path.name),
            run.display.phase(f"{stage.name} generate", len(requests), "answers") as tick,
        ):
            with own.open("a", encoding="utf-8") as file:
                for answer in answers:
                    row = {
                        "index": answer.index,
                        "token_ids": answer.token_ids,
                        "finish_reason": answer.finish_reason,
                        "logp": answer.logp,
                        "text": run.session.machine.renderer.text(answer.token_ids),
                    }
                    rows[answer.index] = files.seal(row, owner)
                    file.write(json.dumps(rows[answer.index]) + "\n")
                    file.flush()
                    tick.advance(tokens=len(answer.token_ids))
                    stop_if_asked()
            files.write_text(path, files.jsonl(rows[example.index] for example in examples))
        if own != path:
            own.unlink()
    return [Completion(row["index"], tuple(row["token_ids"]), row["finish_reason"]) for row in files.read_jsonl(path)]


def _answers(path: Path, owner: str) -> list[dict]:
    """Sealed rows of the answers that every rank of an earlier process kept, now all in one file."""
    parts = [path, *sorted(path.parent.glob(f".{path.name}.rank*"))]
    rows = {row["index"]: files.seal(row, owner) for part in parts for row in files.sealed_lines(part, owner)}
    files.write_text(path, files.jsonl(rows.values()))
    for part in parts[1:]:
        part.unlink()
    return list(rows.values())


def epochs(run: Run, groups: Sequence[Group], settings: Optimisation, round_number: int) -> Epochs:
    """The groups of every step; `round_number` sets a method's rounds apart: 0 but for SPIN's."""
    return Epochs(groups, settings.groups_per_step, settings.epochs, run.config.seed * 1009 + round_number)


def with_reference(
    run: Run, stage: Stage, steps: Epochs, objective: Objective, of: str = "start", heldout: bool = False
) -> tuple[Epochs, int | None]:
    """The same steps, whose groups are given their log-probs under a reference.

    of: "start", the policy as it stands; "base", the model without an adapter; an adapter's directory; or another
    run's reference.parquet. Scored once, in the microbatches of the first epoch, each part that the objective computes
    for itself. Also returns how many tokens those had, 0 if they were dealt to another number of ranks, None if it was
    not the policy as it stands that was scored.
    """
    phase, name = ("score heldout", f"heldout_{REFERENCE}") if heldout else ("score", REFERENCE)
    path, adapter = stage.path(name), _fingerprint(run)
    if not stage.finished(phase):
        with stage.phase(phase, name):
            if of.endswith(".parquet"):
                reference = _taken(run, steps.groups, files.expanded(of), heldout)
            else:
                reference = _scored(run, stage, phase, steps, objective, of, adapter)
            _check_finite(stage, reference.logps)
            references.write(path, steps.groups, reference)
    reference = references.read(path, steps.groups)
    given = [
        objectives.with_reference(group, logps) for group, logps in zip(steps.groups, reference.logps, strict=True)
    ]
    own = reference.adapter == adapter and not of.endswith(".parquet")
    cut = reference.microbatch_tokens if reference.shares == run.budget.dealt else 0
    return steps.of(given), cut if own else None


def _scored(
    run: Run, stage: Stage, phase: str, steps: Epochs, objective: Objective, of: str, adapter: str
) -> Reference:
    """The reference's log-probs, by this run."""
    playing, who = _player(run, of, adapter)
    parts = [steps.of(part) for part in objective.apart(steps.groups)]
    budget = with_room(run.budget, steps.groups)
    with playing, run.display.phase(f"{stage.name} {phase}", len(parts) * len(steps.groups), "groups") as tick:
        scored = [score(run.policy, part, budget, tick.advance) for part in parts]
    logps = [[logp for sums in of_group for logp in sums] for of_group in zip(*(s for s, _ in scored), strict=True)]
    tokens = min(fitted.microbatch_tokens for _, fitted in scored)
    return Reference(logps, run.session.machine.model.revision, who, _dtype(run), tokens, run.budget.dealt)


def _taken(run: Run, groups: Sequence[Group], path: Path, heldout: bool) -> Reference:
    """The reference's log-probs, from another run's file; held-out ones stand in one of their own beside it."""
    beside = path.with_name(f"heldout_{path.name}")
    path = beside if heldout and beside.exists() else path
    reference, model, dtype = references.read(path, groups), run.session.machine.model.revision, _dtype(run)
    if reference.model != model:
        raise UserError(f"reference {path}: of model {reference.model}, expected {model}")
    if reference.dtype != dtype:
        log.warning("reference %s: scored in %s, this run computes in %s", path, reference.dtype, dtype)
    return reference


def _dtype(run: Run) -> str:
    return str(run.policy.dtype).removeprefix("torch.")


def _fingerprint(run: Run) -> str:
    """Of the policy's adapter as it stands, what was merged into the base included."""
    return adapters.fingerprint(adapters.stack([*run.policy.folded, run.policy.adapter()]))


def _player(run: Run, of: str, adapter: str) -> tuple[AbstractContextManager, str]:
    """Who scores, and the fingerprint of its adapter."""
    if of == "start":
        return nullcontext(), adapter
    if of == "base":
        return run.policy.base_only(), ""
    model = run.session.machine.model
    other = adapters.load(adapters.find(files.expanded(of)), model.revision, name=model.name)
    if other.kind != run.config.adapter.kind:
        raise UserError(f"reference {of}: a {other.kind}, this run trains a {run.config.adapter.kind}; give that kind")
    idle = amplified(run.policy.adapter(), 0)
    return run.policy.playing(run.policy.grown(other, idle)), adapters.fingerprint(other)


def _check_finite(stage: Stage, logps: Sequence[Sequence[float]]) -> None:
    broken = [i for i, sums in enumerate(logps) if not all(map(math.isfinite, sums))]
    if broken:
        raise UserError(
            f"{stage.name}: group {broken[0]} has log-probs {list(logps[broken[0]])} under the reference, expected "
            f"finite ones; the adapter has diverged (lower {stage.method}.lr) or the base's weights are damaged"
        )


def watching(run: Run, objective: Objective, settings: Watched, groups: Sequence[Group]) -> Watch | None:
    """Held-out losses on the way, where the config asks for them."""
    if not settings.evaluate_every:
        return None
    if not groups:
        log.warning("evaluate_every, patience and keep have no use: there are no held-out rows to look at")
        return None

    def measure() -> tuple[Losses, Figures]:
        there, parts, logps = as_step(run.policy, objective, groups, run.budget)
        losses = there.units(parts, logps)
        return losses, loss_figures(losses, likelihood=isinstance(objective, Nll))

    return Watch(measure, settings.evaluate_every, settings.patience, settings.keep == "best")


def check_unmerged(config: Config, method: str, instead: str) -> None:
    """Raises UserError where the base, which `method` has for its reference, holds the stages before it."""
    if config.adapter.init == "merge" and config.method[0] != method:
        raise UserError(
            f"{method}.reference {getattr(config, method).reference}: the stages before {method} are merged into the "
            f"base (adapter.init: merge), so it cannot be played any more; use start, or {instead}"
        )


def conclude(
    run: Run,
    stage: Stage,
    last: Stage,
    start: Adapter,
    game: Pairwise | None = None,
    judged: tuple[Preference | Unpaired, Sequence[Group]] | None = None,
    look: bool = True,
) -> dict:
    """Evaluate the stage's adapter on held-out data, if it is to be looked at, and add its row to results.json.

    `start` is the adapter that the stage started from, `game` what it is played by on held-out pairs, `judged` the
    objective and held-out groups, given their reference, by which preferences are held out.
    """
    if stage.after is None:
        run.directory.forget_results()
    checkpoint.clear(stage.path("checkpoints"))
    if stage.path("metrics.jsonl").exists():
        run.directory.restore_metrics(stage, files.read_jsonl(stage.path("metrics.jsonl")))
    run.policy.restore(adapters.load(stage.path("adapter")))
    looked_at = look and run.heldout and (run.config.evaluate.problems or run.config.evaluate.pairs)
    if looked_at and not stage.finished("evaluate"):
        with stage.phase("evaluate", *heldout.OUTPUTS):
            heldout.evaluate(run, stage, last, start, game or run.game, judged)
    pairs = stage.path("pairs.parquet")
    row = {
        "iteration": stage.label,
        "stage": stage.name,
        "method": stage.method,
        "number": stage.number,
        "pairs": len(read_pairs(pairs)) if pairs.exists() else 0,
        "rejected": stage.read("rejected.json"),
        "train": stage.read("train.json"),
        "evaluation": stage.read("eval.json") if looked_at else {},
        "seconds": stage.seconds(),
    }
    run.check_base()
    run.directory.result(row)
    if spread.first():
        write_card(stage.path("adapter"), run.directory.path, stage.name)
    if stage not in run.played:
        run.played.append(stage)
    return row
