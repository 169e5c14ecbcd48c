"""The configuration tree: frozen, validated, each field documented once, beside itself.

A config is one YAML file of the sections below; `section.key=value` overrides a single field. An unknown key
is an error that names the nearest valid one. The resolved tree is saved with every run.
`python -m spinfast.config` prints this reference as a Markdown table.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from spinfast.errors import UserError


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


def _listed(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else (value,)


def _weighed(value: Any) -> Any:
    """A name or a list of names as {name: 1}."""
    if isinstance(value, list) and len({*map(str, value)}) < len(value):
        raise ValueError("expected each name once")
    return value if isinstance(value, dict) else dict.fromkeys(map(str, _listed(value)), 1.0)


PerRound = Annotated[tuple[Annotated[float, Field(ge=0, le=1e6)], ...], BeforeValidator(_listed), Field(min_length=1)]


Weighed = Annotated[dict[str, Annotated[float, Field(gt=0, le=1e6)]], BeforeValidator(_weighed), Field(min_length=1)]
PositivePerRound = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1e6)], ...], BeforeValidator(_listed), Field(min_length=1)
]


class Model(Section):
    name: str = Field(description="hub id, local directory, .gguf file, or package:NAME/FILE.gguf")
    revision: str | None = Field(None, description="commit of a hub model; the resolved one is recorded")
    backend: Literal["transformers", "unsloth"] = Field(
        "transformers", description="who loads the model and runs its layers"
    )
    load_in_4bit: bool = Field(False, description="NF4 base weights (bitsandbytes; CUDA only)")


class Source(Section):
    """One of several sources; what it leaves out is as the section has it."""

    source: str = Field(min_length=1)
    weight: float | None = Field(None, gt=0, le=1e9)
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    columns: dict[str, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


ONE, SEVERAL = "(one)", "(several)"


class Data(Section):
    source: Annotated[
        Annotated[str, Field(min_length=1), Tag(ONE)]
        | Annotated[tuple[Source, ...], Field(min_length=1), Tag(SEVERAL)],
        Discriminator(lambda value: SEVERAL if isinstance(value, (list, tuple)) else ONE),
    ] = Field(
        description="file, folder or pattern (.jsonl .json .csv .tsv .parquet .arrow, also .gz .zst .bz2), saved data "
        "set, hub id, or reasoning_gym:TASK; a list mixes several, each a source or {source, weight, subset, split, "
        "revision, columns}: rows by weight, none twice; without weights all of them"
    )
    subset: str | None = Field(None, description="configuration name of a hub data set or a copy of one")
    split: str = Field("train", description="split or slices: train[:25%], train+test; a single file is train")
    revision: str | None = Field(None, description="commit of a hub data set")
    size: int | None = Field(None, gt=0, description="examples to use, chosen by a seeded shuffle; all if null")
    seed: int = Field(0, ge=0, description="seed of the choice (reasoning_gym: of the problems themselves)")
    turns: Literal["first", "last", "all"] = Field("first", description="which answers of a conversation are learnt")
    columns: dict[str, str] | None = Field(None, description="recognised column name: the data's own name for it")
    bad_rows: Literal["error", "skip"] = Field("error", description="a faulty row stops the run, or is counted")

    @field_validator("source")
    @classmethod
    def _all_or_no_weights(cls, source: str | tuple[Source, ...]) -> str | tuple[Source, ...]:
        if not isinstance(source, str) and len({each.weight is None for each in source}) > 1:
            raise ValueError("expected a weight for each source, or for none")
        return source

    def parts(self) -> list[tuple[float | None, Data]]:
        """The weight and the section of each source, as if it were the only one."""
        if isinstance(self.source, str):
            return [(None, self)]
        own = {"exclude_none": True, "exclude": {"weight"}}
        return [(each.weight, self.model_copy(update=each.model_dump(**own))) for each in self.source]


class Prompt(Section):
    system: str | None = Field(None, description="system turn put before every prompt that has none")
    max_prompt_tokens: int = Field(512, gt=0, description="longer prompts are rejected and counted")
    max_answer_tokens: int = Field(512, gt=0, description="longer answers of the data are rejected and counted, or cut")
    overlong: Literal["drop", "cut"] = Field("drop", description="cut keeps the start of answers that are too long")
    template: dict[str, JsonValue] = Field(default_factory=dict, description="extra variables of the chat template")


class Lora(Section):
    kind: Literal["lora"] = Field("lora", description="what is trained beside the frozen base")
    r: int = Field(16, gt=0, description="rank")
    alpha: float = Field(32, gt=0, description="scaling is alpha / r")
    target_modules: str | tuple[str, ...] = Field("all-linear", description="PEFT's target_modules")
    start: str | None = Field(
        None, description="directory of an adapter that the run trains on (or of a run: its best); null: a fresh one"
    )
    init: Literal["continue", "merge"] = Field(
        "continue",
        description="the next round or stage trains the same adapter on, or merges it and starts a fresh one",
    )


class Optimisation(Section):
    """What every stage of training has; a method's section adds its own keys and defaults."""

    optimizer: Literal["adamw", "rmsprop"] = Field("adamw", description="SPIN's paper: rmsprop, on full weights")
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
    keep: Literal["last", "best"] = Field("last", description="the last adapter, or the best one that a look found")

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
    rewards: Annotated[dict[str, float | dict[str, JsonValue]], BeforeValidator(_weighed), Field(min_length=1)] = Field(
        {"gsm8k": 1.0},
        description="functions that rate answers (docs/rewards.md): ready ones by name, or FILE.py:function; a name, "
        "a list, {name: weight}, or {name: {weight, options ...}}",
    )
    reward_timeout: float = Field(60.0, gt=0, le=1e6, description="seconds that a call of a reward may take")
    completions: Literal["auto", "text", "messages"] = Field(
        "auto", description="how rewards get prompts and answers; auto: as text where the data's prompt is text"
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


class Generation(Section):
    backend: Literal["auto", "transformers", "vllm"] = Field("auto", description="auto: vLLM where it can run")
    temperature: float = Field(1.0, ge=0, description="sampling temperature")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus; 1 is off")
    max_tokens: int = Field(256, gt=0, description="answers are cut here, without an end-of-turn token")
    batch_size: int = Field(64, gt=0, description="answers written at once")
    kv_cache_gib: float = Field(1.0, gt=0, le=1e6, description="GiB of vLLM's KV cache")


class Train(Section):
    microbatch_tokens: int | Literal["auto"] = Field(
        "auto", description="packed tokens of one forward; auto: the memory plan's choice"
    )
    checkpointing: bool | Literal["auto"] = Field("auto", description="recompute activations in the backward")
    save_every_steps: int = Field(50, gt=0, description="steps between checkpoints")
    save_every_seconds: float = Field(300, gt=0, description="seconds between checkpoints, whichever comes first")
    max_overflows: int = Field(20, gt=0, description="abort after so many non-finite steps in a row")


class Evaluate(Section):
    problems: int = Field(64, ge=0, description="held-out problems answered greedily; 0 answers none")
    pairs: int = Field(64, ge=0, description="held-out rows scored, by spin played for pair accuracy; 0 scores none")
    max_tokens: int = Field(256, gt=0, description="tokens of a held-out answer")
    every: int = Field(
        1,
        gt=0,
        description="SPIN iterations from one evaluation to the next; the last and all other stages have theirs",
    )


class Device(Section):
    profile: str = Field("auto", description="auto, cpu, t4, l4, a10, a100, h100, h200; a smaller one rehearses it")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field("auto", description="compute dtype")
    kernels: Literal["auto", "eager", "triton", "numba"] = Field("auto", description="table of operators")
    attention: Literal["auto", "xformers", "aten_efficient", "numba", "sdpa"] = Field(
        "auto", description="attention backend"
    )
    deterministic: bool = Field(False, description="torch.use_deterministic_algorithms (CUDA: slower)")


class Config(Section):
    method: Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)] = Field(
        ("spin",), description="what is played, stage after stage: sft, spin, dpo, grpo"
    )
    model: Model
    data: Data
    heldout: Data | None = Field(None, description="held-out data; null: no evaluation")
    prompt: Prompt = Prompt()
    adapter: Lora = Lora()
    sft: Sft = Sft()
    spin: Spin = Spin()
    dpo: Dpo = Dpo()
    grpo: Grpo = Grpo()
    generation: Generation = Generation()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    device: Device = Device()
    report_to: tuple[Literal["wandb", "trackio"], ...] = Field(
        (), description="services that get the metrics too; TensorBoard files are always written"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seeds adapter, order and sampling")

    @classmethod
    def methods(cls) -> list[str]:
        """The methods there are: those that have a section."""
        return [
            name
            for name, field in cls.model_fields.items()
            if isinstance(field.annotation, type) and issubclass(field.annotation, Optimisation)
        ]

    @field_validator("method")
    @classmethod
    def _known_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        strangers = [name for name in names if name not in cls.methods()]
        if strangers:
            hint = "; it is a dpo.loss" if strangers[0].lower() in (*PAIRED, *UNPAIRED) else ""
            hint = "; names are in lower case" if strangers[0].lower() in cls.methods() else hint
            raise ValueError(f"expected {', '.join(cls.methods())}, {strangers[0]!r} is none of them{hint}")
        if len({*names}) < len(names):
            raise ValueError("expected each method once")
        return names

    @model_validator(mode="after")
    def _trains_what_it_samples(self):
        if "grpo" not in self.method:
            return self
        if not self.generation.temperature:
            raise ValueError(
                "generation.temperature: 0 gives one and the same answer to a prompt again and again, and grpo "
                "compares different ones; set it above 0 (1.0)"
            )
        if self.generation.top_p < 1:
            raise ValueError(
                "generation.top_p: grpo trains the whole distribution, so it must sample from it; expected 1, got "
                f"{self.generation.top_p:g}"
            )
        return self

    def longest_generated(self) -> int:
        """Tokens of the longest answer that is written, 0 if none is."""
        heldout = self.evaluate.max_tokens if self.heldout and self.evaluate.problems else 0
        return max(heldout, self.generation.max_tokens if {"spin", "grpo"} & {*self.method} else 0)

    def identity(self) -> dict:
        """What a run's results depend on, defaults left out: a key that is added later with one changes nothing."""
        tree = self.model_dump(mode="json", exclude_defaults=True, exclude=CHANGES_NO_RESULT)
        return {name: value for name, value in tree.items() if value != {}}

    def hash(self) -> str:
        """16 hex digits that name what the run computes; a run directory belongs to one of them."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]

    def dump(self) -> str:
        """Every value, as YAML; sections of methods that are not named are left out, as a config must."""
        unnamed = {*self.methods()} - {*self.method}
        return yaml.safe_dump(self.model_dump(mode="json", exclude=unnamed), sort_keys=False)


CHANGES_NO_RESULT = {
    "report_to": True,
    "train": {"save_every_steps", "save_every_seconds", "max_overflows"},
    "grpo": {"reward_timeout"},
}
MOVED = {  # keys of the first edition
    "lora": "adapter",
    "sft.examples_per_step": "sft.groups_per_step",
    "train.pairs_per_step": "spin.groups_per_step",
    **{
        f"train.{key}": f"spin.{key}"
        for key in ("optimizer", "lr", "weight_decay", "schedule", "warmup_ratio", "epochs", "max_grad_norm")
    },
}

TRL_NAMES = {  # of GRPOConfig and GRPOTrainer, where likeness alone leads to another key or to none
    "num_generations": "grpo.samples",
    "reward_funcs": "grpo.rewards",
    "reward_weights": "grpo.rewards, {name: weight}",
    "max_completion_length": "generation.max_tokens",
    "max_prompt_length": "prompt.max_prompt_tokens",
    "loss_type": "loss",
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule",
    "max_steps": "grpo.steps",
    "num_train_epochs": "epochs, of grpo grpo.steps",
    "warmup_steps": "warmup_ratio",
    "per_device_train_batch_size": "groups_per_step, of grpo prompts_per_step; memory is planned",
    "gradient_accumulation_steps": "groups_per_step, of grpo prompts_per_step; memory is planned",
    "generation_batch_size": "grpo.prompts_per_step * grpo.samples * grpo.steps_per_generation",
    "importance_sampling_level": "grpo.loss: gspo where it is sequence",
    "mask_truncated_completions": "grpo.mask_truncated",
    "multi_objective_aggregation": "grpo.aggregation",
    "use_vllm": "generation.backend: vllm",
    "vllm_importance_sampling_correction": "grpo.correction",
    "vllm_importance_sampling_mode": "grpo.correction",
    "vllm_importance_sampling_clip_max": "grpo.correction_max",
    "vllm_importance_sampling_cap": "grpo.correction_max",
}


def at(values: Sequence[float], number: int) -> float:
    """The value for this round; the last one holds for all later ones."""
    return values[min(number, len(values) - 1)]


class PlainLoader(yaml.SafeLoader):
    """YAML's plain values: no objects, and no aliases, by which a short file can stand for an endless one."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"alias *{self.peek_event().anchor}: write the value out")
        return super().compose_node(parent, index)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read, override, validate. Raises UserError with one line: where, expected, got."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config {path}: no such file")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8-sig"), PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or a number that is none
        raise UserError(f"config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"config {path}: expected sections (model:, data:, ...), got {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    if any(override.startswith("method=") for override in overrides):  # the file's other methods are not meant
        named = _listed(tree["method"])
        given = {override.partition("=")[0].partition(".")[0] for override in overrides}
        left_out = [name for name in Config.methods() if name not in named and name not in given]
        tree = {key: value for key, value in tree.items() if key not in left_out}
    return parse_config(tree, where=f"config {path}")


def parse_config(tree: dict, where: str = "config", kind: type[Config] = Config) -> Config:
    """Validate a plain tree."""
    try:
        config = kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_one_line(error, kind)}") from None
    for name in kind.methods():
        if name in tree and name not in config.method:
            raise UserError(
                f"{where}: section {name} has no use, method is [{', '.join(config.method)}]; "
                f"name {name} there too, or leave the section out"
            )
    return config


def _override(tree: dict, override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"override {override!r}: expected section.key=value")
    *parents, key = dotted.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section")
    try:
        node[key] = yaml.load(text, PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"override {override!r}: the value is not valid YAML") from None


def _one_line(error: ValidationError, kind: type[Config]) -> str:
    first = error.errors()[0]
    first["loc"] = tuple(part for part in first["loc"] if part not in (ONE, SEVERAL))
    dotted = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        if dotted in MOVED:
            return f"{dotted}: is now {MOVED[dotted]}" + ("" if "." in dotted else f", its keys {MOVED[dotted]}.r ...")
        key, siblings = str(first["loc"][-1]), _siblings(first["loc"], kind)
        if key in TRL_NAMES:
            return f"unknown key {dotted!r}; TRL's {key} is {TRL_NAMES[key]} here"
        near = _elsewhere(key, kind) or difflib.get_close_matches(key, siblings, n=1, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"valid keys: {', '.join(siblings)}"
        return f"unknown key {dotted!r}; {hint}"
    if first["type"] == "missing":
        return f"{dotted}: this key is required"
    said = first["msg"].removeprefix("Value error, ")
    if not dotted:  # of several sections: it names them itself
        return said
    return f"{dotted}: {said[0].lower()}{said[1:]}, got {reprlib.repr(first['input'])}"


def _siblings(location: tuple, kind: type[Config]) -> list[str]:
    section: Any = kind
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        section = _section_of(section.model_fields[part].annotation)
    return list(section.model_fields)


def _elsewhere(key: str, kind: type[Config]) -> list[str]:
    """The sections' keys of exactly this name."""
    sections = {name: _section_of(field.annotation) for name, field in kind.model_fields.items()}
    return [f"{name}.{key}" for name, section in sections.items() if section and key in section.model_fields]


def _section_of(annotation: Any) -> Any:
    """The section in a field's type, or None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_of, getattr(annotation, "__args__", ()))), None)


def reference_table() -> str:
    """Every key with its default and meaning, as Markdown; of a method's keys its own first."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in Config.model_fields.items():
        is_section = any(
            isinstance(o, type) and issubclass(o, Section)
            for o in getattr(field.annotation, "__args__", (field.annotation,))
        )
        if not is_section:
            lines.append(f"| `{name}` | `{_shown(field.default)}` | {field.description} |")
            continue
        keys = _section_of(field.annotation).model_fields
        for key, inner in sorted(keys.items(), key=lambda item: item[0] in Optimisation.model_fields):
            default = "required" if inner.is_required() else f"`{_shown(inner.get_default(call_default_factory=True))}`"
            lines.append(f"| `{name}.{key}` | {default} | {inner.description} |")
    return "\n".join(lines)


def _shown(value: Any) -> Any:
    if isinstance(value, tuple):
        return value[0] if len(value) == 1 else list(value)
    return "null" if value is None else value


if __name__ == "__main__":
    print(reference_table())
