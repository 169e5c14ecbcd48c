"""Views of the engine's tensors: every architecture, every storage; refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from spinfast.errors import UserError
from spinfast.generation import vllm_compat, weight_sharing
from spinfast.generation.vllm import VLLMGenerator
from spinfast.generation.weight_sharing import shared_model, verify, views

slow = pytest.mark.slow
IDS = [5, 9, 17, 300, 21, 8, 77, 150, 42, 3]


def own_copy(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


@torch.no_grad()
def logps(model, ids):
    table = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return table.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize(
    ("arch", "tied"),
    [
        ("qwen2", False),  # biases, a head of its own
        pytest.param("qwen2", True, marks=slow),
        pytest.param("qwen3", False, marks=slow),  # q and k norms, head_dim * heads != D
        pytest.param("qwen3", True, marks=slow),
        pytest.param("llama", False, marks=slow),
    ],
)
def test_shared_model_has_no_weight_of_its_own(tiny_model, arch, tied):
    path = tiny_model(arch, tied, hidden=128)
    options = {"max_model_len": 64, "max_lora_rank": 8, "kv_cache_bytes": 1 << 24, "batch_size": 4}
    with VLLMGenerator(path, device=torch.device("cpu"), dtype=torch.float32, **options) as generator:
        model, alone = generator.shared_model("sdpa"), own_copy(path)
        parameters = dict(alone.named_parameters())
        assert verify(model, generator.engine_model).parameters == len(parameters)
        assert dict(model.named_parameters()).keys() == parameters.keys()
        for name, view in model.named_parameters():
            assert torch.equal(view, parameters[name]), name
        assert torch.equal(logps(model, IDS), logps(alone, IDS))
        engine = torch.tensor(generator.prompt_logps(IDS, None))
        torch.testing.assert_close(engine, logps(alone, IDS), atol=1e-4, rtol=0)

        with torch.no_grad():
            model.model.layers[1].self_attn.k_proj.weight.mul_(-3)
        moved = torch.tensor(generator.prompt_logps(IDS, None))
        torch.testing.assert_close(moved, logps(model, IDS), atol=1e-4, rtol=0)
        assert (moved - engine).abs().max() > 0.01
    with pytest.raises(RuntimeError, match="not running"):
        generator.prompt_logps(IDS, None)
    assert logps(model, IDS).isfinite().all()  # the policy outlives the engine


class LlamaForCausalLM(nn.Module):
    """What an engine's module tree looks like to the sharing code."""

    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            owner = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]
            owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def stacked(model, layers=2):
    """The tensors of a transformers model in the engine's layout, LoRA wrappers and padded vocabulary included."""
    state = {name: p.detach() for name, p in model.named_parameters()}
    for layer in range(layers):
        for stack, parts in weight_sharing.STACKED.items():
            owner = f"model.layers.{layer}.{'self_attn' if stack == 'qkv_proj' else 'mlp'}."
            joined = torch.cat([state.pop(f"{owner}{part}.weight") for part in parts])
            state[f"{owner}{stack}.base_layer.weight"] = joined
    embedding = state.pop("model.embed_tokens.weight")
    state["model.embed_tokens.base_layer.weight"] = torch.cat([embedding, torch.zeros(64, embedding.shape[1])])
    return state


@pytest.fixture(scope="module")
def llama(tiny_model):
    path = tiny_model("llama", True)
    return path, own_copy(path)


def test_padding_of_the_vocabulary_is_cut_off(llama):
    path, model = llama
    shared = shared_model(path, LlamaForCausalLM(stacked(model)), torch.float32, "sdpa")
    assert shared.lm_head.weight is shared.model.embed_tokens.weight
    assert torch.equal(logps(shared, IDS), logps(model, IDS))


@pytest.mark.parametrize(
    ("tensor", "got"),
    [
        (torch.empty(0), r"\(0,\) torch.float32"),  # packed: vLLM empties the original
        (torch.zeros(64, 48, dtype=torch.int8), r"\(64, 48\) torch.int8"),  # quantised
        (torch.zeros(64, 64, dtype=torch.bfloat16), r"\(64, 64\) torch.bfloat16"),  # loaded in another dtype
        (torch.zeros(63, 64), r"\(63, 64\)"),  # a shard of it
        (None, "nothing"),
    ],
    ids=["packed", "quantised", "dtype", "sharded", "missing"],
)
def test_weights_that_are_not_the_checkpoints_are_refused(llama, tensor, got):
    path, model = llama
    state = stacked(model)
    name = "model.layers.1.self_attn.o_proj.weight"
    del state[name]
    if tensor is not None:
        state[name] = tensor
    with pytest.raises(UserError, match=rf"expected {name} .*got {got}.*generation.backend: transformers"):
        shared_model(path, LlamaForCausalLM(state), torch.float32, "sdpa")


def test_other_architectures_are_refused(llama):
    class GptNeoXForCausalLM(LlamaForCausalLM):
        pass

    path, model = llama
    with pytest.raises(UserError, match="got GptNeoXForCausalLM"):
        shared_model(path, GptNeoXForCausalLM(stacked(model)), torch.float32, "sdpa")


def test_quantised_checkpoint_is_refused(llama, tmp_path):
    path, model = llama
    config = AutoConfig.from_pretrained(path)
    config.quantization_config = {"quant_method": "awq", "bits": 4}
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="checkpoint is quantised"):
        shared_model(tmp_path, LlamaForCausalLM(stacked(model)), torch.float32, "sdpa")


def test_verify_names_a_copy(llama):
    path, model = llama
    engine = LlamaForCausalLM(stacked(model))
    shared = shared_model(path, engine, torch.float32, "sdpa")
    shared.model.norm.weight = nn.Parameter(shared.model.norm.weight.clone())
    with pytest.raises(RuntimeError, match=r"1 of 20 parameters are copies \(first: model.norm.weight\)"):
        verify(shared, engine)


def test_views_are_slices_of_the_stacked_tensors(llama):
    _, model = llama
    engine = LlamaForCausalLM(stacked(model))
    found = views(model, engine, torch.float32)
    qkv = engine.get_parameter("model.layers.0.self_attn.qkv_proj.base_layer.weight")
    parts = [found[f"model.layers.0.self_attn.{part}.weight"] for part in weight_sharing.STACKED["qkv_proj"]]
    assert torch.equal(torch.cat(parts), qkv)
    assert all(part.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr() for part in parts)


@pytest.mark.parametrize("rows", [1, 5, 64, 65])  # 65: the weight moves to the right
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_plain_linear_is_linear(rows, dtype, biased):
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=draw).to(dtype) for shape in [(rows, 96), (40, 96), (40,)])
    exact = F.linear(x.double(), weight.double(), bias.double() if biased else None)
    eager = F.linear(x, weight, bias if biased else None)
    found = vllm_compat.plain_linear(x, weight, bias if biased else None)
    assert found.is_contiguous()
    assert found.dtype == dtype
    bound = 2 * (eager - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (found - exact).abs().max() <= bound
