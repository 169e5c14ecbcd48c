"""The verbs that methods share: base_stage, rollout, epochs, with_reference, conclude. They leave files in a stage."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from safetensors.torch import load_file, save_file

from spinfast import objectives
from spinfast.config import Optimisation
from spinfast.data.pairs import read_pairs
from spinfast.errors import UserError
from spinfast.evaluate import heldout
from spinfast.generation import prompt_seed
from spinfast.interrupt import stop_if_asked
from spinfast.methods.run import Run
from spinfast.objectives import Pairwise
from spinfast.policy.adapters import files as adapters
from spinfast.report.card import write_card
from spinfast.store import checkpoint, files
from spinfast.store.record import Stage
from spinfast.train import Epochs, score
from spinfast.types import Adapter, Completion, Example, Group, Request, Sampling

SCORES = "opponent_logps.safetensors"


def base_stage(run: Run) -> Stage:
    """The adapter before any training (B = 0), so that every stage starts from a file."""
    stage = run.stage("base", None, "base")
    if not stage.finished("save"):
        with stage.phase("save", "adapter"):
            files.write_directory(stage.path("adapter"), run.policy.save_adapter)
    return stage


def rollout(run: Run, stage: Stage, examples: Sequence[Example], sampling: Sampling) -> list[Completion]:
    """The policy as it stands answers every prompt; answers are kept as they come, sorted at the end."""
    path = stage.path("completions.jsonl")
    if not stage.finished("generate"):
        adapter = run.policy.adapter()
        owner = f"{stage.name} {run.config.seed} {adapters.fingerprint(adapter)}"
        rows = {row["index"]: files.seal(row, owner) for row in files.sealed_lines(path, owner)}
        files.write_text(path, files.jsonl(rows.values()))
        requests = [
            Request(example.index, example.prompt_ids, prompt_seed(run.config.seed, stage.number, example.index))
            for example in examples
            if example.index not in rows
        ]
        answers = run.generator.generate(requests, sampling, adapter)
        with (
            stage.phase("generate", path.name),
            run.display.phase(f"{stage.name} generate", len(requests), "answers") as tick,
        ):
            with path.open("a", encoding="utf-8") as file:
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
    return [Completion(row["index"], tuple(row["token_ids"]), row["finish_reason"]) for row in files.read_jsonl(path)]


def epochs(run: Run, groups: Sequence[Group], settings: Optimisation, round_number: int) -> Epochs:
    """The groups of every step; `round_number` counts a run's stages of training, 0 for SFT."""
    return Epochs(groups, settings.groups_per_step, settings.epochs, run.config.seed * 1009 + round_number)


def with_reference(run: Run, stage: Stage, steps: Epochs) -> tuple[Epochs, int]:
    """The same steps, whose groups are given their log-probs under the policy as it stands: the stage's reference.

    Scored once, in the microbatches of the first epoch. Also returns how many tokens those had.
    """
    path = stage.path(SCORES)
    if not stage.finished("score"):
        with stage.phase("score", path.name):
            with run.display.phase(f"{stage.name} score", len(steps.groups), "pairs") as tick:
                logps_G2, fitted = score(run.policy, steps, run.budget, tick.advance)
            if not logps_G2.isfinite().all():
                first = int((~logps_G2.isfinite().all(1)).nonzero()[0])
                raise UserError(
                    f"{stage.name}: pair {first} has log-probs {logps_G2[first].tolist()} under the opponent, expected "
                    f"finite ones; the adapter has diverged (lower {stage.method}.lr) or the base's weights are damaged"
                )
            reference = {"adapter": adapters.fingerprint(run.policy.adapter())}  # one entry: their order is not fixed
            scores = {"logps": logps_G2, "microbatch_tokens": torch.tensor(fitted.microbatch_tokens)}
            with files.replacing(path) as partial:
                save_file(scores, partial, metadata=reference)
    scores = load_file(path)
    given = [
        objectives.with_reference(group, logps)
        for group, logps in zip(steps.groups, scores["logps"].tolist(), strict=True)
    ]
    return steps.of(given), int(scores["microbatch_tokens"])


def conclude(run: Run, stage: Stage, last: Stage, start: Adapter, game: Pairwise | None = None) -> dict:
    """Evaluate the stage's adapter on held-out data and add its row to results.json.

    `start` is the adapter that the stage started from, `game` what it is played by on held-out pairs.
    """
    if stage.after is None:
        run.directory.forget_results()
    checkpoint.clear(stage.path("checkpoints"))
    if stage.path("metrics.jsonl").exists():
        run.directory.restore_metrics(stage, files.read_jsonl(stage.path("metrics.jsonl")))
    run.policy.restore(adapters.load(stage.path("adapter")))
    if run.heldout and run.config.evaluate.problems and not stage.finished("evaluate"):
        with stage.phase("evaluate", *heldout.OUTPUTS):
            heldout.evaluate(run, stage, last, start, game or run.game)
    pairs = stage.path("pairs.parquet")
    row = {
        "iteration": stage.label,
        "stage": stage.name,
        "method": stage.method,
        "number": stage.number,
        "pairs": len(read_pairs(pairs)) if pairs.exists() else 0,
        "rejected": stage.read("rejected.json"),
        "train": stage.read("train.json"),
        "evaluation": stage.read("eval.json"),
        "seconds": stage.seconds(),
    }
    run.check_base()
    run.directory.result(row)
    write_card(stage.path("adapter"), run.directory.path, stage.name)
    run.played.append(stage)
    return row
