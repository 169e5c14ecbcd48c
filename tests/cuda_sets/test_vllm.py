"""vLLM of the set as a T4 would meet it: our engine arguments, and all that is reached behind its API on real objects.

The extensions load, the configuration is made, vLLM's own Qwen2 is built with LoRA layers on CPU tensors.
"""

import importlib
import runpy
import socket
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from fixtures import tiny_model_dir
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from spinfast.generation import vllm_compat, weight_sharing
from spinfast.generation.vllm import VLLMGenerator
from spinfast.types import Adapter

CUDA, CAPABILITY = torch.device("cuda"), (7, 5)


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def path(request, tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("model"), request.param, hidden=128)  # heads of 32, the smallest


@pytest.fixture
def engine_config(vllm_on_t4, path, monkeypatch):
    """What our arguments become: vLLM's whole configuration, and the arguments."""
    from vllm import LLMEngine

    asked = []

    class Asked(Exception):
        pass

    def ask(arguments, **_):
        asked.append(arguments)
        raise Asked

    monkeypatch.setattr(LLMEngine, "from_engine_args", ask)
    generator = VLLMGenerator(
        path, device=CUDA, dtype=torch.float16, max_model_len=512, max_lora_rank=16, capability=CAPABILITY
    )
    with pytest.raises(Asked):
        generator.__enter__()
    return asked[0].create_engine_config(), asked[0]


def test_engine_config(engine_config):
    config, _ = engine_config
    assert config.attention_config.backend.name == "TRITON_ATTN"
    assert config.model_config.dtype == torch.float16
    assert config.lora_config.lora_dtype == torch.float16
    assert (config.lora_config.max_loras, config.lora_config.max_lora_rank) == (1, 16)
    assert config.cache_config.kv_cache_memory_bytes > 0
    assert config.device_config.device_type == "cuda"
    assert config.model_config.skip_tokenizer_init


def test_attention_takes_the_backend(engine_config):
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    with set_current_vllm_config(engine_config[0]):
        assert get_attn_backend(64, torch.float16, "auto").get_name() == "TRITON_ATTN"


def test_extensions_load(vllm_on_t4):
    import vllm.cumem_allocator  # noqa: F401, sleeping
    from vllm.platforms import current_platform

    assert current_platform.get_device_capability() == CAPABILITY
    assert current_platform.is_cuda()


def test_a_t4_gets_dense_adapters_and_newer_cards_vllms_kernels(vllm_on_t4):
    from vllm.platforms import current_platform

    theirs = current_platform.get_punica_wrapper()
    assert theirs.endswith("PunicaWrapperGPU")
    vllm_compat.prepare(CUDA, (8, 0))
    assert current_platform.get_punica_wrapper() == theirs
    vllm_compat.prepare(CUDA, CAPABILITY)
    assert current_platform.get_punica_wrapper() == "spinfast.generation.vllm_compat.dense_adapters"


def test_what_is_reached_behind_the_engine_is_there(vllm_on_t4):
    """The functions of sleep and of the scheduler, by name: their engine cannot start here."""
    from vllm import LLMEngine
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.core_client import InprocClient
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for owner, names in {
        LLMEngine: ("collective_rpc", "step", "add_request", "abort_request", "has_unfinished_requests"),
        Scheduler: ("has_requests", "reset_prefix_cache"),
        InprocClient: ("shutdown",),
        GPUModelRunner: ("get_model",),
    }.items():
        assert [name for name in names if not hasattr(owner, name)] == []
    assert callable(cleanup_dist_env_and_memory)
    import inspect

    assert "self.batch_queue" in inspect.getsource(EngineCore)
    assert "self.engine_core = EngineCore" in inspect.getsource(InprocClient)
    if vllm_compat.can_sleep(CUDA):
        assert all(hasattr(LLMEngine, name) for name in ("sleep", "wake_up", "release_kv_cache_memory"))


@pytest.fixture(params=["vllm.lora.worker_manager", "unsloth_zoo/vllm_lora_worker_manager.py"], ids=["vllm", "unsloth"])
def manager_of(request):
    """The class of an engine's LoRA manager: vLLM's own, or what Unsloth puts in its place. Its file alone is executed:
    importing the package would rewrite transformers and vLLM for all tests."""
    if not request.param.endswith(".py"):
        return importlib.import_module(request.param).LRUCacheWorkerLoRAManager
    (file,) = (file for file in metadata.files("unsloth_zoo") if str(file) == request.param)
    return SimpleNamespace(**runpy.run_path(str(file.locate()))).LRUCacheWorkerLoRAManager


@pytest.fixture
def engine(engine_config, path, manager_of, monkeypatch):
    """An engine's model runner as our code asks for it: vLLM's model and its LoRA manager, on the CPU."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.model_executor.model_loader.utils import initialize_model

    config, _ = engine_config
    cpu = torch.device("cpu")
    monkeypatch.setattr(config.device_config, "device", cpu)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        try:
            with cpu:
                model = initialize_model(config)
                source = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16)
                model.load_weights(source.state_dict().items())
                manager = manager_of(config, cpu, model.embedding_modules)
                model = manager.create_lora_manager(model.eval(), config)
            torch.set_default_dtype(before)
            runner = SimpleNamespace(lora_manager=manager, get_model=lambda: model)
            worker = SimpleNamespace(model_runner=runner)
            yield SimpleNamespace(collective_rpc=lambda ask: [ask(worker)], model=model, manager=manager, source=source)
        finally:
            torch.set_default_dtype(before)
            monkeypatch.undo()
            cleanup_dist_env_and_memory()


def drawn_adapter(source) -> Adapter:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft = get_peft_model(source, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name.replace(".default", ""): torch.randn(value.shape, generator=draw) / 8
        for name, value in peft.state_dict().items()
        if "lora_" in name
    }
    settings = peft.peft_config["default"].to_dict()
    peft.unload()
    return Adapter(settings | {"target_modules": targets}, tensors)


def test_weights_are_shared(engine, path):
    model = weight_sharing.shared_model(path, engine.model, torch.float16, "eager")
    assert weight_sharing.verify(model, engine.model).parameters == len(list(model.parameters()))
    for name, value in engine.source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_an_adapter_reaches_every_layer(engine):
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.request import LoRARequest

    adapter = drawn_adapter(engine.source)
    before = {name: value.clone() for name, value in adapter.tensors.items()}
    vllm_compat.install_adapter(engine, adapter, 7)
    assert all(torch.equal(adapter.tensors[name], value) for name, value in before.items())
    assert engine.manager.list_adapters() == {7}
    layer = engine.model.model.layers[1]
    assert type(layer.self_attn.qkv_proj.punica_wrapper).__name__ == "DenseAdapters"
    x = torch.randn(5, 128, dtype=torch.float16)
    base = engine.source.model.layers[1]
    for ids in ((7,) * 5, (0,) * 5):
        requests = {LoRARequest("adapter-7", 7, "in-memory")} if any(ids) else set()
        engine.manager.set_active_adapters(requests, LoRAMapping(ids, ids, is_prefill=True))
        found = layer.self_attn.qkv_proj(x)[0]
        parts = []
        for part in ("q_proj", "k_proj", "v_proj"):
            linear, name = getattr(base.self_attn, part), f"base_model.model.model.layers.1.self_attn.{part}"
            a, b = (adapter.tensors[f"{name}.lora_{side}.weight"] for side in "AB")
            delta = 2.0 * (x.float() @ a.T @ b.T) if any(ids) else 0.0
            parts.append(linear(x).float() + delta)
        torch.testing.assert_close(found.float(), torch.cat(parts, dim=1), rtol=5e-3, atol=5e-3)
    vllm_compat.install_adapter(engine, adapter, 8)
    assert engine.manager.list_adapters() == {8}
