"""A 4-bit base by bitsandbytes itself, on a CPU: the numbers of its dense twin, its bytes, every kind."""

from dataclasses import replace

import pytest
import torch
from packed_cases import make_groups
from test_adapter_kinds import FRAMED, LORA
from test_memory import FP32, TABLE, cpu, real_step
from transformers import AutoConfig

from spinfast import ops
from spinfast.config import Lora, parse_config
from spinfast.device import profile
from spinfast.errors import UserError
from spinfast.generation.transformers import TransformersGenerator
from spinfast.memory.planner import Load, linear_weights, plan
from spinfast.memory.simulation import Phases, Simulation
from spinfast.objectives import Pairwise
from spinfast.packing import pack
from spinfast.policy.quantised import dense, states
from spinfast.policy.transformers import load_base, load_policy
from spinfast.scoring import answer_logps
from spinfast.types import Request, Sampling

pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
ALL = {"lora": Lora(r=4, alpha=8), **FRAMED}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SPINFAST_CACHE", str(tmp_path_factory.getbasetemp() / "frames"))


def policy_of(path, settings, dtype="float32", table=ops.EAGER, base=None, four=True):
    options = {"ops": table, "profile": profile("cpu", dtype), "load_in_4bit": four, "seed": 0, "base": base}
    policy = load_policy(path, "tiny", "0" * 40, lora=settings, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.trainable_parameters().values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


def dense_twin(path, dtype=torch.float32):
    """An ordinary model with the weights that the 4-bit one stands for."""
    from bitsandbytes.functional import dequantize_4bit

    four, twin = load_base(path, dtype, CPU, load_in_4bit=True), load_base(path, dtype, CPU)
    for name, parameter in four.named_parameters():
        if state := getattr(parameter, "quant_state", None):
            twin.get_parameter(name).data = dequantize_4bit(parameter.data, state)
    return twin


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("table", [ops.EAGER, TABLE], ids=["eager", "numba"])
def test_it_computes_what_its_dense_twin_does(tiny_model, name, table):
    """Log-probs and gradients; LoRA-XS and TinyLoRA take their frames from the files, where the weights are whole."""
    path = tiny_model("qwen2")
    four = policy_of(path, ALL[name], table=table)
    twin = policy_of(path, ALL[name], table=table, base=dense_twin(path))
    groups = make_groups([(4, (5, 3)), (1, (2, 6))])
    batch = pack(groups, range(len(groups)), "numba" if table is TABLE else "sdpa")
    found, expected = answer_logps(four, batch), answer_logps(twin, batch)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, answer_logps(policy_of(path, ALL[name], four=False), batch), atol=1e-2)
    found.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip(four.trainable_parameters().values(), twin.trainable_parameters().values(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm()


def test_the_checksum_sees_every_part_of_a_weight(tiny_model):
    policy = policy_of(tiny_model("llama"), Lora(r=2))
    before = policy.base_checksum()
    parts = {name: tensor for name, tensor in states(policy.model).items() if ".layers.1.mlp.up_proj." in name}
    assert sorted(name.rpartition("base_layer.")[2] for name in parts) == [
        "weight.absmax", "weight.code", "weight.nested.absmax", "weight.nested.code", "weight.offset",
    ]  # fmt: skip
    for tensor in parts.values():
        byte = tensor.reshape(-1).view(torch.uint8)
        byte[0] ^= 1
        assert policy.base_checksum() != before
        byte[0] ^= 1
        assert policy.base_checksum() == before


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_the_simulated_bytes_are_bitsandbytes_own(tiny_model, arch, name):
    """Training, scoring and answering: the same peak, byte for byte and kind for kind."""
    path, groups = tiny_model(arch), make_groups([(40, (70, 31)), (1, (12, 99))])
    policy = policy_of(path, ALL[name], table=TABLE)
    simulation = Simulation(AutoConfig.from_pretrained(path), cpu(FP32), ALL[name], TABLE, load_in_4bit=True)
    ledger, _ = real_step(policy, groups)
    assert simulation.train(groups, Pairwise(), "adamw", more_microbatches=False).usage == ledger.usage
    real = Phases(policy, cpu(FP32))
    assert simulation.score(groups) == real.score(groups)
    for layers in (0, 1, 2):
        assert simulation.generate(4, 70, 1.0, layers) == real.generate(4, 70, 1.0, layers)


def test_layers_are_dense_while_answers_are_made(tiny_model, monkeypatch):
    """The same answers; a weight that is held is made once, not at every step; afterwards none is held."""
    from bitsandbytes import functional

    made, original = [], functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *args: made.append(1) or original(*args))
    policy = policy_of(tiny_model("llama"), Lora(r=2))
    requests = [Request(i, (5, 6, 7 + i), seed=i) for i in range(5)]
    sampling, found = Sampling(1.0, 1.0, 12, ()), {}
    for layers in (0, 1, 2):
        made.clear()
        with TransformersGenerator(policy, batch_size=2, dense_layers=layers) as generator:
            answers = [c.token_ids for c in generator.generate(requests, sampling, policy.adapter())]
        found[layers] = answers, len(made)
    assert found[0][0] == found[1][0] == found[2][0]
    steps = found[0][1] // 14
    assert steps >= 30
    assert [count for _, count in found.values()] == [14 * steps, 7 * steps + 7, 14]
    with pytest.raises(RuntimeError, match="out"), dense(policy.decoder.layers):
        raise RuntimeError("out")
    assert not any("dense" in vars(module) for module in policy.model.modules())


def test_the_plan_says_how_many_layers_fit(tiny_model):
    """As many as the memory has room for beside answering, and what is planned is what the ledger then counts."""
    path, groups = tiny_model("llama", layers=4), make_groups([(9, (10, 12))] * 2)
    tree = {
        "model": {"name": "shape only", "load_in_4bit": True},
        "data": {"source": "shape only"},
        "prompt": {"max_prompt_tokens": 9, "max_answer_tokens": 12},
        "generation": {"max_tokens": 200, "batch_size": 32, "backend": "transformers"},
        "spin": {"groups_per_step": 2},
        "adapter": {"r": 4, "alpha": 8},
    }
    config, shape = parse_config(tree), AutoConfig.from_pretrained(path)
    load = Load("spin", groups, Pairwise(), config.spin, 2, (1,))

    def planned(memory):
        return plan(config, replace(cpu(FP32), memory=memory), shape, TABLE, [load])

    enough, layer = planned(2**30), linear_weights(shape) // 4 * 4
    assert enough.dense_layers == enough.step.dense_layers == 4
    alone = enough.phases["generate"].peak - 4 * layer
    for layers in (0, 2):
        found = planned(int(1.05 * (alone + (layers + 0.5) * layer)))
        assert found.dense_layers == layers
        assert found.peak <= found.budget
    real = Phases(policy_of(path, ALL["lora"], table=TABLE), cpu(FP32)).generate(32, 209, 1.0, 2)
    assert real == found.phases["generate"]


def test_it_is_not_merged(tiny_model):
    with pytest.raises(UserError, match="merge needs 16- or 32-bit base weights"):
        policy_of(tiny_model("llama"), LORA)
