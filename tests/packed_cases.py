"""A tiny policy whose adapter does something, groups of random tokens, and the same through plain transformers."""

from __future__ import annotations

import random

import torch
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from spinfast import ops
from spinfast.policy.adapters import Lora
from spinfast.policy.transformers import TransformersPolicy, load_base
from spinfast.types import Group

VOCABULARY = 300


def tiny_lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")


def tiny_policy(path, dtype=torch.float32, device="cpu", table=ops.EAGER) -> TransformersPolicy:
    """The policy at `path` with a random adapter: B is not zero, so every gradient is alive."""
    policy = TransformersPolicy(
        load_base(path, dtype, torch.device(device)), lambda base: Lora(base, tiny_lora(), 0), table
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.trainable_parameters().values():
        parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter)
    return policy


def plain_model(path, policy: TransformersPolicy):
    """The same weights and adapter on transformers alone: eager attention, one sequence at a time."""
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(base.requires_grad_(False), tiny_lora())
    set_peft_model_state_dict(model, policy.adapter().tensors)
    return model.train()


def plain_logps(model, prompt, answer) -> torch.Tensor:
    """Log-probs (len(answer),) of an answer from the full logits of [prompt, answer]."""
    ids = torch.tensor([[*prompt, *answer]])
    logps = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return logps.gather(1, ids[0, len(prompt) :, None])[:, 0]


def lengths(most: int = 24, answers: int = 2):
    """Strategy: [(prompt length, (answer lengths ...)), ...], with ones as likely as the rest."""
    length = st.one_of(st.just(1), st.integers(1, most))
    return st.lists(st.tuples(length, st.tuples(*[length] * answers)), min_size=1, max_size=4)


def make_groups(shape, seed: int = 0) -> list[Group]:
    draw = random.Random(seed)

    def tokens(n):
        return tuple(draw.randrange(VOCABULARY) for _ in range(n))

    return [Group(tokens(prompt), tuple(map(tokens, answers))) for prompt, answers in shape]
