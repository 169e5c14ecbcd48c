"""The fused layers against stock transformers + PEFT: same log-probs, same adapter gradients, and off again."""

import copy
import re

import pytest
import torch
from peft import (
    AdaLoraConfig,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    TinyLoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from spinfast_kernels.blocks import Lora
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GPT2Config

from spinfast import attention
from spinfast import ops as operators
from spinfast.errors import UserError
from spinfast.policy.fuse import fuse

ARCHITECTURES = ["qwen2", "llama", "qwen3"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["eager", "triton", "numba"])
def ops(request):
    if request.param == "numba" and DEVICE == "cuda":
        pytest.skip("compiled for CPUs")
    return operators.EAGER if request.param == "eager" else operators.compiled(request.param)


def peft_model(path, dtype=torch.float32, attention="sdpa", **lora):
    """Stock PEFT over the model at `path`; every adapter weight random, so that every gradient is alive."""
    base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora)
    model = get_peft_model(base.requires_grad_(False), config).to(DEVICE).train()
    randomise(model)
    return model


def randomise(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter)


def tokens(batch=2, length=31):
    return torch.randint(0, 300, (batch, length), generator=torch.Generator().manual_seed(3)).to(DEVICE)


def logps_and_gradients(model):
    """Everything a training step sees, by name: the log-prob of each next token, and the adapter's gradients."""
    ids = tokens()
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    wide = torch.promote_types(logits.dtype, torch.float32)
    logps = logits.to(wide).log_softmax(-1).gather(2, ids[:, 1:, None])
    logps.sum().backward()
    gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {"logps": logps.detach().double().cpu()} | gradients


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_whole_model(tiny_model, ops, arch, dtype):
    """err(fused, fp64) <= 2 err(stock, fp64) + tiny for the log-probs and every adapter gradient by name."""
    model = peft_model(tiny_model(arch), dtype)
    exact = logps_and_gradients(copy.deepcopy(model).double())
    stock = logps_and_gradients(model)
    fuse(model.get_base_model(), ops)
    fused = logps_and_gradients(model)
    assert fused.keys() == stock.keys() == exact.keys()
    for name, truth in exact.items():
        bound = 2 * (stock[name] - truth).norm() + torch.finfo(dtype).eps * truth.norm()
        assert (fused[name] - truth).norm() <= bound, name


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["down_proj", "k_proj"], ["embed_tokens", "up_proj"]], ids="+".join
)
def test_some_projections_without_an_adapter(tiny_model, ops, targets):
    model = peft_model(tiny_model(), target_modules=targets)
    stock = logps_and_gradients(model)
    fuse(model.get_base_model(), ops)
    fused = logps_and_gradients(model)
    assert fused.keys() == stock.keys()
    for name, value in stock.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_undone_by_one_call(tiny_model, ops, arch):
    """Off again, the model is the very same program: bit-equal results, nothing left on the instances."""
    model = peft_model(tiny_model(arch), torch.bfloat16)
    before, keys = logps_and_gradients(model), set(get_peft_model_state_dict(model))
    unfuse = fuse(model.get_base_model(), ops)
    logps_and_gradients(model)
    assert set(get_peft_model_state_dict(model)) == keys
    unfuse()
    after = logps_and_gradients(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any("forward" in vars(module) for module in model.get_base_model().get_decoder().modules())


def test_peft_switches_are_read_at_every_call(tiny_model, ops):
    """Disabled, changed and merged adapters: what PEFT would compute, without fusing again."""
    stock, fused = (peft_model(tiny_model()) for _ in range(2))
    fuse(fused.get_base_model(), ops)

    def same():
        with torch.no_grad():
            outputs = [model(input_ids=tokens(), use_cache=False).logits for model in (stock, fused)]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
        return outputs[1]

    trained = same()
    with stock.disable_adapter(), fused.disable_adapter():
        base = same()
    assert (trained - base).abs().max() > 0.1
    for model in (stock, fused):
        model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.lora_B.default").weight.data.mul_(3)
    changed = same()
    assert (trained - changed).abs().max() > 0.01
    for model in (stock, fused):
        model.merge_adapter()
    same()


def test_gradient_checkpointing(tiny_model, ops):
    model = peft_model(tiny_model())
    fuse(model.get_base_model(), ops)
    kept = logps_and_gradients(model)
    for layer in model.get_base_model().get_decoder().layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda f, *args: checkpoint(f, *args, use_reentrant=False)
    recomputed = logps_and_gradients(model)
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_generates_the_same_tokens_from_its_cache(tiny_model, ops):
    model = peft_model(tiny_model("qwen3")).eval()
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    stock = model.generate(input_ids=tokens(1, 9), **settings)
    fuse(model.get_base_model(), ops)
    assert torch.equal(model.generate(input_ids=tokens(1, 9), **settings), stock)


def test_keywords_reach_the_attention_interface(tiny_model, ops):
    """`layout=` travels through the fused layer to the registered attention, as spinfast's packing needs."""
    from spinfast.packing import pack
    from spinfast.types import Group

    model = peft_model(tiny_model(), attention=attention.NAME)
    batch = pack([Group((5, 6, 7), ((8, 9), (10, 11, 12)))], [0], "sdpa").to(DEVICE)
    keywords = {"position_ids": batch.position_ids_T[None], "layout": batch.layout, "use_cache": False}
    decoder = model.get_base_model().get_decoder()
    stock = decoder(input_ids=batch.token_ids_T[None], **keywords).last_hidden_state
    fuse(model.get_base_model(), ops)
    fused = decoder(input_ids=batch.token_ids_T[None], **keywords).last_hidden_state
    torch.testing.assert_close(fused, stock, rtol=1e-4, atol=1e-4)


def test_activations_kept_per_token_and_layer(tiny_model, ops):
    """At most half of what PEFT's own forward keeps for its backward (bf16, attention's part included)."""
    model = peft_model(tiny_model("qwen2", hidden=128), torch.bfloat16)
    stock = kept_bytes(model)
    fuse(model.get_base_model(), ops)
    assert kept_bytes(model) <= 0.5 * stock


def kept_bytes(model):
    """Bytes of the storages that one decoder layer's backward keeps, its parameters left out."""
    layer = model.get_base_model().get_decoder().layers[1]
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = (t.untyped_storage().nbytes(), t)
        return t

    x = torch.randn(1, 64, 128, device=DEVICE).bfloat16().requires_grad_()
    angles = tuple(torch.ones(1, 64, 32, device=DEVICE).bfloat16() for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x, position_embeddings=angles)
    size = sum(size for pointer, (size, _) in kept.items() if pointer not in own)
    y.sum().backward()
    return size


def test_refuses_what_it_would_get_wrong(tiny_model):
    with pytest.raises(UserError, match=r"expected lora_dropout 0, .* has a dropout; set lora_dropout to 0"):
        fuse(peft_model(tiny_model(), lora_dropout=0.1), operators.EAGER)
    with pytest.raises(UserError, match=r"expected plain LoRA, .* is a variant"):
        fuse(peft_model(tiny_model(), use_dora=True), operators.EAGER)
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=60000))
    with pytest.raises(UserError, match="expected a model of type qwen2, llama, qwen3, got gpt2"):
        fuse(get_peft_model(gpt2, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)), operators.EAGER)


@pytest.mark.parametrize(
    ("foreign", "kind"),
    [
        (TinyLoraConfig(target_modules=["q_proj"]), "tinylora.layer.Linear"),
        (LoHaConfig(target_modules=["down_proj"]), "loha.layer.Linear"),
        (AdaLoraConfig(target_modules=["v_proj"], total_step=10), "adalora.layer.SVDLinear"),  # is a LoraLayer
        (LNTuningConfig(target_modules=["post_attention_layernorm"]), "ln_tuning.layer.LNTuningLayer"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["up_proj"]), "utils.other.ModulesToSaveWrapper"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_what_is_neither_linear_nor_plain_lora(tiny_model, foreign, kind):
    """Taken for a plain layer, it would be trained without effect."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model())
    with pytest.raises(UserError, match=rf"expected plain LoRA .*layers\.0\.\w+.* is a peft\..*{re.escape(kind)}; use"):
        fuse(get_peft_model(base, foreign), operators.EAGER)


def test_refuses_weights_it_cannot_read(tiny_model):
    class PackedLinear(torch.nn.Linear):
        """Another quantisation's layer: its weight is not what it multiplies by."""

    for targets in (["up_proj"], ["q_proj"]):  # under an adapter, and without one
        base = AutoModelForCausalLM.from_pretrained(tiny_model())
        base.model.layers[1].mlp.up_proj.__class__ = PackedLinear
        with pytest.raises(UserError, match=r"expected plain LoRA .*layers\.1\.mlp\.up_proj.* is a .*PackedLinear; "):
            fuse(get_peft_model(base, LoraConfig(target_modules=targets)), operators.EAGER)


def test_choose_says_why_and_refuses_what_cannot_run(monkeypatch):
    table, reason = operators.choose("auto", "cpu")
    assert (table.name, reason) == ("numba", "numba: the compiled kernels of cpu")
    assert operators.choose("eager", "cuda")[0] is operators.EAGER
    assert operators.choose("auto", "meta")[0] is operators.EAGER
    with pytest.raises(UserError, match="triton was asked for but the device is cpu"):
        operators.choose("triton", "cpu")
    with pytest.raises(UserError, match="expected auto, eager, triton or numba, got 'cuda'"):
        operators.choose("cuda", "cpu")
    monkeypatch.setattr(operators, "find_spec", lambda name: None)
    assert operators.choose("auto", "cpu") == (operators.EAGER, "eager: the numba package is not installed")


def test_lora_without_a_matrix_has_rank_zero():
    assert Lora(torch.ones(2, 2)).rank == 0
