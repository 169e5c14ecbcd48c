"""Spectrum: scores against numpy and by hand, its published choices, other people's lists, the command."""

import hashlib
import json
import logging
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fixtures import tiny_model_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spinfast.errors import UserError
from spinfast.model_check import check_model
from spinfast.progress import heard, open_console
from spinfast.store import files
from spinfast.weights.spectrum import (
    METHOD,
    Score,
    as_yaml,
    cached_snr,
    digest,
    layer_type,
    matched,
    read_list,
    read_scores,
    scan,
    select,
    shapes_of,
    snr,
)

ROOT = Path(__file__).parents[2]
PUBLISHED = Path(__file__).parent / "published"
LLAMA, LIST = (PUBLISHED / f"meta-llama-Meta-Llama-3.1-8B-Instruct.{kind}" for kind in ("json", "yaml"))
TYPES = [f"mlp.{name}_proj" for name in ("down", "gate", "up")] + [f"self_attn.{name}_proj" for name in "koqv"]


# Scores


def by_numpy(weight: torch.Tensor) -> float:
    """The formula of the module's docstring in fp64."""
    s = np.linalg.svd(np.atleast_2d(weight.double().numpy()), compute_uv=False)
    n, m = np.atleast_2d(weight.numpy()).shape
    edge = np.subtract(*np.percentile(s, (75, 25))) / 1.349 * (1 + np.sqrt(min(n, m) / max(n, m)))
    return s[s > edge].sum() / (s[s <= edge].sum() or 1) / s[0]


def diagonal(*values: float, columns: int = 0) -> torch.Tensor:
    weight = torch.zeros(len(values), columns or len(values))
    weight.diagonal().copy_(torch.tensor(values))
    return weight


@pytest.mark.parametrize(
    ("weight", "score"),
    [
        (diagonal(100, 7, 6, 5, 4, 3, 2, 1), 113 / 15 / 100),  # quartiles 2.75, 6.25; edge 2.594 * 2 = 5.19
        (diagonal(100, 7, 6, 5.187, 4, 3, 2, 1), 113 / 15.187 / 100),  # just below the edge, 5.189
        (diagonal(100, 7, 6, 5, 4, 3, 2, 1, columns=32), 122 / 6 / 100),  # edge 2.594 * 1.5 = 3.89
        (diagonal(100, 7, 6, 5, 4, 3, 2, 1, columns=32).T, 122 / 6 / 100),
        (diagonal(3, 2, *[0] * 14), float("inf")),  # nothing of it is noise
        (torch.eye(8), 8.0),  # nothing is below the edge, noise is 1
        (torch.tensor([0.5, -3.0, 2.0]), 1.0),  # a norm
        (torch.zeros(4, 4), 0.0),
        (torch.zeros(4), 0.0),
    ],
    ids=["square", "edge", "wide", "tall", "without noise", "identity", "vector", "zeros", "zero vector"],
)
def test_by_hand(weight, score):
    assert snr(weight) == pytest.approx(score, rel=1e-6)


@given(n=st.integers(8, 48), m=st.integers(8, 48), seed=st.integers(0, 999), scale=st.sampled_from([1e-4, 0.02, 1, 50]))
@settings(max_examples=40)
def test_any_shape_and_what_changes_nothing(n, m, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, m, generator=generator)
    score = snr(weight)
    assert score == pytest.approx(by_numpy(weight), rel=1e-4)
    assert snr(weight.T) == pytest.approx(score, rel=1e-4)
    rows, columns = torch.randperm(n, generator=generator), torch.randperm(m, generator=generator)
    assert snr(weight[rows][:, columns]) == pytest.approx(score, rel=1e-4)
    some_noise = score != pytest.approx(float(torch.linalg.svdvals(weight).sum() / torch.linalg.svdvals(weight)[0]))
    # the ratio is without unit, S[0] is not; where nothing is noise, its 1 has S[0]'s unit
    assert snr(weight * scale) == pytest.approx(score / scale if some_noise else score, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_planted_signal_is_found_in_noise(rank, dtype):
    generator = torch.Generator().manual_seed(rank)
    noise = torch.randn(200, 120, generator=generator) / 10  # its largest singular value is near 2.5
    left, right = (torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q for size in (200, 120))
    planted = (noise + 20 * left @ right.T).to(dtype)
    s = np.linalg.svd(planted.float().numpy(), compute_uv=False)
    assert s[rank - 1] > 15 > 3 > s[rank]
    assert snr(planted) == pytest.approx(by_numpy(planted.float()), rel=1e-4)
    pure = snr(noise) * np.linalg.svd(noise.numpy(), compute_uv=False)[0]  # before it is divided by S[0]
    assert snr(planted) * s[0] > pure + 0.8 * rank * 20 / s[rank:].sum()


@pytest.mark.gpu
def test_a_weight_on_a_gpu_is_scored_on_the_cpu():
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).half()
    assert snr(weight.cuda()) == snr(weight)
    assert digest(weight.cuda()) == digest(weight)


def test_a_score_is_computed_once(tmp_path, caplog):
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    score = cached_snr(weight, tmp_path)
    (file,) = (tmp_path / "spectrum").iterdir()
    assert score == snr(weight) == cached_snr(weight, tmp_path)
    files.write_sealed(file, {"score": 5.0}, f"{digest(weight)} {METHOD}")
    assert cached_snr(weight, tmp_path) == 5.0
    files.write_sealed(file, {"score": 6.0}, f"{digest(weight)} {METHOD + 1}")  # computed otherwise
    assert cached_snr(weight, tmp_path) == score
    file.write_text(file.read_text().replace("0.", "7."))
    assert cached_snr(weight, tmp_path) == score
    assert caplog.text.count("is not as it was written") == 2
    for other in (weight.T, weight.double(), weight.bfloat16(), weight + 1e-6):
        assert digest(other) != digest(weight)
        assert cached_snr(other, tmp_path) == snr(other)


@pytest.fixture
def display():
    with heard(open_console()) as display:
        yield display


def test_scan_is_of_every_matrix_of_the_layers_by_type_and_layer(tmp_path, display):
    path = tiny_model_dir(tmp_path, layers=11)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(path, max_shard_size="100KB")
    (path / "model.safetensors").unlink()
    assert check_model(path) == "Qwen2ForCausalLM"
    assert len([*path.glob("*.safetensors")]) > 3
    scores = scan(path, display, tmp_path)
    assert [*scores] == [f"model.layers.{i}.{kind}" for kind in TYPES for i in range(11)]
    for module, (score, kind) in scores.items():
        assert score == snr(model.get_submodule(module).weight)
        assert module.endswith(f".{kind}")


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_that_is_saved_too_is_no_parameter(tmp_path, tied):
    path = tiny_model_dir(tmp_path, tied=tied)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    assert check_model(path)
    parameters = AutoModelForCausalLM.from_pretrained(path).named_parameters()
    assert shapes_of(path) == {name: [*parameter.shape] for name, parameter in parameters}


def test_a_weight_that_is_not_finite_is_named(tmp_path, display):
    path = tiny_model_dir(tmp_path)
    weights = load_file(path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
        scan(path, display, tmp_path)


# Choices


@pytest.mark.parametrize(
    ("name", "top", "blob"),  # the sum by which git knows the published file
    [
        ("meta-llama-Meta-Llama-3.1-8B-Instruct", 50, "fa0000e3b35183e98f753d67b7f4e2485b495661"),
        ("akjindal53244-Llama-3.1-Storm-8B", 50, "da9ece9a3898fdf10ad65c43b61332a1383861e7"),
        ("meta-llama-Meta-Llama-3.1-8B", 50, "717b7ee97248846263f45b2b6d836ec8c95e7ef2"),
        ("meta-llama-Meta-Llama-3.1-8B", 30, "e17c53b0b334a27864c20a5322ae649b06a84163"),
    ],
)
def test_published_choices_are_made_again_to_the_byte(name, top, blob):
    text = as_yaml(select(read_scores(PUBLISHED / f"{name}.json"), top), embeddings=True).encode()
    if name == LIST.stem:
        assert text == LIST.read_bytes()
    assert hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest() == blob


def test_scores_in_any_order_of_layers_make_the_same_choice():
    scores = read_scores(LLAMA)
    items = [item for item in scores.items() if item[1].type in TYPES]
    expected = {kind: modules for kind, modules in select(scores, 50).items() if kind in TYPES}
    random.Random(0).shuffle(items)
    assert select(dict(items), 50) == expected


@given(
    values=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, float("inf")]), min_size=1, max_size=40),
    top=st.integers(1, 100),
)
def test_of_equal_scores_the_first_layers_are_chosen(values, top):
    scores = {f"model.layers.{i}.a": Score(value, "a") for i, value in enumerate(values)}
    count = len(values) * top // 100
    if not count:
        with pytest.raises(UserError, match=r"chooses none; give (\d+) or more") as caught:
            select(scores, top)
        assert len(select(scores, int(re.search(r"give (\d+)", str(caught.value))[1]))["a"]) == 1
        return
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert select(scores, top) == {"a": [f"model.layers.{i}.a" for i in order[:count]]}


@pytest.mark.parametrize("top", [0, -5, 100.5, float("nan")])
def test_top_is_per_cent(top):
    with pytest.raises(UserError, match="expected per cent of each layer type, above 0 and up to 100"):
        select({"a.0.b": Score(1.0, "b")}, top)


# Files of others

AXOLOTL = """
base_model: Qwen/Qwen2-72B
adapter:
unfrozen_parameters:
  - ^lm_head.weight$
  - ^model.embed_tokens.weight$
  # mlp.down_proj layers
  - model.layers.1.mlp.down_proj
  - "model.layers.[23].self_attn.(k|v)_proj.weight$"
sequence_len: 8192
"""
MODULES = {"model.layers.0.a": 0.25, "model.layers.1.a": float("inf")}
FLAT = {module: {"snr": score, "type": "a"} for module, score in MODULES.items()}


def test_lists_of_others(tmp_path):
    assert read_list(LIST)[:3] == ("^lm_head.weight$", "^model.embed_tokens.weight$", "model.layers.0.input_layernorm")
    assert len(read_list(LIST)) == 146
    assert read_list(LLAMA, 50) == read_list(LIST)[2:]
    file = tmp_path / "axolotl.yml"
    file.write_text(AXOLOTL, encoding="utf-8-sig")
    assert read_list(file) == tuple(yaml.safe_load(AXOLOTL)["unfrozen_parameters"])
    file.write_text("- model.layers.1.mlp\n- model.layers.2.mlp\n")  # scripts for TRL read the lines that begin so
    assert read_list(file) == ("model.layers.1.mlp", "model.layers.2.mlp")


@pytest.mark.parametrize("value", [FLAT, {"a": MODULES}], ids=["flat", "nested"])
def test_both_forms_of_results(tmp_path, value):
    file = tmp_path / "snr.json"
    file.write_text(json.dumps(value), encoding="utf-8-sig")
    assert "Infinity" in file.read_text()
    assert read_scores(file) == {module: Score(score, "a") for module, score in MODULES.items()}
    assert read_list(file, 50) == ("model.layers.1.a",)


@pytest.mark.parametrize(
    ("name", "text", "top", "said"),
    [
        ("l.yaml", "", None, "expected a list of names of weights, got None"),
        ("l.yaml", "unfrozen_parameters:\n", None, "expected a list of names of weights, got None"),
        ("l.yaml", "unfrozen_parameters: []", None, r"expected a list of names of weights, got \[\]"),
        ("l.yaml", "unfrozen_parameters: all", None, "expected a list of names of weights, got all"),
        ("l.yaml", "- 5", None, r"expected a list of names of weights, got \[5\]"),
        ("l.yaml", "- {model.layers.0: x}", None, "expected a list of names of weights"),
        ("l.yaml", "spectrum_top_fraction: 0.5", None, "list under unfrozen_parameters, got spectrum_top_fraction"),
        ("l.yaml", "- *.down_proj", None, "not valid YAML: while scanning an alias"),
        ("l.yaml", "- !!python/object:os.system x", None, "not valid YAML"),
        ("l.yaml", "- model.layers.0", 25, "--top: goes with a scan or Spectrum's .json"),
        ("l.yaml", b"\xff\xfe\x00", None, "is no text"),
        ("l.yaml", None, None, "no such file"),
        ("l.json", json.dumps(FLAT), None, "holds scores, no list: spinfast spectrum MODEL --from .*l.json --top 25"),
        ("l.json", json.dumps(FLAT), 10, "chooses none; give 50 or more"),
        ("l.json", "{}", 25, "holds no scores"),
        ("l.json", "{", 25, "expected Spectrum's results, .* got something else"),
        ("l.json", '["a"]', 25, "expected Spectrum's results, .* got something else"),
        ("l.json", '{"a": 1}', 25, "expected Spectrum's results, .* got something else"),
        ("l.json", '{"a": {"snr": 1}}', 25, "expected Spectrum's results, .* got something else"),
        ("l.json", '{"m": {"snr": NaN, "type": "a"}}', 25, "m has snr nan and type 'a', expected a number and a name"),
        ("l.json", '{"m": {"snr": "1", "type": "a"}}', 25, "m has snr '1' and type 'a'"),
        ("l.json", '{"m": {"snr": 1, "type": null}}', 25, "m has snr 1 and type None"),
        ("l.json", '{"a": {"m": true}}', 25, "m has snr True and type 'a'"),
    ],
)
def test_wrong_files_are_told(tmp_path, name, text, top, said):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said) as caught:
        read_list(tmp_path / name, top)
    assert str(caught.value).count("\n") == 0


# Names

LAYERS = {f"model.layers.{i}.{kind}.weight": [8, 8] for i in range(12) for kind in TYPES}
VECTORS = {f"model.layers.{i}.{name}": [8] for i in range(12) for name in ("self_attn.q_proj.bias", "norm.weight")}
SHAPES = {"model.embed_tokens.weight": [100, 8], **LAYERS, **VECTORS, "model.norm.weight": [8]}
UNTIED = {**SHAPES, "lm_head.weight": [100, 8]}
BOTH = ["^lm_head.weight$", "^model.embed_tokens.weight$"]


def layers(kind, *numbers):
    return [f"model.layers.{i}.{kind}.weight" for i in numbers]


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["model.layers.3.mlp.up_proj"], layers("mlp.up_proj", 3)),
        (["model.layers.3.mlp.up_proj.weight"], layers("mlp.up_proj", 3)),
        (["^model.layers.3.mlp.up_proj.weight$"], layers("mlp.up_proj", 3)),
        ([r"model\.layers\.3\.mlp\.up_proj"], layers("mlp.up_proj", 3)),
        (["model.layers.1."], [name for name in LAYERS if ".1." in name]),  # not of layers 10 and 11
        (["model.layers.(1|3).mlp.up"], layers("mlp.up_proj", 1, 3)),
        (["model.layers.[0-1].self_attn.v", "model.layers.0.self_attn.v_proj"], layers("self_attn.v_proj", 0, 1)),
        (["model.layers.1.*.up_proj"], layers("mlp.up_proj", 1, 10, 11)),  # TRL's dots are wild
        ([".*up_proj"], layers("mlp.up_proj", *range(12))),
        (["model.layers.3.self_attn.q_proj"], layers("self_attn.q_proj", 3)),  # and its bias, which stays frozen
        ([*reversed(layers("mlp.up_proj", 3, 5))], layers("mlp.up_proj", 3, 5)),
        ([*BOTH, "model.layers.3.mlp.up_proj"], layers("mlp.up_proj", 3)),
        (["model"], [*LAYERS]),
    ],
)
@pytest.mark.parametrize("shapes", [SHAPES, UNTIED], ids=["tied", "untied"])
def test_what_a_list_chooses(shapes, patterns, names):
    assert matched(shapes, patterns) == tuple(names)


@pytest.mark.parametrize(
    ("shapes", "patterns", "said"),
    [
        (SHAPES, [], r"the list \(0 names\) chooses no weight matrix"),
        (SHAPES, BOTH, r"the list \(2 names\) chooses no weight matrix of the decoder's layers"),
        (SHAPES, ["model.norm"], r"the list \(1 names\) chooses no weight matrix of the decoder's layers"),
        (
            SHAPES,
            ["model.layers.0.mlp.up_proj", "model.layers.12.mlp.up_proj", "model.layers.13.mlp.up_proj"],
            r"2 of the list's 3 names match nothing in the model, first model.layers.12.mlp.up_proj; "
            r"the nearest is model.layers.\d+.mlp.up_proj. Is the list another model's",
        ),
        (SHAPES, ["^model.layers.0.mlp.up_prj$"], "the nearest is model.layers.0.mlp.up_proj"),
        (SHAPES, ["layers.0.mlp.up_proj"], "1 of the list's 1 names match nothing"),  # not at the beginning
        (SHAPES, ["modelxlayers.0.mlp.up_proj"], "1 of the list's 1 names match nothing"),
        (SHAPES, ["modelxlayers"], "1 of the list's 1 names match nothing"),
        (SHAPES, ["model.layersx0.mlp"], "1 of the list's 1 names match nothing"),
        ({"a.0.b.weight": [2, 2]}, ["^lm_head.weight$"], "1 of the list's 1 names match nothing"),
        (SHAPES, ["^model.embed_tokens.weight$[:32000]"], r"\[:32000\]: rows of a matrix are not trained alone"),
        (SHAPES, ["model.layers.0.mlp.up_proj.weight[5]"], "rows of a matrix are not trained alone"),
        (SHAPES, ["model.layers.0.mlp.up_proj.weight[5:9]"], "rows of a matrix are not trained alone"),
        (SHAPES, ["model.layers.(0"], r"model.layers.\(0: not a regular expression"),
    ],
)
def test_wrong_lists_are_told(shapes, patterns, said):
    with pytest.raises(UserError, match=said) as caught:
        matched(shapes, patterns)
    assert str(caught.value).count("\n") == 0


@given(picked=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, unique=True))
def test_a_list_that_was_written_chooses_what_was_chosen(tmp_path_factory, picked):
    modules = [name.removesuffix(".weight") for name in picked]
    file = tmp_path_factory.getbasetemp() / "written.yaml"
    file.write_text(as_yaml({kind: [m for m in modules if layer_type(m) == kind] for kind in TYPES}, "of a test"))
    assert {*matched(SHAPES, read_list(file))} == {*picked}


@pytest.mark.parametrize(
    ("shapes", "patterns", "names"),
    [
        (SHAPES, BOTH, ["model.embed_tokens.weight"]),
        (SHAPES, BOTH[:1], ["model.embed_tokens.weight"]),  # one tensor under two names
        (UNTIED, BOTH[:1], ["lm_head.weight"]),
        (UNTIED, BOTH, ["model.embed_tokens.weight", "lm_head.weight"]),
        (UNTIED, [".*"], ["model.embed_tokens.weight", *LAYERS, "lm_head.weight"]),
    ],
)
def test_embeddings_if_asked_for(shapes, patterns, names):
    assert matched(shapes, patterns, embeddings=True) == tuple(names)


def test_counts_and_what_is_left_out_are_said(caplog):
    caplog.set_level(logging.INFO, "spinfast")
    matched(UNTIED, [*BOTH, "model.layers.0.norm", "model.layers.1.norm.weight", "model.layers.[34].mlp.(up|down)"])
    assert [record.getMessage() for record in caplog.records] == [
        "2 names of the list are vectors (first model.layers.0.norm): left out, matrices are trained",
        "the list names lm_head.weight and model.embed_tokens.weight: left out; asked for, they are 0.0 M parameters "
        "more",
        "4 of 84 matrices, 0.0 M of 0.0 M parameters: 2 mlp.down_proj, 2 mlp.up_proj",
    ]
