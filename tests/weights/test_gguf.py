"""GGUF files: against transformers' reader, the bytes of llama.cpp's own converter, and what must be refused."""

import json
import os
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from fixtures import CHATML, tiny_model_dir, tiny_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import decoders, pre_tokenizers
from transformers import AutoModelForCausalLM

from spinfast.errors import UserError
from spinfast.models import resolve_model
from spinfast.policy.adapters import compact
from spinfast.policy.adapters import files as adapters
from spinfast.progress import heard, open_console
from spinfast.run import main
from spinfast.types import Adapter
from spinfast.weights.export import TYPES, ollama, resolve
from spinfast.weights.gguf import write_lora, write_model
from spinfast.weights.gguf_tokenizer import WORDS as SPLIT
from spinfast.weights.gguf_tokenizer import add_tokenizer, copy_tokenizer
from spinfast.weights.gguf_types import KINDS

sys.path.append(str(Path(__file__).parent / "gguf"))
from lora import tiny_lora
from record import CASES, GUESSED, content

OFFICIAL = json.loads((Path(__file__).parent / "gguf" / "official.json").read_text())
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | {
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}


def write(target, kind, out, **options):
    with heard(open_console()) as display:
        return write_model(resolve(str(target), "tiny", **options), kind, out, display)


def read(file):
    """{name: fp32 array} as the gguf package reads them."""
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}


def loaded(file):
    """The state dict of what transformers makes of the file."""
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model.state_dict()


@pytest.mark.parametrize(("arch", "tied"), CASES)
def test_transformers_reads_the_model_back(tiny_model, tmp_path, arch, tied):
    assert write(tiny_model(arch, tied), "f32", tmp_path / "m.gguf") == 0
    expected = AutoModelForCausalLM.from_pretrained(tiny_model(arch, tied), dtype=torch.float32).state_dict()
    found = loaded(tmp_path / "m.gguf")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("case", sorted(OFFICIAL))
def test_bytes_are_the_official_converters(tiny_model, tmp_path, case):
    name, kind = case.rsplit(" ", 1)
    arch = name.split("-")[1] if "-" in name else "llama"
    model = tiny_model(arch, "untied" not in name)
    if name == "llama3 rope":
        model = tiny_model_dir(tmp_path, "llama", rope_parameters=dict(LLAMA3))
    if kind == "lora":
        adapter = tiny_lora(model, tmp_path / "lora")
        write_lora(resolve(str(adapter), "tiny", model=str(model)), "f32", tmp_path / "m.gguf")
    else:
        write(model, kind, tmp_path / "m.gguf")
    found, expected = content(tmp_path / "m.gguf"), OFFICIAL[case]
    assert found["tensors"] == expected["tensors"]
    added = {} if kind == "lora" else {"tokenizer.ggml.add_bos_token": False}
    assert json.loads(json.dumps(found["keys"])) == added | expected["keys"]
    assert set(GUESSED) & set(gguf.GGUFReader(tmp_path / "m.gguf").fields) == {"general.name"}


def test_types_in_order_of_their_rounding(tiny_model, tmp_path):
    found, kinds = {}, [kind for kind in KINDS if "_k" not in kind]
    for kind in kinds:
        found[kind] = write(tiny_model("qwen2"), kind, tmp_path / f"{kind}.gguf")
        tensors = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / f"{kind}.gguf").tensors}
        assert tensors["blk.0.attn_q.weight"] == kind.upper()
        assert tensors["token_embd.weight"] == (kind.upper() if kind[0] in "fb" else "Q8_0")
        assert {tensors["blk.1.attn_norm.weight"], tensors["blk.1.attn_k.bias"]} == {"F32"}
    assert [found[kind] for kind in kinds] == sorted(found.values())
    assert all(found[kind] <= KINDS[kind].limit for kind in kinds)
    assert found["q4_0"] > 0.02
    write(tiny_model("llama", tied=False), "q4_0", tmp_path / "untied.gguf")
    tensors = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "untied.gguf").tensors}
    assert (tensors["token_embd.weight"], tensors["output.weight"]) == ("Q4_0", "Q8_0")


def test_k_quants(tmp_path):
    """By libgguf; tests/weights/test_llama_cpp.py holds types and bytes against llama-quantize's."""
    pytest.importorskip("libgguf")
    assert tuple(KINDS) == TYPES
    model = tiny_model_dir(tmp_path, "llama", hidden=256, intermediate_size=512)
    found = {kind: write(model, kind, tmp_path / f"{kind}.gguf") for kind in KINDS if "_k" in kind}
    assert list(found.values()) == sorted(found.values())
    assert all(KINDS[kind].limit / 4 < apart < KINDS[kind].limit for kind, apart in found.items())


def test_rows_that_no_block_divides_are_f16(tmp_path):
    write(tiny_model_dir(tmp_path, "qwen2", hidden=80), "q4_0", tmp_path / "m.gguf")
    assert {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors} == {"F32", "F16"}


# What was trained


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}, {"embedding": True}])
def test_a_lora_is_added_in_fp32(tiny_model, tmp_path, changes):
    base = tiny_model("llama")
    layers = ["q_proj", "down_proj", "k_proj"] + ["embed_tokens"] * changes.pop("embedding", False)
    adapter = tiny_lora(base, tmp_path / "lora", target_modules=layers, **changes)
    assert write(adapter, "f32", tmp_path / "m.gguf", model=str(base)) == 0
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    ids = torch.arange(3, 60)[None]
    expected = model(ids).logits
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert torch.allclose(found(ids).logits, expected, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert not torch.allclose(plain(ids).logits, expected, atol=0.1)


def test_base_and_lora_are_the_merged_file(tiny_model, tmp_path):
    base = tiny_model("llama", hidden=128)
    source = resolve(
        str(tiny_lora(base, tmp_path / "lora", use_rslora=True, alpha_pattern={"v_proj": 3})), "tiny", model=str(base)
    )
    write(base, "f32", tmp_path / "base.gguf")
    write(tmp_path / "lora", "f32", tmp_path / "merged.gguf", model=str(base))
    assert write_lora(source, "f32", tmp_path / "lora.gguf") == 0
    parts, lora, merged = (read(tmp_path / f"{name}.gguf") for name in ("base", "lora", "merged"))
    assert len(lora) == 2 * 7 * 2
    alpha = gguf.GGUFReader(tmp_path / "lora.gguf").fields["adapter.lora.alpha"].contents()
    for name, weight in parts.items():
        if f"{name}.lora_a" in lora:
            a, b = lora[f"{name}.lora_a"], lora[f"{name}.lora_b"]
            weight = weight + alpha / len(a) * b @ a
        np.testing.assert_allclose(merged[name], weight, atol=1e-5)
    assert write_lora(source, "q8_0", tmp_path / "small.gguf") > 0


def test_any_kind_of_adapter(tiny_model, tmp_path, capsys):
    from test_adapter_kinds import KINDS, policy_of

    found = resolve_model(str(tiny_model("llama")))
    for name, kind in KINDS.items():
        policy = policy_of(found.path, kind, found=found)
        policy.save_adapter(tmp_path / name)
        out = tmp_path / f"{name}.gguf"
        assert main(["export", "gguf", str(tmp_path / name), "--type", "f32", "--out", str(out)]) == 0
        made = loaded(out)
        plain = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32).state_dict()
        if kind.kind == "full":
            plain |= {key: t.float() for key, t in compact.load(tmp_path / name).tensors.items()}
            plain["lm_head.weight"] = plain["model.embed_tokens.weight"]
        else:
            lora = policy.serving(policy.adapter())[1]
            for key, a in lora.tensors.items():
                if "lora_A" in key:
                    weight = key.removeprefix("base_model.model.").replace("lora_A.", "")
                    plain[weight] = (
                        plain[weight]
                        + adapters.scale(lora.config, key)[1]
                        * lora.tensors[key.replace("lora_A", "lora_B")].float()
                        @ a
                    )
        assert all(torch.allclose(made[key], t, atol=1e-5) for key, t in plain.items())
    assert main(["export", "gguf", str(tmp_path / "full"), "--adapter-only"]) == 2
    assert "holds no LoRA" in capsys.readouterr().err


# Tokenizers


def written(path, tmp_path, rows=384):
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    add_tokenizer(writer, path, rows)
    return {key: value.value for key, value in writer.kv_data[0].items()}


def test_tokens_types_and_ends(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "<|control|>", "a▁b"])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 392, "model_type": "llama"}))
    keys = written(tmp_path, tmp_path, 392)
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert tokens[-8:] == ("<think>", "<|control|>", "a b", "[PAD387]", *[f"[PAD{n}]" for n in range(388, 392)])
    assert types[-8:] == (4, 3, 4, 5, 5, 5, 5, 5)
    assert types[:5] == (3, 3, 3, 3, 1)
    assert keys["tokenizer.ggml.eos_token_id"] == 2
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.chat_template"] == CHATML
    assert keys["tokenizer.ggml.pre"] == "gpt-2"


BYTES, GPT2 = pre_tokenizers.ByteLevel(False, use_regex=False), pre_tokenizers.ByteLevel(False)


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "pre"),
    [
        ([GPT2], False, "gpt-2"),
        ([pre_tokenizers.Digits(True), GPT2], False, "smollm"),
        ([SPLIT % "", BYTES], False, "qwen2"),
        ([SPLIT % "{1,3}", BYTES], True, "llama-bpe"),
        ([SPLIT % "{1,3}", BYTES], False, None),
        ([SPLIT % "{1,2}", BYTES], False, None),
        ([GPT2], True, None),
        ([pre_tokenizers.ByteLevel(True)], False, None),
        ([pre_tokenizers.Whitespace()], False, None),
    ],
)
def test_the_rule_that_splits_text_has_a_name_or_is_refused(tmp_path, steps, ignore_merges, pre):
    from tokenizers import Regex

    tokenizer = tiny_tokenizer()
    parts = [pre_tokenizers.Split(Regex(s), "isolated") if isinstance(s, str) else s for s in steps]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
    tokenizer.backend_tokenizer.model.ignore_merges = ignore_merges
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 384, "model_type": "llama"}))
    if pre:
        assert written(tmp_path, tmp_path)["tokenizer.ggml.pre"] == pre
    else:
        with pytest.raises(UserError, match=r"no name of llama.cpp's is known.*convert_hf_to_gguf"):
            written(tmp_path, tmp_path)


def test_what_is_no_byte_level_bpe_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.ByteFallback()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 384, "model_type": "llama"}))
    with pytest.raises(UserError, match="expected a byte-level BPE"):
        written(tmp_path, tmp_path)


def test_a_model_from_a_gguf_keeps_its_tokenizer(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("SPINFAST_CACHE", str(tmp_path / "cache"))
    model = shutil.copytree(tiny_model("qwen2"), tmp_path / "model")
    write(model, "f32", tmp_path / "first.gguf")
    keys = content(tmp_path / "first.gguf")["keys"]
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "qwen2")
    copy_tokenizer(writer, tmp_path / "first.gguf")
    copied = {key: value.value for key, value in writer.kv_data[0].items() if key.startswith("tokenizer.")}
    assert copied.keys() == {key for key in keys if key.startswith("tokenizer.")}
    write(tmp_path / "first.gguf", "bf16", tmp_path / "second.gguf")
    again = content(tmp_path / "second.gguf")["keys"]
    assert {k: v for k, v in again.items() if k[:10] == "tokenizer."} == {
        k: v for k, v in keys.items() if k[:10] == "tokenizer."
    }


# The command


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """command(*words) -> (exit code, stdout, stderr) in a directory of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = main(["export", "gguf", *map(str, words)])
        return code, *capsys.readouterr()

    return run


def test_command(command, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model("llama"), tmp_path / "tiny")
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "top_k": 7, "eos_token_id": [2, 3]}))
    code, out, _ = command(model)
    assert code == 0
    assert "tiny-q8_0.gguf: 0.1 MB, Q8_0, verified: read back, its numbers are 0.00" in out
    keys = content(tmp_path / "tiny-q8_0.gguf")["keys"]
    assert keys["general.sampling.temp"] == 0.5
    assert (keys["general.sampling.top_k"], keys["general.file_type"]) == (7, 7)
    assert gguf.GGUFReader(tmp_path / "tiny-q8_0.gguf").fields["general.name"].contents() == "tiny"
    assert (tmp_path / "tiny-q8_0.Modelfile").read_text().splitlines() == [
        "# spinfast export gguf",
        "FROM ./tiny-q8_0.gguf",
        "# ChatML, as the model's own chat template renders it",
        'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}',
        "{{ .Content }}<|im_end|>",
        "{{ end }}<|im_start|>assistant",
        '"""',
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|endoftext|>"',
    ]
    assert command(model, "--type", "F32", "--out", "exact.gguf")[1].startswith("exact.gguf: 0.4 MB, F32, verified")
    assert "is there already" in command(model)[2]
    lora = tiny_lora(model, tmp_path / "lora")
    code, out, _ = command(lora, "--adapter-only", "--model", model)
    assert (code, out.splitlines()[1]) == (0, "llama-cli -m BASE.gguf --lora lora-lora-f32.gguf")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--type", "iq4_xs"], "llama-quantize FILE.gguf OUT.gguf IQ4_XS"),
        (["--out", "model.bin"], "ending in .gguf"),
        (["--adapter-only"], "holds no LoRA"),
        (["--model", "other"], "is a model itself"),
    ],
)
def test_what_cannot_be_meant_is_refused(command, tiny_model, tmp_path, words, said):
    code, _, err = command(tiny_model("llama"), *words)
    assert (code, [*tmp_path.iterdir()]) == (2, [])
    assert said in err


def test_what_k_quants_need(command, tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "libgguf", None)
    code, _, err = command(tiny_model("llama"), "--type", "q4_k_m")
    assert code == 2
    assert "pip install libgguf; or export f16, then llama-quantize FILE.gguf OUT.gguf Q4_K_M" in err


@pytest.mark.parametrize(
    "harm", [lambda file: file.unlink(), lambda file: os.truncate(file, 5000)], ids=["gone", "cut"]
)
def test_weights_that_are_not_there(command, tiny_model, tmp_path, harm):
    model = shutil.copytree(tiny_model("llama"), tmp_path / "harmed")
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    names = load_file(model / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    harm(model / "model-00001-of-00001.safetensors")
    code, _, err = command(model)
    assert (code, [path.name for path in tmp_path.iterdir()], len(err.splitlines())) == (2, ["harmed"], 1)
    assert "model-00001-of-00001.safetensors" in err


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "is not finite"), (1e6, "it cannot hold")])
def test_numbers_that_the_file_cannot_hold(command, tiny_model, tmp_path, value, said):
    model = shutil.copytree(tiny_model("llama"), tmp_path / "broken")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    code, _, err = command(model, "--type", "f16")
    assert (code, [path.name for path in tmp_path.iterdir()]) == (2, ["broken"])
    assert said in err


@pytest.mark.parametrize(("key", "value"), [("beta_fast", 16.0), ("attention_factor", 2.0)])
def test_yarn_that_llama_cpp_computes_otherwise_is_refused(tmp_path, key, value):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4, key: value}
    with pytest.raises(UserError, match=f"yarn with {key}"):
        write(tiny_model_dir(tmp_path, rope_parameters=yarn), "f32", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_an_adapter_of_another_base_is_refused(command, tiny_model, tmp_path):
    lora = tiny_lora(tiny_model("llama"), tmp_path / "lora")
    code, _, err = command(lora, "--model", tiny_model("llama", hidden=128))
    assert code == 2
    assert "give its base by --model" in err
    assert not [*tmp_path.glob("*.gguf")]
    source = resolve(str(lora), "tiny", model=str(tiny_model("llama")))
    strange = Adapter(
        source.lora.config, {k.replace("layers.1", "layers.9"): t for k, t in source.lora.tensors.items()}
    )
    with pytest.raises(UserError, match=r"layers.9.*the base's is None"):
        write_lora(type(source)(source.path, "n", source.architecture, strange), "f32", tmp_path / "m.gguf")


LLAMA_3 = (
    "<|bos|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe\nkind.<|im_end|>\n{% endif %}" + CHATML


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (DEFAULT, ["# ChatML", 'SYSTEM """Be\nkind."""']),
        (LLAMA_3, ["# Llama 3", 'PARAMETER stop "<|eot_id|>"']),
        ("{{ messages[0].content }}", ["# no TEMPLATE"]),
        ("{{ raise_exception('no') }}", ["# no TEMPLATE"]),
        (None, ["# no TEMPLATE"]),
    ],
)
def test_modelfile_knows_a_family_by_what_it_renders(tmp_path, template, expected):
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 385, "model_type": "llama"}))
    found = ollama(tmp_path, "m.gguf")
    assert all(part in found for part in expected)
    assert ("SYSTEM" in found, 'TEMPLATE "' in found) == ("SYSTEM" in expected[-1], "no" not in expected[0])
