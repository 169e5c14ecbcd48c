"""The ledger against real steps, the simulation against the ledger, checkpointing and offloading against neither."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from packed_cases import make_groups, tiny_policy
from transformers import AutoConfig

from bench.rehearse import rehearse
from spinfast import ops, train
from spinfast.config import Calm, Full, Lora, LoraXs, Sft, TinyLora, parse_config
from spinfast.device import DeviceProfile
from spinfast.memory.ledger import apply_checkpointing, counting
from spinfast.memory.planner import Load, training
from spinfast.memory.simulation import Nf4Weight, Phases, Simulation, settled
from spinfast.objectives import Pairwise, Surrogate
from spinfast.packing import pack
from spinfast.policy.transformers import load_policy
from spinfast.scoring import Budget, batch_sequence_logps
from spinfast.train import train_step

SHAPE = [(40, (70, 31)), (1, (12, 99)), (9, (1, 1)), (64, (64, 64))]
BF16, FP32 = torch.bfloat16, torch.float32
TABLE = ops.compiled("numba")  # and the attention of that name: what a CPU runs


def cpu(dtype):
    return DeviceProfile("cpu", torch.device("cpu"), None, 0, dtype, "numba", False, {})


def simulated(path, dtype=FP32, profile=None, **options):
    return Simulation(AutoConfig.from_pretrained(path), profile or cpu(dtype), Lora(r=4, alpha=8), TABLE, **options)


def real_step(policy, groups, optimizer="adamw", objective=None):
    """What a real step holds, by the same ledger, and the adapter's gradients."""
    objective = objective or Pairwise()
    groups = objective.filled(groups)
    state = settled(policy, optimizer, scaled=False)
    gradients = {}
    state.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: p.grad.clone() for name, p in policy.trainable_parameters().items()})
    )
    with counting(policy, state) as ledger:
        train_step(policy, groups, objective, 1e9, Budget(10_000, "numba"), state)
    assert gradients.keys() == policy.trainable_parameters().keys()
    return ledger, gradients


@pytest.mark.parametrize("arch", ["qwen2", "llama", "qwen3"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_simulated_train_step_equals_the_real_one(tiny_model, arch, dtype, layers):
    """The same peak, byte for byte and kind for kind."""
    path, groups = tiny_model(arch, layers=3), make_groups(SHAPE)
    policy, simulation = tiny_policy(path, dtype, table=TABLE), simulated(path, dtype)
    for each in (policy, simulation.policy):
        apply_checkpointing(each, layers, offload=False)
    ledger, _ = real_step(policy, groups)
    assert simulation.train(groups, Pairwise(), "adamw", more_microbatches=False).usage == ledger.usage
    assert ledger.usage.by_kind.get("checkpoints", 0) > 0 or layers == 0


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "kind",
    [
        LoraXs(kind="lora_xs", r=4),
        TinyLora(kind="tiny_lora", u=3, tie=2),
        Lora(r=4, init_lora_weights="pissa"),
        Full(kind="full", embeddings=True),
        Full(kind="full", target_modules=("v_proj", "gate_proj")),
        "calm",
    ],
    ids=str,
)
def test_a_simulated_step_of_every_kind_is_the_real_one(tiny_model, monkeypatch, tmp_path, kind, dtype, optimizer):
    monkeypatch.setattr(train, "TOGETHER", 1000)  # weights go tensor by tensor
    monkeypatch.setenv("SPINFAST_CACHE", str(tmp_path))
    path, groups = tiny_model("qwen2", layers=3), make_groups(SHAPE)
    if kind == "calm":
        kind = Calm(kind="calm", augmenting=str(tiny_model("llama", True, 4, 32)), connections=2)
    options = {"ops": TABLE, "profile": cpu(dtype), "load_in_4bit": False, "seed": 0}
    policy = load_policy(path, "tiny", "0", lora=kind, **options)
    simulation = Simulation(AutoConfig.from_pretrained(path), cpu(dtype), kind, TABLE)
    ledger, _ = real_step(policy, groups, optimizer)
    assert simulation.train(groups, Pairwise(), optimizer, more_microbatches=False).usage == ledger.usage
    counted = simulation.generate(4, 70, 1.0)
    assert counted == Phases(policy, cpu(dtype)).generate(4, 70, 1.0)
    with policy.without_adapter():  # answers are written with it; of calm that is another model's forward
        alone = Phases(policy, cpu(dtype)).generate(4, 70, 1.0)
    assert counted.peak > alone.peak if kind.kind == "calm" else counted.peak >= alone.peak


@pytest.mark.parametrize("objective", [Surrogate(), Surrogate("gspo", beta=0.1, correction="sequence_mask")])
def test_a_simulated_policy_gradient_is_the_real_one_and_takes_less_where_its_groups_are_cut(tiny_model, objective):
    path, groups = tiny_model("qwen2", layers=3), make_groups([(40, (70, 31, 50, 64, 64, 9)), (12, (99,))])
    policy, simulation = tiny_policy(path, table=TABLE), simulated(path)
    ledger, _ = real_step(policy, groups, objective=objective)
    assert simulation.train(groups, objective, "adamw", more_microbatches=False).usage == ledger.usage
    load = Load("grpo", groups, objective, Sft(), len(groups), (1,))
    assert load.longest == 12 + 98
    peaks = [training(load, simulation, tokens).peak for tokens in (110, 200, 500)]
    assert peaks == sorted(peaks)
    assert peaks[0] < 0.7 * peaks[-1]


def test_a_rehearsed_plan_holds_what_was_predicted(tiny_model):
    """bench rehearse with the ledger in the allocator's place: every phase of the plan, on the CPU, byte for byte."""
    tree = {
        "model": {"name": "shape only"},
        "data": {"source": "shape only"},
        "prompt": {"max_prompt_tokens": 40, "max_answer_tokens": 30},
        "generation": {"max_tokens": 30, "batch_size": 4},
        "method": ["sft", "spin"],
        "spin": {"groups_per_step": 4},
        "sft": {"groups_per_step": 4},
    }
    device = replace(cpu(FP32), memory=2**30)
    found = rehearse(parse_config(tree), device, AutoConfig.from_pretrained(tiny_model("qwen2")), Phases)
    assert {row["what"] for row in found} == {"spin", "score", "sft", "generate"}
    assert {row["what"]: row["error"] for row in found} == dict.fromkeys(("spin", "score", "sft", "generate"), 0)


def test_simulated_scoring_equals_the_real_one(tiny_model):
    path, groups = tiny_model("qwen2"), make_groups(SHAPE)
    policy, simulation = tiny_policy(path, table=TABLE), simulated(path)
    with counting(policy) as ledger:
        batch_sequence_logps(policy, pack(groups, range(len(groups)), "numba"))
    assert simulation.score(groups) == ledger.usage


def test_ledger_of_known_tensors(tiny_model):
    policy = tiny_policy(tiny_model("qwen2"))
    with counting(policy) as ledger:
        before = ledger.live.total()
        a = torch.empty(1000, dtype=torch.float32)
        view = a[10:]  # no bytes of its own
        assert ledger.live.total() == before + 4000
        with ledger.allocating("head"):
            b = torch.empty(10, dtype=torch.float64)
        assert ledger.live["head"] == 80
        del a
        assert ledger.live.total() == before + 4080, "the view holds the storage"
        del view, b
    assert ledger.live.total() == before
    assert ledger.usage.peak == before + 4080
    weights = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in policy.model.parameters()}
    buffers = sum(b.untyped_storage().nbytes() for b in policy.model.buffers())
    assert ledger.live["weights"] + ledger.live["adapters"] == sum(weights.values()) + buffers


def test_ledger_agrees_with_the_allocator(tiny_model):
    """An independent witness: the bytes torch's CPU allocator reports while the same step runs.

    It also sees what an operator takes and gives back inside, which no dispatch mode can.
    """
    policy, groups = tiny_policy(tiny_model("qwen2", layers=3, hidden=128), table=TABLE), make_groups(SHAPE * 2)
    ledger, _ = real_step(policy, groups)
    static = sum(ledger.live[kind] for kind in ("weights", "adapters", "optimizer"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        real_step(policy, groups)
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    predicted = ledger.usage.peak - static
    moments = ledger.live["optimizer"]  # made inside the profile, before it
    assert predicted <= peak <= 1.1 * (predicted + moments)


@pytest.mark.parametrize("offload", [False, True], ids=["kept", "offloaded"])
@pytest.mark.parametrize("layers", [1, 3])
def test_checkpointing_changes_no_gradient(tiny_model, layers, offload):
    path, groups = tiny_model("qwen2", layers=3), make_groups(SHAPE)
    policy = tiny_policy(path, table=TABLE)
    plain, expected = real_step(policy, groups)
    apply_checkpointing(policy, layers, offload)
    ledger, gradients = real_step(policy, groups)
    assert ledger.usage.peak < plain.usage.peak
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6)


def test_offloaded_checkpoints_leave_the_device(tiny_model):
    groups = make_groups(SHAPE)
    profile = DeviceProfile("t4", torch.device("cuda"), (7, 5), 0, torch.float16, "aten_efficient", False, {})
    simulation = simulated(tiny_model("qwen2", layers=3), profile=profile)
    usages = []
    for offload in (False, True):
        apply_checkpointing(simulation.policy, 3, offload)
        usages.append(simulation.train(groups, Pairwise(), "adamw", more_microbatches=True).usage)
    kept, offloaded = usages
    tokens = pack(groups, range(len(groups)), "numba").tokens
    assert kept.host == 0
    assert offloaded.host == 3 * tokens * 64 * 2  # layers x tokens x D x bytes: the layers' inputs
    assert offloaded.peak < kept.peak


def test_nf4_weights(tiny_model):
    """4.127 bits per weight at rest; head, embedding and norms stay as they are."""
    weight = Nf4Weight(torch.empty(896, 4864, dtype=torch.float16, device="meta"))
    bits = 8 * sum(part.numel() for part in weight.packed) / (896 * 4864)
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), rel=1e-3)
    path, groups = tiny_model("qwen2"), make_groups(SHAPE)
    dense, packed = (simulated(path, load_in_4bit=four).score(groups) for four in (False, True))
    linears = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)  # layers x (q, o, k, v, mlp) weights of the tiny model
    saved = dense.by_kind["weights"] - packed.by_kind["weights"]
    tables = 4 * (1 + 16 + 256) * 7 * 2  # of each weight
    assert saved == pytest.approx(linears * (4 - 4.127 / 8) - tables, rel=0.001)


def test_a_real_models_step_is_simulated_without_its_weights(tiny_model):
    """24 layers of Qwen2.5-0.5B as a T4 holds them: no weights, no GPU, and the Triton functions' own host code."""
    pytest.importorskip("triton")
    from transformers import Qwen2Config

    config = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    profile = DeviceProfile("t4", torch.device("cuda"), (7, 5), 0, torch.float16, "aten_efficient", False, {})
    simulation = Simulation(config, profile, Lora(r=4, alpha=8), ops.choose("triton", "cuda")[0])
    usage = simulation.train(make_groups([(256, (256, 256))] * 4), Pairwise(), "adamw", more_microbatches=True).usage
    assert usage.by_kind["weights"] == pytest.approx(494_032_768 * 2, rel=1e-3)  # the model card's 0.49 B, tied
    assert "head" in usage.by_kind


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_step_counters_stay_on_the_host(tiny_model, optimizer):
    """torch before 2.13 makes them on the default device; on meta the optimizer's step reads them in vain."""
    policy = simulated(tiny_model("qwen2")).policy
    counters = [moment["step"] for moment in settled(policy, optimizer, scaled=False).optimizer.state.values()]
    assert counters
    assert all(counter.is_cpu and counter == 1 for counter in counters)
