"""Scoring and training at the models' own widths on a card of shapes: no tensor of the wrong device, layout or dtype,
every launch compiled for sm_75, and the host waits for the card twice a step: for the loss and the gradient's norm.
"""

from dataclasses import replace

import pytest
import torch

from bench import shapes
from bench.compile import inspect, problems
from spinfast.config import Full, Lora, LoraXs, TinyLora
from spinfast.device import profile
from spinfast.memory.ledger import apply_checkpointing, apply_head_chunk
from spinfast.objectives import DESIRABLE, Nll, Pairwise, Preference, Surrogate, Unpaired
from spinfast.objectives.losses import LOSSES
from spinfast.packing import pack, packed_length
from spinfast.scoring import Budget, batch_sequence_logps, token_logps
from spinfast.train import start_training, train_step
from spinfast.types import Request, Sampling

WAITS = {"item": 1, "cuda to cpu": 1, "cpu to cuda": 0}


def made_policy(name, on, layers=2, adapter=None):
    policy = shapes.policy(on, shapes.shape(name, num_hidden_layers=layers), adapter)
    assert policy.ops.name == "triton"
    return policy


def waited(host):
    found = {name: host.waits[name] for name in WAITS}
    host.waits.clear()
    return found


MODELS = [(name, "auto", False) for name in ("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen3-0.6B", "SmolLM2-135M")]


@pytest.mark.parametrize(
    ("name", "kernel", "recomputed"),
    [*MODELS, ("Qwen2.5-0.5B", "aten_efficient", False), ("Qwen2.5-0.5B", "auto", True)],
)
def test_scoring_and_training(t4_in_use, name, kernel, recomputed):
    host, compiled = t4_in_use
    on = profile(attention=kernel)
    assert (on.capability, on.dtype, on.scaled_loss) == ((7, 5), torch.float16, True)
    policy, groups = made_policy(name, on), shapes.draw(6)
    if recomputed:
        apply_checkpointing(policy, 1, offload=True)
        apply_head_chunk(policy, 256)
    host.waits.clear()
    budget = Budget(max(map(packed_length, groups)), on.attention)
    batch_sequence_logps(policy, pack(groups, range(2), on.attention))
    assert waited(host) == {**WAITS, "item": 0}
    state = start_training(policy, "adamw", 0.0, on.scaled_loss)
    for _ in range(2):
        metrics, _ = train_step(policy, groups, Nll(), 1.0, budget, state)
        assert metrics["train/tokens"] == sum(map(packed_length, groups))
        assert waited(host) == WAITS
    for parameter in policy.trainable_parameters().values():
        assert (parameter.dtype, parameter.device.type) == (torch.float32, "cuda")
    assert len(compiled) > 8
    found = {key: problems(75, inspect(binary)) for key, binary in compiled.items()}
    assert {key: said for key, said in found.items() if said} == {}


KINDS = {
    "pissa": Lora(init_lora_weights="pissa"),
    "lora_xs": LoraXs(kind="lora_xs"),
    "tiny_lora": TinyLora(kind="tiny_lora", tie="all"),
    "full": Full(kind="full"),
    "embeddings": Full(kind="full", target_modules=("v_proj",), embeddings=True),
}
OBJECTIVES = {
    "sft": Nll(),
    "spin": Pairwise(),
    "dpo": Preference(loss=tuple((name, 1.0) for name in LOSSES)),
    "kto": Unpaired(),
    "grpo": Surrogate(),
    "gspo": Surrogate("gspo", beta=0.1, correction="sequence_mask"),
}
CASES = [("lora", name, optimizer) for name in OBJECTIVES for optimizer in ("adamw", "rmsprop")]
CASES += [(kind, name, "adamw") for kind in KINDS for name in ("sft", "spin", "dpo", "grpo")]
CASES += [("lora", "sft", optimizer) for optimizer in ("adafactor", "adamw_8bit")]


@pytest.mark.parametrize(("kind", "name", "optimizer"), CASES)
def test_every_objective_kind_and_optimizer(t4_in_use, kind, name, optimizer):
    """However many metrics there are, they are waited for once. Beyond this and the norm KTO measures its KL before it
    begins, and torch's Adafactor asks for two norms of each tensor."""
    host, _ = t4_in_use
    on, objective = profile(), OBJECTIVES[name]
    policy = made_policy("Qwen2.5-0.5B", on, 1, KINDS.get(kind))
    groups = shapes.draw(4, 3 if name == "grpo" else 2)
    if name == "kto":
        groups = [replace(group, given={DESIRABLE: (float(i % 2),) * 2}) for i, group in enumerate(groups)]
    groups = objective.filled(groups)
    state = start_training(policy, optimizer, 0.0, on.scaled_loss)
    for _ in range(2):  # the first also makes the optimizer's state
        host.waits.clear()
        train_step(policy, groups, objective, 1.0, Budget(4096, on.attention), state)
    norms = 2 * len(state.names) * (optimizer == "adafactor")
    assert waited(host) == {**WAITS, "item": 1 + norms, "cuda to cpu": 1 + (name == "kto")}
    token_logps(policy, groups, Budget(4096, on.attention))


def test_a_step_that_is_not_finite_is_skipped(t4_in_use):
    host, _ = t4_in_use
    host.number = float("nan")
    on = profile()
    policy, groups = made_policy("SmolLM2-135M", on, 1), shapes.draw(2)
    state = start_training(policy, "adamw", 0.0, on.scaled_loss)
    train_step(policy, groups, Nll(), 1.0, Budget(4096, on.attention), state)
    assert (state.overflows, state.loss_scale) == (1, 2.0**11)


def test_generation_by_the_policy_itself(t4_in_use):
    from spinfast.generation.transformers import TransformersGenerator

    host, _ = t4_in_use
    host.number = 0.0  # the nucleus is found at once
    on = profile()
    policy = made_policy("Qwen2.5-0.5B", on, 2)
    requests = [Request(i, (5,) * length, seed=i) for i, length in enumerate((7, 3, 90))]
    sampling = Sampling(temperature=1.0, top_p=0.9, max_tokens=5, stop_ids=(2,))
    with TransformersGenerator(policy, batch_size=2, max_model_len=128, attention=on.attention) as generator:
        answers = list(generator.generate(requests, sampling, None))
    assert sorted(answer.index for answer in answers) == [0, 1, 2]
    assert {len(answer.token_ids) for answer in answers} == {5}
