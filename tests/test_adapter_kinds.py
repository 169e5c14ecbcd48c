"""Every kind of adapter: its numbers, its gradients, its files; each with each method."""

import json
import os
import shutil
import signal

import pytest
import torch
import yaml
from crossed import crossed
from packed_cases import make_groups, plain_logps
from peft import PeftModel, TinyLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_grpo import REWARDS
from test_preferences import pairs
from test_run import fingerprints, train_rows, write_config
from transformers import AutoModelForCausalLM

from bench.shapes import shape
from spinfast import config as sections
from spinfast import ops, params
from spinfast.device import profile
from spinfast.errors import UserError
from spinfast.generation.canary import amplified
from spinfast.generation.transformers import TransformersGenerator
from spinfast.interrupt import EXIT_CODE
from spinfast.models import resolve_model
from spinfast.packing import pack
from spinfast.policy.adapters import files as adapters
from spinfast.policy.adapters import tiny_lora
from spinfast.policy.transformers import load_policy
from spinfast.progress import Tick
from spinfast.run import main
from spinfast.scoring import answer_logps
from spinfast.types import Request, Sampling

XS = sections.LoraXs(kind="lora_xs", r=4, alpha=8)
TINY = sections.TinyLora(kind="tiny_lora", u=3, tie=4)
FULL = sections.Full(kind="full", target_modules=("q_proj", "down_proj"))
FRAMED = {"lora_xs": XS, "tiny_lora": TINY, "structured": TINY.model_copy(update={"sharing": "structured"})}
TABLES = sections.Full(kind="full", target_modules=("v_proj",), embeddings=True)
KINDS = FRAMED | {"full": FULL, "embeddings": TABLES}
PATTERNS = {"rank_pattern": {"q_proj": 2, "up_proj": 6}, "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 1}}
LORA = sections.Lora(r=4, alpha=2, use_rslora=True, init_lora_weights="orthogonal", init="merge", **PATTERNS)
QLORA = sections.Lora(r=4, alpha=8)  # on a 4-bit base
PISSA = sections.Lora(r=4, alpha=2, init_lora_weights="pissa", **PATTERNS)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SPINFAST_CACHE", str(tmp_path_factory.getbasetemp() / "frames"))


def policy_of(path, settings, moved=True, found=None):
    """The policy with an adapter that does something."""
    options = {"ops": ops.EAGER, "profile": profile("cpu", "float32"), "load_in_4bit": False, "seed": 0}
    name, revision = (found.name, found.revision) if found else ("tiny", "0" * 40)
    policy = load_policy(path, name, revision, lora=settings, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.trainable_parameters().values() if moved else ():
        parameter.data += (0.03 if settings.kind == "full" else 0.3) * torch.randn(parameter.shape, generator=generator)
    policy.updated()
    return policy


def batch_of(policy):
    groups = make_groups([(4, (5, 3)), (1, (2, 6))])
    return pack(groups, range(len(groups)), "sdpa").to(policy.device)


@pytest.mark.parametrize(("name", "tied"), [*((name, True) for name in KINDS), ("embeddings", False)])
def test_logps_and_gradients_are_those_of_dense_weights(tiny_model, name, tied):
    """W + s B R A put together in fp64 by plain torch, and differentiated there."""
    path = tiny_model("llama", tied)
    policy = policy_of(path, KINDS[name])
    batch, kind = batch_of(policy), policy.kind
    logps = answer_logps(policy, batch)
    logps.sum().backward()
    values = {n: p.detach().double().requires_grad_() for n, p in policy.trainable_parameters().items()}
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").double()
    dense = dict(model.named_parameters())
    for number, module in enumerate(kind.config["modules"]):
        if name in ("full", "embeddings"):
            dense[f"{module}.weight"] = values[f"{module}.weight"]
            continue
        A, B = (factor.double() for factor in kind.frames.by_module[module])
        if name == "lora_xs":
            R = values[f"{module}.R"]
        else:
            P = tiny_lora.projection(kind.config, number).double()
            R = sum(values["v"][tiny_lora.groups(kind.config)[number], i] * P[i] for i in range(3))
        dense[f"{module}.weight"] = dense[f"{module}.weight"].detach() + kind.config["scaling"] * B @ R @ A
    expected = []
    for prompt, answers in [(g.prompt_ids, g.answers) for g in make_groups([(4, (5, 3)), (1, (2, 6))])]:
        for answer in answers:
            ids = torch.tensor([[*prompt, *answer]])
            rows = torch.func.functional_call(model, dense, (ids,)).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            expected.append(rows.gather(1, ids[0, len(prompt) :, None])[:, 0])
    expected = torch.cat(expected)
    expected.sum().backward()
    assert torch.allclose(logps.double(), expected, atol=1e-4)
    for key, parameter in policy.trainable_parameters().items():
        found, truth = parameter.grad.double(), values[key].grad
        assert (found - truth).norm() <= 1e-3 * truth.norm(), key


@pytest.mark.parametrize("name", FRAMED)
def test_expanded_it_is_plain_peft(tiny_model, tmp_path, name):
    policy = policy_of(tiny_model("qwen2"), KINDS[name])
    batch = batch_of(policy)
    adapters.save(policy.serving(policy.adapter())[1], tmp_path / "peft")
    base = AutoModelForCausalLM.from_pretrained(tiny_model("qwen2"), attn_implementation="eager")
    model = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    expected = [
        plain_logps(model, group.prompt_ids, answer)
        for group in make_groups([(4, (5, 3)), (1, (2, 6))])
        for answer in group.answers
    ]
    assert torch.allclose(answer_logps(policy, batch), torch.cat(expected), atol=1e-4)
    assert adapters.load(tmp_path / "peft").config["r"] == KINDS[name].r  # what the engine takes


def test_tiny_lora_is_pefts_in_the_same_projections(tiny_model):
    """PEFT's frame is U S^1/2 and S^1/2 V'; its P in our frame is S^-1/2 P S^1/2. Signs are LAPACK's there."""
    path = tiny_model("llama")
    policy = policy_of(path, TINY.model_copy(update={"tie": 7}))  # two groups, as PEFT makes them of 14 modules
    modules, number_of = policy.kind.config["modules"], tiny_lora.groups(policy.kind.config)
    tying = 1 - (max(number_of) + 1) / len(modules)
    theirs = TinyLoraConfig(r=2, u=3, weight_tying=tying, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), theirs)
    values = model.base_model.tinylora_v["default"]
    for group, v in values.items():
        v.data = policy.trainable_parameters()["v"][int(group)].detach().clone()
    for number, module in enumerate(modules):
        layer = model.base_model.model.get_submodule(module)
        root = policy.kind.frames.by_module[module][1].norm(dim=0).sqrt()
        signs = (layer.tinylora_A["default"] * policy.kind.frames.by_module[module][0]).sum(1).sign()
        P = tiny_lora.projection(policy.kind.config, number) * signs[:, None] * signs
        layer.tinylora_P["default"] = P * root[:, None] / root
    for module in modules:
        A, B, scaling = policy.kind.added(policy.causal_lm.get_submodule(module)).values()
        expected = model.base_model.model.get_submodule(module).get_delta_weight("default")
        assert (scaling * B @ A - expected).norm() <= 1e-4 * expected.norm()  # theirs is an SVD in fp32


@pytest.mark.parametrize(("layers", "modules"), [(24, 168), (28, 196)])
def test_thirteen_numbers_for_any_model(layers, modules):
    """Qwen2.5-0.5B and 7B: one v of u = 13 for all modules; or u = 1 with as many groups as tie leaves."""
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    names = [f"model.layers.{i}.x.{kind}" for i in range(layers) for kind in kinds]
    for settings, count in [
        (sections.TinyLora(kind="tiny_lora", u=13, tie="all"), 13),
        (sections.TinyLora(kind="tiny_lora", u=1), modules),
        (sections.TinyLora(kind="tiny_lora", u=1, tie=8, sharing="structured"), -(-modules // 8)),
    ]:
        made = tiny_lora.TinyLora.tensors(tiny_lora.TinyLora.describe(settings) | {"modules": names})
        assert made["v"].numel() == count


@pytest.mark.parametrize(("name", "modules"), [("Qwen2.5-0.5B", 168), ("Qwen2.5-7B", 196)])
def test_thirteen_numbers_are_counted_on_the_real_shapes(name, modules):
    """As `spinfast params` counts: the policy itself on meta tensors."""
    for settings, count in ((sections.TinyLora(kind="tiny_lora", tie="all"), 13), (XS, modules * XS.r**2)):
        assert params.count(shape(name), settings).trained == count


def test_structured_shares_among_neighbours_of_one_type():
    names = [f"layers.{i}.{kind}" for i in range(4) for kind in ("q", "k")]
    description = {"modules": names, "tie": 2, "sharing": "structured"}
    assert dict(zip(names, tiny_lora.groups(description), strict=True)) == {
        "layers.0.q": 0, "layers.1.q": 0, "layers.2.q": 1, "layers.3.q": 1,
        "layers.0.k": 2, "layers.1.k": 2, "layers.2.k": 3, "layers.3.k": 3,
    }  # fmt: skip
    assert tiny_lora.groups(description | {"sharing": "tiled"}) == [0, 0, 1, 1, 2, 2, 3, 3]


# Files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("payload", "suffix", "bytes_each"), [("bfloat16", "bf16", 2), ("float32", "f32", 4)])
def test_the_file_is_its_numbers_and_nothing_else(tiny_model, tmp_path, payload, suffix, bytes_each):
    settings = sections.TinyLora(kind="tiny_lora", u=13, tie="all", payload=payload)
    policy = policy_of(tiny_model("llama"), settings)
    policy.save_adapter(tmp_path)
    assert (tmp_path / f"tiny_lora.{suffix}").stat().st_size == 13 * bytes_each
    batch = batch_of(policy)
    saved = answer_logps(policy, batch)  # what is in memory is what was saved, rounded alike
    other = policy_of(tiny_model("llama"), settings, moved=False)
    other.load_adapter(adapters.load(tmp_path))
    assert torch.equal(answer_logps(other, batch), saved)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("name", KINDS)
def test_saved_and_loaded_it_is_the_same(tiny_model, tmp_path, name):
    policy = policy_of(tiny_model("qwen3"), KINDS[name])
    policy.save_adapter(tmp_path)
    other = policy_of(tiny_model("qwen3"), KINDS[name], moved=False)
    batch = batch_of(policy)
    with policy.without_adapter():
        base = answer_logps(policy, batch)
    assert torch.equal(answer_logps(other, batch), base)
    other.load_adapter(adapters.load(tmp_path))
    assert torch.equal(answer_logps(other, batch), answer_logps(policy, batch))
    assert not torch.equal(answer_logps(other, batch), base)
    if KINDS[name].kind != "full":
        with other.playing(amplified(other.adapter(), 0)):
            assert torch.equal(answer_logps(other, batch), base)
    assert adapters.fingerprint(adapters.load(tmp_path)) == adapters.fingerprint(policy.adapter())


def scaled(model, path):
    """The model with other weights."""
    shutil.copytree(model, path)
    weights = {name: 1.1 * tensor for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_what_is_not_its_own_is_refused(tiny_model, tmp_path):
    policy = policy_of(tiny_model("llama"), TINY)
    policy.save_adapter(tmp_path / "a")
    saved = adapters.load(tmp_path / "a")
    wrong_base = policy_of(scaled(tiny_model("llama"), tmp_path / "other"), TINY)
    with pytest.raises(UserError, match="its base_sha256 is"):
        wrong_base.load_adapter(saved)
    with pytest.raises(UserError, match="its u is 3, this run's tiny_lora has 2"):
        policy_of(tiny_model("llama"), TINY.model_copy(update={"u": 2})).load_adapter(saved)
    with pytest.raises(UserError, match="its projection_seed is"):
        policy_of(tiny_model("llama"), TINY.model_copy(update={"projection_seed": 1})).load_adapter(saved)
    told = json.loads((tmp_path / "a" / "tiny_lora.json").read_text())
    told["probe"] = [-x for x in told["probe"]]
    (tmp_path / "a" / "tiny_lora.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="not the update that was saved"):
        policy.load_adapter(adapters.load(tmp_path / "a"))
    (tmp_path / "a" / "tiny_lora.f32").write_bytes(b"x" * 5)
    with pytest.raises(UserError, match="cannot be read"):
        adapters.load(tmp_path / "a")


def test_weights_of_another_base_are_refused(tiny_model, tmp_path):
    policy = policy_of(tiny_model("llama"), FULL)
    policy.save_adapter(tmp_path)
    assert adapters.load(tmp_path, "0" * 40).kind == "full"
    with pytest.raises(UserError, match="made on base tiny of revision 0000"):
        adapters.load(tmp_path, "1" * 40)
    narrow = policy_of(tiny_model("llama"), FULL.model_copy(update={"target_modules": ("v_proj",)}))
    with pytest.raises(UserError, match="not those that this run trains"):
        narrow.load_adapter(adapters.load(tmp_path))


def edited(directory, name, change):
    path = directory / name
    written = json.loads(path.read_text())
    change(written)
    path.write_text(json.dumps(written))


EDITS = {  # of the JSON, each refused in one line
    **{f"no {key}": lambda c, key=key: c.pop(key) for key in ("r", "scaling", "revision", "base_sha256", "version")},
    **{
        f"probe {value}": lambda c, value=value: c.update(probe=value)
        for value in ([], None, "x", ["x"] * 8, [0.0] * 8)
    },
    **{f"scaling {value}": lambda c, value=value: c.update(scaling=value) for value in (4.0, float("nan"), "x", 0)},
    **{f"r {value}": lambda c, value=value: c.update(r=value) for value in (3, "4", 4096, 0, True)},
    "version 99": lambda c: c.update(version=99),
    "a key more": lambda c: c.update(more=1),
    "modules of numbers": lambda c: c.update(modules=[1, 2]),
    "a module twice": lambda c: c.update(modules=c["modules"] + c["modules"][:1]),
    "modules reversed": lambda c: c.update(modules=c["modules"][::-1]),
    "no base": lambda c: c.update(base_model_name_or_path=None),
}
OF_TINY = {
    **{f"tie {value}": lambda c, value=value: c.update(tie=value) for value in (0, 2, "some")},
    "sharing x": lambda c: c.update(sharing="x"),
    "seed x": lambda c: c.update(projection_seed="x"),
    "payload": lambda c: c.update(payload="bfloat16"),
}


@pytest.mark.parametrize("name", ["lora_xs", "tiny_lora"])
def test_an_edited_description_is_refused(tiny_model, tmp_path, capsys, name):
    found = resolve_model(str(tiny_model("llama")))
    policy_of(found.path, KINDS[name], found=found).save_adapter(tmp_path / "whole")
    passed = []
    for what, change in (EDITS | (OF_TINY if name == "tiny_lora" else {})).items():
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "a")
        edited(tmp_path / "a", f"{name}.json", change)
        if main(["expand", str(tmp_path / "a"), "--out", str(tmp_path / "out")]) != 2 or (tmp_path / "out").exists():
            passed.append(what)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert not passed
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spinfast")]
    assert len(lines) == len(EDITS | (OF_TINY if name == "tiny_lora" else {}))


@pytest.mark.parametrize("name", ["lora", "pissa", *KINDS])
def test_memory_is_planned_for_every_kind_that_generates_by_itself(tiny_model, tmp_path, name):
    kind = (KINDS | {"lora": sections.Lora(r=4), "pissa": PISSA})[name]
    config = configured(tmp_path, tiny_model("llama"), "spin", kind)
    words = ["train.microbatch_tokens=auto", "train.checkpointing=auto", "generation.backend=transformers", "--dry-run"]
    assert main([config, *words]) == 0


# Methods -----------------------------------------------------------------------------------------------------------

METHODS = {
    "sft": {"sft": {"groups_per_step": 4, "lr": 0.05}},
    "dpo": {"dpo": {"groups_per_step": 4, "lr": 0.05}},
    "spin": {"spin": {"iterations": 2, "groups_per_step": 4, "lr": 0.05}},
    "grpo": {"grpo": {"steps": 3, "prompts_per_step": 2, "samples": 4, "lr": 0.05}},
}


def configured(directory, model, method, kind):
    """A config of seconds for this method and kind."""
    tree = yaml.safe_load(write_config(directory, model).read_text())
    del tree["spin"]
    tree |= {"method": method, "adapter": kind.model_dump(mode="json")} | METHODS[method]
    if kind is FULL:
        tree[method] |= {"lr": 1e-3}
    tree["evaluate"] = {"problems": 3, "pairs": 4, "max_tokens": 8}
    if method == "dpo":
        for name, first, count in (("train", 0, 12), ("heldout", 50, 6)):
            rows = pairs(first, count)
            (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if method == "grpo":
        (directory / "rewards.py").write_text(REWARDS)
        tree["grpo"] |= {"rewards": f"{directory}/rewards.py:vowels"}
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


EACH = ["lora", "lora_xs", "tiny_lora", "full", "calm", "qlora", "calm in 4 bits"]


@pytest.mark.parametrize(
    ("method", "name"), [*crossed([*METHODS], EACH, each=2), ("spin", "pissa"), ("grpo", "pissa in 4 bits")]
)
def test_every_method_trains_every_kind_and_goes_on_where_it_was_stopped(
    tmp_path, tiny_model, monkeypatch, method, name
):
    """The adapter moves, the loss falls; a run that is stopped within training leaves the bytes of one that is not."""
    four_bit = name == "qlora" or name.endswith("in 4 bits")
    if four_bit:
        pytest.importorskip("bitsandbytes")
    calm = sections.Calm(kind="calm", augmenting=str(tiny_model("qwen2", True, 4, 32)), connections=2)
    kinds = KINDS | {"lora": LORA, "qlora": QLORA, "calm": calm, "calm in 4 bits": calm}
    kinds |= {"pissa": PISSA, "pissa in 4 bits": PISSA}
    config = configured(tmp_path, tiny_model("llama"), method, kinds[name])
    words = [config, f"model.load_in_4bit={str(four_bit).lower()}", "--run-dir"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    stages = sorted((tmp_path / "whole").glob("*/adapter"))
    assert (
        len({adapters.fingerprint(adapters.load(stage)) for stage in stages}) == len(stages) == 2 + (method == "spin")
    )
    rows = train_rows(tmp_path / "whole")
    losses = [row["train/loss"] for row in rows if row["stage"] == rows[0]["stage"]]
    assert method == "grpo" or min(losses[1:]) < losses[0]
    stopped_once(monkeypatch, [*words, str(tmp_path / "stopped")])
    assert fingerprints(tmp_path / "stopped") == fingerprints(tmp_path / "whole")
    assert method != "sft" or main(["report", str(tmp_path / "whole")]) == 0


def stopped_once(monkeypatch, words):
    """Play it, stopped by a signal after its second step of training, and again to the end."""
    advance, steps = Tick.advance, 0

    def advance_and_signal(tick, *args, **kwargs):
        nonlocal steps
        advance(tick, *args, **kwargs)
        if tick.name.endswith(" train") and kwargs:
            steps += 1
            if steps == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Tick, "advance", advance_and_signal)
    assert main(words) == EXIT_CODE
    assert main(words) == 0


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw_8bit"])
def test_whole_matrices_go_on_with_optimizers_of_few_bytes(tmp_path, tiny_model, monkeypatch, optimizer):
    """Their state is in the checkpoint: the same bytes as of a run that is not stopped."""
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    words = [configured(tmp_path, tiny_model("llama"), "sft", FULL), f"sft.optimizer={optimizer}", "--run-dir"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    losses = [row["train/loss"] for row in train_rows(tmp_path / "whole")]
    assert losses[-1] < losses[0]
    stopped_once(monkeypatch, [*words, str(tmp_path / "stopped")])
    assert fingerprints(tmp_path / "stopped") == fingerprints(tmp_path / "whole")


# Commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora_xs", "tiny_lora"])
def test_expand_makes_the_lora_of_the_base_alone(tiny_model, tmp_path, capsys, name):
    found = resolve_model(str(tiny_model("llama")))
    policy = policy_of(found.path, KINDS[name], found=found)
    policy.save_adapter(tmp_path / "a")
    assert main(["expand", str(tmp_path / "a"), "--out", str(tmp_path / "peft")]) == 0
    made, expected = adapters.load(tmp_path / "peft"), policy.serving(policy.adapter())[1]
    assert made.tensors.keys() == expected.tensors.keys()
    assert all(torch.allclose(made.tensors[n], t, atol=1e-6) for n, t in expected.tensors.items())
    assert main(["expand", str(tmp_path / "a"), "--out", str(tmp_path / "peft")]) == 2
    assert main(["expand", str(tmp_path / "peft"), "--out", str(tmp_path / "b")]) == 2
    other = scaled(tiny_model("llama"), tmp_path / "other")
    assert main(["expand", str(tmp_path / "a"), "--out", str(tmp_path / "b"), "--model", str(other)]) == 2
    assert main(["expand", str(tmp_path), "--out", str(tmp_path / "b")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spinfast")]
    for line, words in zip(
        lines,
        [
            *("is there already", "expected lora_xs or tiny_lora, got another; it is plain LoRA", "other weights"),
            "expected an adapter, or a finished run with best.json",
        ],
        strict=True,
    ):
        assert words in line


@pytest.mark.parametrize(("name", "tied"), [*((name, True) for name in KINDS), ("embeddings", False)])
def test_merged_into_its_base_it_is_the_whole_model(tiny_model, tmp_path, capsys, name, tied):
    found = resolve_model(str(tiny_model("llama", tied)))
    policy = policy_of(found.path, KINDS[name], found=found)
    policy.save_adapter(tmp_path / "a")
    assert main(["merge", str(tmp_path / "a"), "--out", str(tmp_path / "model")]) == 0
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    groups = make_groups([(4, (5, 3)), (1, (2, 6))])
    expected = [plain_logps(whole, group.prompt_ids, answer) for group in groups for answer in group.answers]
    assert torch.allclose(answer_logps(policy, batch_of(policy)), torch.cat(expected), atol=1e-4)
    other = scaled(tiny_model("llama"), tmp_path / "other")
    for base in (tiny_model("qwen3"), other):
        assert main(["merge", str(tmp_path / "a"), "--out", str(tmp_path / "b"), "--model", str(base)]) == 2
    assert not (tmp_path / "b").exists()
    if name == "full":
        assert main(["expand", str(tmp_path / "a"), "--out", str(tmp_path / "b")]) == 2
        assert f"spinfast merge {tmp_path / 'a'} --out DIR" in capsys.readouterr().err


def test_the_whole_model_is_in_the_dtype_that_was_trained(tiny_model, tmp_path):
    """Of a bf16 checkpoint trained in fp16 nothing is rounded away."""
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    found = resolve_model(str(base))
    options = {"ops": ops.EAGER, "profile": profile("cpu", "float16"), "load_in_4bit": False, "seed": 0}
    policy = load_policy(base, found.name, found.revision, lora=FULL, **options)
    for parameter in policy.trainable_parameters().values():
        parameter.data *= 1 + 2e-3
    policy.updated()
    policy.save_adapter(tmp_path / "a")
    assert main(["merge", str(tmp_path / "a"), "--out", str(tmp_path / "model")]) == 0
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert whole.dtype == torch.float16
    for name, parameter in policy.trainable_parameters().items():
        assert torch.equal(whole.get_parameter(name), parameter.half())


@pytest.mark.parametrize("name", KINDS)
def test_a_policy_in_16_bits_answers(tiny_model, name):
    """Whatever of the adapter is in fp32: keys and values are kept in the model's dtype."""
    options = {"ops": ops.EAGER, "profile": profile("cpu", "bfloat16"), "load_in_4bit": False, "seed": 0}
    policy = load_policy(tiny_model("llama"), "tiny", "0", lora=KINDS[name], **options)
    with TransformersGenerator(policy, batch_size=2) as generator:
        answers = generator.generate([Request(0, (5, 6, 7), seed=0)], Sampling(1.0, 1.0, 4, ()), policy.adapter())
        assert [len(answer.token_ids) for answer in answers] == [4]
    assert policy.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_updates_too_small_for_16_bits_are_not_lost(tiny_model, dtype):
    """A hundred steps, each of an eighth of a rounding: the 16-bit weight has moved by all of them, not by none."""
    options = {"ops": ops.EAGER, "profile": profile("cpu", dtype), "load_in_4bit": False, "seed": 0}
    policy = load_policy(tiny_model("llama"), "tiny", "0", lora=FULL, **options)
    before = [weight.clone() for weight in policy.kind.weights()]
    rounding = torch.finfo(getattr(torch, dtype)).eps
    step = [weight.float().abs() * rounding / 8 for weight in before]
    for _ in range(100):
        for parameter, moved in zip(policy.trainable_parameters().values(), step, strict=True):
            parameter.data += moved
        policy.updated()
    for weight, start, moved in zip(policy.kind.weights(), before, step, strict=True):
        assert torch.allclose(weight.float(), start.float() + 100 * moved, rtol=2 * rounding)
        assert torch.equal(start + moved.to(start), start)  # in 16 bits alone it would stand still
    with policy.without_adapter():
        assert all(torch.equal(weight, start) for weight, start in zip(policy.kind.weights(), before, strict=True))
    policy.restart(0)
    assert all(torch.equal(weight, start) for weight, start in zip(policy.kind.weights(), before, strict=True))


def test_a_list_of_spectrum_chooses(tiny_model, tmp_path, capsys):
    (tmp_path / "list.yaml").write_text(
        "unfrozen_parameters:\n- ^lm_head.weight$\n- ^model.embed_tokens.weight$\n- model.layers.1.mlp.up_proj\n"
    )
    config = configured(tmp_path, tiny_model("llama"), "sft", FULL)
    words = [config, f"adapter.target_modules={tmp_path}/list.yaml", "--run-dir", str(tmp_path / "run")]
    assert main(words) == 0
    assert adapters.load(tmp_path / "run" / "sft" / "adapter").config["modules"] == ["model.layers.1.mlp.up_proj"]
    assert "left out" in " ".join("".join(capsys.readouterr()).split())
    (tmp_path / "list.yaml").write_text("unfrozen_parameters:\n- model.layers.0.mlp.up_proj\n")
    assert main(words) == 2  # the run's own list is another one now


def test_params_counts_what_is_trained(tiny_model, tmp_path, capsys):
    config = configured(tmp_path, tiny_model("llama"), "sft", TINY)
    assert main(["params", config, "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["this config"]["trained"] == 4 * 3  # 14 modules, 4 tied
    assert rows["tiny_lora u 13, tie all"] | {"share": 0, "published": ""} == {
        "name": "tiny_lora u 13, tie all", "trained": 13, "share": 0, "saved": 52, "held": 208, "published": "",
    }  # fmt: skip
    policy = policy_of(tiny_model("llama"), sections.Lora(), moved=False)
    assert rows["lora r 16"]["trained"] == sum(p.numel() for p in policy.trainable_parameters().values())
    assert main(["params", config]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
