"""Group relative policy optimisation (GRPO, arXiv 2402.03300) with reward functions, and the losses after it.

    for every rollout (sampling.py):
        x_1 .. x_n            ~ data                                     drawn
        y_1 .. y_G            ~ p_theta(. | x_i), by the engine          answered
        r                     = sum of weight * reward(x, y)             rewards/
        A                     = (r - mean of its group) / their spread   advantages.py
        for one or more steps:
            theta            += gradient of A * ratio(p_theta, p_old)    objectives, fit

A rollout is kept in a file before it is trained on, and a resumed run reads it again. Groups whose rewards are all
equal teach nothing: they are not computed, and with grpo.refill fresh prompts take their place.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import fields

import torch

from spinfast.config import Config, at
from spinfast.errors import UserError
from spinfast.evaluate import heldout
from spinfast.evaluate.rewarded import reward_metrics
from spinfast.evaluate.selfplay import Metrics
from spinfast.fit import fit
from spinfast.memory.planner import Load
from spinfast.methods.phases import check_unmerged, conclude
from spinfast.methods.run import Run
from spinfast.methods.sampling import Rollouts
from spinfast.objectives import Surrogate
from spinfast.store.record import Stage
from spinfast.types import Example, Group, Request
from spinfast.watch import Figures, Losses, Watch

log = logging.getLogger("spinfast")
OF_RATIOS = {"epsilon", "epsilon_high", "delta", "sapo_temperature_pos", "sapo_temperature_neg"}


def grpo(run: Run, last: Stage) -> Iterator[dict]:
    c, stage = run.config.grpo, run.stage("grpo", last, "grpo")
    start = run.become(last)
    objective = surrogate(run.config)
    if c.steps_per_rollout == 1 and c.old_logps == "policy" and (idle := sorted(OF_RATIOS & c.model_fields_set)):
        log.warning("grpo.%s has no use: with one step per rollout every ratio to the sampling policy is 1", idle[0])
    fit(run, stage, Rollouts(run, stage, start, objective), objective, c, at(c.lr, 0), watch=looking(run))
    yield conclude(run, stage, last, start)


def surrogate(config: Config) -> Surrogate:
    """What is optimised: grpo's keys of its names, and the limits of what is sampled."""
    own = {field.name for field in fields(Surrogate)} & {*type(config.grpo).model_fields}
    keys = {name: getattr(config.grpo, name) for name in own}
    return Surrogate(
        **keys,
        max_tokens=config.generation.max_tokens,
        temperature=config.generation.temperature,
        steps_per_rollout=config.grpo.steps_per_rollout,
    )


def looking(run: Run) -> Watch | None:
    """Held-out problems answered greedily on the way, where the config asks for it."""
    c, settings = run.config.grpo, run.config.evaluate
    if not c.evaluate_every:
        return None
    if not (problems := heldout.answered(run)):
        log.warning("grpo.evaluate_every, patience and keep have no use: there are no held-out problems to answer")
        return None

    def measure() -> tuple[Losses, Figures]:
        adapter = run.policy.adapter()
        run.session.check_generator(problems[0].prompt_ids, adapter)
        requests = [Request(i, example.prompt_ids, seed=i) for i, example in enumerate(problems)]
        found = run.generate(requests, run.session.sampling(0.0, settings.max_tokens), adapter)
        answers = sorted(found, key=lambda answer: answer.index)
        metrics, rewards = reward_metrics(run, problems, answers)
        scores = heldout.verdict(problems, answers, run.session.machine.renderer.text)
        losses = -torch.from_numpy(rewards)
        return (losses, (~losses.isnan()).double()), figures(metrics | heldout.accuracies(scores))

    return Watch(measure, c.evaluate_every, c.patience, c.keep == "best", "its held-out reward is greatest")


def figures(metrics: Metrics) -> Figures:
    """Estimates as a metrics line has them."""
    errors = {f"{name}_stderr": each["stderr"] for name, each in metrics.items() if each["stderr"] is not None}
    return {name: each["value"] for name, each in metrics.items()} | errors


def load(config: Config, examples: Sequence[Example]) -> Load:
    """Every answer at its limit."""
    c, answer = config.grpo, (0,) * config.generation.max_tokens
    prompts = [e.prompt_ids for e in examples if e.messages] or [(0,) * config.prompt.max_prompt_tokens]
    if examples and not any(e.messages for e in examples):
        raise UserError("method grpo: needs prompts, and the data is plain text")
    if c.reference == "base":
        check_unmerged(config, "grpo", "adapter.init: continue")
    loss = surrogate(config)
    prompts *= math.ceil(c.prompts_per_step / len(prompts))  # drawn again and again, so a step is full
    answers = (answer,) * c.samples
    groups = [Group(prompt, answers) for prompt in prompts]
    off_policy = c.steps_per_rollout > 1 and c.old_logps == "policy"
    scoring = (bool(c.beta) + off_policy) / c.num_iterations
    kept = math.ceil(c.steps / c.steps_per_rollout) * c.steps_per_generation * c.prompts_per_step * c.samples
    return Load("grpo", groups, loss, c, c.prompts_per_step, (c.steps,), scoring, kept)
