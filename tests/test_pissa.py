"""PiSSA on a base that is never changed: PEFT's, in what is computed and trained; a plain LoRA, in what is saved."""

import pytest
import torch
from peft import PeftModel
from test_adapter_kinds import scaled
from test_lora import logps_of, moved, peft_logps, peft_of, policy_of, section
from transformers import AutoConfig, AutoModelForCausalLM

from spinfast import ops
from spinfast.config import parse_config
from spinfast.device import profile
from spinfast.errors import UserError
from spinfast.generation.canary import STRONG, amplified, policy_logps
from spinfast.params import count
from spinfast.policy.adapters import files as adapters
from spinfast.policy.transformers import load_policy

PISSA = {"init_lora_weights": "pissa"}
PATTERNS = {"rank_pattern": {"q_proj": 8, "up_proj": 2}, "alpha_pattern": {"down_proj": 1}, "use_rslora": True}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern"),  # it could not convert
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SPINFAST_CACHE", str(tmp_path_factory.getbasetemp() / "frames"))


def in_dtype(dtype, path, changes):
    options = {"ops": ops.EAGER, "profile": profile("cpu", dtype), "load_in_4bit": False, "seed": 0}
    return load_policy(path, "tiny", "0", lora=section(changes), **options)


def trained(policy, optimizer, logps, steps=4):
    for _ in range(steps):
        optimizer.zero_grad()
        (-logps(policy).mean()).backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("changes", [{}, PATTERNS], ids=["plain", "patterns"])
def test_it_computes_and_trains_what_pefts_does_on_its_changed_base(tiny_model, changes, optimizer):
    """Signs of singular vectors are LAPACK's there: the weights that come out are compared."""
    path, changes = tiny_model("llama"), changes | PISSA
    policy, theirs = policy_of(path, section(changes)), peft_of(path, changes)
    checksum = policy.base_checksum()
    base = dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).named_parameters())

    def weights():
        for name, weight, delta in zip(policy.kind.names, policy.kind.weights(), policy.kind.deltas(), strict=True):
            layer = theirs.base_model.model.get_submodule(name)
            expected = layer.get_base_layer().weight + layer.get_delta_weight("default")
            yield base[f"{name}.weight"], weight, delta, expected

    for before, _, delta, expected in weights():
        assert not delta.any()
        assert torch.allclose(before, expected, atol=1e-6)
    options = {"lr": 1e-2} if optimizer is torch.optim.SGD else {"lr": 1e-3, "weight_decay": 0.0}
    trained(policy, optimizer(policy.trainable_parameters().values(), **options), logps_of)
    trained(theirs, optimizer([p for p in theirs.parameters() if p.requires_grad], **options), peft_logps)
    for before, weight, delta, expected in weights():
        assert delta.norm() > 1e-3 * weight.norm(), "the case is too easy"
        assert (delta - (expected - before)).norm() <= 1e-3 * delta.norm()
        assert torch.equal(weight, before)
    assert torch.allclose(logps_of(policy), peft_logps(theirs), atol=1e-4)
    assert policy.base_checksum() == checksum


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_starts_as_the_base_to_the_bit(tiny_model, dtype):
    policy = in_dtype(dtype, tiny_model("llama"), PISSA | PATTERNS)
    with policy.without_adapter():
        base = logps_of(policy)
    assert torch.equal(logps_of(policy), base)
    moved(policy)
    assert not torch.equal(logps_of(policy), base)
    policy.restart(1)
    assert torch.equal(logps_of(policy), base)


def test_saved_it_is_plain_peft_of_twice_the_rank(tiny_model, tmp_path):
    path = tiny_model("qwen2")
    policy = moved(policy_of(path, section(PISSA | PATTERNS)))
    policy.save_adapter(tmp_path)
    saved = adapters.load(tmp_path)
    assert (saved.config["r"], saved.config["rank_pattern"]) == (8, {"q_proj": 16, "up_proj": 4})
    assert saved.config["init_lora_weights"] is True
    base = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    assert torch.allclose(peft_logps(PeftModel.from_pretrained(base, tmp_path).eval()), logps_of(policy), atol=1e-4)


def test_any_lora_is_played_and_what_is_trained_comes_back(tiny_model):
    """Amplified for the canary, or a reference of another kind."""
    policy = moved(policy_of(tiny_model("llama"), section(PISSA)))
    own, before = adapters.fingerprint(policy.adapter()), logps_of(policy)
    plain = moved(policy_of(tiny_model("llama"), section({"rank_pattern": {"q_proj": 7}})))
    twice = policy_of(tiny_model("llama"), section({"r": 8, "alpha": 12}))
    twice.load_adapter(amplified(policy.adapter(), 2))
    for other, adapter in ((plain, plain.adapter()), (twice, amplified(policy.adapter(), 2))):
        with policy.playing(adapter):
            assert torch.allclose(logps_of(policy), logps_of(other), atol=1e-4)
        assert adapters.fingerprint(policy.adapter()) == own
        assert torch.equal(logps_of(policy), before)


def test_it_goes_on_from_its_own_alone(tiny_model, tmp_path):
    policy = policy_of(tiny_model("llama"), section(PISSA))
    start = moved(policy_of(tiny_model("llama"), section(PISSA))).adapter()
    policy.load_adapter(policy.grown(start, policy.adapter()))
    assert adapters.fingerprint(policy.adapter()) == adapters.fingerprint(start)
    for path, changes in [
        (tiny_model("llama"), {"r": 8, "alpha": 12}),
        (tiny_model("llama"), {"r": 4}),
        (tiny_model("llama"), PISSA | {"alpha": 5}),
        (tiny_model("llama"), PISSA | {"r": 3}),
        (scaled(tiny_model("llama"), tmp_path / "other"), PISSA),
    ]:
        other = moved(policy_of(path, section(changes))).adapter()
        with pytest.raises(UserError, match="pissa goes on from an adapter that began at this base's principal"):
            policy.grown(other, policy.adapter())


def test_a_small_step_is_amplified_within_16_bits(tiny_model):
    """B0 is as large as the weight's own factors, so that it is dA that is multiplied."""
    policy = in_dtype("float16", tiny_model("llama"), PISSA)
    trained(policy, torch.optim.AdamW(policy.trainable_parameters().values(), lr=1e-6), logps_of, steps=1)
    logps, ids = policy_logps(policy, "sdpa"), range(5, 40)
    move = torch.tensor(logps(ids, 3.0**11)) - torch.tensor(logps(ids, 0))
    assert 0.1 * STRONG < move.abs().mean() < 100 * STRONG


def test_it_is_counted_as_what_is_trained_and_saved_twice(tiny_model):
    shape = AutoConfig.from_pretrained(tiny_model("llama"))
    lora, pissa = count(shape, section({})), count(shape, section(PISSA))
    assert (pissa.trained, pissa.held, pissa.saved) == (lora.trained, lora.held, 2 * lora.saved)
    assert section(PISSA | PATTERNS).largest_rank == 16


def test_unsloth_is_refused():
    tree = {"model": {"name": "x", "backend": "unsloth"}, "data": {"source": "y"}, "adapter": PISSA}
    with pytest.raises(UserError, match="init_lora_weights: pissa is trained by"):
        parse_config(tree, "config.yaml")
