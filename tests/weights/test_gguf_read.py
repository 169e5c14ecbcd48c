"""A .gguf file of ours, read by our own reader: the same weights to the bit, text of any kind as the same tokens."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import CHATML, tiny_model_dir, tiny_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM

from spinfast.data.renderer import Renderer
from spinfast.models import load_tokenizer, read_gguf_tokenizer, resolve_model
from spinfast.run import main
from spinfast.weights.gguf import read_rope

sys.path.append(str(Path(__file__).parent / "gguf"))
from texts import NASTY, RULES


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPINFAST_CACHE", str(tmp_path / "cache"))


def exported(model, tmp_path, kind):
    file = tmp_path / "m.gguf"
    assert main(["export", "gguf", str(model), "--type", kind, "--out", str(file)]) == 0
    return file


@pytest.mark.parametrize(("kind", "dtype"), [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize(("arch", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_weights_come_back_to_the_bit(tiny_model, tmp_path, arch, tied, kind, dtype):
    model = shutil.copytree(tiny_model(arch, tied), tmp_path / "model")
    weights = {name: tensor.to(dtype) for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    found = load_file(resolve_model(str(exported(model, tmp_path, kind))).path / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == dtype for name, tensor in weights.items())


ROPE = {"rope_theta": 1e4, "factor": 4.0}
YARN = ROPE | {"rope_type": "yarn", "original_max_position_embeddings": 64}
LLAMA3 = ROPE | {"rope_type": "llama3", "original_max_position_embeddings": 64}
SCALED = {
    "linear": ("llama", ROPE | {"rope_type": "linear"}),
    "yarn": ("qwen2", YARN),
    "yarn of qwen3": ("qwen3", YARN),
    "llama3": ("llama", LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}),
}


@pytest.mark.parametrize("name", SCALED)
def test_scaled_positions_come_back(tmp_path, name):
    arch, rope = SCALED[name]
    model = tiny_model_dir(tmp_path, arch, rope_parameters=rope)
    found = resolve_model(str(exported(model, tmp_path, "f32"))).path
    ids = torch.arange(3, 203)[None]
    before, after = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (model, found))
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("said", "factors"),
    [
        ({"scaling.type": "longrope", "scaling.factor": 4.0}, None),
        ({"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.yarn_beta_fast": 16.0}, None),
        ({}, np.array([1.0, 3.0, 2.0], np.float32)),
    ],
)
def test_scaling_that_is_not_known_is_refused(said, factors):
    fields = {"general.architecture": "llama"} | {f"llama.rope.{key}": value for key, value in said.items()}
    with pytest.raises(ValueError, match="its RoPE is scaled by"):
        read_rope(fields, factors)


@pytest.mark.parametrize(
    ("arch", "rule"), [*(("llama", rule) for rule in RULES), ("qwen2", "qwen2"), ("qwen3", "qwen2")]
)
def test_text_is_tokenised_as_it_was(tmp_path, arch, rule):
    """Tokens that a template writes without calling them special among it, and a text's first token."""
    model = tiny_model_dir(tmp_path, arch, vocab_size=392)
    tokenizer = tiny_tokenizer(CHATML.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n"))
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    backend = tokenizer.backend_tokenizer
    last = pre_tokenizers.ByteLevel(False, use_regex=rule in ("gpt-2", "smollm"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*RULES[rule], last])
    backend.model.ignore_merges = rule == "llama-bpe"
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()
    if rule == "llama-bpe":
        begin = ("<|begin|>", tokenizer.bos_token_id)
        backend.post_processor = processors.TemplateProcessing("<|begin|> $A", "<|begin|> $A $B", [begin])
    tokenizer.save_pretrained(model)
    own, file = load_tokenizer(model), exported(model, tmp_path, "f32")
    for found in (read_gguf_tokenizer(file)[0], load_tokenizer(resolve_model(str(file)).path)):
        for text in [*NASTY, "a<think>b</think>\n<|begin|><|im_end|>", "e\u0301"]:
            ids = own(text)["input_ids"]
            assert found(text)["input_ids"] == ids, text
            assert found.decode(ids) == own.decode(ids)
        assert (found.eos_token, found.bos_token, found.pad_token) == ("<|im_end|>", "<|begin|>", "<|pad|>")
        prompt = Renderer(found).prompt_ids([{"role": "user", "content": "hi"}])
        assert prompt == Renderer(own).prompt_ids([{"role": "user", "content": "hi"}])
        assert {*found.convert_tokens_to_ids(["<think>", "</think>"])} < {*prompt}
