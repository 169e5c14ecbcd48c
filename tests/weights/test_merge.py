"""Merging models: methods and recipes against mergekit's recorded values, the YAML's properties."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from merged_models import TABLE, make
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spinfast.errors import UserError
from spinfast.models import load_tokenizer
from spinfast.run import main
from spinfast.weights.merge import METHODS
from spinfast.weights.recipe import KNOWN, Recipe, Reference, Setting, read_recipe, resolved

MERGEKIT = Path(__file__).parent / "mergekit"
CASES = json.loads((MERGEKIT / "cases.json").read_text())
RECIPES = sorted(path.stem for path in MERGEKIT.glob("*.yaml"))
VOCABULARIES = [name for name in RECIPES if name.startswith("vocabulary")]


# Methods


@pytest.fixture(scope="module")
def recorded():
    return load_file(MERGEKIT / "cases.safetensors")


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{n}-{case['method']}" for n, case in enumerate(CASES)])
def test_a_method_is_mergekits(recorded, number):
    case = CASES[number]
    base = recorded[f"{number}.base"] if case["base"] else None
    tensors = [recorded[f"{number}.{n}"] for n in range(case["count"])]
    method, before = METHODS[case["method"]], [tensor.clone() for tensor in tensors]
    given = {n: v for n, v in method.shared.items() if v is not None} | case["shared"]
    given |= {n: [v] * len(tensors) for n, v in method.each.items() if v is not None} | case["each"]
    found = method(base, tensors, given, seed=number)
    assert torch.allclose(found, recorded[f"{number}.merged"], atol=1e-6, rtol=1e-6)
    assert all(map(torch.equal, tensors, before))  # they are read only


def test_every_method_is_held_against_mergekit():
    assert {case["method"] for case in CASES} == METHODS.keys()


@given(density=st.floats(0.05, 0.95), seed=st.integers(0, 999))
@settings(max_examples=20)
def test_dare_as_in_its_paper_divides_by_the_density(density, seed):
    base, model = torch.zeros(4000), torch.ones(4000)
    given = {"weight": [1.0], "density": [density], "normalize": False, "lambda": 1.0}
    paper = METHODS["dare_linear"](base, [model], given | {"rescale": "density"}, seed)
    kept = paper != 0
    assert torch.allclose(paper[kept], torch.tensor(1 / density))
    assert abs(kept.float().mean() - density) < 0.05
    same_norm = METHODS["dare_linear"](base, [model], given | {"rescale": True}, seed)
    assert same_norm.sum() == pytest.approx(4000, rel=1e-4)
    assert torch.equal(same_norm != 0, kept)


def test_corners():
    ones, zeros = torch.ones(6), torch.zeros(6)
    assert torch.allclose(METHODS["slerp"](ones, [2 * ones], {"t": 0.5}), 1.5 * ones)  # parallel
    assert torch.equal(METHODS["slerp"](zeros, [ones], {"t": 0.5}).isfinite(), ones.bool())
    stock = METHODS["model_stock"](zeros, [ones, -ones], {"filter_wise": False})  # N = 2, c = -1: no finite t
    assert torch.equal(stock, zeros)
    assert torch.equal(METHODS["karcher"](None, [zeros, zeros], {"max_iter": 10, "tol": 1e-5}), zeros)
    with pytest.raises(UserError, match="add up to 0"):
        METHODS["linear"](None, [ones, ones], {"weight": [1, -1], "normalize": True})


# Recipes


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory with the models A, B, C, B-more and C-more."""
    room = tmp_path_factory.mktemp("merge")
    make(room, load_file(MERGEKIT / "models.safetensors"))
    return room


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in VOCABULARIES])
def test_a_recipe_makes_what_mergekit_made(models, tmp_path, monkeypatch, name):
    monkeypatch.chdir(models)
    recipe = MERGEKIT / f"{name}.yaml"
    assert main(["merge", str(recipe), "--out", str(tmp_path / "out")]) == 0
    found, expected = load_file(tmp_path / "out/model.safetensors"), load_file(MERGEKIT / f"{name}.safetensors")
    assert found.keys() == expected.keys()
    for tensor in found:
        assert torch.allclose(found[tensor], expected[tensor], atol=1e-6, rtol=1e-6), tensor
    assert (tmp_path / "out/mergekit_config.yml").read_text() == recipe.read_text()


@pytest.mark.parametrize("name", VOCABULARIES)
def test_rows_are_brought_together_by_token_as_mergekit_does(models, tmp_path, monkeypatch, name):
    monkeypatch.chdir(models)
    assert main(["merge", str(MERGEKIT / f"{name}.yaml"), "--out", str(tmp_path / "out")]) == 0
    with safe_open(MERGEKIT / f"{name}.safetensors", framework="pt") as file:
        theirs, expected = json.loads(file.metadata()["tokens"]), file.get_tensor(TABLE)
    ours, found = load_tokenizer(tmp_path / "out").get_vocab(), load_file(tmp_path / "out/model.safetensors")[TABLE]
    assert ours.keys() == {*theirs}
    rows = [ours[token] for token in theirs]
    assert torch.allclose(found[rows], expected[: len(rows)], atol=1e-6, rtol=1e-6)
    assert found.shape == expected.shape
    assert torch.allclose(found[len(rows) :], expected[len(rows) :], atol=1e-6)  # those that are no token's
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


knots = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=7)


@given(knots=knots, t=st.floats(0, 1))
def test_a_gradient_is_linear_between_knots_of_equal_distance(knots, t):
    expected = np.interp(t, np.linspace(0, 1, len(knots)), knots) if len(knots) > 1 else knots[0]
    assert Setting(tuple(knots)).at(t) == pytest.approx(expected, abs=1e-6)


filters = st.sampled_from([None, "*", "mlp", "self_attn", "norm", "embed"])
levels = st.lists(st.lists(st.builds(Setting, st.integers(0, 99), filters), max_size=3).map(tuple), max_size=4)


@given(
    levels=levels, name=st.sampled_from(["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
)
def test_the_strongest_level_with_a_filter_that_holds_counts(levels, name):
    every = [one for level in levels for one in level]
    holding = [one.value for one in every if one.filter in (None, "*") or one.filter in name]
    assert resolved("weight", [{"weight": level} for level in levels], name, 0.5) == (holding or [None])[0]


trees = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["A", "A+b", "linear"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [*Recipe.model_fields, "model", "sources", "layer_range", "weight", "filter", "value", "wieght"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(tree=trees, at=st.sampled_from(["models", "slices", "modules", "parameters", "tokenizer", None]))
@example(tree={"parameters": {"merge_method": None}}, at="modules")  # a module of a key's name
@settings(max_examples=100)
def test_any_tree_is_a_recipe_or_one_line(tmp_path_factory, tree, at):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    whole = {"models": [{"model": "A"}], "merge_method": "linear"}
    file.write_text(yaml.safe_dump(whole | {at: tree} if at else tree))
    said = []
    try:
        assert read_recipe(file).models_named
    except UserError as error:
        said = [str(error)]
    assert all(line.startswith(f"recipe {file}: ") and "\n" not in line for line in said)


@given(name=st.sampled_from(sorted(KNOWN - {"t"})), place=st.integers(0, 20))
def test_a_letter_too_much_is_told(tmp_path_factory, name, place):
    wrong, file = (
        name[: place % len(name)] + "q" + name[place % len(name) :],
        tmp_path_factory.getbasetemp() / "typo.yaml",
    )
    file.write_text(f"merge_method: ties\nbase_model: A\nmodels: [{{model: B, parameters: {{{wrong}: 1}}}}]\n")
    with pytest.raises(UserError, match=f"unknown parameter '{wrong}'; did you mean '{name}'"):
        read_recipe(file)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"merge_metod": "ties"}, "unknown key 'merge_metod'; did you mean 'merge_method'?"),
        ({"models": [{"model": "A", "parameter": {}}]}, "unknown key 'models.0.parameter'; did you mean 'parameters'?"),
        ({"embed_slerp": True}, "unknown key 'embed_slerp'; valid keys: "),
        ({"merge_method": "della"}, "got 'della'; that one is mergekit's alone"),
        ({"merge_method": "task_arithmetik"}, "did you mean 'task_arithmetic'?"),
        ({"merge_method": None}, "merge_method: "),
        (
            {"slices": [{"sources": [{"model": "A", "layer_range": [0, 2]}]}]},
            "expected exactly one of them, got models, sli",
        ),
        ({"models": None}, "expected exactly one of them, got none"),
        (
            {"models": [{"model": "a@b@c"}]},
            "models.0.model: expected path@revision+adapter@revision, each once and as needed, got 'a@b@c'",
        ),
        ({"dtype": "int8"}, "dtype: "),
        ({"parameters": {"density": 1.5}}, "expected a share between 0 and 1, got 1.5"),
        ({"parameters": {"weight": "much"}}, "weight: expected a number or a list of numbers, got 'much'"),
        ({"parameters": {"weight": []}}, "expected at least one knot"),
        ({"parameters": {"normalize": "maybe"}}, "normalize: expected true or false, got 'maybe'"),
        ({"parameters": {"weight": [{"filter": "mlp", "valu": 1}]}}, "weight: expected value and filter"),
        ({"tokenizer_source": "C"}, "tokenizer_source: expected union, base or one of the models, got 'C'"),
        ({"tokenizer": {"source": "base", "tokens": {}}}, "tokenizer.tokens: this is not built, leave it out, got {}"),
        ({"chat_template": "alpaca"}, "expected auto, chatml, llama3, or the template as Jinja, got 'alpaca'"),
        ({"modules": {"text": {"models": [{"model": "A"}]}}, "models": None}, "expected default alone"),
    ],
)
def test_what_is_wrong_is_told_by_its_key(tmp_path, changes, words):
    tree = {"models": [{"model": "A"}, {"model": "B"}], "merge_method": "linear"} | changes
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in tree.items() if value is not None}))
    with pytest.raises(UserError) as error:
        read_recipe(file)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b@main+c", ("a/b", "main", "c", None)),
        ("a/b+c", ("a/b", None, "c", None)),
        ("a/b@v1+c/d@v2", ("a/b", "v1", "c/d", "v2")),
        ({"model": "a b", "lora": {"path": "c", "revision": "v2"}}, ("a b", None, "c", "v2")),
        ({"model": {"path": "a/b", "revision": "v1"}}, ("a/b", "v1", None, None)),
    ],
)
def test_what_references_mean(text, expected):
    found = Reference.parse(text)
    assert found == Reference(*expected)
    assert Reference.parse(str(found)) == found


def test_a_directory_may_be_called_anything(tmp_path):
    odd = tmp_path / "x@1+y"
    odd.mkdir()
    assert Reference.parse(str(odd)) == Reference(str(odd))
    (tmp_path / "x@1").mkdir()
    assert Reference.parse(f"{tmp_path}/x@1+c") == Reference(f"{tmp_path}/x@1", None, "c")


@pytest.mark.parametrize(
    "text", ["a@b@c", "a+b+c", "a+", "@b", "", 3, {"lora": "x"}, {"model": "a", "architecture": "b"}]
)
def test_what_is_no_reference(text):
    with pytest.raises(ValueError, match="expected path@revision\\+adapter@revision"):
        Reference.parse(text)
