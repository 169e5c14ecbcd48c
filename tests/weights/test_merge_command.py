"""`spinfast merge`: whole or absent, in little memory; vocabularies; a run's adapter into its base; one-line errors."""

import json
import math
import os
import shutil
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml
from fixtures import tiny_model_dir
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spinfast.errors import UserError
from spinfast.memory.ledger import Ledger
from spinfast.model_check import check_model
from spinfast.models import load_tokenizer
from spinfast.progress import heard, open_console
from spinfast.run import main
from spinfast.store import files
from spinfast.weights import merging
from spinfast.weights.export import FAMILIES
from spinfast.weights.merge import METHODS
from spinfast.weights.recipe import Recipe
from spinfast.weights.writer import write_weights

sys.path.append(str(Path(__file__).parent / "gguf"))
from lora import tiny_lora


def weights(directory):
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def another(path, seed, arch="llama", dtype=torch.float32, **shape):
    """A model like the tiny one with other weights."""
    made, draw = tiny_model_dir(path, arch, **shape), torch.Generator().manual_seed(seed)
    own = {name: (t + 0.1 * torch.randn(t.shape, generator=draw)).to(dtype) for name, t in weights(made).items()}
    save_file(own, made / "model.safetensors", metadata={"format": "pt"})
    return made


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return [another(tmp_path_factory.mktemp(name), seed) for seed, name in enumerate("ab")]


def merged(out, method, models, shard=None, **more):
    """Merge them in process; `models`: what a recipe says of each."""
    recipe = Recipe.model_validate({"merge_method": method, "models": models} | more)
    with heard(open_console()) as display:
        merging.merge(recipe, "text: this", out, display, **({"shard": shard} if shard else {}))
    return weights(out)


def halves(pair):
    return [{"model": str(path), "parameters": {"weight": 1}} for path in pair]


def test_the_output_is_a_model_like_any_other(pair, tmp_path):
    found = merged(tmp_path / "out", "linear", halves(pair), out_dtype="bfloat16", chat_template="{{ messages }}")
    assert check_model(tmp_path / "out") == "LlamaForCausalLM"
    model, tokenizer = (of.from_pretrained(tmp_path / "out") for of in (AutoModelForCausalLM, AutoTokenizer))
    assert model.dtype == torch.bfloat16
    assert tokenizer.chat_template == "{{ messages }}"
    one, two = map(weights, pair)
    assert all(torch.equal(t, ((one[name] + two[name]) / 2).bfloat16()) for name, t in found.items())
    assert files.damage(tmp_path / "out") is None
    card = (tmp_path / "out/README.md").read_text()
    assert "text: this" in card
    assert card.count(str(pair[0])) == 3  # config and tokenizer are its


def test_shards_hold_the_same_weights(pair, tmp_path):
    whole = merged(tmp_path / "one", "linear", halves(pair))
    cut = merged(tmp_path / "many", "linear", halves(pair), shard=120_000)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    shards = [*(tmp_path / "many").glob("*.safetensors")]
    assert len(shards) == len({*index["weight_map"].values()}) > 2
    assert max(file.stat().st_size for file in shards) < 125_000
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in cut.values())
    assert all(torch.equal(cut[name], t) for name, t in whole.items())
    AutoModelForCausalLM.from_pretrained(tmp_path / "many")


def test_a_random_choice_is_the_seeds_and_the_tensors_alone(pair, tmp_path):
    base, other = map(str, pair)
    given = [{"model": other, "parameters": {"weight": 1, "density": 0.5}}]
    part = {"model": other, "layer_range": [1, 2], "parameters": {"weight": 1, "density": 0.5}}
    found = merged(tmp_path / "a", "dare_linear", given, base_model=base)
    recipe = {
        "merge_method": "dare_linear",
        "base_model": base,
        "slices": [{"sources": [{"model": base, "layer_range": [1, 2]}, part]}],
    }
    with heard(open_console()) as display:
        merging.merge(Recipe.model_validate(recipe), "", tmp_path / "b", display)
        merging.merge(Recipe.model_validate(recipe), "", tmp_path / "c", display, seed=1)
    one, two = weights(tmp_path / "b"), weights(tmp_path / "c")
    assert torch.equal(found["model.norm.weight"], one["model.norm.weight"])
    assert not torch.equal(one["model.norm.weight"], two["model.norm.weight"])


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    shape = {"layers": 12, "dtype": torch.bfloat16}
    return [str(another(tmp_path_factory.mktemp("deep"), seed, **shape)) for seed in range(3)]


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"slerp", "nuslerp", "passthrough"}))
def test_memory_is_a_few_tensors(deep, tmp_path, method):
    """Of three models and the largest tensor: at most four times the tensors that go in."""
    of = METHODS[method]
    parameters = dict.fromkeys(of.each, 0.5)
    named = [{"model": deep[0]}, *({"model": name, "parameters": parameters} for name in deep[1:])]
    tree = {"merge_method": method, "models": named} | ({"base_model": deep[0]} if of.base == "apart" else {})
    recipe = Recipe.model_validate(tree | ({"parameters": parameters} if of.base == "among" else {}))
    with ExitStack() as stack:
        opened = merging.Merge(recipe, "", 0, stack)
        every = opened.weights
        with Ledger() as ledger:
            write_weights(tmp_path, [weight.entry for weight in every], map(opened.computed, every))
    largest, whole = (4 * of(math.prod(weight.entry.shape) for weight in every) for of in (max, sum))
    assert 3 * largest <= ledger.usage.peak <= 12.1 * largest < whole  # fp32; of one model


@pytest.mark.parametrize("at", [1, 9, 19])
def test_a_kill_leaves_nothing_that_looks_whole(pair, tmp_path, at):
    """At the first tensor, in the middle, at the last; then the same command makes it."""
    child = os.fork()
    if not child:
        calls, computed = [], merging.Merge.computed

        def killed(*words):
            calls.append(words)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return computed(*words)

        merging.Merge.computed = killed
        merged(tmp_path / "out", "linear", halves(pair))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (tmp_path / "out").exists()
    merged(tmp_path / "out", "linear", halves(pair))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Layers and vocabularies


def test_stacked_layers_of_windowed_models_keep_their_kinds(tmp_path):
    kinds = ["full_attention", "sliding_attention"]
    model = tiny_model_dir(tmp_path / "q", "qwen2", layer_types=kinds, sliding_window=64, use_sliding_window=True)
    slices = [{"sources": [{"model": str(model), "layer_range": bounds}]} for bounds in ([0, 2], [1, 2])]
    recipe = Recipe.model_validate({"merge_method": "passthrough", "slices": slices})
    with heard(open_console()) as display:
        merging.merge(recipe, "", tmp_path / "out", display)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["layer_types"] == [*kinds, kinds[1]]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_own_head_beside_a_tied_one(tmp_path, pair):
    untied = another(tmp_path / "u", 3, tied=False)
    found, own, tied = merged(tmp_path / "out", "linear", halves([pair[0], untied])), weights(untied), weights(pair[0])
    head = (tied["model.embed_tokens.weight"] + own["lm_head.weight"]) / 2
    assert torch.allclose(found["lm_head.weight"], head)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


@pytest.fixture
def renumbered(pair, tmp_path):
    """The second model with four rows more, and two of its tokens in each other's place."""
    path = shutil.copytree(pair[1], tmp_path / "renumbered")
    own, tokenizer = weights(path), json.loads((path / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    one, two = (next(token for token, row in vocab.items() if row == number) for number in (100, 200))
    vocab[one], vocab[two] = 200, 100
    table = own["model.embed_tokens.weight"]
    table[[100, 200]] = table[[200, 100]]
    own["model.embed_tokens.weight"] = torch.cat([table, torch.zeros(4, table.shape[1])])
    save_file(own, path / "model.safetensors", metadata={"format": "pt"})
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": len(table) + 4}))
    return path


def test_unequal_vocabularies_are_said_and_brought_together_by_token(pair, renumbered, tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": halves([pair[0], renumbered])}))
    assert main(["merge", str(recipe), "--out", str(tmp_path / "no")]) == 2
    assert "tokenizer_source: base brings them to one vocabulary" in capsys.readouterr().err
    expected = merged(tmp_path / "plain", "linear", halves(pair))
    found = merged(tmp_path / "out", "linear", halves([pair[0], renumbered]), tokenizer_source="base")
    wrong = {name: (found[name] != t).any(-1).nonzero().flatten().tolist() for name, t in expected.items()}
    assert {name: rows for name, rows in wrong.items() if rows} == {}


def test_rows_without_a_token_stay_and_are_merged_by_number(pair, renumbered, tmp_path, caplog):
    other = shutil.copytree(renumbered, tmp_path / "other")
    table = "model.embed_tokens.weight"
    for path, value in ((renumbered, 1.0), (other, 3.0)):
        own = weights(path)
        own[table][384:] = value
        save_file(own, path / "model.safetensors", metadata={"format": "pt"})
    both = merged(tmp_path / "both", "linear", halves([renumbered, other, pair[0]]), tokenizer_source="base")
    assert both[table].shape[0] == 388
    assert torch.allclose(both[table][384:], torch.full((4, 64), 2.0))  # pair[0] has none: it counts with their mean
    based = {"base_model": str(renumbered), "tokenizer": {"source": "base", "pad_to_multiple_of": 100}}
    padded = merged(tmp_path / "padded", "linear", halves([renumbered, pair[0]]), **based)
    assert padded[table].shape[0] == 400
    assert torch.equal(padded[table][384:388], torch.ones(4, 64))
    assert torch.allclose(padded[table][388:], padded[table][:388].mean(0).expand(12, -1), atol=1e-5)
    assert "tokens are in none" not in caplog.text


# An adapter into its base


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 5}}],
    ids=["plain", "rslora", "patterns"],
)
def test_a_lora_is_folded_as_peft_computes_it(pair, tmp_path, changes):
    base = AutoModelForCausalLM.from_pretrained(pair[0])
    torch.manual_seed(0)
    lora = get_peft_model(
        base,
        LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "up_proj", "o_proj"], init_lora_weights=False, **changes
        ),
    )
    lora.save_pretrained(tmp_path / "adapter")
    expected = lora.merge_and_unload().state_dict()
    assert main(["merge", str(tmp_path / "adapter"), "--out", str(tmp_path / "out"), "--model", str(pair[0])]) == 0
    found = weights(tmp_path / "out")
    assert all(torch.allclose(t, expected[name], atol=1e-6) for name, t in found.items())
    assert not torch.equal(
        found["model.layers.1.self_attn.q_proj.weight"], weights(pair[0])["model.layers.1.self_attn.q_proj.weight"]
    )


def test_base_and_adapter_from_the_hub(pair, tmp_path, monkeypatch, capsys):
    """`base@revision+owner/adapter@revision`, from the hub's cache."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name, made in (("base", pair[0]), ("lora", tiny_lora(pair[0], tmp_path / "lora"))):
        repo = tmp_path / f"hub/models--org--{name}"
        shutil.copytree(made, repo / "snapshots" / commit)
        (repo / "refs").mkdir()
        (repo / "refs/v1").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = merged(tmp_path / "out", "passthrough", [{"model": "org/base@v1+org/lora@v1"}])
    expected = merged(tmp_path / "local", "passthrough", [{"model": f"{pair[0]}+{tmp_path / 'lora'}"}])
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert f"| org/base@v1+org/lora@v1 | {commit} |" in (tmp_path / "out/README.md").read_text()
    for wrong, words in (
        ("org/base@v1+org/lora@v2", "adapter org/lora at revision v2: neither on this machine nor to be had"),
        (f"{pair[0]}+{tmp_path / 'lora'}@v1", "only what is on the hub has a revision; leave @v1 out"),
        (f"{pair[0]}+{tmp_path / 'nowhere'}", "nowhere: no such directory; expected an adapter's"),
        (f"{pair[0]}+{pair[1]}", "cannot be read"),
    ):
        (tmp_path / "r.yaml").write_text(yaml.safe_dump({"merge_method": "passthrough", "models": [{"model": wrong}]}))
        assert main(["merge", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "no")]) == 2
        assert words in capsys.readouterr().err


# Errors


def nan(path):
    own = weights(path)
    own["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(own, path / "model.safetensors", metadata={"format": "pt"})


def cut(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def shard_gone(path):
    (path / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def short(path):
    own = weights(path)
    own["model.norm.weight"] = own["model.norm.weight"][:-1].clone()
    save_file(own, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (nan, "model.layers.1.mlp.up_proj.weight is not finite"),
        (cut, "damaged safetensors file"),
        (shard_gone, "no model-00001-of-00002.safetensors"),
        (short, "model.norm.weight has shape [63]"),
    ],
)
def test_a_harmed_model_is_one_line_and_no_output(pair, tmp_path, capsys, harm, words):
    harmed = shutil.copytree(pair[1], tmp_path / "harmed")
    harm(harmed)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": halves([pair[0], harmed])}))
    assert main(["merge", str(recipe), "--out", str(tmp_path / "out")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spinfast")]
    assert len(lines) == 1
    assert words in lines[0]
    assert {path.name for path in tmp_path.iterdir()} == {"harmed", "r.yaml"}


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"merge_method": "slerp"}, "merge_method slerp: needs a base_model"),
        ({"merge_method": "slerp", "base_model": "A"}, "merge_method slerp: no t for model.embed_tokens.weight"),
        ({"merge_method": "ties", "base_model": "A"}, "no weight for model.embed_tokens.weight of B; give one under"),
        ({"merge_method": "passthrough"}, "merge_method passthrough: expected 1 models, got 2"),
        ({"merge_method": "model_stock", "base_model": "A"}, "expected at least 2 models beside the base, got 1"),
        (
            {"merge_method": "linear", "models": [{"model": "A"}, {"model": "Q"}]},
            "A is LlamaForCausalLM, Q Qwen2ForCausalLM",
        ),
        (
            {"merge_method": "linear", "models": [{"model": "A"}, {"model": "D"}]},
            "A has 2 layers, D has 3 layers; take parts",
        ),
        (
            {"merge_method": "linear", "models": [{"model": "A"}, {"model": "no/where"}]},
            "model no/where: neither on this machine",
        ),
        ({"merge_method": "linear", "models": [{"model": "A@main"}]}, "only what is on the hub has a revision"),
        (
            {
                "merge_method": "linear",
                "parameters": {"weight": 1e38},
                "models": [{"model": "A"}],
                "out_dtype": "float16",
            },
            None,
        ),
        (
            {
                "merge_method": "passthrough",
                "models": [{"model": "A", "parameters": {"scale": 1e9}}],
                "out_dtype": "float16",
            },
            "is not finite in torch.float16",
        ),
        (
            {"merge_method": "slerp", "base_model": "A", "models": [{"model": "B", "parameters": {"t": 1}}]},
            "t of B: it is one for all",
        ),
    ],
)
def test_what_does_not_fit_is_told_before_a_tensor_is_read(pair, tmp_path, monkeypatch, capsys, tree, words):
    monkeypatch.chdir(tmp_path)
    os.symlink(pair[0], "A")
    os.symlink(pair[1], "B")
    if "Q" in str(tree):
        os.symlink(tiny_model_dir(tmp_path / "q", "qwen2"), "Q")
    if "'D'" in str(tree):
        os.symlink(another(tmp_path / "d", 0, layers=3), "D")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"models": [{"model": "A"}, {"model": "B"}]} | tree))
    assert main(["merge", "r.yaml", "--out", "out"]) == (2 if words else 0)
    assert (tmp_path / "out").exists() == (words is None)
    assert (words or "") in capsys.readouterr().err


def test_an_adapter_of_another_base_is_one_line(pair, tmp_path, capsys):
    adapter = tiny_lora(pair[0], tmp_path / "lora")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for change, base, words in (
        (
            {},
            tiny_model_dir(tmp_path, "llama", hidden=128),
            "for model.layers.0.mlp.down_proj.weight [64, 96], the model",
        ),
        ({"revision": "0" * 64}, pair[0], "was trained on"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(config | change))
        assert main(["merge", str(adapter), "--out", str(tmp_path / "out"), "--model", str(base)]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spinfast")]
        assert words in line
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: [", "recipe r.yaml: "),
        ("models: *nobody", "recipe r.yaml: "),
        ("models:\n- {model: A, model: B}\n", "line 2: model is there twice"),
        ("- linear", "expected merge_method, models ..., got list"),
        ("", "expected merge_method, models ..., got NoneType"),
        (b"\xff\xfe\x00", "recipe r.yaml: "),
        (None, "recipe r.yaml: no such file"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(tmp_path, monkeypatch, capsys, text, words):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["merge", "r.yaml", "--out", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_template_needs_a_tokenizer(pair, tmp_path):
    bare = shutil.copytree(pair[0], tmp_path / "bare", ignore=shutil.ignore_patterns("token*", "chat*"))
    with pytest.raises(UserError, match="bare has no tokenizer to have it"):
        merged(tmp_path / "out", "passthrough", [{"model": str(bare)}], chat_template="chatml")
    for source in ("base", "union"):
        with pytest.raises(UserError, match=r"tokenizer_source: .*bare has no tokenizer; leave tokenizer_source out"):
            merged(tmp_path / "out", "linear", halves([pair[0], bare]), tokenizer_source=source)
    assert merged(tmp_path / "out", "passthrough", [{"model": str(bare)}])


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_a_template_by_name(pair, tmp_path, name):
    merged(tmp_path / "out", "passthrough", [{"model": str(pair[0])}], chat_template=name)
    talk = [{"role": role, "content": f"@{role}"} for role in ("system", "user")]
    text = load_tokenizer(tmp_path / "out").apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    before, after, end = {"chatml": FAMILIES["ChatML"], "llama3": FAMILIES["Llama 3"]}[name]
    turns = "".join(f"{before}{one['role']}{after}{one['content']}{end}" for one in talk)
    assert text == f"{turns}{before}assistant{after}"


def test_what_has_no_effect_is_said(pair, tmp_path, caplog):
    given = [
        {"model": str(path), "parameters": {"weight": [{"filter": "self_atn", "value": 2}, {"value": 1}]}}
        for path in pair
    ]
    merged(tmp_path / "out", "linear", given, parameters={"density": 0.5})
    assert "density has no effect on linear" in caplog.text
    assert "filter self_atn: no weight's name holds it" in caplog.text


def test_what_is_there_is_not_overwritten(pair, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert main(["merge", str(pair[0]), "--out", str(tmp_path / "out")]) == 2
    assert main(["merge", str(tmp_path / "out"), "--out", str(tmp_path / "new")]) == 2
    err = capsys.readouterr().err
    assert "expected a recipe (.yaml), an adapter, or a finished run" in err


def test_a_place_below_a_file_is_one_line(pair, tmp_path, capsys):
    adapter, file = tiny_lora(pair[0], tmp_path / "lora"), tmp_path / "file"
    file.write_text("")
    for words, name in (
        (["merge", adapter, "--model", pair[0]], "out"),
        (["export", "gguf", adapter, "--model", pair[0]], "out.gguf"),
        (["spectrum", pair[0], "--top", "50"], "out.yaml"),
    ):
        assert main([*map(str, words), "--out", str(file / name)]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spinfast")]
        assert line == f"spinfast: {file}: File exists; give another place, or the right to write there"


def test_an_adapter_of_a_4_bit_base_is_told_of_before_it_goes_into_whole_weights(pair, tmp_path, caplog):
    adapter = tiny_lora(pair[0], tmp_path / "run/sft/adapter")
    config = {"model": {"name": str(pair[0]), "load_in_4bit": True}, "data": {"source": "x"}}
    (tmp_path / "run/inputs.json").write_text("{}")
    for four in (True, False):
        config["model"]["load_in_4bit"] = four
        (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
        caplog.clear()
        words, out = [str(adapter), "--model", str(pair[0]), "--out"], tmp_path / str(four)
        assert main(["export", "gguf", "--adapter-only", *words, f"{out}-alone.gguf"]) == 0
        assert "in 4 bits" not in caplog.text
        assert main(["merge", *words, f"{out}-merged"]) == 0
        assert main(["export", "gguf", *words, f"{out}.gguf"]) == 0
        assert caplog.text.count("was trained on the base in 4 bits") == 2 * four


def test_a_seed_that_draws_nothing_is_said(pair, tmp_path, caplog):
    for method, said in (("dare_linear", False), ("task_arithmetic", True)):
        tree = {"merge_method": method, "base_model": str(pair[0]), "models": halves(pair[1:])}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
        caplog.clear()
        assert main(["merge", str(tmp_path / "r.yaml"), "--out", str(tmp_path / method), "--seed", "3"]) == 0
        assert ("--seed has no effect on task_arithmetic" in caplog.text) == said
