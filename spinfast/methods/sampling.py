"""How a rollout is made: prompts drawn, answered by the engine, rewarded, compared, and kept (store/rollouts.py)."""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from statistics import fmean

from spinfast.advantages import Advantages, advantages, metrics
from spinfast.evaluate.rewarded import rated
from spinfast.generation import prompt_seed
from spinfast.interrupt import stop_if_asked
from spinfast.methods.run import Run
from spinfast.objectives import ACTIVE, ADVANTAGE, OLD_LOGPS, REFERENCE, SAMPLER_LOGPS, Surrogate
from spinfast.policy.adapters import files as adapters
from spinfast.rewards import ConstantWatch, Scores, TrainerState
from spinfast.scoring import token_logps
from spinfast.store import rollouts
from spinfast.store.record import Stage
from spinfast.store.rollouts import Rollout, by_group
from spinfast.types import Adapter, Completion, Example, Group, Request

log = logging.getLogger("spinfast")
PLACE = "place"  # given per answer while it is scored: where it stands among its group's


class Rollouts:
    """Implements train.Steps: a step's groups are sampled when its rollout's turn comes, or read from its file."""

    def __init__(self, run: Run, stage: Stage, start: Adapter, objective: Surrogate):
        self.run, self.stage, self.start, self.objective, self.c = run, stage, start, objective, run.config.grpo
        self.longest = run.longest
        self.prompts = [example for example in run.examples if example.messages]
        self.number, self.rollout = -1, None  # the one at hand
        self.constant = ConstantWatch(run.rewards)

    def __len__(self) -> int:
        return self.c.steps

    @property
    def files(self) -> list[str]:
        count = math.ceil(self.c.steps / self.c.steps_per_rollout)
        return [str(rollouts.path(self.stage.directory, n).relative_to(self.stage.directory)) for n in range(count)]

    def figures(self, step: int) -> dict[str, float]:
        return self.at(step).figures

    def __getitem__(self, step: int) -> list[Group]:
        part, size = step % self.c.steps_per_generation, self.c.prompts_per_step
        return [as_group(rows) for rows in by_group(self.at(step).rows)[part * size : (part + 1) * size]]

    def at(self, step: int) -> Rollout:
        """The rollout that a step trains on."""
        number, place = divmod(step, self.c.steps_per_rollout)
        if number != self.number:
            self.rollout = self.kept(number, new=place == 0) or self.made(number, step)
            self.number = number
            self.tell()
        return self.rollout

    def kept(self, number: int, new: bool) -> Rollout | None:
        """The rollout of an earlier process; before its first step the policy must be who wrote it."""
        path = rollouts.path(self.stage.directory, number)
        found = rollouts.read(path, self.owner(number))
        if found and new and found.adapter != adapters.fingerprint(self.run.policy.adapter()):
            log.warning("%s is by another policy than this step's; its prompts are answered again", path)
            return None
        return found

    def made(self, number: int, step: int) -> Rollout:
        """Sampled by the policy as it stands, and kept."""
        run, started, adapter = self.run, time.monotonic(), self.run.policy.adapter()
        groups, told = self.filled(number, step, adapter)
        paid = values(run, groups)
        found = compared(run, paid)
        self.credit(groups, found)
        self.score(groups)
        figures = told | metrics(paid, found) | lengths(groups)
        rollout = Rollout([row for rows in groups for row in rows], adapters.fingerprint(adapter), figures)
        rollout = rollouts.write(rollouts.path(self.stage.directory, number), rollout, self.owner(number))
        seconds, tokens = time.monotonic() - started, sum(len(row["completion_ids"]) for row in rollout.rows)
        run.directory.system(self.stage.name, "rollout", {"rollout": number, "seconds": seconds, "tokens": tokens})
        return rollout

    def filled(self, number: int, step: int, adapter: Adapter) -> tuple[list[list[dict]], dict[str, float]]:
        """Groups of rewarded answers, dead ones replaced as far as grpo.refill allows, and what is told of them."""
        c, run = self.c, self.run
        size = c.prompts_per_step * c.steps_per_generation
        state, logged, refilled = TrainerState(step, c.steps, number * size / len(self.prompts)), [], 0

        def answered(asked: Sequence[Example], purpose: str) -> list[list[dict]]:
            answers = sampled(run, asked, f"{self.stage.name} {purpose}", adapter)
            rows, by_functions = rewarded(run, asked, answers, state)
            logged.append(by_functions)
            return rows

        groups = answered(self.drawn(number, size), f"{number}")
        for turn in range(c.refill):
            if not (dead := [i for i, is_dead in enumerate(compared(run, values(run, groups)).dead) if is_dead]):
                break
            source = random.Random(f"{run.config.seed} refill {number} {turn}")
            fresh = answered(source.choices(self.prompts, k=len(dead)), f"{number} refill {turn}")
            still = compared(run, values(run, fresh)).dead
            live = [rows for rows, is_dead in zip(fresh, still, strict=True) if not is_dead]
            for i, rows in zip(dead, live, strict=False):
                groups[i] = rows
            refilled += len(live)
        names = dict.fromkeys(name for call in logged for name in call)
        told = {name: fmean(call[name] for call in logged if name in call) for name in names}
        return groups, told | {"groups/refilled": refilled}

    def credit(self, groups: Sequence[list[dict]], found: Advantages) -> None:
        """Every answer its place, reward and advantage; one that was cut is left out where the config says so."""
        for i, (rows, rewards, worth) in enumerate(zip(groups, found.rewards, found.advantages, strict=True)):
            for row, reward, advantage in zip(rows, rewards.tolist(), worth.tolist(), strict=True):
                left_out = self.c.mask_truncated and row["finish_reason"] == "length"
                row |= {"group": i, "reward": None if math.isnan(reward) else reward, "advantage": advantage}
                row["active"] = float(not left_out)

    def owner(self, number: int) -> str:
        """Whose a rollout is: config, model and data, what came before, its number."""
        inputs = json.dumps(self.run.directory.inputs, sort_keys=True)
        return f"{self.run.config.hash()} {inputs} {self.stage.name} {self.stage.basis('train')} {number}"

    def drawn(self, number: int, size: int) -> list[Example]:
        """The next prompts of an endless list: the data again and again, shuffled anew each time."""
        epochs = range(number * size // len(self.prompts), ((number + 1) * size - 1) // len(self.prompts) + 1)
        listed: list[Example] = []
        for epoch in epochs:
            order = list(self.prompts)
            random.Random(f"{self.run.config.seed} prompts {epoch}").shuffle(order)
            listed += order
        first = number * size - epochs[0] * len(self.prompts)
        return listed[first : first + size]

    def score(self, groups: Sequence[list[dict]]) -> None:
        """Log-probs under the old policy, where steps come after the first, and under the reference: step by step."""
        run, objective, columns = self.run, self.objective, []
        if self.c.steps_per_rollout > 1 and self.c.old_logps == "policy":
            columns.append((OLD_LOGPS, nullcontext()))
        if self.c.beta:
            base = self.c.reference == "base"
            columns.append((REFERENCE, run.policy.base_only() if base else run.policy.playing(self.start)))
        for name, playing in columns:
            with playing:
                for rows in batched(groups, self.c.prompts_per_step):
                    _, live = objective.for_step(
                        [as_group(of_group, placed=i) for i, of_group in enumerate(rows)], None
                    )
                    scored = token_logps(run.policy, live, run.budget, objective.temperature)
                    for group, logps in zip(live, scored, strict=True):
                        for place, found in zip(group.given[PLACE], logps, strict=True):
                            i, j = divmod(int(place), self.c.samples)
                            rows[i][j][name] = found

    def tell(self) -> None:
        """What a person should know of the rollout at hand: its first answer rated, and rewards that never change."""
        rows, rewards = self.rollout.rows, self.run.rewards
        if self.number == 0:
            first = rows[0]
            log.info("first prompt: %s", first["prompt"])
            log.info("its first answer (%s): %s", first["finish_reason"], first["completion"])
            log.info("its rewards: %s", ", ".join(f"{name} {first[f'rewards/{name}']}" for name in rewards.names))
        scores = Scores({name: [row[f"rewards/{name}"] for row in rows] for name in rewards.names}, {}, {})
        for sentence in self.constant(scores, self.rollout.figures["completions/clipped_ratio"]):
            log.warning("%s: %s", self.stage.name, sentence)


def sampled(run: Run, asked: Sequence[Example], purpose: str, adapter: Adapter) -> list[list[Completion]]:
    """So many answers to every prompt as a group has, side by side, so that they share the prompt's keys and values."""
    samples, settings = run.config.grpo.samples, run.config.generation
    requests = [
        Request(i, example.prompt_ids, prompt_seed(run.config.seed, 0, i, purpose, sample), sample)
        for i, example in enumerate(asked)
        for sample in range(samples)
    ]
    sampling, found = run.session.sampling(settings.temperature, settings.max_tokens), {}
    for answer in run.generate(requests, sampling, adapter):
        found[answer.index, answer.sample] = answer
        stop_if_asked()
    return [[found[i, sample] for sample in range(samples)] for i in range(len(asked))]


def rewarded(
    run: Run, asked: Sequence[Example], answers: Sequence[Sequence[Completion]], state: TrainerState
) -> tuple[list[list[dict]], dict[str, float]]:
    """Rows of store/rollouts.py as far as they are known, by group; what functions told by log_metric."""
    text = run.session.machine.renderer.text
    flat = [answer for group in answers for answer in group]
    scores = rated(run, [example for example in asked for _ in range(run.config.grpo.samples)], flat, state)
    rows = [
        {
            "sample": answer.sample,
            "index": asked[answer.index].index,
            "prompt": run.session.machine.renderer.tokenizer.decode(asked[answer.index].prompt_ids),
            "prompt_ids": asked[answer.index].prompt_ids,
            "completion": text(answer.token_ids),
            "completion_ids": answer.token_ids,
            "finish_reason": answer.finish_reason,
            "sampler_logps": answer.logps,
            "old_logps": None,
            "reference_logps": None,
            **{f"rewards/{name}": given[place] for name, given in scores.values.items()},
            "extra": json.dumps({name: given[place] for name, given in scores.extra.items()}, default=str),
        }
        for place, answer in enumerate(flat)
    ]
    return list(batched(rows, run.config.grpo.samples)), scores.metrics


def values(run: Run, groups: Sequence[Sequence[dict]]) -> dict[str, list[list[float | None]]]:
    """Each function's rewards, by group."""
    return {name: [[row[f"rewards/{name}"] for row in rows] for rows in groups] for name in run.rewards.names}


def compared(run: Run, paid: dict[str, list[list[float | None]]]) -> Advantages:
    c = run.config.grpo
    return advantages(paid, run.rewards.weights, c.scale_rewards, c.baseline, c.aggregation)


def lengths(groups: Sequence[Sequence[dict]]) -> dict[str, float]:
    """Tokens of the answers, and of those that ended by themselves, under TRL's names."""
    rows = [row for rows in groups for row in rows]
    every = [len(row["completion_ids"]) for row in rows]
    ended = [len(row["completion_ids"]) for row in rows if row["finish_reason"] == "stop"]
    found = {"completions/clipped_ratio": 1 - len(ended) / len(every)}
    for name, sizes in {"length": every, "terminated_length": ended or [0]}.items():
        figures = {"mean": fmean(sizes), "min": min(sizes), "max": max(sizes)}
        found |= {f"completions/{which}_{name}": float(value) for which, value in figures.items()}
    return found


def as_group(rows: Sequence[dict], placed: int | None = None) -> Group:
    """A group's rows as training takes them. `placed`: the group's own place, to tell its answers apart by."""
    given = {ADVANTAGE: tuple(row["advantage"] for row in rows), ACTIVE: tuple(row["active"] for row in rows)}
    per_token = [SAMPLER_LOGPS, *(name for name in (OLD_LOGPS, REFERENCE) if any(row[name] for row in rows))]
    given |= {name: tuple(tuple(row[name] or ()) for row in rows) for name in per_token}
    if placed is not None:
        given[PLACE] = tuple(float(placed * len(rows) + i) for i in range(len(rows)))
    return Group(tuple(rows[0]["prompt_ids"]), tuple(tuple(row["completion_ids"]) for row in rows), given)


def batched(items: Sequence, size: int) -> Iterator[list]:
    return (list(items[i : i + size]) for i in range(0, len(items), size))
