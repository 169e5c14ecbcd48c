"""vLLM's answers against the policy's own: same weights, same adapter, same tokens; what the engine may not touch."""

import os
from collections import deque
from dataclasses import replace

import psutil
import pytest
import torch

from spinfast.config import Full, Lora, LoraXs, TinyLora
from spinfast.errors import UserError
from spinfast.generation import Voices, prompt_seed, vllm_compat
from spinfast.generation.canary import BOUNDS, MOVE_BOUNDS, amplified, check_adapter, policy_logps
from spinfast.generation.transformers import TransformersGenerator
from spinfast.generation.weight_sharing import verify
from spinfast.packing import pack
from spinfast.policy.adapters import files as adapters
from spinfast.policy.checksum import checksum
from spinfast.scoring import answer_logps, batch_sequence_logps
from spinfast.studies.outcomes import Problems
from spinfast.studies.together import BASE, check_applied
from spinfast.types import Group, Request, Sampling


def ask(prompts, tokens=16, temperature=0.0, seed=100):
    ids, stop_ids = prompts
    requests = [Request(index, tuple(prompt), seed + index) for index, prompt in enumerate(ids)]
    return requests, Sampling(temperature, 1.0, tokens, tuple(stop_ids))


def answers(generator, requests, sampling, adapter):
    completions = {c.index: c for c in generator.generate(requests, sampling, adapter)}
    assert sorted(completions) == sorted(request.index for request in requests)
    return [completions[request.index] for request in requests]


def tokens(completions):
    return [completion.token_ids for completion in completions]


def engine_checksum(generator):
    return checksum(dict(generator.engine_model.named_parameters()))


def test_greedy_tokens_equal_the_policys_before_and_after_training(generator, trained, prompts):
    requests, sampling = ask(prompts)
    own = TransformersGenerator(trained)
    base = answers(generator, requests, sampling, None)
    assert tokens(base) == tokens(answers(own, requests, sampling, None))
    adapted = answers(generator, requests, sampling, trained.adapter())
    assert tokens(adapted) == tokens(answers(own, requests, sampling, trained.adapter()))
    assert tokens(adapted) != tokens(base)


def test_tokens_come_one_by_one_from_batches_that_requests_join_and_leave(generator, trained, prompts):
    """As for a chat or a server: base and adapter one after the other, one request dropped, another added late."""
    requests, sampling = ask(prompts)
    adapters = {"base": None, "adapter": trained.adapter()}
    expected = {name: answers(generator, requests, sampling, adapter) for name, adapter in adapters.items()}
    voices, found = Voices(generator, adapters), {}
    for name in adapters:
        for request in requests[:-1]:
            voices.add(name, replace(request, sample=len(name)), sampling)
    voices.drop(replace(requests[0], sample=len("base")))
    late = replace(requests[-1], sample=len("base"))
    while len(voices):
        if late and found:
            voices.add("base", late, sampling)
            late = None
        for token in voices.step():
            found.setdefault((voices.turn, token.request.index), []).append(token)
    wanted = {(name, c.index): c for name, all in expected.items() for c in all}
    del wanted["base", requests[0].index], wanted["adapter", requests[-1].index]
    assert {place: tuple(token.id for token in got) for place, got in found.items()} == {
        place: completion.token_ids for place, completion in wanted.items()
    }
    for place, got in found.items():
        assert [token.ends for token in got] == [None] * (len(got) - 1) + [wanted[place].finish_reason]


@pytest.mark.parametrize("rank", [pytest.param(8, marks=pytest.mark.slow), 2])
def test_any_adapter_is_asked_not_only_the_live_one(generator, policy, trained_adapter, prompts, rank):
    """The policy is fresh, B zero. A lower rank comes with its own scaling, which both must honour."""
    cut = {n: t[:rank] if ".lora_A." in n else t[:, :rank] for n, t in trained_adapter.tensors.items()}
    tensors = {name: tensor.contiguous() for name, tensor in cut.items()}
    other = replace(trained_adapter, tensors=tensors, config=trained_adapter.config | {"r": rank, "lora_alpha": 12})
    requests, sampling = ask(prompts)
    found = tokens(answers(generator, requests, sampling, other))
    assert found == tokens(answers(TransformersGenerator(policy), requests, sampling, other))
    assert found != tokens(answers(generator, requests, sampling, policy.adapter()))
    with policy.playing(other):
        assert found == tokens(answers(generator, requests, sampling, policy.adapter()))


def test_a_batch_of_several_adapters_answers_as_each_alone(generator, policy, trained_adapter, prompts, tmp_path):
    """From PEFT's files, two at a time of three, and the base; then the engine serves one again."""
    tensors = {n: t * (-2 if ".lora_B." in n else 1) for n, t in trained_adapter.tensors.items()}
    cut = {n: (t[:4] if ".lora_A." in n else t[:, :4]).contiguous() for n, t in trained_adapter.tensors.items()}
    each = {
        "trained": trained_adapter,
        "turned": replace(trained_adapter, tensors=tensors),
        "cut": replace(trained_adapter, tensors=cut, config=trained_adapter.config | {"r": 4, "lora_alpha": 9}),
    }
    for name, adapter in each.items():
        adapters.save(adapter, tmp_path / name)
    requests, sampling = ask((prompts[0][:2], prompts[1]), tokens=8)
    alone = {name: tokens(answers(generator, requests, sampling, adapter)) for name, adapter in each.items()}
    alone["base"] = tokens(answers(generator, requests, sampling, None))
    asked = [(request, name) for request in requests for name in alone]
    paths = [tmp_path / name if name in each else None for _, name in asked]
    numbered = [replace(request, index=position) for position, (request, _) in enumerate(asked)]
    found = {completion.index: completion.token_ids for completion in generator.mixed(numbered, sampling, paths)}
    assert len({*found.values()}) >= 6
    for position, (request, name) in enumerate(asked):
        assert found[position] == alone[name][request.index], name
    scored = dict(generator.mixed_logps([requests[0].prompt_ids] * len(alone), paths[: len(alone)]))
    for position, name in enumerate(alone):
        expected = generator.prompt_logps(requests[0].prompt_ids, each.get(name))
        assert scored[position] == pytest.approx(expected, abs=1e-3)
    assert tokens(answers(generator, requests, sampling, trained_adapter)) == alone["trained"]


def test_generation_changes_no_parameter(generator, trained, prompts):
    requests, sampling = ask(prompts, tokens=4, temperature=1.0)
    adapter = trained.adapter()
    before, base = checksum(dict(trained.model.named_parameters())), engine_checksum(generator)
    kept = {name: tensor.clone() for name, tensor in adapter.tensors.items()}
    answers(generator, requests, sampling, adapter)
    assert checksum(dict(trained.model.named_parameters())) == before
    assert engine_checksum(generator) == base
    assert all(torch.equal(adapter.tensors[name], tensor) for name, tensor in kept.items())


def test_training_leaves_the_base_alone(generator, trained):
    engine, base = engine_checksum(generator), trained.base_checksum()
    with torch.no_grad():
        for parameter in trained.trainable_parameters().values():
            parameter.add_(1.0)
    assert (engine_checksum(generator), trained.base_checksum()) == (engine, base)
    assert verify(trained.causal_lm, generator.engine_model).parameters == 92


def test_sharing_costs_no_memory(generator):
    before = psutil.Process().memory_info().rss
    model = generator.shared_model("sdpa")
    grown = psutil.Process().memory_info().rss - before
    assert grown < 0.05 * verify(model, generator.engine_model).bytes


def test_logp_is_the_policys_own_within_rounding(generator, trained, prompts):
    requests, sampling = ask(prompts, temperature=1.0)
    completions = answers(generator, requests, sampling, trained.adapter())
    for request, completion in zip(requests, completions, strict=True):
        batch = pack([Group(request.prompt_ids, (completion.token_ids,))], [0], "sdpa")
        with torch.no_grad():
            assert completion.logp == pytest.approx(answer_logps(trained, batch).sum().item(), abs=1e-2)


def several(requests, samples):
    return [replace(r, seed=prompt_seed(0, 0, r.index, sample=k), sample=k) for r in requests for k in range(samples)]


def test_log_probs_per_token_are_those_of_the_training_forward(generator, trained, prompts):
    """At the temperature of the draw: several samples of a prompt, packed as training packs a group."""
    requests, sampling = ask(prompts)
    sampling = replace(sampling, temperature=0.7)
    found = {(c.index, c.sample): c for c in generator.generate(several(requests, 3), sampling, trained.adapter())}
    assert len(found) == 12
    for request in requests:
        samples = [found[request.index, k] for k in range(3)]
        batch = pack([Group(request.prompt_ids, tuple(c.token_ids for c in samples))], [0], "sdpa")
        with torch.no_grad():
            expected = answer_logps(trained, batch, sampling.temperature)
        assert [len(c.logps) for c in samples] == [len(c.token_ids) for c in samples]
        given = torch.tensor([logp for c in samples for logp in c.logps])
        assert (given - expected).abs().max() < BOUNDS[torch.float32]


def test_greedy_and_drawn_answers_in_one_batch_are_those_of_batches_of_their_own(generator, trained, prompts):
    requests, greedy = ask(prompts)
    ways = [greedy, replace(greedy, temperature=1.0, max_tokens=9)]
    alone = [tokens(answers(generator, requests, way, trained.adapter())) for way in ways]
    assert alone[0] != alone[1]
    mixed = [replace(request, sample=k) for request in requests for k in range(2)]
    found = {(c.index, c.sample): c for c in generator.generate(mixed, ways * len(requests), trained.adapter())}
    assert [[found[r.index, k].token_ids for r in requests] for k in range(2)] == alone
    assert {found[r.index, 1].finish_reason for r in requests if len(found[r.index, 1].token_ids) == 9} <= {"length"}


def test_a_prompt_of_many_samples_is_prefilled_once(generator, prompts, monkeypatch):
    """Tokens that the engine computes: of a prompt that stands in the cache only what is beyond its full blocks."""
    core, computed = generator.engine.engine_core.engine_core, []
    schedule = core.scheduler.schedule

    def counted(*args, **kwargs):
        output = schedule(*args, **kwargs)
        computed.append(output.total_num_scheduled_tokens)
        return output

    monkeypatch.setattr(core.scheduler, "schedule", counted)
    block = generator.engine.vllm_config.cache_config.block_size
    prompt = tuple((prompts[0][0] * 20)[: block + block // 4])
    assert len(prompt) == block + block // 4 < 240, "the case is too easy: no block is full"
    requests = several([Request(0, prompt, seed=0)], 8)
    list(generator.generate(requests, Sampling(1.0, 1.0, 1, ()), None))
    assert sum(computed) == len(prompt) + 7 * (len(prompt) - block)


def test_seed_alone_decides_a_sampled_answer(generator, prompts):
    requests, sampling = ask(prompts, temperature=1.0)
    first = answers(generator, requests, sampling, None)
    assert tokens(answers(generator, requests[::-1], sampling, None)) == tokens(first)[::-1]
    others = [replace(request, seed=request.seed + 1000) for request in requests]
    assert all(a != b for a, b in zip(tokens(answers(generator, others, sampling, None)), tokens(first), strict=True))


def test_same_prompt_with_other_seeds_gets_other_answers(generator, prompts):
    requests, sampling = ask(prompts, temperature=1.0)
    same = [Request(i, requests[0].prompt_ids, seed=i) for i in range(6)]
    assert len(set(tokens(answers(generator, same, sampling, None)))) == 6


def test_stop_token_is_kept_and_a_cut_answer_has_none(generator, prompts):
    requests, sampling = ask(prompts, tokens=6)
    cut = answers(generator, requests, sampling, None)
    assert {(c.finish_reason, len(c.token_ids)) for c in cut} == {("length", 6)}
    third = cut[0].token_ids[2]
    (stopped,) = answers(generator, requests[:1], replace(sampling, stop_ids=(third,)), None)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == cut[0].token_ids[: cut[0].token_ids.index(third) + 1]


def test_prompt_that_does_not_fit_is_named(generator, prompts):
    requests, sampling = ask(prompts, tokens=4)
    long = Request(77, tuple(requests[0].prompt_ids[:1]) * 253, seed=0)
    with pytest.raises(UserError, match=r"prompt 77: 253 prompt tokens \+ max_tokens 4 = 257 .* context of 256"):
        generator.generate([*requests, long], sampling, None)
    assert answers(generator, [replace(long, prompt_ids=long.prompt_ids[:252])], sampling, None)


def test_leaving_early_drops_the_rest(generator, prompts):
    requests, sampling = ask(prompts, tokens=2)
    stream = generator.generate([replace(requests[i % 4], index=i) for i in range(12)], sampling, None)
    next(stream)
    with pytest.raises(RuntimeError, match="not finished"):
        generator.prompt_logps(requests[0].prompt_ids, None)
    stream.close()
    assert len(answers(generator, requests, sampling, None)) == len(requests)


@pytest.fixture(params=["one batch at a time", "two batches in flight"])
def sleeper(request, generator, monkeypatch):
    """The engine as a GPU's: its K/V cache can be released, here in name only; on a GPU batches run ahead."""
    core = generator.engine.engine_core.engine_core
    if request.param == "two batches in flight":
        monkeypatch.setattr(core, "batch_queue_size", 2)
        monkeypatch.setattr(core, "batch_queue", deque(maxlen=2))
        monkeypatch.setattr(core, "step_fn", core.step_with_batch_queue)
    generator.released = []
    monkeypatch.setattr(core.model_executor, "discard", generator.released.append)
    monkeypatch.setattr(generator, "_sleeps", True)
    yield generator
    del generator.released
    vllm_compat.restore_kv_cache(generator.engine)
    generator._asleep = False


def test_rests_after_answers_and_goes_on(sleeper, prompts):
    """vLLM releases nothing while finished requests wait to be told to the worker, or a batch is in flight."""
    requests, sampling = ask(prompts, tokens=4)
    before = answers(sleeper, requests, sampling, None)
    sleeper.rest()
    sleeper.rest()
    assert sleeper.released == [("kv_cache",)]
    stream = sleeper.generate([replace(requests[i % 4], index=i) for i in range(12)], sampling, None)
    next(stream)
    with pytest.raises(RuntimeError, match="not finished"):
        sleeper.rest()
    stream.close()
    sleeper.rest()
    assert sleeper.released == [("kv_cache",)] * 2
    assert tokens(answers(sleeper, requests, sampling, None)) == tokens(before)


def test_answers_never_use_an_earlier_adapters_keys(generator, prompts, monkeypatch):
    """vLLM refuses to forget blocks that a request still holds: asked again once it is gone, else an error."""
    requests, sampling = ask(prompts, tokens=4)
    before, verdicts = answers(generator, requests, sampling, None), [False]
    scheduler = generator.engine.engine_core.engine_core.scheduler
    reset = scheduler.reset_prefix_cache

    def refusing(*arguments, **options):
        return verdicts.pop() if verdicts else reset(*arguments, **options)

    monkeypatch.setattr(scheduler, "reset_prefix_cache", refusing)
    assert tokens(answers(generator, requests, sampling, None)) == tokens(before)
    assert not verdicts
    verdicts += [False, False]
    with pytest.raises(RuntimeError, match="vLLM holds keys and values of an earlier adapter or base"):
        answers(generator, requests, sampling, None)
    assert tokens(answers(generator, requests, sampling, None)) == tokens(before)


def test_more_prompts_than_places(generator, prompts):
    requests, sampling = ask(prompts, tokens=3, temperature=1.0)
    many = [replace(requests[i % 4], index=i, seed=i) for i in range(19)]
    assert len(answers(generator, many, sampling, None)) == 19


def test_canary_accepts_the_trained_adapter_and_tells_how_far_it_moved(generator, trained, prompts):
    logps = policy_logps(trained, "sdpa")
    report = check_adapter(generator, logps, prompts[0][0], trained.adapter(), dtype=torch.float32)
    assert report.base_error < 1e-4
    assert report.adapter_error < 1e-4
    assert report.moved > 100 * report.adapter_error
    assert report.move_error < 1e-3


def test_canary_accepts_an_adapter_that_does_nothing_yet(generator, policy, prompts):
    logps = policy_logps(policy, "sdpa")
    report = check_adapter(generator, logps, prompts[0][0], policy.adapter(), dtype=torch.float32)
    assert report.moved == 0
    assert report.move_error is None


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(LoraXs(kind="lora_xs", r=4, alpha=4), marks=pytest.mark.slow),
        TinyLora(kind="tiny_lora", u=13, tie="all"),
        Lora(r=4, alpha=3, use_rslora=True, rank_pattern={"q_proj": 8, "down_proj": 2}, alpha_pattern={"up_proj": 1}),
        Lora(r=4, alpha=8, init_lora_weights="pissa", rank_pattern={"down_proj": 2}),
    ],
    ids=lambda s: s.implementation,
)
def test_every_form_is_served_as_the_plain_lora_it_makes(generator, new_policy, prompts, monkeypatch, settings):
    policy = new_policy(generator, settings)
    monkeypatch.setattr(generator, "serving", policy.serving)
    for parameter in policy.trainable_parameters().values():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    report = check_adapter(
        generator, policy_logps(policy, "sdpa"), prompts[0][0], policy.adapter(), dtype=torch.float32
    )
    assert report.moved > 100 * report.adapter_error
    assert report.move_error < 1e-3
    requests, sampling = ask(prompts)
    own = TransformersGenerator(policy, batch_size=4, max_model_len=256)
    assert tokens(answers(generator, requests, sampling, policy.adapter())) == tokens(
        answers(own, requests, sampling, policy.adapter())
    )


def test_trained_weights_are_the_engines_own(generator, new_policy, prompts, monkeypatch):
    policy = new_policy(generator, Full(kind="full", target_modules=("v_proj", "down_proj")))
    monkeypatch.setattr(generator, "serving", policy.serving)
    requests, sampling = ask(prompts)
    base, start = answers(generator, requests, sampling, None), policy.adapter()
    try:
        for parameter in policy.trainable_parameters().values():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            parameter.data += 0.2 * parameter.std() * noise
        policy.updated()
        moved = policy.adapter()
        report = check_adapter(generator, policy_logps(policy, "sdpa"), prompts[0][0], moved, dtype=torch.float32)
        assert report.moved > 100 * report.adapter_error
        own = TransformersGenerator(policy, batch_size=4, max_model_len=256)
        found = answers(generator, requests, sampling, moved)
        assert tokens(found) == tokens(answers(own, requests, sampling, moved))
        assert tokens(found) != tokens(base)
        for other in (None, start):  # and the policy is what it was afterwards
            assert tokens(answers(generator, requests, sampling, other)) == tokens(base)
            assert adapters.fingerprint(policy.adapter()) == adapters.fingerprint(moved)
    finally:
        policy.restart(0)
    assert tokens(answers(generator, requests, sampling, None)) == tokens(base)


class Deaf:
    """A fault: an engine that drops the adapter it is given."""

    def __init__(self, generator):
        self.generator = generator

    def prompt_logps(self, prompt_ids, adapter):
        return self.generator.prompt_logps(prompt_ids, None)


def test_canary_catches_generation_without_the_adapter(generator, trained, prompts):
    with pytest.raises(RuntimeError, match="generates without it"):
        check_adapter(
            Deaf(generator), policy_logps(trained, "sdpa"), prompts[0][0], trained.adapter(), dtype=torch.float32
        )


class Rounding:
    """The engine as 16 bit would have it, log-probs off by 0.05; `factor` is a fault: what becomes of the adapter."""

    def __init__(self, generator, factor):
        self.generator, self.factor, self.draw = generator, factor, torch.Generator().manual_seed(0)

    def prompt_logps(self, prompt_ids, adapter):
        adapter = adapter and amplified(adapter, self.factor)
        exact = torch.tensor(self.generator.prompt_logps(prompt_ids, adapter))
        return (exact + 0.05 * torch.randn(exact.shape, generator=self.draw)).tolist()


@pytest.mark.parametrize("factor", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_canary_sees_through_the_rounding_of_16_bit(generator, trained, prompts, factor):
    """An adapter that moves log-probs far less than rounding does, yet dropped, halved."""
    trained.load_adapter(amplified(trained.adapter(), 1e-4))
    ask = {"prompt_ids": prompts[0][0], "adapter": trained.adapter(), "dtype": torch.bfloat16}
    report = check_adapter(Rounding(generator, 1.0), policy_logps(trained, "sdpa"), **ask)
    assert report.move_error < 0.15
    with pytest.raises(RuntimeError, match=r"amplified .* it moves the engine's log-probs otherwise"):
        check_adapter(Rounding(generator, factor), policy_logps(trained, "sdpa"), **ask)


def test_canary_leaves_adapters_as_they_were(generator, trained, prompts):
    before = trained.adapter()
    check_adapter(generator, policy_logps(trained, "sdpa"), prompts[0][0], before, dtype=torch.float32)
    assert adapters.fingerprint(trained.adapter()) == adapters.fingerprint(before)
    assert generator._adapter[0] == adapters.fingerprint(before)


def test_canary_catches_last_rounds_adapter(generator, trained, prompts):
    old = trained.adapter()
    with torch.no_grad():
        for name, parameter in trained.trainable_parameters().items():
            if "lora_B" in name:
                parameter.mul_(-1)
    with pytest.raises(RuntimeError, match="does not generate with this adapter"):
        check_adapter(generator, policy_logps(trained, "sdpa"), prompts[0][0], old, dtype=torch.float32)


def test_canary_catches_a_changed_base(generator, policy, prompts):
    norm = policy.causal_lm.model.norm
    shared = norm.weight
    norm.weight = torch.nn.Parameter(shared * 1.05, requires_grad=False)
    with pytest.raises(RuntimeError, match="base is not the policy's"):
        check_adapter(generator, policy_logps(policy, "sdpa"), prompts[0][0], policy.adapter(), dtype=torch.float32)


def test_canary_bounds_every_compute_dtype():
    assert BOUNDS.keys() == MOVE_BOUNDS.keys() == {torch.float32, torch.float16, torch.bfloat16}


def test_adapter_of_too_high_a_rank_is_refused(generator, policy, prompts):
    adapter = policy.adapter()
    wide = replace(adapter, config=adapter.config | {"r": 16})
    requests, sampling = ask(prompts)
    with pytest.raises(UserError, match="rank 16 exceeds max_lora_rank 8"):
        list(generator.generate(requests, sampling, wide))


def test_adapter_of_unknown_modules_is_refused(generator, policy, prompts):
    adapter = policy.adapter()
    renamed = {name.replace("q_proj", "other_proj"): tensor for name, tensor in adapter.tensors.items()}
    requests, sampling = ask(prompts)
    with pytest.raises(UserError, match="no slot for 10 of its modules"):
        list(generator.generate(requests, sampling, replace(adapter, tensors=renamed)))
    assert answers(generator, requests[:1], sampling, adapter)


def test_another_cells_adapter_does_not_pass(generator, policy, trained_adapter, groups, tmp_path):
    tensors = {n: t * (-1 if ".lora_B." in n else 1) for n, t in trained_adapter.tensors.items()}
    each = {"own": trained_adapter, "other": replace(trained_adapter, tensors=tensors)}
    paths, probe = {BASE: None}, Problems("set", groups, groups, [], [], 4, str)

    def worked():
        sums = batch_sequence_logps(policy, pack(groups, range(len(groups)), "sdpa")).tolist()
        return {"set/worked": [total / group.lengths[0] for total, group in zip(sums, groups, strict=True)]}

    measured = {}
    with policy.without_adapter():
        measured[BASE] = worked()
    for name, adapter in each.items():
        adapters.save(adapter, tmp_path / name)
        paths[name] = tmp_path / name
        with policy.playing(adapter):
            measured[name] = worked()
    names = [*paths]
    check_applied(generator, [probe], names, paths, measured, torch.float32)
    swapped = paths | {"own": paths["other"], "other": paths["own"]}
    with pytest.raises(RuntimeError, match="does not answer as own"):
        check_applied(generator, [probe], names, swapped, measured, torch.float32)
    with pytest.raises(RuntimeError, match="does not answer as own"):
        check_applied(generator, [probe], names, paths | {"own": None}, measured, torch.float32)
    moved = measured | {"own": {"set/worked": [value + 1e-4 for value in measured[BASE]["set/worked"]]}}
    with pytest.raises(RuntimeError, match="as the base for own"):
        check_applied(generator, [probe], names, paths | {"own": None}, moved, torch.float32)


def test_starting_the_engine_leaves_no_traces(generator):
    assert "LD_PRELOAD" not in os.environ
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(threads)
