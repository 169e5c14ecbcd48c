"""The sections of the methods, each with what it shares with others and its own keys."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    model_validator,
)

from spinfast.config.sections import PerRound, PositivePerRound, Section, Weighed, weighed


class Optimisation(Section):
    """What every stage of training has; a method's section adds its own keys and defaults."""

    optimizer: Literal["adamw", "rmsprop", "adafactor", "adamw_8bit"] = Field(
        "adamw",
        description="rmsprop: SPIN's paper, on full weights; adafactor keeps one number a row and column; adamw_8bit "
        "needs bitsandbytes",
    )
    lr: PerRound = Field((1e-5,), description="peak learning rate; a list gives one value per round")
    weight_decay: float = Field(0.0, ge=0, description="decoupled (AdamW) or plain (RMSProp)")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="decay after the warm-up")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of the steps that warm up")
    min_lr_rate: float = Field(0.0, ge=0, le=1, description="where linear and cosine end, as a share of lr")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")

    @model_validator(mode="after")
    def _decays(self):
        if self.min_lr_rate and self.schedule == "constant":
            raise ValueError("min_lr_rate has no use with schedule constant")
        return self


class Passes(Optimisation):
    """A method that goes through groups that are there before it starts."""

    epochs: int = Field(1, gt=0, le=10_000, description="passes over the data of a round")
    groups_per_step: int = Field(16, gt=0, description="groups (a prompt with its answers) of one optimizer step")


class Watched(Section):
    """A method that can be looked at on held-out data at any step: by its loss, grpo by its reward."""

    evaluate_every: int = Field(0, ge=0, description="steps between looks at held-out data on the way; 0: none")
    patience: int = Field(0, ge=0, description="stop after so many looks without a significant gain; 0 never")
    keep: Literal["last", "best"] = Field(
        "last", description="the last adapter, or the best one that a look found, the start among them"
    )

    @model_validator(mode="after")
    def _looks(self):
        if not self.evaluate_every and (self.patience or self.keep == "best"):
            raise ValueError("patience and keep: best need looks on the way; set evaluate_every")
        return self


class Sft(Watched, Passes):
    lr: PerRound = Field((1e-4,), max_length=1, description="peak learning rate")


PAIRED = (  # those of objectives/losses.py
    *("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard"),
    *("apo_zero", "apo_down", "discopop", "sft", "cpo", "simpo", "orpo"),
)
UNPAIRED = ("kto", "apo_zero_unpaired")
REFERENCE_FREE = {"sft", "cpo", "simpo", "orpo"}
USED_BY = {  # option -> the losses that have it
    "label_smoothing": {"robust", "exo_pair", "cpo", "simpo"},
    "discopop_tau": {"discopop"},
    "simpo_gamma": {"simpo"},
    "cpo_alpha": {"cpo"},
    "desirable_weight": {*UNPAIRED},
    "undesirable_weight": {*UNPAIRED},
}


class Dpo(Watched, Passes):
    loss: Weighed = Field(
        {"sigmoid": 1.0}, description="a loss of objectives/losses, a list (their sum), or {name: weight}"
    )
    beta: float = Field(0.1, gt=0, le=1e6, description="how far the policy may move from its reference")
    reference: str = Field(
        "start", min_length=1, description="start of the stage, base, an adapter's directory, or a reference.parquet"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of wrong labels (robust, exo_pair, cpo ...)")
    discopop_tau: float = Field(0.05, gt=0, le=1e6, description="temperature of discopop's blend")
    simpo_gamma: float = Field(0.5, ge=0, le=1e6, description="SimPO's margin")
    cpo_alpha: float = Field(1.0, ge=0, le=1e6, description="weight of CPO's likelihood term")
    desirable_weight: float = Field(1.0, ge=0, le=1e6, description="of desirable answers (kto, apo_zero_unpaired)")
    undesirable_weight: float = Field(1.0, ge=0, le=1e6, description="of undesirable answers (kto, apo_zero_unpaired)")
    lr: PerRound = Field((1e-5,), max_length=1, description="peak learning rate")

    @property
    def unpaired(self) -> bool:
        """Whether the loss takes labelled answers one by one, not pairs."""
        return not {*self.loss}.isdisjoint(UNPAIRED)

    @model_validator(mode="after")
    def _fits(self):
        names, known = [*self.loss], (*PAIRED, *UNPAIRED)
        if strangers := [name for name in names if name not in known]:
            near = difflib.get_close_matches(strangers[0], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(known)}"
            raise ValueError(f"loss: {strangers[0]!r} is none there is; {hint}")
        if len(names) > 1 and self.unpaired:
            raise ValueError(f"loss: {' and '.join(UNPAIRED)} take no pairs, so they stand alone")
        for option, losses in USED_BY.items():
            if getattr(self, option) != type(self).model_fields[option].default and not losses & {*names}:
                raise ValueError(f"{option} has no use with loss {', '.join(names)}; only {', '.join(sorted(losses))}")
        if "exo_pair" in names and not self.label_smoothing:
            raise ValueError("exo_pair needs label_smoothing above 0 (its paper: 1e-3)")
        if self.reference != "start" and {*names} <= REFERENCE_FREE:
            raise ValueError(f"reference has no use with loss {', '.join(names)}")
        if not self.desirable_weight + self.undesirable_weight:
            raise ValueError("desirable_weight and undesirable_weight: expected one above 0")
        return self


class Spin(Passes):
    iterations: int = Field(3, gt=0, description="rounds of self-play")
    beta: PositivePerRound = Field((0.1,), description="the paper's lambda; a list gives one value per iteration")
    loss: Literal["logistic", "hinge", "exponential", "ipo"] = Field("logistic", description="l(z) of Eq. 4.7")
    mix_previous: bool = Field(True, description="train on the previous iteration's pairs as well (paper, 6.1)")
    stop_patience: int = Field(
        0, ge=0, description="stop after so many evaluated iterations without a significant gain; 0 plays all"
    )


class Grpo(Watched, Optimisation):
    rewards: Annotated[dict[str, float | dict[str, JsonValue]], BeforeValidator(weighed), Field(min_length=1)] = Field(
        {"gsm8k": 1.0},
        description="functions that rate answers (docs/rewards.md): ready ones by name, or FILE.py:function; a name, "
        "a list, {name: weight}, or {name: {weight, options ...}}",
    )
    reward_timeout: float = Field(60.0, gt=0, le=1e6, description="seconds that a call of a reward may take")
    completions: Literal["auto", "text", "messages"] = Field(
        "auto", description="how rewards get prompts and answers; auto: as messages where a row has a conversation"
    )
    prompts_per_step: int = Field(8, gt=0, description="prompts of one optimizer step")
    samples: int = Field(8, gt=0, description="answers to each prompt, its group")
    steps: int = Field(200, gt=0, description="optimizer steps")
    steps_per_generation: int = Field(1, gt=0, description="optimizer steps on one rollout, each on its own prompts")
    num_iterations: int = Field(1, gt=0, description="times that a rollout is gone through")
    refill: int = Field(0, ge=0, description="rounds in which fresh prompts replace groups whose rewards are all equal")
    loss: Literal["dapo", "grpo", "bnpo", "dr_grpo", "gspo", "cispo", "sapo"] = Field(
        "dapo", description="objectives/surrogates.py has them all"
    )
    epsilon: float = Field(0.2, gt=0, lt=1, description="the ratio to the sampling policy is clipped at 1 - epsilon")
    epsilon_high: float | None = Field(None, gt=0, le=1e6, description="and at 1 + this; null: epsilon, cispo 5")
    delta: float | None = Field(None, gt=0, le=1e6, description="greatest ratio where the advantage is negative")
    sapo_temperature_pos: float = Field(1.0, gt=0, le=1e6, description="sapo: of answers with a positive advantage")
    sapo_temperature_neg: float = Field(1.05, gt=0, le=1e6, description="sapo: of the others")
    beta: float = Field(0.0, ge=0, le=1e6, description="weight of the KL divergence (k3) from the reference; 0: none")
    reference: Literal["start", "base"] = Field("start", description="the stage's start, or the model without adapter")
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="whose standard deviation the advantage is divided by"
    )
    baseline: Literal["mean", "leave_one_out"] = Field("mean", description="of the group's rewards: all, or the others")
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = Field(
        "sum_then_normalize", description="normalize_then_sum: every function's rewards for themselves (GDPO)"
    )
    mask_truncated: bool = Field(False, description="leave answers out that were cut at generation.max_tokens")
    correction: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "none"] = Field(
        "token_truncate", description="of the ratio between trainer and sampler, which weighs every token or answer"
    )
    correction_max: float = Field(2.0, gt=1, le=1e6, description="where that ratio is truncated or masked")
    old_logps: Literal["policy", "sampler"] = Field(
        "policy", description="sampler: its log-probs are the sampling policy's, nothing is corrected"
    )
    lr: PerRound = Field((1e-5,), max_length=1, description="peak learning rate")

    @property
    def steps_per_rollout(self) -> int:
        return self.steps_per_generation * self.num_iterations

    @model_validator(mode="after")
    def _fits(self):
        for option, key, values in GRPO_USED_BY:
            if getattr(self, option) != type(self).model_fields[option].default and getattr(self, key) not in values:
                raise ValueError(f"{option} has no use with {key} {getattr(self, key)}; only {', '.join(values)}")
        if self.reference != "start" and not self.beta:
            raise ValueError("reference has no use with beta 0")
        if self.loss == "cispo" and self.epsilon_high is not None and self.epsilon_high < 1:
            raise ValueError(
                f"epsilon_high: of cispo it bounds the ratio itself, expected 1 or more (5), got {self.epsilon_high:g}"
            )
        if self.delta is not None and self.delta <= 1 + (self.epsilon_high or self.epsilon):
            raise ValueError(f"delta: expected more than 1 + epsilon_high, got {self.delta:g}")
        if self.samples == 1:  # the mean of its group is its own reward, however it is scaled
            raise ValueError("samples: one answer has nothing to be compared with; expected 2 or more")
        return self


GRPO_USED_BY = (  # option, key, its values that have a use for the option
    ("epsilon", "loss", ("dapo", "grpo", "bnpo", "dr_grpo", "gspo")),
    ("epsilon_high", "loss", ("dapo", "grpo", "bnpo", "dr_grpo", "gspo", "cispo")),
    ("delta", "loss", ("dapo", "grpo", "bnpo", "dr_grpo", "gspo")),
    ("sapo_temperature_pos", "loss", ("sapo",)),
    ("sapo_temperature_neg", "loss", ("sapo",)),
    ("scale_rewards", "aggregation", ("sum_then_normalize",)),
    ("correction", "old_logps", ("policy",)),
    ("correction_max", "old_logps", ("policy",)),
    ("correction_max", "correction", ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")),
)


def at(values: Sequence[float], number: int) -> float:
    """The value for this round; the last one holds for all later ones."""
    return values[min(number, len(values) - 1)]
