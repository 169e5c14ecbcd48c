"""Tiny random models with a real tokenizer, for everybody's tests: deterministic, built in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]  # transformers adds the last to any Qwen2
LINES = [
    "What is the sum of twelve and thirty? The sum of twelve and thirty is 42.\n#### 42",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "How many eggs are left in the yard? The children find a total of 36 eggs. The answer is 48.",
    "system\nYou are a helpful assistant.\nuser\nassistant\n",
    "Step 1\n\nStep 2\n\nStep 3\n\n",  # a token of two line ends, which can straddle prompt and answer
]
CONFIGS = {"qwen2": Qwen2Config, "llama": LlamaConfig, "qwen3": Qwen3Config}


class FailingCall:
    """`function`, but its call number `at` (from 1, of those that `counts`) finds no memory."""

    def __init__(self, function, at: int, counts=lambda: True):
        self.function, self.at, self.counts, self.calls = function, at, counts, 0

    def __call__(self, *args):
        if self.counts():
            self.calls += 1
            if self.calls == self.at:
                raise torch.OutOfMemoryError("injected")
        return self.function(*args)


def tiny_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 384 entries; pad, <|im_start|> and <|im_end|> (eos) are 0, 1, 2."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=SPECIAL, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|im_end|>", chat_template=chat_template
    )


def tiny_model_dir(
    tmp_path: Path, arch: str = "qwen2", tied: bool = True, layers: int = 2, hidden: int = 64, **changes
) -> Path:
    """A saved fp32 model of random weights: biases and norms random too, so that no term is left untested.

    `changes` are of its config.
    """
    path = Path(tmp_path) / f"tiny-{arch}-{'tied' if tied else 'untied'}-{layers}x{hidden}"
    tokenizer = tiny_tokenizer()
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": hidden * 3 // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4 if arch != "qwen3" else 32,  # Qwen3's head_dim is not D / H
        "max_position_embeddings": 1024,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CONFIGS[arch](**shape | changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.1 * noise if "norm" in name else 0.15 * noise
    model.tie_weights()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
