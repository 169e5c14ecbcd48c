"""The transformers generator against `model.generate`, and what batching may not change."""

import gc
import weakref
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from spinfast.errors import UserError
from spinfast.generation.transformers import NUCLEUS, TransformersGenerator, sample, uniform
from spinfast.types import Adapter, Request, Sampling

SHAPE = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.3,  # wide enough that the greedy answers differ from prompt to prompt
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=96,
)
FAMILIES = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True),  # head_dim is not D / H
}


@dataclass
class TinyPolicy:
    """The part of spinfast.policy.Policy that generation uses, over a tiny random model."""

    model: torch.nn.Module
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    @property
    def decoder(self):
        return self.model.get_base_model().model

    @property
    def head_VD(self):
        return self.model.get_base_model().lm_head.weight

    @property
    def head_bias_V(self):
        return None

    def adapter(self) -> Adapter:
        tensors = get_peft_model_state_dict(self.model)
        return Adapter({}, {name: tensor.detach().clone() for name, tensor in tensors.items()})


@cache
def policy(family: str, dtype: torch.dtype = torch.float32) -> TinyPolicy:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="spinfast", dtype=dtype)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
    return TinyPolicy(get_peft_model(model, lora).train(), dtype=dtype)


def requests(count: int, seed: int = 0, longest: int = 40) -> list[Request]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=draw).tolist()
    return [
        Request(i, tuple(torch.randint(0, 96, (n,), generator=draw).tolist()), seed=1000 + i)
        for i, n in enumerate(lengths)
    ]


def answers(policy, requests, sampling, adapter="live", **options) -> dict[int, tuple]:
    adapter = policy.adapter() if adapter == "live" else adapter
    with TransformersGenerator(policy, **options) as generator:
        done = {c.index: (c.token_ids, c.finish_reason) for c in generator.generate(requests, sampling, adapter)}
    assert done.keys() == {request.index for request in requests}
    return done


def library_greedy(policy, request, sampling, adapter_on: bool) -> tuple[int, ...]:
    """`model.generate` under its own attention, one prompt at a time."""
    model = policy.model.eval()
    model.get_base_model().set_attn_implementation("sdpa")
    options = dict(max_new_tokens=sampling.max_tokens, do_sample=False, eos_token_id=list(sampling.stop_ids))
    prompt = torch.tensor([request.prompt_ids])
    try:
        if adapter_on:
            out = model.generate(input_ids=prompt, **options)
        else:
            with model.disable_adapter():
                out = model.generate(input_ids=prompt, **options)
    finally:
        model.get_base_model().set_attn_implementation("spinfast")
        model.train()
    return tuple(out[0, len(request.prompt_ids) :].tolist())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter_on", [True, False], ids=["lora", "base"])
def test_greedy_equals_model_generate(family, adapter_on):
    asked, greedy = requests(7), Sampling(temperature=0, top_p=1, max_tokens=40, stop_ids=(5, 17, 33))
    tiny = policy(family)
    found = answers(tiny, asked, greedy, "live" if adapter_on else None, batch_size=3)
    expected = {r.index: library_greedy(tiny, r, greedy, adapter_on) for r in asked}
    assert {index: tokens for index, (tokens, _) in found.items()} == expected
    assert len(set(expected.values())) > 3  # the answers are not all one loop
    assert {reason for _, reason in found.values()} >= {"stop"}


def test_adapter_changes_the_answers():
    asked, greedy = requests(4), Sampling(temperature=0, top_p=1, max_tokens=8, stop_ids=())
    assert answers(policy("llama"), asked, greedy) != answers(policy("llama"), asked, greedy, None)
