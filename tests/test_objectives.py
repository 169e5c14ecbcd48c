"""Objectives: what a step optimises depends neither on how it is packed nor on how it is cut."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_cases import make_groups, plain_logps, plain_model, tiny_policy
from test_packing import current

from spinfast.config import PAIRED, UNPAIRED
from spinfast.losses import LOSSES
from spinfast.objectives import (
    DESIRABLE,
    REFERENCE,
    Nll,
    Preference,
    Unpaired,
    described,
    restored,
    with_reference,
)
from spinfast.train import Budget, sequence_logps, start_training, train_step
from spinfast.types import Group

WHOLE = Budget(4096, "sdpa")
OBJECTIVES = [
    *(Preference(((name, 1.0),), beta=0.3, label_smoothing=0.1) for name in PAIRED),
    Preference((("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0))),
    *(Unpaired(name, 0.3, 1.5, 0.5) for name in UNPAIRED),
]
NAMES = ["+".join(name for name, _ in o.loss) if isinstance(o, Preference) else o.kind for o in OBJECTIVES]


@pytest.fixture(scope="module")
def policy(tiny_model):
    return tiny_policy(tiny_model("llama"))


def ranked(counts=(2, 3, 2, 5, 2)) -> list[Group]:
    """Groups of so many answers of random lengths, given a reference's log-probs that are not the policy's."""
    draw = torch.Generator().manual_seed(3)
    shape = [(5 + k, tuple(torch.randint(1, 12, (k,), generator=draw).tolist())) for k in counts]
    noise = torch.rand(sum(counts), generator=draw).tolist()
    return [
        with_reference(group, [-4.0 * len(answer) - 3 * noise.pop() for answer in group.answers])
        for group in make_groups(shape)
    ]


def labelled() -> list[Group]:
    """Answers of which every third is undesirable, each beside another prompt's."""
    return [
        dataclasses.replace(group, given={**group.given, DESIRABLE: (float(i % 3 > 0), 0.0)})
        for i, group in enumerate(ranked((2,) * 6))
    ]


def groups_of(objective) -> list[Group]:
    return labelled() if isinstance(objective, Unpaired) else ranked()


def step(policy, groups, objective, budget=WHOLE):
    """Metrics, and the adapter's gradients after one step that moves nothing."""
    state = start_training(policy, "adamw", 0.0, scaled=False)
    gradients = {}
    handle = state.optimizer.register_step_pre_hook(lambda *_: gradients.update(current(policy)))
    metrics, _ = train_step(policy, groups, objective, 1e9, budget, state)
    handle.remove()
    return metrics, torch.cat([gradient.flatten() for gradient in gradients.values()])


def test_every_name_of_the_config_is_a_loss():
    assert {*LOSSES} == {*PAIRED}


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_a_step_is_the_same_however_it_is_cut(policy, objective):
    groups = groups_of(objective)
    whole, gradients = step(policy, groups, objective)
    cut, cut_gradients = step(policy, groups, objective, Budget(64, "sdpa"))
    for name in whole.keys() - {"train/microbatch_tokens"}:
        assert cut[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-5), name
    assert torch.allclose(gradients, cut_gradients, rtol=1e-3, atol=1e-5 * gradients.abs().max().item())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_the_loss_of_a_policy_that_is_its_reference_is_announced(policy, objective):
    groups = groups_of(objective)
    parts = [with_reference(g, logps) for g, logps in zip(groups, sequence_logps(policy, groups, WHOLE), strict=True)]
    metrics, _ = step(policy, parts, objective)
    assert abs(metrics["train/loss"] - objective.at_start(parts)) < 1e-5 * max(1, metrics["train/loss"])
    assert abs(step(policy, groups, objective)[0]["train/loss"] - objective.at_start(groups)) > 1e-3


def test_the_losses_at_start_are_those_of_the_papers():
    groups = ranked()
    values = {name: Preference(((name, 1.0),), 0.1, 1e-3).at_start(groups) for name in PAIRED[:12]}
    ln2 = math.log(2)
    assert values == pytest.approx(
        {
            **dict.fromkeys(("sigmoid", "sigmoid_norm", "robust"), ln2),
            **dict.fromkeys(("hinge", "apo_zero", "apo_down"), 1.0),
            **dict.fromkeys(("nca_pair", "bco_pair"), 2 * ln2),
            **{"ipo": 25.0, "sppo_hard": 50.0, "discopop": 0.5 * ln2 + 0.5, "exo_pair": 2.7612},
        },
        rel=1e-4,
    )
    assert Unpaired("kto", 0.1, 2.0, 1.0).at_start(labelled()) == pytest.approx(0.5 * (4 * 2 + 2) / 6)


@pytest.mark.parametrize("objective", OBJECTIVES[:13], ids=NAMES[:13])
def test_ranked_answers_are_all_their_pairs(policy, objective):
    """A group of k answers is worth its k (k-1) / 2 pairs, each a group of its own."""
    pairs = [
        Group(g.prompt_ids, (g.answers[i], g.answers[j]), {REFERENCE: (g.given[REFERENCE][i], g.given[REFERENCE][j])})
        for g in ranked()
        for i, j in combinations(range(len(g.answers)), 2)
    ]
    together, gradients = step(policy, ranked(), objective)
    alone, alone_gradients = step(policy, pairs, objective)
    for name in ("train/loss", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert together[name] == pytest.approx(alone[name], rel=1e-4)
    assert torch.allclose(gradients, alone_gradients, rtol=1e-3, atol=1e-5 * gradients.abs().max().item())


def test_kto_weighs_against_answers_of_other_prompts(policy):
    groups = labelled()
    strangers = [Group(g.prompt_ids, g.answers[1:]) for g in groups]
    ratios = [
        s[0] - g.given[REFERENCE][1] for g, s in zip(groups, sequence_logps(policy, strangers, WHOLE), strict=True)
    ]
    raised = [
        with_reference(g, (g.given[REFERENCE][0], g.given[REFERENCE][1] + sum(ratios) / len(ratios) - kl))
        for g, kl in zip(groups, [2.0] * len(groups), strict=True)
    ]
    assert step(policy, raised, Unpaired())[0]["kl"] == pytest.approx(2.0, rel=1e-4)
    lowered = [with_reference(g, (g.given[REFERENCE][0], 0.0)) for g in groups]
    assert step(policy, lowered, Unpaired())[0]["kl"] == 0


@pytest.mark.parametrize("objective", [Nll(), *OBJECTIVES], ids=["nll", *NAMES])
def test_a_kept_objective_comes_back(objective):
    assert restored(json.loads(json.dumps(described(objective)))) == objective


spans = st.lists(st.lists(st.booleans(), min_size=1, max_size=16).filter(any), min_size=1, max_size=8)


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 12), spans), min_size=1, max_size=3))
def test_packed_answers_and_spans_are_those_of_each_sequence_alone(policy, plain, shape):
    """1 to 8 answers a group, several scored spans an answer: log-probs and lengths of transformers, one by one."""
    groups = make_groups([(prompt, tuple(map(len, masks))) for prompt, masks in shape])
    groups = [
        dataclasses.replace(g, scored=tuple(map(tuple, masks))) for g, (_, masks) in zip(groups, shape, strict=True)
    ]
    for group, sums in zip(groups, sequence_logps(policy, groups, WHOLE), strict=True):
        for answer, mask, length, logp in zip(group.answers, group.scored, group.lengths, sums, strict=True):
            expected = plain_logps(plain, group.prompt_ids, answer).detach()[torch.tensor(mask)]
            assert length == len(expected)
            assert logp == pytest.approx(expected.sum().item(), rel=2e-5, abs=1e-4)


@pytest.fixture(scope="module")
def plain(tiny_model, policy):
    return plain_model(tiny_model("llama"), policy)


def test_a_conversation_of_several_spans_is_learnt_as_one_sequence(policy, plain):
    """Loss and gradients of the scored tokens alone, all turns before them in sight."""
    mask = (True,) * 4 + (False,) * 5 + (True,) * 3 + (False,) * 2 + (True,)
    group = dataclasses.replace(make_groups([(7, (len(mask),))])[0], scored=(mask,))
    metrics, gradients = step(policy, [group], Nll())
    loss = -plain_logps(plain, group.prompt_ids, group.answers[0])[torch.tensor(mask)].mean()
    plain.zero_grad()
    loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    names = policy.trainable_parameters()
    for name, gradient in zip(names, gradients.split([p.numel() for p in names.values()]), strict=True):
        assert torch.allclose(gradient, expected[name].flatten(), rtol=1e-3, atol=1e-5), name
