"""Objectives: what a step optimises depends neither on how it is packed nor on how it is cut."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_cases import make_groups, plain_logps, plain_model, tiny_policy
from test_packing import StarvedOps, current

from spinfast.config import PAIRED, UNPAIRED
from spinfast.errors import UserError
from spinfast.fit import summary
from spinfast.objectives import (
    ACTIVE,
    ADVANTAGE,
    DESIRABLE,
    OLD_LOGPS,
    REFERENCE,
    SAMPLER_LOGPS,
    Nll,
    Preference,
    Surrogate,
    Unpaired,
    described,
    restored,
    split,
    with_reference,
)
from spinfast.objectives.losses import LOSSES
from spinfast.objectives.surrogates import SURROGATES, Tokens, clipped, correction, ratios
from spinfast.ops import choose
from spinfast.packing import packed_length
from spinfast.scoring import Budget, answer_logps, batches, sequence_logps, token_logps
from spinfast.train import start_training, train_step
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
    return metrics, torch.cat([torch.zeros(0), *(gradient.flatten() for gradient in gradients.values())])


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


@pytest.mark.parametrize("objective", [Nll(), *OBJECTIVES, Surrogate("gspo", delta=3.0)], ids=["nll", *NAMES, "gspo"])
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


# Policy gradients ----------------------------------------------------------------------------------------------------

CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "none")
ADVANTAGES = st.sampled_from((0.0, 1.5, -0.7, 0.3))


@pytest.fixture(scope="module")
def exact(tiny_model):
    return tiny_policy(tiny_model("llama"), torch.float64)


def rewarded(shape, seed: int = 0, drawn=None) -> list[Group]:
    """Groups with all that a Surrogate may be given: log-probs that are near no policy's, the sampler's partly NaN."""
    draw = random.Random(seed)
    drawn = drawn or (lambda: (draw.choice((1.5, -0.7, 0.3)), 1.0))

    def filled(group: Group) -> Group:
        advantages, active = zip(*(drawn() for _ in group.answers), strict=True)
        near = {name: tuple(tuple(draw.gauss(-5.5, 0.5) for _ in answer) for answer in group.answers)
                for name in (REFERENCE, OLD_LOGPS)}  # fmt: skip
        sampler = tuple(
            tuple(math.nan if draw.random() < 0.1 else logp + draw.gauss(0, 0.5) for logp in logps)
            for logps in near[OLD_LOGPS]
        )
        return dataclasses.replace(group, given={ADVANTAGE: advantages, ACTIVE: active, SAMPLER_LOGPS: sampler, **near})

    return [*map(filled, make_groups(shape, seed))]


answers = st.lists(st.integers(1, 12), min_size=1, max_size=6).map(tuple)
shapes = st.lists(st.tuples(st.integers(1, 12), answers), min_size=1, max_size=3)
surrogates = st.builds(
    Surrogate,
    st.sampled_from([*SURROGATES]),
    delta=st.sampled_from((None, 1.5)),
    beta=st.sampled_from((0.0, 0.1)),
    correction=st.sampled_from(CORRECTIONS),
    old_logps=st.sampled_from(("policy", "sampler")),
    max_tokens=st.just(12),
    temperature=st.sampled_from((1.0, 0.7)),
)


@settings(max_examples=40)
@given(surrogates, shapes, st.data())
def test_a_policy_gradient_is_the_same_however_its_groups_are_cut(exact, objective, shape, data):
    """Groups cut to single answers, each with its prompt again, make the step of whole ones: to fp64's rounding."""
    drawn = lambda: (data.draw(ADVANTAGES), data.draw(st.sampled_from((0.0, 1.0, 1.0))))  # noqa: E731
    groups = rewarded(shape, drawn=drawn)
    singles = [group.part([i]) for group in groups for i in range(len(group.answers))]
    longest = max(map(packed_length, singles))
    whole, gradients = step(exact, groups, objective)
    for cut, budget in ((groups, Budget(longest, "sdpa")), (groups, Budget(longest + 9, "sdpa")), (singles, WHOLE)):
        metrics, others = step(exact, cut, objective, budget)
        assert torch.allclose(others, gradients, rtol=1e-7, atol=1e-12)
        assert metrics.keys() == whole.keys()
        for name in whole.keys() - {"train/microbatch_tokens", "train/tokens"}:
            assert metrics[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-7), name


@given(shapes, st.integers(0, 60))
def test_groups_are_cut_into_as_few_parts_as_fit(shape, tokens):
    for group in rewarded(shape):
        parts = split(group, tokens)
        for name, values in {"answers": group.answers, **group.given}.items():
            rows = [part.answers if name == "answers" else part.given[name] for part in parts]
            assert [value for row in rows for value in row] == [*values], name
        counts = [len(part.answers) for part in parts]
        assert max(counts) - min(counts) <= 1
        assert max(map(packed_length, parts)) <= tokens or max(counts) == 1
        assert len(parts) == 1 or packed_length(group) > tokens


def moving(policy):
    """A training state that has made a step, and what an empty one may not move: adapter, moments, counters."""
    state = start_training(policy, "adamw", 0.1, scaled=True)
    state.optimizer.param_groups[0]["lr"] = 1e-3
    train_step(policy, rewarded([(4, (3, 5))]), Surrogate(), 1.0, WHOLE, state)

    def seen():
        tensors = {f"{i}.{k}": v for i, e in enumerate(state.optimizer.state.values()) for k, v in e.items()}
        counters = (state.loss_scale, state.good_steps, state.overflows, state.overflows_in_a_row, *state.recent_norms)
        return {k: v.clone() for k, v in (policy.trainable_parameters() | tensors).items()}, counters

    return state, seen


def test_a_step_of_dead_groups_moves_nothing(tiny_model):
    policy = tiny_policy(tiny_model("llama"))
    state, seen = moving(policy)
    before, counters = seen()
    state.overflows_in_a_row = 1
    dead = rewarded([(4, (3, 5)), (2, (6, 1))], drawn=iter([(0.0, 1.0)] * 3 + [(1.0, 0.0)]).__next__)
    metrics, _ = train_step(policy, dead, Surrogate(), 1.0, WHOLE, state)
    assert (metrics["train/empty"], metrics["train/loss"], metrics["train/grad_norm"]) == (1.0, 0.0, 0.0)
    assert metrics["train/tokens"] == 0
    assert state.overflows_in_a_row == 1
    state.overflows_in_a_row = 0
    after, same = seen()
    assert same == counters
    assert all(torch.equal(before[name], after[name]) for name in before)
    metrics, _ = train_step(policy, dead, Surrogate(beta=0.1), 1.0, WHOLE, state)  # the KL has a gradient
    assert "train/empty" not in metrics
    assert metrics["train/grad_norm"] > 0


@pytest.mark.parametrize("loss", SURROGATES)
def test_dead_groups_count_in_the_mean_and_are_not_computed(exact, loss):
    """Beside as many again whose advantages are 0, the gradient is half; an inactive answer counts nowhere."""
    live = rewarded([(4, (3, 5)), (2, (6, 1, 4))])
    dead = rewarded([(4, (3, 5)), (2, (6, 1, 4))], drawn=lambda: (0.0, 1.0))
    cut = rewarded([(4, (3, 5))], drawn=lambda: (1.0, 0.0))
    objective = Surrogate(loss, max_tokens=10)
    metrics, gradient = step(exact, live, objective)
    halved, half = step(exact, [*live, *dead, *cut], objective)
    assert torch.allclose(gradient, 2 * half, rtol=1e-9, atol=1e-12)
    assert halved["train/loss"] == pytest.approx(metrics["train/loss"] / 2)
    for name in metrics.keys() - {"train/loss", "train/grad_norm"}:
        share = 0.5 if "clip" in name else 1.0  # of all tokens; the rest is of those computed
        assert halved[name] == pytest.approx(share * metrics[name]), name


@pytest.mark.parametrize("loss", SURROGATES)
def test_on_policy_all_losses_have_the_gradient_of_the_policys_log_prob(exact, loss):
    """Without old log-probs the ratio is 1: -A d log p, averaged as the loss is."""
    groups = [
        dataclasses.replace(g, given={k: v for k, v in g.given.items() if k != OLD_LOGPS})
        for g in rewarded([(4, (3, 5)), (2, (6, 1, 4))])
    ]
    objective = Surrogate(loss, correction="none", max_tokens=10)
    metrics, gradient = step(exact, groups, objective)
    by_length = SURROGATES[loss].mean == "answer"
    total = sum(map(objective.weight, groups))
    for batch in batches(groups, WHOLE):
        scale_S = batch.given[ADVANTAGE] / (batch.lengths_S if by_length else 1)
        (-(answer_logps(exact, batch) * scale_S[batch.sequence_ids_N]).sum() / total).backward()
    expected = torch.cat([found.flatten() for found in current(exact).values()])
    assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-8)  # 1 / length is fp32
    assert metrics["sampling/sampling_logp_difference/mean"] > 0
    assert metrics.get("clip_ratio/region_mean", 0.0) == 0


@pytest.mark.parametrize("ops", ["eager", "numba"])
def test_log_probs_per_token_at_a_temperature(tiny_model, plain, ops):
    """The policy that is sampled at temperature T is softmax(logits / T); groups longer than a microbatch are cut."""
    policy = tiny_policy(tiny_model("llama"), table=choose(ops, "cpu")[0])
    groups = make_groups([(5, (7, 1, 4, 9)), (2, (3,))])
    found = token_logps(policy, groups, Budget(16, "sdpa"), temperature=0.6)
    for group, logps in zip(groups, found, strict=True):
        for answer, of_answer in zip(group.answers, logps, strict=True):
            ids = torch.tensor([[*group.prompt_ids, *answer]])
            logits = plain(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1]
            expected = (logits / 0.6).log_softmax(-1).gather(1, ids[0, len(group.prompt_ids) :, None])[:, 0]
            assert of_answer == pytest.approx(expected.tolist(), rel=2e-5, abs=1e-4)
    assert token_logps(policy, groups, Budget(16, "sdpa"))[1][0] != pytest.approx(found[1][0], rel=1e-2)
    assert token_logps(policy, [], WHOLE) == []


def test_a_stage_of_dead_groups_alone_has_a_summary():
    rows = [{"step": step, "train/loss": 0.0, "train/empty": 1.0} for step in (1, 2)]
    assert summary(rows) == {"steps": 2, "first_loss": 0.0, "last_loss": 0.0, "last/empty": 1.0}
    made = {"step": 3, "train/loss": 0.7}
    assert summary([*rows, made, {**rows[0], "step": 4}])["last_loss"] == 0.7


@pytest.mark.parametrize("given_up", [None, 12])
def test_where_memory_runs_out_a_group_is_cut(exact, monkeypatch, given_up):
    """A group of 40 scored tokens where there is memory for 12: the same step of smaller parts; for fewer, an error."""
    groups = rewarded([(4, (12, 3, 5, 7, 9, 4))])
    whole, gradients = step(exact, groups, Surrogate("grpo"))
    monkeypatch.setattr(exact, "ops", StarvedOps(12 if given_up is None else given_up - 1))
    if given_up is not None:
        with pytest.raises(UserError, match="microbatches of 15 tokens, the longest group"):
            step(exact, groups, Surrogate("grpo"), Budget(39, "sdpa"))
        return
    shrunk = []
    metrics, cut = step(exact, groups, Surrogate("grpo"), Budget(39, "sdpa", shrunk=shrunk.append))
    assert shrunk == [19, 15]
    assert (metrics["train/microbatch_tokens"], whole["train/tokens"]) == (15, 4 + 40 - 6)
    assert metrics["train/loss"] == pytest.approx(whole["train/loss"], rel=1e-6)
    assert torch.allclose(cut, gradients, rtol=1e-7, atol=1e-12)
    found = token_logps(exact, groups, Budget(39, "sdpa", shrunk=shrunk.append))
    assert shrunk == [19, 15, 19, 15]
    assert [*map(len, found[0])] == [*groups[0].lengths]


@given(st.floats(0.01, 50), st.floats(-3, 3), st.floats(1.3, 10))
def test_delta_is_the_dual_clip(ratio, advantage, delta):
    """arXiv 1912.09729, Eq. 5: for A < 0 the surrogate is never below delta A; elsewhere the bound changes nothing."""
    ratios, advantages = (torch.tensor([x], dtype=torch.float64) for x in (ratio, advantage))
    bounded, free = (
        -clipped(Tokens(ratios.log(), ratios, advantages), Surrogate(delta=d)).item() for d in (delta, None)
    )
    assert bounded == pytest.approx(max(free, delta * advantage) if advantage < 0 else free)
    assert free == pytest.approx(min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage))


@given(
    st.lists(st.lists(st.one_of(st.just(math.nan), st.floats(-5, 5)), min_size=1, max_size=5), min_size=1, max_size=4)
)
def test_a_samplers_correction_is_the_bounded_ratio_of_token_or_answer(rows):
    ids = torch.tensor([i for i, row in enumerate(rows) for _ in row])
    logs = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
    known = [[0.0 if math.isnan(value) else value for value in row] for row in rows]
    of_tokens = [math.exp(value) for row in known for value in row]
    of_answers = [math.exp(sum(row)) for row in known for _ in row]
    for level, expected in {"token": of_tokens, "sequence": of_answers}.items():
        truncated, masked = (correction(f"{level}_{how}", logs, ids, len(rows), 2.0) for how in ("truncate", "mask"))
        assert truncated.tolist() == pytest.approx([min(value, 2.0) for value in expected])
        assert masked.tolist() == pytest.approx([0.0 if value > 2.0 else value for value in expected])


def test_a_policy_far_from_the_sampling_one_gives_no_nan():
    """A token that became e^100 times as likely, with either sign of the advantage."""
    for loss in ("dapo", "gspo", "cispo", "sapo"):
        logps = torch.tensor([-0.1, -0.2], requires_grad=True)
        ratios_N = ratios(logps + 100, torch.tensor([0, 1]), torch.ones(2), loss == "gspo")
        tokens = Tokens(logps, ratios_N, torch.tensor([1.0, -1.0]))
        SURROGATES[loss].loss(tokens, Surrogate(loss=loss)).sum().backward()
        assert logps.grad.isfinite().all()
