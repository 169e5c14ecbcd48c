"""Packing: what is in a batch, that budgets hold, that a step does not depend on how it is cut."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_cases import lengths, make_groups, tiny_policy

from spinfast import ops
from spinfast.config import Spin
from spinfast.errors import UserError
from spinfast.objectives import REFERENCE, Nll, Pairwise
from spinfast.packing import bins, on_common_prefix, pack, packed_length
from spinfast.scoring import Budget, logps_in_cut, score
from spinfast.steps import Epochs
from spinfast.train import start_training, train, train_step
from spinfast.types import Group

LONGEST = 24 * 3
shapes = lengths()


@given(shapes, st.integers(LONGEST, 4 * LONGEST))
def test_bins(shape, budget):
    groups = make_groups(shape * 3)
    filled = bins(groups, budget)
    assert sorted(row for rows in filled for row in rows) == list(range(len(groups)))
    used = [sum(packed_length(groups[row]) for row in rows) for rows in filled]
    assert max(used) <= budget
    assert all(a + b > budget for a, b in pairwise(used)), "two bins in a row fit into one"
    assert filled == bins(list(groups), budget)


@given(shapes, st.integers(0, 20), st.integers(LONGEST + 20, 4 * LONGEST))
def test_prompts_with_a_common_start_are_packed_on_it(shape, common, budget):
    """Every answer once, scored alone, after its own prompt; the start of all prompts once in each group."""
    groups, start = make_groups(shape * 3), tuple(range(1000, 1000 + common))
    prompts, answers = [start + g.prompt_ids for g in groups], [g.answers[0] for g in groups]
    packed = on_common_prefix(prompts, answers, budget)
    assert sorted(row for _, rows in packed for row in rows) == list(range(len(groups)))
    for group, rows in packed:
        assert packed_length(group) <= budget
        assert group.prompt_ids[:common] == start
        assert {group.prompt_ids} == {prompt[: len(group.prompt_ids)] for prompt in prompts}
        for row, answer, scored in zip(rows, group.answers, group.scored, strict=True):
            assert group.prompt_ids + answer == prompts[row] + answers[row]
            assert scored == (False,) * (len(answer) - len(answers[row])) + (True,) * len(answers[row])
    size = sum(packed_length(group) for group, _ in packed)
    whole = sum(packed_length(Group(*pair)) for pair in zip(prompts, [(a,) for a in answers], strict=True))
    assert size == whole - (len(groups) - len(packed)) * len(packed[0][0].prompt_ids)


@pytest.mark.parametrize("common", [0, 7])
def test_an_answer_on_the_common_start_has_the_log_prob_of_its_own_prompt(tiny_model, common):
    """Also where one prompt is the start of all others, or there is no common one."""
    policy, groups = tiny_policy(tiny_model("llama")), make_groups([(n, (m,)) for n, m in [(5, 9), (1, 1), (12, 3)]])
    start = tuple(range(3, 3 + common))
    prompts, answers = [start + g.prompt_ids for g in groups], [g.answers[0] for g in groups]
    prompts, answers = [*prompts, start or prompts[0]], [*answers, (8, 9)]
    alone = [Group(prompt, (answer,)) for prompt, answer in zip(prompts, answers, strict=True)]
    own = [logps_in_cut(policy, [group], Budget(64, "sdpa"))[0][0] for group in alone]
    found = {}
    for group, rows in on_common_prefix(prompts, answers, 24):
        found |= zip(rows, logps_in_cut(policy, [group], Budget(24, "sdpa"))[0], strict=True)
    assert [found[row] for row in range(len(prompts))] == pytest.approx(own, abs=1e-4)


def test_bins_refuse_a_group_over_budget():
    with pytest.raises(UserError, match=r"group of 11 packed tokens exceeds the microbatch of 10 .*raise"):
        bins(make_groups([(3, (5, 5))]), 10)


@given(shapes)
def test_tokens_computed_are_the_distinct_content(shape):
    """Content: each prompt once and of each answer the tokens that predict one, all but its last. Ratio 1.00."""
    groups = make_groups(shape)
    batch = pack(groups, range(len(groups)))
    content = sum(prompt + sum(answer - 1 for answer in answers) for prompt, answers in shape)
    assert batch.tokens == content == sum(map(packed_length, groups))
    assert sum(queries for queries, _ in batch.layout.segments) == batch.tokens


@given(shapes)
def test_a_cpu_row_is_filled_up_and_nothing_else_moves(shape):
    groups = make_groups(shape)
    plain, filled = (pack(groups, range(len(groups)), backend) for backend in ("sdpa", "numba"))
    assert filled.tokens % 64 == 0
    assert 0 <= filled.tokens - plain.tokens < 64
    assert torch.equal(filled.token_ids_T[: plain.tokens], plain.token_ids_T)
    assert torch.equal(filled.scored_N, plain.scored_N)
    assert filled.layout.segments[:-1] == plain.layout.segments[:-1]
    extra = filled.tokens - plain.tokens
    assert filled.layout.segments[-1] == tuple(length + extra for length in plain.layout.segments[-1])
    assert filled.layout.kv_index_K[-extra:].tolist() == list(range(plain.tokens, filled.tokens)) or not extra


@given(shapes)
def test_pack_spells_every_sequence(shape):
    """Reading keys, positions and targets back through the layout gives each prompt and answer in order."""
    groups = make_groups(shape)
    batch = pack(groups, range(len(groups)))
    ids, positions, targets = (x.tolist() for x in (batch.token_ids_T, batch.position_ids_T, batch.targets_N))
    kv_index, kv_starts = batch.layout.kv_index_K.tolist(), batch.layout.kv_starts.tolist()
    q_starts = batch.layout.q_starts.tolist()
    keys_of = {}  # query row -> the rows it sees
    for number, (queries, keys) in enumerate(batch.layout.segments):
        rows = kv_index[kv_starts[number] : kv_starts[number + 1]]
        for i in range(queries):
            keys_of[q_starts[number] + i] = rows[: keys - queries + i + 1]
    expected = [(group.prompt_ids, answer) for group in groups for answer in group.answers]
    scored = list(zip(batch.scored_N.tolist(), batch.sequence_ids_N.tolist(), targets, strict=True))
    assert [sequence for _, sequence, _ in scored] == sorted(sequence for _, sequence, _ in scored)
    assert batch.sequences == len(expected)
    for number, (prompt, answer) in enumerate(expected):
        own = [(row, target) for row, sequence, target in scored if sequence == number]
        assert tuple(target for _, target in own) == answer
        for i, (row, _) in enumerate(own):
            assert [ids[key] for key in keys_of[row]] == [*prompt, *answer[:i]]
            assert [positions[key] for key in keys_of[row]] == list(range(len(prompt) + i))


# The step ----------------------------------------------------------------------------------------------------------

SHAPE = [(5, (7, 1)), (1, (12, 9)), (9, (1, 1)), (3, (4, 20)), (16, (2, 3)), (2, (6, 6))]
WHOLE = 400


def spin_step(policy, microbatch_tokens, opponent, shrunk=None, objective=None):
    """The adapter's gradients after one step over SHAPE that moves nothing, its metrics, the budget it ended with."""
    groups = refereed(opponent)
    told = {} if shrunk is None else {"shrunk": shrunk.append}
    budget = Budget(microbatch_tokens, "sdpa", **told)
    objective = objective or Pairwise("logistic", beta=0.3)
    state = start_training(policy, "adamw", 0.0, scaled=False)
    gradients = {}
    handles = [state.optimizer.register_step_pre_hook(lambda *_: gradients.update(current(policy)))]
    metrics, budget = train_step(policy, groups, objective, 1e9, budget, state)
    [handle.remove() for handle in handles]
    return gradients, metrics, budget


def refereed(opponent):
    """SHAPE's groups with an opponent's log-probs."""
    rows = zip(make_groups(SHAPE), opponent.tolist(), strict=True)
    return [replace(group, given={REFERENCE: tuple(logps)}) for group, logps in rows]


def current(policy):
    return {name: p.grad.clone() for name, p in policy.trainable_parameters().items()}


@pytest.fixture(scope="module")
def policy(tiny_model):
    return tiny_policy(tiny_model("qwen2"))


@pytest.fixture(scope="module")
def opponent():
    return torch.randn(len(SHAPE), 2, generator=torch.Generator().manual_seed(3)) * 5 - 40


@pytest.mark.parametrize("objective", [None, Nll()], ids=["pairwise", "nll"])
@settings(max_examples=12, deadline=None)
@given(budget=st.integers(30, WHOLE))
def test_gradient_does_not_depend_on_the_cut(policy, opponent, objective, budget):
    whole, metrics, _ = spin_step(policy, WHOLE, opponent, objective=objective)
    cut, cut_metrics, _ = spin_step(policy, budget, opponent, objective=objective)
    assert (metrics.pop("train/microbatch_tokens"), cut_metrics.pop("train/microbatch_tokens")) == (WHOLE, budget)
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item() + 1e-9)
    assert cut_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5)


class StarvedOps:
    """EAGER, but memory runs out above `tokens` scored tokens: in the forward, or late in the backward."""

    def __init__(self, tokens, where="forward", policy=None):
        self.tokens, self.where, self.starving = tokens, where, False
        if where == "backward":  # the first layer's gradients come last: the others have been accumulated by then
            first = next(iter(policy.trainable_parameters().values()))
            self.handle = first.register_hook(lambda _: self._fail_if(self.starving))

    pairwise_loss = staticmethod(ops.EAGER.pairwise_loss)

    def linear_logps(self, hidden_ND, *args, **kwargs):
        self.starving = len(hidden_ND) > self.tokens
        self._fail_if(self.starving and self.where == "forward")
        return ops.EAGER.linear_logps(hidden_ND, *args, **kwargs)

    def _fail_if(self, failing):
        if failing:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_splits_and_repeats_the_step(policy, opponent, monkeypatch, caplog, where):
    fitting, metrics, _ = spin_step(policy, 60, opponent)
    shrunk = []
    starved = StarvedOps(60, where, policy)
    monkeypatch.setattr(policy, "ops", starved)
    with caplog.at_level(logging.WARNING, "spinfast"):
        gradients, survived, budget = spin_step(policy, 120, opponent, shrunk)
    if where == "backward":
        starved.handle.remove()
    assert budget.microbatch_tokens == 60
    assert shrunk == [60]
    assert [r.message for r in caplog.records] == ["memory ran out at 120 tokens; microbatches have 60 from here on"]
    assert survived == metrics
    for name, gradient in fitting.items():
        assert torch.equal(gradients[name], gradient), name


def test_out_of_memory_corrects_the_rest_of_the_phase(policy, opponent, monkeypatch, caplog):
    groups = refereed(opponent)
    steps, budget = Epochs(groups, len(groups), 3, 0), Budget(120, "sdpa")
    state = start_training(policy, "adamw", 0.0, scaled=False)
    monkeypatch.setattr(policy, "ops", StarvedOps(60))
    with caplog.at_level(logging.WARNING, "spinfast"):
        assert len(list(train(policy, steps, Pairwise(), Spin(), 0.0, budget, state, 20))) == 3
    assert len(caplog.records) == 1


def test_out_of_memory_while_scoring(policy, monkeypatch):
    groups = make_groups(SHAPE)
    steps, budget = Epochs(groups, len(groups), 1, 0), Budget(120, "sdpa")
    expected, _ = score(policy, steps, budget, lambda *_: None)
    told = []
    monkeypatch.setattr(policy, "ops", StarvedOps(60))
    scores, fitted = score(policy, steps, budget, lambda *counted: told.append(counted))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert fitted.microbatch_tokens == 60
    assert told == [(len(groups), sum(map(packed_length, groups)))]


def test_scores_are_cut_alike_where_memory_runs_out_halfway(policy, monkeypatch):
    groups = make_groups(SHAPE)
    steps, budget = Epochs(groups, 5, 1, 0), Budget(120, "sdpa")
    expected, _ = score(policy, steps, replace(budget, microbatch_tokens=60), lambda *_: None)
    budgets = iter([WHOLE, 0])  # the first step fits, the second does not
    starved = StarvedOps(WHOLE)
    monkeypatch.setattr(starved, "_fail_if", lambda _: StarvedOps._fail_if(starved, next(budgets, WHOLE) == 0))
    monkeypatch.setattr(policy, "ops", starved)
    scores, fitted = score(policy, steps, budget, lambda *_: None)
    assert fitted.microbatch_tokens == 60
    assert scores == expected


def test_out_of_memory_with_one_group_is_told(policy, opponent, monkeypatch):
    monkeypatch.setattr(policy, "ops", StarvedOps(1))
    with pytest.raises(UserError, match=r"the longest group; set train.checkpointing=true or lower"):
        spin_step(policy, 120, opponent)


def test_batches_do_not_depend_on_history(policy):
    """The same groups give the same batches, tensor for tensor: what resume rests on."""
    groups = make_groups(SHAPE * 2)
    cut = [[pack(given, rows) for rows in bins(given, 70)] for given in (groups, list(groups))]
    for a, b in zip(*cut, strict=True):
        assert a.rows == b.rows
        assert torch.equal(a.token_ids_T, b.token_ids_T)
        assert torch.equal(a.layout.kv_index_K, b.layout.kv_index_K)
