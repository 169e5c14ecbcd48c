"""Run by test_unsloths_engine.py in a process of its own, because Unsloth rewrites transformers and vLLM: python
unsloths_engine.py MODEL. Unsloth on a T4 that is not there, asked for a model on vLLM's weights as a run asks; where it
would start the engine, its arguments are taken, and what vLLM makes of them goes to stdout.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import card
import torch


class Asked(Exception):
    """Where the engine would start."""


def what_vllm_makes_of(arguments: dict) -> dict:
    """Asked where the engine starts: Unsloth hides FlashInfer while it does."""
    from vllm import EngineArgs
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.v1.attention.selector import get_attn_backend

    config = EngineArgs(**arguments).create_engine_config()
    with set_current_vllm_config(config):
        attention = get_attn_backend(64, torch.float16, "auto").get_name()
    return {
        "attention": attention,
        "adapters": current_platform.get_punica_wrapper(),
        "slots": config.lora_config.max_loras,
        "rank": config.lora_config.max_lora_rank,
        "dtypes": [str(config.model_config.dtype), str(config.lora_config.lora_dtype)],
    }


def main(path: Path) -> None:
    import vllm
    import vllm.platforms

    vllm.platforms._current_platform = card.vllm_platform()

    from spinfast.device import profile
    from spinfast.generation import vllm_compat
    from spinfast.policy import import_unsloth

    unsloth, found = import_unsloth(), []

    def start(engine, **arguments):
        found.append(what_vllm_makes_of(arguments))
        raise Asked

    with mock.patch.object(vllm.LLM, "__init__", start):
        try:
            unsloth.load_base(
                path,
                profile(),
                load_in_4bit=False,
                max_seq_length=512,
                engine_cache=1 << 28,
                prepare=vllm_compat.prepare,
            )
        except Exception as error:  # which Unsloth may have wrapped
            if not found:
                raise error
    print(json.dumps(found[0]))


if __name__ == "__main__":
    with card.present(), mock.patch.object(torch._C, "_cuda_getCurrentRawStream", return_value=0):
        main(Path(sys.argv[1]))
