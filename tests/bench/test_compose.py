"""CALM's toy: its data says what it claims, its figures are counted right, its encoder sees the prompt alone."""

import json
import random

import pytest
import torch

from bench import compose
from bench.compose import Seed, Task, as_encoder, found, fresh, guessed, num, table, wide_interval, write, write_asked
from spinfast import ops
from spinfast.config import Calm
from spinfast.device import profile
from spinfast.models import load_tokenizer
from spinfast.packing import pack
from spinfast.policy.transformers import load_policy
from spinfast.types import Group


def evaluated(text: str) -> int:
    """Of "07-03" or "7-3"."""
    sign = "+" if "+" in text[1:] else "-"
    left, right = (int(part) for part in text.split(sign, 1))
    return left + right if sign == "+" else left - right


def test_its_data_says_what_it_claims():
    task, draw = Task(3), random.Random(0)
    assert len(task.keys) == len({*task.keys}) == len(task.held_in) + len(task.held_out)
    assert {*task.held_in}.isdisjoint(task.held_out)
    assert sorted(task.number.values()) == sorted(task.permuted.values())
    assert {task.number[key] for key in task.held_in} == {*range(10)}, "a digit that the composition never meets"
    for _ in range(200):
        prompt, answer = task.math(draw, task.held_out)
        keys = prompt[:2], prompt[3:5]
        assert {*keys} <= {*task.held_out}
        assert evaluated(f"{task.number[keys[0]]}{prompt[2]}{task.number[keys[1]]}") == int(answer)
        prompt, answer = task.subs(draw, task.keys)
        assert answer == f"{task.number[prompt[:2]]}{prompt[2]}{task.number[prompt[3:5]]}"
        prompt, answer = task.key(draw, task.permuted)
        assert answer == str(task.permuted[prompt[-2:]])
        prompt, answer = num(draw)
        assert len(prompt) == compose.PROMPT
        assert evaluated(prompt[:-1]) == int(answer)


def test_its_tokens_are_characters(tmp_path):
    for name, shape in (("a", compose.A), ("b", compose.B)):  # transformers has a tokenizer of its own for Qwen2
        tokenizer = load_tokenizer(fresh(tmp_path / name, **shape, seed=0))
        for text in ("ab+cd=", "07-13=", "-10"):
            assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == [*text]
        assert len(tokenizer) == len(compose.SYMBOLS)


def test_answers_are_counted_by_their_part(tmp_path):
    asked = write_asked(tmp_path / "asked.jsonl", Task(0), 0)
    pairs = [json.loads(line) for line in asked.read_text().splitlines()]
    size = {name: len(asked.with_suffix(f".{name}").read_text().splitlines()) for name in compose.ASKED}
    rows = [
        {"index": i, "real": pair["completion"], "text": pair["completion"] if i % 2 else "?"}
        for i, pair in enumerate(pairs)
    ]
    random.Random(0).shuffle(rows)
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counted = found(tmp_path, asked)
    assert {name: n for name, (_, n) in counted.items()} == size
    assert sum(right for right, _ in counted.values()) == len(pairs) // 2
    assert 0.08 < guessed(asked) < 0.2


def test_the_interval_is_the_wider_one():
    assert wide_interval([(0, 500)] * 3) == pytest.approx((0, 0.0026), abs=1e-3)  # Wilson's: Student's is of no width
    low, high = wide_interval([(400, 500), (450, 500), (425, 500)])
    assert (low, high) == pytest.approx((0.85 - 4.303 * 0.05 / 3**0.5, 0.85 + 4.303 * 0.05 / 3**0.5), abs=1e-3)
    row = {"row": "CALM", "trained_on": "D_MATH", "math": [450, 500], "held-in": [1, 2], "subs": [1, 2], "num": [1, 2]}
    assert "| CALM | D_MATH | 90.0; 90.0 | 90.0 [88.0, 91.7] | 50.0 | 50.0 | 50.0 |" in table([row, row])


def test_an_encoder_sees_the_prompt_alone(tmp_path):
    """With what it sees of the answer gone, the answer's first token is as before and the later ones are not."""
    a, b = (fresh(tmp_path / name, **shape, seed=0) for name, shape in (("a", compose.A), ("b", compose.B)))
    settings = Calm(kind="calm", augmenting=str(a), connections=compose.CONNECTIONS)
    ids = tuple(range(3, 3 + compose.PROMPT))
    batch = pack([Group(ids, ((20, 21, 22),))], [0], "sdpa")

    def hidden():
        options = {"ops": ops.EAGER, "profile": profile("cpu", "float32"), "load_in_4bit": False, "seed": 0}
        policy = load_policy(b, "b", None, lora=settings, **options)
        for name, parameter in policy.trainable_parameters().items():
            parameter.data += 0.1 * (name.endswith(".o"))
        return policy.hidden(batch)

    with as_encoder():
        encoded = hidden()
    whole = hidden()
    assert torch.equal(encoded[: compose.PROMPT], whole[: compose.PROMPT])
    assert not torch.allclose(encoded[compose.PROMPT], whole[compose.PROMPT])


@pytest.mark.slow
def test_its_first_rows_are_made_by_runs_and_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(compose, "STEPS", dict.fromkeys(compose.STEPS, 4))
    monkeypatch.setattr(compose, "DRAWS", dict.fromkeys(compose.DRAWS, 256))
    monkeypatch.setattr(compose, "ASKED", dict.fromkeys(compose.ASKED, 8))
    of = Seed(0, tmp_path / "seed-0")
    made = [(row, data, found(stage, of.asked)) for (row, data, stage), _ in zip(of.rows(), range(3), strict=False)]
    assert [row for row, *_ in made] == ["m_A", "m_B", "CALM"]
    monkeypatch.setattr(compose, "spinfast", pytest.fail)
    again = [(row, data, found(stage, of.asked)) for (row, data, stage), _ in zip(of.rows(), range(3), strict=False)]
    assert again == made
    assert write(tmp_path / "x", num, 500, 0).read_text().count("\n") <= 200
