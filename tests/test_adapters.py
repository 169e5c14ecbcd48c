"""Adapters of others: what the engine takes equals PEFT's own log-probs, everything else is refused by name."""

import json
import re
import shutil

import pytest
import torch
from fixtures import tiny_model_dir
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file, save_file
from test_run import fingerprints, play
from transformers import AutoModelForCausalLM

from spinfast import ops
from spinfast.config import Lora
from spinfast.device import profile
from spinfast.errors import UserError
from spinfast.policy.adapters import files as adapters
from spinfast.policy.transformers import load_policy
from spinfast.run import main
from spinfast.scoring import Budget, sequence_logps
from spinfast.types import Group

TEXT = Group(tuple(range(5, 45)), (tuple(range(60, 80)), tuple(range(200, 240))))


@pytest.fixture(scope="module")
def base(tiny_model):
    return tiny_model("llama")


def saved(base, path, peft_config):
    """An adapter as PEFT saves it, every matrix random."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft_config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(path, save_embedding_layers=False)
    return path


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    return saved(base, tmp_path_factory.mktemp("plain"), lora(target_modules=["q_proj", "down_proj"]))


@pytest.fixture
def adapter(plain, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(plain, tmp_path / "adapter")


def lora(**changes):
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | changes)


def edit(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def policy_of(base, settings):
    cpu = profile("cpu", "float32", "auto")
    options = {"ops": ops.choose("auto", "cpu")[0], "profile": cpu, "load_in_4bit": False, "seed": 0}
    return load_policy(base, "base", "0", lora=Lora(**settings), **options)


def policy_sums(policy):
    return sequence_logps(policy, [TEXT], Budget(4096, "numba"))[0]


def engine_sums(base, path):
    """Log-prob sums of the answers by the engine with this adapter, opened as `spinfast eval` opens it."""
    found = adapters.uniform(adapters.load(path))
    policy = policy_of(base, adapters.settings(found))
    policy.load_adapter(found)
    return policy_sums(policy)


@torch.no_grad()
def peft_sums(base, path=None):
    """The same by PEFT; without a path the base's."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = (PeftModel.from_pretrained(model, path) if path else model).eval()

    def logp(answer):
        ids = torch.tensor([TEXT.prompt_ids + answer])
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        return float(logps[len(TEXT.prompt_ids) - 1 :].sum())

    return [logp(answer) for answer in TEXT.answers]


ACCEPTED = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2}},
    {"alpha_pattern": {"q_proj": 1, "layers.0.mlp.down_proj": 32}},
    {"use_rslora": True, "rank_pattern": {"v_proj": 1}, "alpha_pattern": {"v_proj": 3, "o_proj": 12}},
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "gate_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"exclude_modules": r".*mlp.*"},
    {"target_modules": r".*layers\.0\..*(k|down)_proj"},
    {"target_modules": ["embed_tokens", "up_proj"]},
    {"init_lora_weights": False},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "eva"},
    {"lora_dropout": 0.1},
    {"fan_in_fan_out": True},
    {"lora_alpha": 0.5},
]


@pytest.mark.parametrize("changes", ACCEPTED, ids=lambda changes: str(changes)[1:60])
@pytest.mark.filterwarnings("ignore")
def test_what_is_taken_equals_peft(base, tmp_path, changes):
    path = saved(base, tmp_path / "adapter", lora(**changes))
    expected = peft_sums(base, path)
    assert engine_sums(base, path) == pytest.approx(expected, rel=1e-5)
    assert abs(expected[0] - peft_sums(base)[0]) > 0.02, "the case is too easy: the adapter does nothing"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_matrices_of_another_dtype(base, adapter, dtype):
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    assert engine_sums(base, adapter) == pytest.approx(peft_sums(base, adapter), rel=1e-5)


def test_the_first_layers_of_many(tiny_model, tmp_path):
    """PEFT shortens a list of 20 names or more to their ends; the last layer must stay without an adapter."""
    deep = tiny_model("llama", layers=4)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    path = saved(deep, tmp_path / "adapter", lora(target_modules=linears, layers_to_transform=[0, 1, 2]))
    assert len(adapters.settings(adapters.load(path))["target_modules"]) == 21
    assert engine_sums(deep, path) == pytest.approx(peft_sums(deep, path), rel=1e-5)


def test_loaded_as_it_was_saved(base, tmp_path, plain):
    """An adapter in the engine's own form keeps its bits, and what is made of another one is plain LoRA to PEFT too."""
    found, tensors = adapters.load(plain), load_file(plain / "adapter_model.safetensors")
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    patterned = saved(base, tmp_path / "patterned", lora(use_rslora=True, rank_pattern={"q_proj": 8, "k_proj": 2}))
    made = adapters.uniform(adapters.load(patterned))
    assert (made.config["rank_pattern"], made.config["use_rslora"]) == ({}, False)
    assert adapters.uniform(found) is found
    adapters.save(made, tmp_path / "made plain")
    assert peft_sums(base, tmp_path / "made plain") == pytest.approx(peft_sums(base, patterned), rel=1e-5)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_adapters_that_changed_their_base_are_refused(base, tmp_path, init):
    """PEFT changes the base again as it loads them; as plain LoRA they would be another model."""
    path = saved(base, tmp_path / "adapter", lora(init_lora_weights=init))
    with pytest.raises(UserError, match=f"init_lora_weights in adapter_config.json is '{init}', expected .*convert it"):
        adapters.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({"init_lora_weights": init}, f"init_lora_weights in adapter_config.json is '{init}'")
            for init in ("corda", "loftq", "lora_ga", "mica", "unheard-of")
        ),
        ({"use_dora": True}, "use_dora .* is True, expected false"),
        ({"bias": "all"}, "bias .* is 'all', expected none"),
        ({"bias": "lora_only"}, "bias .* is 'lora_only', expected none"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save .* is \['lm_head'\], expected none"),
        ({"task_type": "SEQ_CLS"}, "task_type .* is 'SEQ_CLS', expected CAUSAL_LM"),
        ({"lora_bias": True}, "lora_bias .* is True, which the engine does not compute"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices .* does not compute"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens .* does not compute"),
        ({"use_qalora": True}, "use_qalora .* does not compute"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication .* does not compute"),
        ({"target_parameters": ["mlp.experts.up_proj"]}, "target_parameters .* does not compute"),
        ({"megatron_config": {"tensor_model_parallel_size": 2}}, "megatron_config .* does not compute"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying .* does not compute"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config .* does not compute"),
        ({"a_later_variant": {"k": 1}}, "a_later_variant .* does not compute; expected its default"),
        ({"use_rslora": 3}, "use_rslora .* is 3, expected true or false"),
        ({"rank_pattern": {"q_proj": 8}}, r"q_proj.lora_A.weight is float32 \(4, 64\), r is 8"),
        ({"rank_pattern": {"(": 8}}, "adapter .*: missing \\), unterminated subpattern"),
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern .* expected module names with a positive integer each"),
        ({"target_modules": ["q_proj"]}, "down_proj has tensors, but adapter_config.json does not target it"),
        ({"exclude_modules": ["mlp.down_proj"]}, "down_proj has tensors, but adapter_config.json does not target it"),
        ({"layers_to_transform": [0]}, "layers.1.* has tensors, but adapter_config.json does not target it"),
        ({"layers_to_transform": "all"}, "layers_to_transform .* is 'all', expected numbers of layers"),
        ({"target_modules": "("}, "adapter .*: "),
        ({"target_modules": ["q_proj", "down_proj"], "r": 3}, r"is float32 \(4, 96\), r is 3"),
        ({"peft_type": None}, "expected peft_type LORA in adapter_config.json, got None"),
    ],
    ids=lambda value: str(value)[1:50] if isinstance(value, dict) else "",
)
def test_what_the_engine_does_not_compute_is_refused(adapter, changes, message):
    edit(adapter, **changes)
    with pytest.raises(UserError, match=message) as caught:
        adapters.load(adapter)
    assert str(adapter) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [kind.value for kind in PeftType if kind is not PeftType.LORA])
def test_other_kinds_of_adapters_are_refused(adapter, kind):
    edit(adapter, peft_type=kind)
    with pytest.raises(UserError, match=f"expected peft_type LORA in adapter_config.json, got '{kind}'"):
        adapters.load(adapter)


@pytest.mark.parametrize(
    "changes",
    [
        {"a_later_variant": None, "another": False, "a_third": {}, "a_fourth": []},  # not in use
        {"auto_mapping": {"unsloth_fixed": True}, "peft_version": "9.9", "inference_mode": True, "task_type": None},
        {"eva_config": {"rho": 2.0}, "megatron_core": "megatron.core", "qalora_group_size": 16, "lora_dropout": 0.3},
        {"use_dora": None, "bias": None, "rank_pattern": None, "alpha_pattern": None, "init_lora_weights": None},
    ],
    ids=["unused", "metadata", "of-training", "null"],
)
def test_keys_that_change_nothing(adapter, plain, changes):
    edit(adapter, **changes)
    found, expected = adapters.load(adapter), adapters.load(plain)
    assert adapters.fingerprint(found) == adapters.fingerprint(expected)


def test_keys_that_an_old_peft_did_not_know(adapter, plain):
    config = json.loads((adapter / "adapter_config.json").read_text())
    few = {key: config[key] for key in ("peft_type", "r", "lora_alpha", "target_modules")}
    (adapter / "adapter_config.json").write_text(json.dumps(few))
    assert adapters.fingerprint(adapters.load(adapter)) == adapters.fingerprint(adapters.load(plain))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, n: t.update({n.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(64)}),
            "no LoRA matrix",
        ),
        (lambda t, n: t.update({n.replace("lora_A.weight", "lora_B.bias"): torch.ones(64)}), "no LoRA matrix"),
        (lambda t, n: t.update({"base_model.model.lm_head.weight": torch.ones(384, 64)}), "lm_head.weight is no LoRA"),
        (
            lambda t, n: t.update({"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(384, 64)}),
            "base_layer.weight is no LoRA",  # which PEFT would put into the base's place
        ),
        (lambda t, n: t.update({n: t[n].to(torch.int8)}), "no LoRA matrix"),
        (lambda t, n: t.clear(), "holds no LoRA matrix"),
        (lambda t, n: t.pop(n), "lora_B.weight is there, .*lora_A.weight is not"),
        (
            lambda t, n: t.update({f"base_model.model.lm_head.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}),
            "lm_head has an adapter; the engine's head takes none",
        ),
    ],
    ids=["dora", "bias", "head", "embedding", "int8", "empty", "half", "head's"],
)
def test_tensors_that_are_no_lora(adapter, change, message):
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors, min(name for name in tensors if "lora_A" in name))
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message):
        adapters.load(adapter)


@pytest.mark.parametrize(
    ("made_on", "revision", "told"),
    [
        ("Org/Base-1", None, False),  # another folder of the same name
        ("org/another", None, True),
        (None, None, True),
        ("org/another", "0123abc", False),  # the very revision
        ("org/another", "main", True),
    ],
)
def test_another_base_is_told(adapter, caplog, made_on, revision, told):
    edit(adapter, base_model_name_or_path=made_on, revision=revision)
    adapters.load(adapter, "0123abc", name="/models/base-1")
    assert [f"made on {made_on or 'a base without a name'}, used on /models/base-1" in caplog.text] == [told]


def test_a_base_of_another_revision_or_shape_is_refused(adapter, base, tmp_path):
    wider = tiny_model_dir(tmp_path, "llama", intermediate_size=80)
    with pytest.raises(UserError, match=r"adapter does not fit the model: .*check model.name"):
        engine_sums(wider, adapter)
    edit(adapter, revision="3210abc")
    with pytest.raises(
        UserError, match="of revision 3210abc, this base has 0123abc; use the base that it was trained on"
    ):
        adapters.load(adapter, "0123abc")


# A run that starts from one ------------------------------------------------------------------------------------------


def other(base, path, **changes):
    return saved(base, path, lora(**{"target_modules": ["q_proj", "up_proj"]} | changes))


@pytest.mark.parametrize(
    "changes", [{}, {"r": 8}, {"r": 1, "use_rslora": True}, {"rank_pattern": {"q_proj": 2}}], ids=lambda c: str(c)[1:-1]
)
def test_a_start_adds_the_same_and_can_be_trained_throughout(base, tmp_path, changes):
    path = other(base, tmp_path / "start", **changes)
    policy = policy_of(base, {"r": 8, "alpha": 32})
    own = policy.adapter()
    policy.load_adapter(adapters.grown(adapters.load(path), own))
    assert policy_sums(policy) == pytest.approx(peft_sums(base, path), rel=1e-5)
    found = policy.adapter().tensors
    for name in found:
        if "lora_A" in name:
            b = found[name.replace("lora_A", "lora_B")]
            assert (found[name].any(1) | b.any(0)).all(), f"{name} has a rank that no step can move"
            if "down_proj" in name:
                assert torch.equal(found[name], own.tensors[name])


def test_a_start_on_the_embedding(base, tmp_path):
    path = other(base, tmp_path / "start", target_modules=["embed_tokens", "q_proj"])
    policy = policy_of(base, {"r": 8, "target_modules": ["embed_tokens", "q_proj"]})
    policy.load_adapter(adapters.grown(adapters.load(path), policy.adapter()))
    assert policy_sums(policy) == pytest.approx(peft_sums(base, path), rel=1e-5)


def started(directory, base, start, **adapter):
    settings = {"r": 4, "alpha": 8, "start": str(start)} | adapter
    few = {"problems": 2, "pairs": 4, "max_tokens": 6}
    return play(directory, base, adapter=settings, sft={"groups_per_step": 6}, spin={"iterations": 1}, evaluate=few)


@pytest.mark.parametrize("init", ["continue", "merge"])
def test_a_run_starts_from_an_adapter(base, tmp_path, init):
    """`base` is the adapter before the run's training; later stages are held against the base model itself."""
    path = other(base, tmp_path / "start")
    run_dir = started(tmp_path, base, path, init=init)
    assert peft_sums(base, run_dir / "base" / "adapter") == pytest.approx(peft_sums(base, path), rel=1e-5)
    sft, last = (adapters.load(run_dir / stage / "adapter") for stage in ("sft", "iter_000"))
    assert sft.config["r"] == 4  # the start is trained on, with merge too
    assert last.config["r"] == {"continue": 4, "merge": 8}[init]
    rows = {row["stage"]: row["evaluation"] for row in json.loads((run_dir / "results.json").read_text())}
    assert rows["base"]["heldout/margin"]["value"] == 0
    assert rows["base"]["heldout/kl_k1"]["value"] != 0
    before = fingerprints(run_dir)
    (run_dir / "base" / "eval.json").unlink()  # resumed, its evaluation is made again, with the same adapter
    assert main([str(tmp_path / "config.yaml"), "--run-dir", str(run_dir)]) == 0
    assert fingerprints(run_dir) == before


def test_a_start_that_changed_is_not_what_the_run_began_with(base, tmp_path, capsys):
    path = other(base, tmp_path / "start")
    run_dir = started(tmp_path, base, path)
    edit(path, lora_alpha=7)
    assert main([str(tmp_path / "config.yaml"), "--run-dir", str(run_dir)]) == 2
    assert "adapter.start is not what the run started with" in capsys.readouterr().err


def test_a_run_as_a_start_means_its_best_adapter(tmp_path):
    stage = tmp_path / "run" / "sft" / "adapter"
    stage.mkdir(parents=True)
    (tmp_path / "run" / "best.json").write_text(json.dumps({"stage": "sft", "adapter": "sft/adapter"}))
    assert adapters.find(tmp_path / "run") == stage
    assert adapters.find(stage) == stage
    (tmp_path / "run" / "best.json").write_text("{")
    with pytest.raises(UserError, match=r"best.json: damaged; name the adapter of one of the run's stages"):
        adapters.find(tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 2}, "adapter.start: .* has rank 4, this run's adapter has 2; raise adapter.r"),
        ({"target_modules": ["q_proj"]}, "adapter: 4 of its tensors have no place in the run's adapter, first"),
        ({"r": 4}, "adapter .*/nowhere: no such directory; expected an adapter's, or a finished run's"),
    ],
)
def test_a_start_that_does_not_fit(base, tmp_path, capsys, settings, message):
    start = other(base, tmp_path / "start") if "nowhere" not in message else tmp_path / "nowhere"
    with pytest.raises(AssertionError):
        started(tmp_path, base, start, **settings)
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists() or not (tmp_path / "run" / "base" / "adapter").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_run_may_train_the_embedding(tiny_model, tmp_path):
    """Saved, restored and merged like any other module, and plain LoRA to PEFT."""
    base = tiny_model("llama", tied=False)
    settings = {"r": 2, "alpha": 4, "target_modules": ["embed_tokens", "v_proj"], "init": "merge"}
    few = {"problems": 2, "pairs": 4, "max_tokens": 6}
    run_dir = play(tmp_path, base, adapter=settings, sft={"groups_per_step": 6}, spin={"iterations": 1}, evaluate=few)
    last = run_dir / "iter_000" / "adapter"
    assert adapters.load(last).config["r"] == 4
    assert engine_sums(base, last) == pytest.approx(peft_sums(base, last), rel=1e-4)
    assert engine_sums(base, last) != pytest.approx(peft_sums(base), rel=1e-6)


def test_a_tied_embedding_is_not_merged(base):
    """Its head would move too, and the saved adapter would not say so."""
    with pytest.raises(UserError, match=r"adapter.init: model.embed_tokens is the head's weight too"):
        policy_of(base, {"target_modules": ["embed_tokens"], "init": "merge"})
