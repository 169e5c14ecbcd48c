"""A LoRA of a tiny model, as PEFT saves one."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def tiny_lora(base, path, **changes):
    """Rank 4, alpha 6, all linear layers, every matrix random; returns `path`."""
    settings = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | changes
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(path, save_embedding_layers=False)
    return path
