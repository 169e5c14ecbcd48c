"""`python -m bench compose [--seeds N]`: CALM's key-value arithmetic (arXiv 2401.02412, 3.1), on a CPU, from scratch.

Model A knows what number every key stands for, model B adds numbers. Neither can add keys. Connections between the two
(both frozen) are trained on expressions of a fifth of the keys, and asked about expressions of the others, whose
numbers nothing but A holds. Every model is made and trained by spinfast's own runs, the tokenizer of characters by the
tokenizers library. Stopped, it goes on where it was.

    D_NUM    "07+03="  ->  "10"        what B learns: numbers have as many columns as keys
    D_SUBS   "ab+cd="  ->  "7+3"       what A learns, with D_KEY
    D_KEY    "ab+cd"   ->  "3"         the number of the last key
    D_MATH   "ab+cd="  ->  "10"        what neither learns
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from bench.rows import certificate
from spinfast.errors import UserError
from spinfast.evaluate.statistics import wilson
from spinfast.policy.adapters.calm import Calm
from spinfast.studies.statistics import quantile_t

SYMBOLS = ["<pad>", "<end>", "<|endoftext|>", *string.ascii_lowercase, *string.digits, *"+-="]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
KEYS, HELD_IN, OPERANDS = 400, 80, 2
Pair = tuple[str, str]  # prompt, completion


# Data --------------------------------------------------------------------------------------------------------------


class Task:
    """Keys of two letters, each with a digit of its own; a fifth of them are for the composition's training."""

    def __init__(self, seed: int):
        draw = random.Random(seed)
        keys = draw.sample(["".join(pair) for pair in product(string.ascii_lowercase, repeat=2)], KEYS)
        self.held_in, self.held_out, self.keys = keys[:HELD_IN], keys[HELD_IN:], keys
        self.number = {key: draw.randrange(10) for key in keys}
        others = list(self.number.values())
        draw.shuffle(others)
        self.permuted = dict(zip(keys, others, strict=True))

    def math(self, draw: random.Random, keys: Sequence[str]) -> Pair:
        chosen, signs = _expression(draw, keys)
        return f"{_joined(chosen, signs)}=", str(_value([self.number[key] for key in chosen], signs))

    def subs(self, draw: random.Random, keys: Sequence[str], number: dict[str, int] | None = None) -> Pair:
        chosen, signs = _expression(draw, keys)
        return f"{_joined(chosen, signs)}=", _joined([str((number or self.number)[key]) for key in chosen], signs)

    def key(self, draw: random.Random, number: dict[str, int]) -> Pair:
        chosen, signs = _expression(draw, self.keys)
        last = draw.randrange(OPERANDS)
        return _joined(chosen[: last + 1], signs[:last]), str(number[chosen[last]])

    def knowledge(self, number: dict[str, int], draw: random.Random) -> Pair:
        """What the augmenting model learns: D_SUBS or D_KEY."""
        return self.subs(draw, self.keys, number) if draw.random() < 0.5 else self.key(draw, number)


def num(draw: random.Random) -> Pair:
    numbers, signs = _expression(draw, range(10))
    return f"{_joined([f'{n:02}' for n in numbers], signs)}=", str(_value(numbers, signs))


def _expression(draw: random.Random, of: Sequence) -> tuple[list, list[str]]:
    return [draw.choice(of) for _ in range(OPERANDS)], [draw.choice("+-") for _ in range(OPERANDS - 1)]


def _joined(parts: Sequence[str], signs: Sequence[str]) -> str:
    return "".join(part + sign for part, sign in zip(parts, [*signs, ""], strict=True))


def _value(numbers: Sequence[int], signs: Sequence[str]) -> int:
    return numbers[0] + sum(n if sign == "+" else -n for n, sign in zip(numbers[1:], signs, strict=True))


def write(path: Path, make: Callable[[random.Random], Pair], rows: int, seed: int) -> Path:
    """So many draws, equal ones once."""
    draw = random.Random(seed)
    pairs = dict.fromkeys(make(draw) for _ in range(rows))
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    return path


ASKED = {"math": 500, "held-in": 100, "subs": 200, "num": 200}  # held-out problems of each run


def write_asked(path: Path, task: Task, seed: int) -> Path:
    makers = (
        partial(task.math, keys=task.held_out),
        partial(task.math, keys=task.held_in),
        partial(task.subs, keys=task.held_out),
        num,
    )
    parts = [
        write(path.with_suffix(f".{name}"), make, rows, seed + i).read_text()
        for i, ((name, rows), make) in enumerate(zip(ASKED.items(), makers, strict=True))
    ]
    path.write_text("".join(parts))
    return path


# Models and runs ---------------------------------------------------------------------------------------------------

A = {"kind": LlamaConfig, "layers": 2}
B = {"kind": Qwen2Config, "layers": 3}
WIDTH, HEADS, INNER = 64, 4, 168
CONNECTIONS = [[1, 0], [1, 1], [1, 2]]  # what A knows stands in its last layer
RANK = 17  # of LoRA on B: 61,608 numbers, CALM's are 61,440
GROUPS = 128
STEPS = {"A": 700, "B": 300, "composed": 700, "skyline": 3000}  # in 700 all of m_B learns nothing of so many keys
DRAWS = {"A": 16_000, "B": 6_400, "composed": 12_800, "skyline": 51_200}  # of which equal ones count once
PROMPT = 6  # tokens: "ab+cd=", "07+03="


def fresh(path: Path, kind: type, layers: int, seed: int) -> Path:
    """A model of random weights, with the tokenizer of characters that all of them share."""
    if (path / "config.json").exists():
        return path
    backend = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(SYMBOLS)}, "<pad>"))
    backend.add_special_tokens(SYMBOLS[:3])
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", chat_template=TEMPLATE
    )
    config = kind(
        vocab_size=len(SYMBOLS), hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=64, tie_word_embeddings=True,
        initializer_range=0.04, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def spinfast(*words: str) -> None:
    from spinfast.run import main

    if code := main([*words]):
        raise UserError(f"spinfast {' '.join(words)}: ended with {code}")


def run(where: Path, model: dict, adapter: dict, data: Path, asked: Path, steps: int, lr: float, seed: int) -> Path:
    """SFT by the command; its directory. A finished run is left as it is."""
    steps_of_epoch = -(-len(data.read_text().splitlines()) // GROUPS)
    tree = {
        "method": "sft", "model": model, "adapter": adapter, "seed": seed,
        "data": {"source": str(data)}, "heldout": {"source": str(asked)},
        "prompt": {"max_prompt_tokens": 16, "max_answer_tokens": 16},
        "sft": {
            "lr": lr, "groups_per_step": GROUPS, "epochs": round(steps / steps_of_epoch), "schedule": "cosine",
            "warmup_ratio": 0.05, "min_lr_rate": 0.02, "weight_decay": 0.1,
        },
        "generation": {"backend": "transformers", "batch_size": 256},
        "train": {"microbatch_tokens": 4096, "checkpointing": False},
        "evaluate": {"problems": sum(ASKED.values()), "pairs": 0, "max_tokens": 8},
        "device": {"profile": "cpu", "dtype": "float32"},
    }  # fmt: skip
    config = where.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(tree))
    if not (where / "best.json").exists():
        spinfast(str(config), "--run-dir", str(where))
    return where


def found(stage: Path, asked: Path) -> dict[str, list[int]]:
    """[exact answers, problems] of each part of what was asked."""
    rows = [json.loads(line) for line in (stage / "heldout.jsonl").read_text().splitlines()]
    right = {row["index"]: row["text"].strip() == row["real"].strip() for row in rows}
    parts, first = {}, 0
    for name in ASKED:
        size = len(asked.with_suffix(f".{name}").read_text().splitlines())
        parts[name], first = [sum(right[index] for index in range(first, first + size)), size], first + size
    return parts


@contextmanager
def as_encoder():
    """The augmenting model sees the prompt and nothing that is generated (the paper's ablation)."""
    whole = Calm._augment

    def cut(self, decoder, args, kwargs):
        changed = whole(self, decoder, args, kwargs)
        for states in changed[1]["augmented"].values() if changed else ():
            states[kwargs["position_ids"] >= PROMPT] = 0
        return changed

    Calm._augment = cut
    try:
        yield
    finally:
        Calm._augment = whole


class Seed:
    """One seed's keys, models and runs under a directory."""

    def __init__(self, seed: int, directory: Path):
        self.seed, self.directory, self.task = seed, directory, Task(seed)
        directory.mkdir(parents=True, exist_ok=True)
        self.asked = write_asked(directory / "asked.jsonl", self.task, 1000 * seed)

    def play(self, name: str, what: str, make: Callable, model: dict, adapter: dict, lr: float) -> Path:
        data = write(self.directory / f"{name}.jsonl", make, DRAWS[what], 1000 * self.seed + 500)
        return run(self.directory / name, model, adapter, data, self.asked, STEPS[what], lr, self.seed)

    def trained(self, name: str, what: str, make: Callable, start: Path) -> Path:
        """A whole model, trained from `start`."""
        whole = {"kind": "full", "embeddings": True}
        made = self.play(name, what, make, {"name": str(start)}, whole, 3e-3)
        if not (model := self.directory / f"{name}-model").exists():
            spinfast("merge", str(made), "--out", str(model))
        return model

    def rows(self) -> Iterator[tuple[str, str, Path]]:
        """(row, what was trained on the keys that are held in, the stage that answered)"""
        task, directory, whole = self.task, self.directory, {"kind": "full", "embeddings": True}
        untrained = fresh(directory / "A-raw", **A, seed=2 * self.seed)
        knows = self.trained("A", "A", partial(task.knowledge, task.number), untrained)
        yield "m_A", "", directory / "A" / "sft"
        adds = self.trained("B", "B", num, fresh(directory / "B-raw", **B, seed=2 * self.seed + 1))
        yield "m_B", "", directory / "B" / "sft"

        def composed(name: str, make: Callable, augmenting: Path = knows, **form) -> Path:
            model = {"anchor": str(adds), "augmenting": str(augmenting), "connections": CONNECTIONS}
            return self.play(name, "composed", make, model, form, 2e-3) / "sft"

        alone, lora = {"name": str(adds)}, {"kind": "lora", "r": RANK, "alpha": 2 * RANK}
        held_in = partial(task.math, keys=task.held_in)
        yield "CALM", "D_MATH", composed("calm-math", held_in)
        yield "LoRA on m_B", "D_MATH", self.play("lora-math", "composed", held_in, alone, lora, 2e-3) / "sft"
        yield "CALM, m_A untrained", "D_MATH", composed("calm-untrained", held_in, untrained)
        permuted = self.trained("A-permuted", "A", partial(task.knowledge, task.permuted), untrained)
        yield "CALM, m_A of permuted numbers", "D_MATH", composed("calm-permuted", held_in, permuted)
        with as_encoder():
            stage = composed("calm-encoder", held_in)
        yield "CALM, m_A as encoder", "D_MATH", stage
        substituted = partial(task.subs, keys=task.held_in)
        yield "CALM", "D_SUBS", composed("calm-subs", substituted)
        yield "LoRA on m_B", "D_SUBS", self.play("lora-subs", "composed", substituted, alone, lora, 2e-3) / "sft"
        yield "CALM, no norm, no rope", "D_MATH", composed("calm-plain", held_in, norm=False, rope=False)
        every = partial(task.math, keys=task.keys)
        yield (
            "skyline: all of m_B, all keys",
            "D_MATH",
            self.play("skyline", "skyline", every, alone, whole, 2e-3) / "sft",
        )


# Rows --------------------------------------------------------------------------------------------------------------


def guessed(asked: Path) -> float:
    """The share that whoever knows the signs and no key gets right at the best: of each sign the likeliest result."""
    pairs = [json.loads(line) for line in asked.with_suffix(".math").read_text().splitlines()]
    results: dict[bool, Counter] = {True: Counter(), False: Counter()}
    for pair in pairs:
        results["+" in pair["prompt"]][pair["completion"]] += 1
    return sum(max(counts.values()) for counts in results.values()) / len(pairs)


def wide_interval(shares: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """The wider of Student's over the seeds and Wilson's over all problems."""
    values = np.array([right / count for right, count in shares])
    low, high = wilson(*(sum(part) for part in zip(*shares, strict=True)))
    if len(values) > 1:
        reach = float(quantile_t(0.05, np.array(len(values) - 1))) * values.std(ddof=1) / len(values) ** 0.5
        low, high = min(low, values.mean() - reach), max(high, values.mean() + reach)
    return max(0.0, low), min(1.0, high)


def table(made: Sequence[dict]) -> str:
    """Markdown, a line for each row of any seed."""
    lines = [
        "| row | trained on | D_MATH, held-out keys, % by seed | mean [95 %] | D_MATH, held-in keys | D_SUBS | D_NUM |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, data in dict.fromkeys((row["row"], row["trained_on"]) for row in made):
        of = [row for row in made if (row["row"], row["trained_on"]) == (name, data)]
        shares = {part: [row[part] for row in of] for part in ASKED}
        percent = {part: [100 * right / count for right, count in shares[part]] for part in ASKED}
        low, high = wide_interval(shares["math"])
        seeds = "; ".join(f"{value:.1f}" for value in percent["math"])
        means = [f"{statistics.mean(percent[part]):.1f}" for part in ASKED]
        interval = f"{means[0]} [{100 * low:.1f}, {100 * high:.1f}]"
        lines.append(f"| {name} | {data} | {seeds} | {interval} | {' | '.join(means[1:])} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench compose")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path("runs/calm"), help="of models and runs, made once")
    arguments = parser.parse_args(argv)
    seeds = [Seed(seed, arguments.dir.resolve() / f"seed-{seed}") for seed in range(arguments.seeds)]
    kept = arguments.dir / "rows.jsonl"
    made = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for rows_of_seeds in zip(*(seed.rows() for seed in seeds), strict=True):
        for of, (row, data, stage) in zip(seeds, rows_of_seeds, strict=True):
            key = {"seed": of.seed, "row": row, "trained_on": data}
            if not any(key.items() <= each.items() for each in made):
                made.append(key | found(stage, of.asked) | {"guessed": guessed(of.asked)} | certificate())
                with kept.open("a") as file:
                    file.write(json.dumps(made[-1]) + "\n")
            print(json.dumps(key | found(stage, of.asked)), flush=True)
    print(table(made))
    return 0
