"""The transformers generator against `model.generate`, and what batching may not change."""

import gc
import json
import weakref
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from test_run import play, write_config

from spinfast import fit
from spinfast.errors import UserError
from spinfast.generation import prompt_seed, slots
from spinfast.generation import transformers as generation
from spinfast.generation.canary import BOUNDS
from spinfast.generation.transformers import TransformersGenerator, sample, uniform
from spinfast.ops import EAGER
from spinfast.packing import pack
from spinfast.policy.adapters import Lora
from spinfast.policy.adapters import files as adapters
from spinfast.policy.transformers import TransformersPolicy, load_base
from spinfast.run import main
from spinfast.scoring import answer_logps
from spinfast.types import Adapter, Completion, Group, Request, Sampling

CPU = torch.device("cpu")
FAMILIES = [("llama", False), ("qwen2", True), ("qwen3", True)]


@pytest.fixture(scope="module")
def policy(tiny_model):
    """policy(family, tied, dtype): a tiny model with a LoRA adapter that matters, as training leaves it."""
    made = {}

    def make(family: str = "llama", tied: bool = False, dtype: torch.dtype = torch.float32) -> TransformersPolicy:
        if (key := (family, tied, dtype)) not in made:
            base = load_base(tiny_model(family, tied), dtype, CPU)
            lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
            made[key] = TransformersPolicy(base, lambda base: Lora(base, lora, 0), EAGER)
        return made[key]

    return make


def requests(count: int, seed: int = 0, longest: int = 40) -> list[Request]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=draw).tolist()
    return [
        Request(i, tuple(torch.randint(3, 384, (n,), generator=draw).tolist()), seed=1000 + i)
        for i, n in enumerate(lengths)
    ]


def answers(policy, asked, sampling, adapter="live", **options) -> dict[int, Completion]:
    adapter = policy.adapter() if adapter == "live" else adapter
    with TransformersGenerator(policy, **options) as generator:
        done = list(generator.generate(asked, sampling, adapter))
    assert sorted(c.index for c in done) == sorted(r.index for r in asked)
    return {c.index: c for c in done}


def tokens(completions: dict[int, Completion]) -> dict[int, tuple]:
    return {index: (c.token_ids, c.finish_reason) for index, c in completions.items()}


def library_greedy(policy, request, sampling) -> tuple[int, ...]:
    """`model.generate` under its own attention and cache, one prompt at a time."""
    policy.causal_lm.set_attn_implementation("sdpa")
    policy.model.eval()
    try:
        out = policy.model.generate(
            input_ids=torch.tensor([request.prompt_ids]),
            max_new_tokens=sampling.max_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(sampling.stop_ids),
        )
    finally:
        policy.model.train()
        policy.causal_lm.set_attn_implementation("spinfast")
    return tuple(out[0, len(request.prompt_ids) :].tolist())


GREEDY = Sampling(temperature=0, top_p=1, max_tokens=40, stop_ids=tuple(range(2, 384, 29)))
RANDOM = Sampling(temperature=1, top_p=1, max_tokens=24, stop_ids=tuple(range(2, 384, 29)))


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
@pytest.mark.parametrize("adapter_on", [True, False], ids=["lora", "base"])
def test_greedy_equals_model_generate(policy, family, tied, adapter_on):
    asked, tiny = requests(7), policy(family, tied)
    if adapter_on:
        found = answers(tiny, asked, GREEDY, batch_size=3)
        expected = {r.index: library_greedy(tiny, r, GREEDY) for r in asked}
    else:
        found = answers(tiny, asked, GREEDY, None, batch_size=3)
        with tiny.base_only():
            expected = {r.index: library_greedy(tiny, r, GREEDY) for r in asked}
    assert {index: c.token_ids for index, c in found.items()} == expected
    assert len(set(expected.values())) > 3, "the case is too easy: the answers are all one loop"
    assert len({len(answer) for answer in expected.values()}) > 1, "the case is too easy: all end together"


@pytest.mark.parametrize(("sampling"), [GREEDY, RANDOM], ids=["greedy", "random"])
def test_answers_do_not_depend_on_batch_size_or_order(policy, sampling):
    asked = requests(13)
    alone = tokens(answers(policy(), asked, sampling, batch_size=1))
    assert len({c for c, _ in alone.values()}) > 9
    for batch_size, order in [(2, asked), (5, asked[::-1]), (5, asked[7:] + asked[:7]), (64, asked[::-1])]:
        assert tokens(answers(policy(), order, sampling, batch_size=batch_size)) == alone


def test_greedy_and_drawn_answers_in_one_batch_are_those_of_batches_of_their_own(policy):
    tiny, asked = policy(), requests(7)
    ways = [GREEDY, RANDOM, Sampling(0.7, 0.9, 5, RANDOM.stop_ids[:1])]
    alone = [tokens(answers(tiny, asked, way)) for way in ways]
    assert alone[0] != alone[1] != alone[2] != alone[0]
    mixed = [replace(request, sample=k) for request in asked for k in range(len(ways))]
    for batch_size in (2, 5, 64):
        with TransformersGenerator(tiny, batch_size=batch_size) as generator:
            done = list(generator.generate(mixed, ways * len(asked), tiny.adapter()))
            assert [tokens({c.index: c for c in done if c.sample == k}) for k in range(len(ways))] == alone
            with pytest.raises(ValueError, match="zip"):
                generator.generate(mixed, ways, tiny.adapter())


def test_answers_follow_the_seed_alone(policy):
    prompt = requests(1)[0].prompt_ids
    asked = [Request(i, prompt, seed) for i, seed in enumerate([7, 8, 7, 2**63 - 1])]
    found = answers(policy(), asked, RANDOM)
    assert found[0].token_ids == found[2].token_ids
    assert len({c.token_ids for c in found.values()}) == 3


def test_prompts_beyond_the_step_budget_wait(policy, monkeypatch):
    asked = requests(9)
    expected = tokens(answers(policy(), asked, RANDOM))
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 30)
    assert tokens(answers(policy(), asked, RANDOM)) == expected


def test_query_heads_may_stand_as_rows_of_their_key_head(policy, monkeypatch):
    expected = tokens(answers(policy(), requests(5), GREEDY))
    monkeypatch.setattr(slots, "_query_rows", lambda device, shared: shared)  # as on CUDA
    assert tokens(answers(policy(), requests(5), GREEDY)) == expected


def test_log_probs_are_those_of_the_whole_sequence(policy):
    tiny, asked = policy("qwen2", True), requests(5)
    sampling = Sampling(temperature=0.7, top_p=1, max_tokens=20, stop_ids=RANDOM.stop_ids)
    found = answers(tiny, asked, sampling, batch_size=2)
    tiny.causal_lm.set_attn_implementation("sdpa")
    for request in asked:
        completion = found[request.index]
        ids = torch.tensor([request.prompt_ids + completion.token_ids])
        with torch.no_grad():
            logits = tiny.model(input_ids=ids).logits[0, :-1] / sampling.temperature
        logps = logits.log_softmax(-1).gather(1, ids[0, 1:, None])
        expected = logps[len(request.prompt_ids) - 1 :].sum().item()
        assert completion.logp == pytest.approx(expected, abs=1e-3)
    tiny.causal_lm.set_attn_implementation("spinfast")


def test_seeds_of_recorded_runs_are_unchanged_and_samples_have_others():
    assert prompt_seed(0, 0, 0) == 8782083180342756274
    assert prompt_seed(7, 3, 41, sample=0) == prompt_seed(7, 3, 41) == 8276671797839628375
    assert prompt_seed(7, 3, 41, "heldout iter_003") == 1116326510487904701
    grid = product((0, 1), (0, 11), (1, 11), ("train", "train/1"), range(12))
    seeds = [prompt_seed(run, iteration, index, purpose, sample) for run, iteration, index, purpose, sample in grid]
    assert len(set(seeds)) == len(seeds) == 192
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_logp_is_the_sum_of_the_tokens():
    assert Completion(3, (5, 6), "stop", (-0.5, -1.25), sample=2).logp == -1.75
    assert Completion(3, (5, 6), "stop").logp is None


def sampled(policy, asked, sampling=RANDOM, adapter="live", **options) -> dict[tuple[int, int], Completion]:
    adapter = policy.adapter() if adapter == "live" else adapter
    with TransformersGenerator(policy, **options) as generator:
        done = list(generator.generate(asked, sampling, adapter))
    assert sorted((c.index, c.sample) for c in done) == sorted((r.index, r.sample) for r in asked)
    return {(c.index, c.sample): c for c in done}


def several(asked: list[Request], samples: int) -> list[Request]:
    return [
        Request(r.index, r.prompt_ids, prompt_seed(0, 0, r.index, sample=k), sample=k)
        for r in asked
        for k in range(samples)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_samples_are_the_answers_that_their_seeds_give_alone(policy, batch_size):
    """Whether a sample's prompt is computed in the same step, was computed in an earlier one, or is its own."""
    asked = several(requests(5), samples=4)
    alone = {(r.index, r.sample): sampled(policy(), [r])[r.index, r.sample] for r in asked}
    assert len({c.token_ids for c in alone.values()}) > 15
    found = sampled(policy(), asked, batch_size=batch_size)
    for place, completion in alone.items():
        assert found[place].token_ids == completion.token_ids
        assert found[place].logps == pytest.approx(completion.logps, abs=1e-4)


def test_a_prompt_is_computed_once_for_all_samples_in_flight(policy, monkeypatch):
    """Rows of the decoder: the prompt's once, then one per token of each answer but its last."""
    rows, tiny = [], policy()
    plan = generation.SlotCache.plan

    def counted(cache, *answers):
        ids_1T, *rest = plan(cache, *answers)
        rows.append(ids_1T.shape[1] - cache.padding)
        return ids_1T, *rest

    monkeypatch.setattr(generation.SlotCache, "plan", counted)
    endless = Sampling(temperature=1, top_p=1, max_tokens=5, stop_ids=())
    (request,) = requests(1, seed=3)
    sampled(tiny, several([request], samples=8), endless)
    assert sum(rows) == len(request.prompt_ids) + 7 + 8 * 4  # a later sample feeds the prompt's last token again
    rows.clear()
    staggered = Sampling(temperature=1, top_p=1, max_tokens=24, stop_ids=RANDOM.stop_ids)
    done = sampled(tiny, several([request], samples=8), staggered, batch_size=3)
    assert len({len(c.token_ids) for c in done.values()}) > 3, "the case is too easy: all end together"
    assert sum(rows) == len(request.prompt_ids) + 7 + sum(len(c.token_ids) - 1 for c in done.values())


def test_equal_index_with_another_prompt_shares_nothing(policy):
    first, other = requests(2)
    asked = [first, Request(first.index, other.prompt_ids, seed=5, sample=1)]
    (alone,) = sampled(policy(), asked[1:]).values()
    assert sampled(policy(), asked)[first.index, 1].token_ids == alone.token_ids


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_log_probs_per_token_are_those_of_the_training_forward(policy, family, tied):
    """At the temperature of the draw; packed as training packs a group."""
    tiny, asked = policy(family, tied), several(requests(3), samples=4)
    sampling = Sampling(temperature=0.7, top_p=1, max_tokens=20, stop_ids=RANDOM.stop_ids)
    found = sampled(tiny, asked, sampling, batch_size=5)
    for request in asked[::4]:
        samples = [found[request.index, k] for k in range(4)]
        batch = pack([Group(request.prompt_ids, tuple(c.token_ids for c in samples))], [0], "sdpa")
        with torch.no_grad():
            expected = answer_logps(tiny, batch, sampling.temperature)
        given = torch.tensor([logp for c in samples for logp in c.logps])
        assert [len(c.logps) for c in samples] == [len(c.token_ids) for c in samples]
        assert (given - expected).abs().max() < BOUNDS[torch.float32]


def test_a_cut_answer_is_whole_and_says_length(policy):
    endless = Sampling(temperature=1, top_p=1, max_tokens=9, stop_ids=())
    for completion in answers(policy(), requests(4), endless, batch_size=3).values():
        assert (len(completion.token_ids), completion.finish_reason) == (9, "length")
    for completion in answers(policy(), requests(20), RANDOM).values():
        ended = completion.token_ids[-1] in RANDOM.stop_ids
        assert completion.finish_reason == ("stop" if ended else "length")
        assert not set(completion.token_ids[:-1]) & set(RANDOM.stop_ids)


def test_a_prompt_that_does_not_fit_is_named(policy):
    asked = [Request(4, (5,) * 10, 0), Request(17, (5,) * 11, 0)]
    sampling = Sampling(temperature=0, top_p=1, max_tokens=20, stop_ids=())
    with TransformersGenerator(policy(), max_model_len=30) as generator:
        assert [c.index for c in generator.generate(asked[:1], sampling, None)] == [4]
        with pytest.raises(UserError, match=r"prompt 17: 11 prompt tokens \+ max_tokens 20 = 31 .* 30"):
            generator.generate(asked, sampling, None)


def stranger(policy, seed: int = 1) -> Adapter:
    """An adapter that fits the policy and is not its live one."""
    draw, live = torch.Generator().manual_seed(seed), policy.adapter()
    return replace(live, tensors={n: t + 0.3 * torch.randn(t.shape, generator=draw) for n, t in live.tensors.items()})


def same_values(one: Adapter, other: Adapter) -> bool:
    return all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


@pytest.mark.parametrize("batch_size", [2, 64])
def test_any_adapter_answers_as_if_it_were_loaded(policy, batch_size):
    tiny, other = policy(), stranger(policy())
    live, asked = tiny.adapter(), several(requests(4), samples=2)
    found = sampled(tiny, asked, adapter=other, batch_size=batch_size)
    assert same_values(tiny.adapter(), live)
    assert found != sampled(tiny, asked, batch_size=batch_size), "the case is too easy"
    with tiny.playing(other):
        assert found == sampled(tiny, asked, batch_size=batch_size)


def test_two_streams_with_two_adapters_do_not_mix(policy):
    """Between two answers the policy is its own again, whatever a stream that is not exhausted plays with."""
    tiny, one, two = policy(), stranger(policy(), 1), stranger(policy(), 2)
    live, asked = tiny.adapter(), requests(5)
    expected = [tokens(answers(tiny, asked, RANDOM, adapter)) for adapter in (one, two, None)]
    with TransformersGenerator(tiny, batch_size=2) as generator:
        streams = [generator.generate(asked, RANDOM, adapter) for adapter in (one, two, None)]
        found = [{}, {}, {}]
        for _ in asked:
            for stream, seen in zip(streams, found, strict=True):
                completion = next(stream)
                seen[completion.index] = completion
                assert same_values(tiny.adapter(), live)
        assert [tokens(seen) for seen in found] == expected


def test_an_adapter_of_lower_rank_and_other_scaling_is_played_as_it_is(policy):
    """Rank 2 of 4, scaling 6 for 2: what the weights get is B A times the adapter's own scaling."""
    tiny = policy()
    other = stranger(tiny)
    cut = {n: (t[:2] if ".lora_A." in n else t[:, :2]).contiguous() for n, t in other.tensors.items()}
    narrow = Adapter(other.config | {"r": 2, "lora_alpha": 12}, cut)
    zeros = {n: torch.zeros_like(t) for n, t in other.tensors.items()}
    for name, tensor in cut.items():
        zeros[name][tuple(map(slice, tensor.shape))] = tensor * (3 if ".lora_B." in name else 1)
    asked = requests(4)
    found = tokens(answers(tiny, asked, GREEDY, narrow))
    assert found == tokens(answers(tiny, asked, GREEDY, Adapter(other.config, zeros)))
    assert found != tokens(answers(tiny, asked, GREEDY, Adapter(narrow.config | {"lora_alpha": 4}, cut)))


def test_an_adapter_that_does_not_fit_is_refused(policy):
    tiny = policy()
    other, live = stranger(tiny), tiny.adapter()
    renamed = Adapter(other.config, {n.replace("q_proj", "z_proj"): t for n, t in other.tensors.items()})
    wide = adapters.stack([other, other])
    with TransformersGenerator(tiny) as generator:
        for bad, message in [(renamed, "adapter does not fit the model"), (wide, "rank 8 exceeds the policy's 4")]:
            with pytest.raises(UserError, match=message):
                next(generator.generate(requests(2), GREEDY, bad))
    assert same_values(tiny.adapter(), live)


def test_none_is_the_frozen_weights_with_what_was_merged_into_them(tiny_model):
    """As for an engine, which sees the same weights; `base_only` refuses, because the base is gone."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    merged = TransformersPolicy(
        load_base(tiny_model("llama", False), torch.float32, CPU), lambda base: Lora(base, lora, 0), EAGER
    )
    base = tokens(answers(merged, requests(4), GREEDY, None))
    merged.merge_and_restart(seed=1)  # B is zero
    found = tokens(answers(merged, requests(4), GREEDY, None))
    assert found == tokens(answers(merged, requests(4), GREEDY))
    assert found != base
    with pytest.raises(UserError, match="the base alone is gone"), merged.base_only():
        pass


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM], ids=["greedy", "random"])
def test_a_diverged_adapter_is_an_error(policy, sampling):
    tiny = policy()
    sound = tiny.adapter()
    tiny.load_adapter(Adapter(sound.config, {name: t * float("nan") for name, t in sound.tensors.items()}))
    try:
        with TransformersGenerator(tiny) as generator:
            with pytest.raises(UserError, match=r"prompt 0: expected finite logits, got NaN at answer token 0"):
                next(generator.generate(requests(2), sampling, tiny.adapter()))
    finally:
        tiny.load_adapter(sound)


def test_answers_stream_and_leaving_gives_everything_back(policy, monkeypatch):
    tiny, caches = policy(), []
    build = generation.SlotCache.__init__
    monkeypatch.setattr(
        generation.SlotCache,
        "__init__",
        lambda self, *args: (build(self, *args), caches.extend(weakref.ref(t) for kv in self.layers for t in kv))[0],
    )
    asked = [Request(i, (3 + i,), seed=i) for i in range(6)]
    with TransformersGenerator(tiny, batch_size=2) as generator:
        stream = generator.generate(asked, RANDOM, None)
        first = next(stream)
        assert first.index in (0, 1), "an answer comes while the others wait"
        assert not torch.is_inference_mode_enabled()
        assert any(cache() is not None for cache in caches)
    gc.collect()
    assert caches
    assert all(cache() is None for cache in caches)
    assert list(stream) == []
    assert tiny.model.training
    assert all(p.requires_grad for name, p in tiny.model.named_parameters() if "lora_" in name)
    assert all("lora_" in name for name in tiny.trainable_parameters())


@given(
    seeds=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5, unique=True),
    step=st.integers(0, 4096),
)
def test_uniform_is_splitmix64(seeds, step):
    """Against the generator written with Python's integers, stepped from the seed."""

    def stepped(state):
        for _ in range(step % 50 + 1):
            state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return ((z ^ z >> 31) >> 16) / 2**48

    found = uniform(torch.tensor(seeds), torch.full((len(seeds),), step % 50)).tolist()
    assert found == [stepped(seed) for seed in seeds]


@settings(deadline=None, max_examples=60)
@given(
    vocabulary=st.sampled_from([1, 7, 256, 384, 1000, 1187 * 2]),
    spread=st.sampled_from([0.0, 0.5, 3.0, 12.0]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_p=st.sampled_from([0.1, 0.5, 0.95, 0.999, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_sample_inverts_the_cdf_of_the_nucleus(vocabulary, spread, temperature, top_p, seed):
    """The drawn token's interval of the nucleus's CDF (sorted out in fp64) holds the uniform; its width is its prob."""
    draw = torch.Generator().manual_seed(seed)
    logits_SV = torch.randn(6, vocabulary, generator=draw) * spread
    uniform_S = torch.rand(6, generator=draw, dtype=torch.float64)
    uniform_S[:2] = torch.tensor([0.0, 1 - 2.0**-48])  # the two ends
    token_S, logp_S = sample(logits_SV, uniform_S, temperature, top_p)

    probs_SV = torch.softmax(logits_SV.double() / temperature, -1)
    sorted_SV = probs_SV.sort(descending=True).values
    mass_SV = sorted_SV.cumsum(-1)
    clear_S = (top_p == 1) | ((mass_SV - top_p).abs().amin(-1) > 1e-6)  # else fp32 may end the nucleus elsewhere
    size_S1 = (mass_SV < top_p).sum(-1, keepdim=True).clamp(max=vocabulary - 1)
    last_S1 = sorted_SV.gather(1, size_S1)
    near_SV = ((probs_SV / last_S1 - 1).abs() < 2e-5) & (probs_SV != last_S1)  # fp32 may not tell them from the last
    clear_S &= (top_p == 1) | ~near_SV.any(-1)
    floor_S1 = last_S1 * (1 - 1e-5) if top_p < 1 else 0.0
    kept_SV = probs_SV.where(probs_SV >= floor_S1, 0.0)
    kept_SV /= kept_SV.sum(-1, keepdim=True)
    high_S, width_S = (x.gather(1, token_S[:, None])[clear_S, 0] for x in (kept_SV.cumsum(-1), kept_SV))
    assert (width_S > 0).all()
    assert (high_S - width_S <= uniform_S[clear_S] + 1e-4).all()
    assert (uniform_S[clear_S] <= high_S + 1e-4).all()
    known_S = width_S > torch.finfo(torch.float32).tiny  # below it a probability has a bit or two
    assert torch.allclose(logp_S[clear_S].double()[known_S], width_S[known_S].log(), atol=1e-4)


def test_a_round_that_changes_the_base_is_an_error(tiny_model, tmp_path, monkeypatch):
    """One bit of one frozen weight, changed while the policy trains."""
    train = fit.train

    def harmful(policy, *args):
        policy.decoder.layers[1].mlp.up_proj.get_base_layer().weight.data.view(torch.int32)[3, 5] ^= 1
        yield from train(policy, *args)

    monkeypatch.setattr(fit, "train", harmful)
    with pytest.raises(RuntimeError, match="the base's weights changed while a round was played"):
        play(tmp_path, tiny_model("llama"), spin={"iterations": 1})
    assert [row["iteration"] for row in json.loads((tmp_path / "run" / "results.json").read_text())] == ["base"]


def test_a_context_longer_than_the_models_is_refused(tiny_model, tmp_path, capsys):
    config = write_config(tmp_path, tiny_model("llama"), prompt={"max_prompt_tokens": 1013})
    assert main([str(config), "--run-dir", str(tmp_path / "run")]) == 2
    assert "max_prompt_tokens + the longer max_tokens = 1025 tokens, but" in capsys.readouterr().err
