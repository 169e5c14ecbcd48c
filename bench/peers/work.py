"""What every peer is given: one model, one adapter, one list of pairs in one order, one recipe. Files in a scratch
directory, because every peer runs in a process of its own.

The adapter has a random B, as from the second iteration on: at B = 0 the gradient of A would be zero, and the
reference could be had for nothing by switching the adapter off.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from bench import shapes
from spinfast.advantages import advantages
from spinfast.data.pairs import make_pairs
from spinfast.generation import prompt_seed
from spinfast.generation.transformers import TransformersGenerator
from spinfast.models import load_tokenizer
from spinfast.objectives import ACTIVE, ADVANTAGE, SAMPLER_LOGPS
from spinfast.packing import packed_length
from spinfast.policy.transformers import TransformersPolicy
from spinfast.types import Group, Request, Sampling


@dataclass(frozen=True)
class Work:
    """One epoch's training, as every peer is to do it: AdamW without decay, constant lr, gradients clipped.

    spin and dpo: sigmoid loss, the reference is the adapter it starts from. sft: a pair is a prompt and its answer.
    grpo: a pair is a prompt with `samples` answers, every second of them right, the loss dapo on policy; `whole`: the
    answers of a step are sampled when its turn comes, each of `max_tokens`.
    """

    scratch: str
    model: str  # directory
    device: str
    dtype: str
    pairs_per_step: int  # each a microbatch; packed ones hold as many tokens as so many pairs have at most
    method: str = "spin"
    lr: float = 5e-5
    beta: float = 0.1
    gradient_checkpointing: bool = False
    max_grad_norm: float = 1.0
    pad_id: int = 0
    budget_gib: float | None = None  # cap of the CUDA allocator
    samples: int = 8
    max_tokens: int = 128
    whole: bool = False
    engine: str = "transformers"  # who samples for spinfast where whole

    @property
    def adapter(self) -> Path:
        return Path(self.scratch) / "adapter"

    @property
    def answers(self) -> int:
        """Of a group."""
        return {"sft": 1, "grpo": self.samples}.get(self.method, 2)

    @property
    def rewards(self) -> list[float]:
        """Of a group's answers; no group is dead."""
        return [float(sample % 2) for sample in range(self.samples)]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def loss_scale(self) -> float:
        """fp16 gradients need one; spinfast's own start."""
        return 2.0**12 if self.dtype == "float16" else 1.0

    def groups(self) -> list[Group]:
        """The pairs in the order in which everyone trains on them."""
        rows = json.loads((Path(self.scratch) / "pairs.json").read_text())
        groups = [Group(tuple(prompt), tuple(map(tuple, answers))) for prompt, *answers in rows]
        return [self.rewarded(group) for group in groups] if self.method == "grpo" else groups

    def rewarded(self, group: Group, sampler_logps: tuple | None = None) -> Group:
        """A group of grpo as its loss takes it; a sampler that is not known is corrected for by ratios of 1."""
        found = advantages({"right": [self.rewards]}, {"right": 1.0}).advantages[0]
        unknown = tuple((math.nan,) * len(answer) for answer in group.answers)
        given = {ADVANTAGE: tuple(found.tolist()), ACTIVE: (1.0,) * self.samples}
        return replace(group, given=given | {SAMPLER_LOGPS: sampler_logps or unknown})

    def policy(self, noise: float = 0.0) -> TransformersPolicy:
        return shapes.policy(shapes.device(self.device, self.dtype), Path(self.model), noise=noise)

    def save(self) -> None:
        (Path(self.scratch) / "work.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, scratch: Path) -> Work:
        return cls(**json.loads((scratch / "work.json").read_text()))


def prepare(scratch: Path, model: str, count: int, **recipe) -> Work:
    """Write model, adapter and pairs under `scratch`."""
    scratch.mkdir(parents=True, exist_ok=True)
    path = shapes.resolve(model, scratch)
    work = Work(str(scratch), str(path), pad_id=load_tokenizer(path).pad_token_id, **recipe)
    groups = shapes.draw(count, max(2, work.answers)) if model.startswith("random:") else played(work, count)
    if work.whole:
        groups = [Group(group.prompt_ids, ((0,) * work.max_tokens,) * work.samples) for group in groups]
    write_groups(scratch, [replace(group, answers=group.answers[: work.answers]) for group in groups])
    work.policy(noise=2e-3).save_adapter(work.adapter)
    work.save()
    return work


def write_groups(scratch: Path, groups: list[Group]) -> None:
    (scratch / "pairs.json").write_text(json.dumps([[g.prompt_ids, *g.answers] for g in groups]))


def played(work: Work, count: int) -> list[Group]:
    """Worked maths problems; the model's own answers, sampled at temperature 1 with fixed seeds, are beside the real
    one (SPIN, DPO) or all there is (GRPO)."""
    examples, renderer = shapes.problems(Path(work.model), count)
    if work.method == "sft":
        return [Group(e.prompt_ids, (e.real_ids,)) for e in examples]
    if work.whole:
        return [Group(e.prompt_ids, ()) for e in examples]
    samples = work.samples if work.method == "grpo" else 1
    requests = [
        Request(e.index, e.prompt_ids, prompt_seed(0, 0, e.index, sample=sample), sample)
        for e in examples
        for sample in range(samples)
    ]
    limit = work.max_tokens if work.method == "grpo" else 192
    with TransformersGenerator(work.policy(), batch_size=64, max_model_len=2048) as generator:
        answers = list(generator.generate(requests, Sampling(1.0, 1.0, limit, renderer.stop_ids), None))
    if work.method == "grpo":
        found = {(answer.index, answer.sample): answer.token_ids for answer in answers}
        return [Group(e.prompt_ids, tuple(found[e.index, i] for i in range(samples))) for e in examples]
    return [pair.group for pair in make_pairs(examples, answers, 0)[0]]


def facts(groups: list[Group]) -> dict:
    """The pairs in a row of results: how many, how long, which."""
    text = json.dumps([[g.prompt_ids, *g.answers] for g in groups])
    return {
        "pairs": len(groups),
        "tokens": sum(map(packed_length, groups)),
        "answer_tokens": sum(len(answer) for g in groups for answer in g.answers),
        "longest": max(map(packed_length, groups)),
        "pairs_sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
    }
