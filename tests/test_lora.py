"""LoRA's settings are PEFT's: the same tensors, numbers and files as its LoraConfig gives, and nothing passed over."""

import pytest
import torch
from packed_cases import make_groups, plain_logps
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from spinfast import ops
from spinfast.config import Full, Lora, LoraXs
from spinfast.device import profile
from spinfast.errors import UserError
from spinfast.generation.canary import amplified
from spinfast.packing import pack
from spinfast.policy.adapters import files as adapters
from spinfast.policy.transformers import load_policy
from spinfast.scoring import answer_logps

CASES = {
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.up_proj": 2}},
    "alphas": {"alpha_pattern": {"q_proj": 1, "down_proj": 32}},
    "all of them": {
        **{"use_rslora": True, "rank_pattern": {"v_proj": 2, "embed_tokens": 6}},
        **{"alpha_pattern": {"v_proj": 3, "embed_tokens": 12}, "target_modules": ["v_proj", "embed_tokens", "o_proj"]},
    },
    "layers": {"layers_to_transform": [1]},
    "layers of names": {"layers_to_transform": [0, 1], "target_modules": ["q_proj", "layers.0.mlp.up_proj"]},
    "excluded": {"exclude_modules": ["layers.0.self_attn.q_proj", "up_proj"]},
    "excluded by expression": {"exclude_modules": r".*mlp.*"},
    "expression": {"target_modules": r".*layers\.0\..*(k|down)_proj"},
    "gaussian": {"init_lora_weights": "gaussian", "rank_pattern": {"q_proj": 2}},
    "orthogonal": {"init_lora_weights": "orthogonal", "use_rslora": True, "rank_pattern": {"q_proj": 2}},
}
OURS = CASES | {"pissa": {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 2}}}
GROUPS = make_groups([(4, (5, 3)), (1, (2, 6))])
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SPINFAST_CACHE", str(tmp_path_factory.getbasetemp() / "frames"))


def policy_of(path, settings, seed=0):
    options = {"ops": ops.EAGER, "profile": profile("cpu", "float32"), "load_in_4bit": False, "seed": seed}
    return load_policy(path, "tiny", "0" * 40, lora=settings, **options)


def section(changes):
    return Lora(**{"r": 4, "alpha": 6} | changes)


def peft_of(path, changes, seed=0):
    """By PEFT alone, of the same seed. It takes numbers of layers only beside names."""
    base = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    changes = {"target_modules": "all-linear"} | changes
    if changes["target_modules"] == "all-linear" and "layers_to_transform" in changes:
        changes["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **changes))


def peft_tensors(model):
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def peft_logps(model):
    return torch.cat([plain_logps(model, g.prompt_ids, answer) for g in GROUPS for answer in g.answers])


def logps_of(policy):
    return answer_logps(policy, pack(GROUPS, range(len(GROUPS)), "sdpa"))


def moved(policy, scale=0.1):
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.trainable_parameters().values():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return policy


@pytest.mark.parametrize("name", CASES)
def test_it_is_pefts(tiny_model, tmp_path, name):
    """Start, log-probs, gradients, and what is saved, which plain PEFT loads."""
    path, changes = tiny_model("llama"), CASES[name]
    policy, model = policy_of(path, section(changes)), peft_of(path, changes)
    ours, theirs = policy.adapter().tensors, peft_tensors(model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours), "another start"
    policy.restart(7)
    again = peft_tensors(peft_of(path, changes, 7))
    assert all(torch.equal(tensor, again[n]) for n, tensor in policy.adapter().tensors.items()), "another restart"
    moved(policy)
    for theirs, ours in zip(
        (p for p in model.parameters() if p.requires_grad), policy.trainable_parameters().values(), strict=True
    ):
        theirs.data = ours.detach().clone()
    found, expected = logps_of(policy), peft_logps(model)
    assert torch.allclose(found, expected, atol=1e-4)
    with policy.without_adapter():
        assert not torch.allclose(found, logps_of(policy), atol=1e-2), "the case is too easy"
    found.sum().backward()
    expected.sum().backward()
    for (key, ours), theirs in zip(
        policy.trainable_parameters().items(), (p for p in model.parameters() if p.requires_grad), strict=True
    ):
        assert (ours.grad - theirs.grad).norm() <= 1e-3 * theirs.grad.norm(), key
    policy.save_adapter(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    assert torch.allclose(peft_logps(PeftModel.from_pretrained(base, tmp_path).eval()), found, atol=1e-4)


@pytest.mark.parametrize("name", OURS)
def test_saved_and_loaded_it_is_the_same_to_the_bit(tiny_model, tmp_path, name):
    settings = section(OURS[name])
    policy = moved(policy_of(tiny_model("llama"), settings))
    policy.save_adapter(tmp_path)
    saved, other = adapters.load(tmp_path), policy_of(tiny_model("llama"), settings)
    other.load_adapter(saved)
    assert torch.equal(logps_of(other), logps_of(policy))
    assert adapters.fingerprint(saved) == adapters.fingerprint(policy.adapter())
    served = policy.serving(policy.adapter())[1]  # what an engine takes
    assert max(t.shape[adapters.rank_axis(n)] for n, t in served.tensors.items()) == served.config["r"]
    assert served.config["r"] <= settings.largest_rank
    plain = policy_of(tiny_model("llama"), Lora(**adapters.settings(served)))
    plain.load_adapter(served)
    assert torch.allclose(logps_of(plain), logps_of(policy), atol=1e-5)


@pytest.mark.parametrize("name", OURS)
def test_merged_rounds_come_apart_as_they_were(tiny_model, tmp_path, name):
    """A stack of three is plain PEFT of the base alone, and its parts are the single ones to the bit."""
    path, settings = tiny_model("llama", tied=False), section(OURS[name] | {"init": "merge"})
    policy = policy_of(path, settings)
    for seed in (1, 2):
        moved(policy)
        policy.merge_and_restart(seed)
    moved(policy, 0.05)
    found = logps_of(policy)
    policy.save_adapter(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    assert torch.allclose(peft_logps(PeftModel.from_pretrained(base, tmp_path).eval()), found, atol=1e-3)
    other = policy_of(path, settings)
    other.restore(adapters.load(tmp_path))
    assert torch.equal(logps_of(other), found)
    assert [*map(adapters.fingerprint, other.folded)] == [*map(adapters.fingerprint, policy.folded)]
    assert adapters.fingerprint(other.full_adapter()) == adapters.fingerprint(policy.full_adapter())


@pytest.mark.parametrize("name", ["rslora", "ranks", "orthogonal", "all of them"])
@pytest.mark.parametrize("start", ["rslora", "ranks", "excluded"])
def test_one_goes_on_from_another(tiny_model, name, start):
    """Of other ranks and scalings: it adds the same, and every rank can be trained."""
    few = {"target_modules": ["v_proj", "o_proj"], "exclude_modules": None}
    first = {"r": 2, **CASES[start] | few | {"rank_pattern": {"v_proj": 1}}}
    other = moved(policy_of(tiny_model("llama"), section(first)))
    policy = policy_of(tiny_model("llama"), section(CASES[name]))
    policy.load_adapter(policy.grown(other.adapter(), policy.adapter()))
    assert torch.allclose(logps_of(policy), logps_of(other), atol=1e-5)
    logps_of(policy).sum().backward()
    for key, parameter in policy.trainable_parameters().items():
        if "lora_A" in key:
            b = policy.trainable_parameters()[key.replace("lora_A", "lora_B")]
            assert (parameter.grad.any(1) | b.grad.any(0)).all(), key


@pytest.mark.parametrize("name", ["rslora", "orthogonal", "all of them", "pissa"])
def test_it_adds_nothing_before_it_is_trained(tiny_model, name):
    policy = policy_of(tiny_model("llama"), section(OURS[name]))
    adapter = policy.adapter()
    with policy.without_adapter():
        base = logps_of(policy)
    assert torch.allclose(logps_of(policy), base, atol=1e-5)
    assert adapters.idle(adapter)
    optimizer = torch.optim.AdamW(policy.trainable_parameters().values(), lr=1e-5)
    logps_of(policy).sum().backward()
    optimizer.step()
    assert not adapters.idle(policy.adapter())
    assert adapters.idle(amplified(policy.adapter(), 0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_modules": ["q_proj", "queue_proj"]}, "target_modules: 'queue_proj' matches no layer"),
        ({"target_modules": r".*queue"}, r"target_modules: '.\*queue' matches no layer"),
        ({"layers_to_transform": [0, 7]}, "layers_to_transform: 7 matches no layer"),
        ({"layers_to_transform": [1], "exclude_modules": r".*\.1\..*"}, "layers_to_transform: 1 matches no layer"),
        ({"exclude_modules": ["queue_proj"]}, "exclude_modules: 'queue_proj' matches no layer"),
        ({"exclude_modules": ".*"}, "exclude_modules: no layer is left"),
        ({"exclude_modules": "("}, "adapter: missing \\)"),
        ({"rank_pattern": {"queue_proj": 2}}, "rank_pattern: 'queue_proj' matches no layer"),
        ({"alpha_pattern": {"proj": 2}}, "alpha_pattern: 'proj' matches no layer"),
        ({"rank_pattern": {"q_proj": 2}, "target_modules": ["v_proj"]}, "rank_pattern: 'q_proj' matches no layer"),
        ({"rank_pattern": {"(": 2}}, "adapter: missing \\)"),
        (
            {"rank_pattern": {"q_proj": 2, r"layers\.0\..*": 8}},
            r"rank_pattern: 'q_proj' and .* both match model.layers.0.self_attn.q_proj",
        ),
        ({"init_lora_weights": "orthogonal", "rank_pattern": {"q_proj": 3}}, "rank to be even, got 3"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head stays as it is"),
        (
            {"init_lora_weights": "pissa", "target_modules": ["q_proj", "embed_tokens"]},
            "target_modules: 'embed_tokens' matches no layer",
        ),
        ({"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 33}}, "adapter.r: 33 is more than .*k_proj has, 32"),
    ],
    ids=str,
)
def test_what_matches_nothing_is_named(tiny_model, changes, words):
    with pytest.raises(UserError, match=words):
        policy_of(tiny_model("llama"), section(changes))


def test_of_whole_matrices_the_head_has_a_key_of_its_own(tiny_model):
    with pytest.raises(UserError, match=r"lm_head stays as it is, adapter.embeddings: true trains it; leave it out"):
        policy_of(tiny_model("llama"), Full(kind="full", target_modules=("lm_head",)))


def test_two_patterns_of_one_value_may_match(tiny_model):
    policy = policy_of(
        tiny_model("llama"), section({"rank_pattern": {"q_proj": 2, r"layers\.0\.self_attn\.q_proj": 2}})
    )
    assert {t.shape[0] for n, t in policy.adapter().tensors.items() if "q_proj.lora_A" in n} == {2}


def test_layers_and_exclusions_are_every_kinds(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("SPINFAST_CACHE", str(tmp_path))
    few = {"layers_to_transform": (1,), "exclude_modules": ("up_proj",)}
    policy = policy_of(tiny_model("llama"), LoraXs(kind="lora_xs", r=2, alpha=2, **few))
    assert [name.split(".")[2] for name in policy.adapter().config["modules"]] == ["1"] * 6
    with pytest.raises(UserError, match="target_modules: 'embed_tokens' matches no layer"):
        policy_of(tiny_model("llama"), LoraXs(kind="lora_xs", r=2, alpha=2, target_modules=("embed_tokens", "q_proj")))


def test_layers_go_with_names():
    with pytest.raises(ValidationError, match="write the layers into the regular expression"):
        Lora(target_modules=r".*q_proj", layers_to_transform=(1,))
    assert Lora(init_lora_weights=True) == Lora()
