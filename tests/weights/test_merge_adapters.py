"""Adapters merged with one another: exact sums of any ranks, brought down to a rank, elections; what comes out."""

import logging

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from spinfast.policy.adapters import files as adapters
from spinfast.run import main
from spinfast.weights.adapter_merge import truncated
from spinfast.weights.merge import METHODS

Q, UP, O = (
    f"model.layers.{n}.{of}.weight" for n, of in ((0, "self_attn.q_proj"), (1, "mlp.up_proj"), (1, "self_attn.o_proj"))
)


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """Four adapters of one base: other ranks, scalings, modules; rank-stabilised; patterns."""
    base, found = tiny_model("llama"), {}
    given = {
        "small": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]},
        "wide": {"r": 6, "lora_alpha": 3, "target_modules": ["q_proj", "o_proj"]},
        "stable": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "use_rslora": True},
        "mixed": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "o_proj"], "rank_pattern": {"q_proj": 1}},
    }
    for seed, (name, config) in enumerate(given.items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base)
        model = get_peft_model(model, LoraConfig(**config, init_lora_weights=False, task_type="CAUSAL_LM"))
        found[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(found[name])
    return base, found


def updates(base, directory):
    """What PEFT adds to each weight of the base, by merging."""
    model = AutoModelForCausalLM.from_pretrained(base)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    after = PeftModel.from_pretrained(model, directory).merge_and_unload().state_dict()
    return {name: after[name] - t for name, t in before.items() if not torch.equal(after[name], t)}


def merge(tmp_path, models, method, *words, **more):
    tree = {"merge_method": method, "models": [{"model": str(path), "parameters": given} for path, given in models]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree | more))
    return main(["merge", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out"), *words])


def test_a_weighted_sum_is_exact_whatever_the_ranks(made, tmp_path, capsys):
    base, found = made
    weight = dict(zip(found, (0.7, -0.4, 1.2, 0.5), strict=True))
    assert merge(tmp_path, [(path, {"weight": weight[name]}) for name, path in found.items()], "task_arithmetic") == 0
    assert "rank 13, relative error 0" in capsys.readouterr().out  # q_proj: 2 + 6 + 4 + 1
    expected = {name: updates(base, path) for name, path in found.items()}
    merged = updates(base, tmp_path / "out")
    for name in merged:
        total = sum(weight[each] * own[name] for each, own in expected.items() if name in own)
        assert torch.allclose(merged[name], total, atol=2e-6), name
    assert merged.keys() == {name for own in expected.values() for name in own}


def test_a_mean_by_layer_and_filter(made, tmp_path):
    base, found = made
    models = [
        (found["small"], {"weight": [1, 3]}),
        (found["stable"], {"weight": [{"filter": "up_proj", "value": 0}, {"value": 1}]}),
    ]
    assert merge(tmp_path, models, "linear") == 0
    one, two, merged = (updates(base, path) for path in (found["small"], found["stable"], tmp_path / "out"))
    assert torch.allclose(merged[Q], (one[Q] + two[Q]) / 2, atol=2e-6)
    assert torch.allclose(merged[UP], one[UP], atol=2e-6)


@given(ranks=st.tuples(st.integers(1, 6), st.integers(1, 9)), sizes=st.tuples(st.integers(6, 20), st.integers(6, 20)))
@settings(max_examples=30)
def test_brought_down_it_is_the_best_of_its_rank(ranks, sizes):
    rank, r = ranks
    draw = torch.Generator().manual_seed(sum(ranks) + sum(sizes))
    B, A = torch.randn(sizes[0], r, generator=draw), torch.randn(r, sizes[1], generator=draw)
    (B2, A2), lost, whole = truncated(B, A, rank)
    U, S, Vh = torch.linalg.svd((B @ A).double(), full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    assert torch.allclose((B2 @ A2).double(), best, atol=1e-3)
    assert whole == pytest.approx(float((S**2).sum()), rel=1e-4)
    assert lost == pytest.approx(float((S[rank:] ** 2).sum()), abs=1e-4 * whole)


def test_the_error_that_is_told_is_that_of_the_update(made, tmp_path, capsys):
    base, found = made
    models = [(found["small"], {"weight": 1}), (found["wide"], {"weight": 1})]
    assert merge(tmp_path, models, "task_arithmetic", "--rank", "3") == 0
    said = float(capsys.readouterr().out.split("relative error ")[1])
    one, two, merged = (updates(base, path) for path in (found["small"], found["wide"], tmp_path / "out"))
    cut = {n: one.get(n, 0) + two.get(n, 0) for n in merged}
    lost = sum(float((cut[n] - t).square().sum()) for n, t in merged.items())
    whole = sum(float(t.square().sum()) for n, t in cut.items())
    assert said == pytest.approx((lost / whole) ** 0.5, rel=0.05)
    assert 0.05 < said < 0.9
    assert adapters.load(tmp_path / "out").config["r"] == 3


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear", "breadcrumbs"])
def test_elections_are_of_the_updates(made, tmp_path, method):
    base, found = made
    given = {"weight": 0.8, "density": 0.4}
    models = [(found[name], dict(given)) for name in ("small", "stable")]
    assert merge(tmp_path, models, method, "--rank", "64") == 0  # of 64: nothing is left out
    one, two, merged = (updates(base, path) for path in (found["small"], found["stable"], tmp_path / "out"))
    for name in (Q, UP):
        of = METHODS[method]
        parameters = dict(of.shared) | {n: [given.get(n, default)] * 2 for n, default in of.each.items()}
        expected = of(torch.zeros_like(one[name]), [one[name], two[name]], parameters)
        if of.random:  # its own choice: it is one of the values that may be
            share = (merged[name].abs() > 1e-5).float().mean()
            assert 0.25 < share < 0.75
        else:
            assert torch.allclose(merged[name], expected, atol=1e-5)


def test_the_merged_adapter_is_folded_like_any_other(made, tmp_path):
    base, found = made
    assert merge(tmp_path, [(found["small"], {"weight": 1}), (found["stable"], {"weight": 1})], "linear") == 0
    words = ["--out", str(tmp_path / "model"), "--model", str(base)]
    assert main(["merge", str(tmp_path / "out"), *words]) == 0
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.allclose(folded(ids).logits, peft(ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"merge_method": "slerp", "parameters": {"t": 0.5}}, "merge_method slerp: adapters are merged by linear"),
        ({"models": ["small", "base"]}, "is an adapter, "),
        ({"models": ["small", "torn"]}, "cannot be read"),
        ({"models": ["small", "strange"]}, "the adapters' matrices have other sizes"),
        ({"models": ["small", "nan"]}, "is not finite"),
        ({"tokenizer_source": "base"}, "an adapter has neither"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_line(made, tiny_model, tmp_path, capsys, change, words, caplog):
    base, found = made
    small = adapters.load(found["small"])
    wrong = {
        "strange": {n: torch.cat([t, t], 1 - adapters.rank_axis(n)) for n, t in small.tensors.items()},
        "nan": {n: t * float("nan") for n, t in small.tensors.items()},
    }
    for name, tensors in wrong.items():
        adapters.save(type(small)(small.config, tensors), tmp_path / name)
    adapters.save(small, tmp_path / "torn")
    (tmp_path / "torn/adapter_model.safetensors").write_bytes(b"torn")
    places = found | {"base": base} | {name: tmp_path / name for name in ("strange", "nan", "torn")}
    named = change.get("models", ["small", "wide"])
    tree = {"merge_method": "linear"} | change
    tree["models"] = [{"model": str(places[name]), "parameters": {"weight": 1}} for name in named]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    caplog.set_level(logging.ERROR)
    assert main(["merge", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spinfast")]
    assert len(lines) == 1
    assert words in lines[0]
    assert not (tmp_path / "out").exists()
