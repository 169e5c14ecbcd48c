"""The protocol of a policy: exactly what its callers use, and enough to train with."""

import ast
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

import spinfast
from spinfast.generation.canary import amplified, policy_logps
from spinfast.objectives import Nll
from spinfast.ops import EAGER
from spinfast.packing import pack
from spinfast.policy import Policy
from spinfast.policy.adapters import Lora
from spinfast.policy.adapters import files as adapters
from spinfast.policy.checksum import checksum
from spinfast.policy.transformers import TransformersPolicy, load_base
from spinfast.scoring import Budget, answer_logps, batch_sequence_logps
from spinfast.train import start_training, train_step
from spinfast.types import Adapter, Group, PackedBatch

PACKAGE = Path(spinfast.__file__).parent
GROUPS = [Group((1, 2), ((3, 4, 5), (6, 5))), Group((7,), ((8, 9),)), Group((2, 2, 1), ((4,), (4, 4), (9, 1, 5)))]


def attributes(of) -> dict[str, str]:
    """name -> where it is read, of every NODE.name in spinfast/ outside policy/ whose NODE is `of`."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        if "policy" not in file.relative_to(PACKAGE).parts:
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and of(node.value):
                    found[node.attr] = f"{file.relative_to(PACKAGE)}:{node.lineno}"
    return found


def is_policy(node: ast.AST) -> bool:
    return getattr(node, "id", None) == "policy" or getattr(node, "attr", None) == "policy"


def is_its_module(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in ("model", "decoder") and is_policy(node.value)


def test_the_protocol_lists_exactly_what_callers_use():
    listed = {*Policy.__annotations__, *(name for name in vars(Policy) if not name.startswith("_"))}
    used = attributes(is_policy)
    assert {name: where for name, where in used.items() if name not in listed} == {}
    assert sorted(listed - used.keys()) == []


def test_nothing_reaches_around_the_protocol():
    """Of the modules callers use what every torch module has, and its shape; an adapter's switches are the policy's."""
    used = attributes(is_its_module)
    assert "named_modules" in used
    strangers = {name: where for name, where in used.items() if not hasattr(torch.nn.Module(), name)}
    assert strangers.keys() <= {"config", "layers"}, strangers


class Bigram:
    """The smallest language model: the next token's scores are head (I + B A) row of the last token."""

    def __init__(self, vocabulary: int = 11, width: int = 6, r: int = 2):
        draw = torch.Generator().manual_seed(0)
        self.ops, self.folded, self.head_bias_V, self.attentions = EAGER, [], None, []
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.table_VD, self.head_VD = torch.randn(2, vocabulary, width, generator=draw)
        self.model = self.decoder = torch.nn.ParameterDict(
            {"lora_A": torch.randn(r, width, generator=draw), "lora_B": torch.zeros(width, r)}
        )
        self.scaling, self.causal_lm = 1.0, self.model

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        x_TD = self.table_VD[batch.token_ids_T]
        return x_TD + self.scaling * x_TD @ self.model["lora_A"].T @ self.model["lora_B"].T

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.model.items())

    def base_checksum(self) -> str:
        return checksum({"table": self.table_VD, "head": self.head_VD})

    def checkpoint_layers(self, layers: int) -> None:
        assert layers == 0, "it has none"

    def adapter(self) -> Adapter:
        config = {"r": len(self.model["lora_A"]), "lora_alpha": len(self.model["lora_A"])}
        return Adapter(config, {f"x.{name}.weight": p.detach().clone() for name, p in self.model.items()})

    @torch.no_grad()
    def load_adapter(self, adapter: Adapter) -> None:
        for name, parameter in self.model.items():
            parameter.copy_(adapter.tensors[f"x.{name}.weight"])

    restore = load_adapter

    def grown(self, start: Adapter, own: Adapter) -> Adapter:
        return start

    def updated(self) -> None:
        pass

    def serving(self, adapter: Adapter | None):
        return nullcontext(), adapter

    def save_adapter(self, path: Path, exact: bool = False) -> None:
        adapters.save(self.adapter(), path)

    def restart(self, seed: int) -> None:
        raise NotImplementedError  # a run's beginning; a step does not ask for it

    leave = restart

    @torch.no_grad()
    def merge_and_restart(self, seed: int) -> None:
        self.folded.append(self.adapter())
        self.table_VD += self.table_VD @ self.model["lora_A"].T @ self.model["lora_B"].T
        self.model["lora_B"].zero_()

    @contextmanager
    def without_adapter(self):
        self.scaling = 0.0
        try:
            yield
        finally:
            self.scaling = 1.0

    base_only = without_adapter

    @contextmanager
    def playing(self, adapter: Adapter):
        own = self.adapter()
        self.load_adapter(adapter)
        try:
            yield
        finally:
            self.load_adapter(own)


def expected_sums(policy: Bigram, change_DD: torch.Tensor) -> list[float]:
    """Answer by answer, token by token."""
    sums = []
    for group in GROUPS:
        for answer in group.answers:
            sequence = torch.tensor(group.prompt_ids[-1:] + answer)
            table_DV = (policy.head_VD @ change_DD @ policy.table_VD.T).log_softmax(0)
            sums.append(table_DV[sequence[1:], sequence[:-1]].sum().item())
    return sums


def change(policy: Bigram, factor: float = 1.0) -> torch.Tensor:
    return torch.eye(policy.head_VD.shape[1]) + factor * (policy.model["lora_B"] @ policy.model["lora_A"]).detach()


def test_both_are_members(tiny_model):
    lora = LoraConfig(r=2, target_modules="all-linear")
    base = load_base(tiny_model(), torch.float32, torch.device("cpu"))
    assert isinstance(TransformersPolicy(base, lambda base: Lora(base, lora, 0), EAGER), Policy)
    assert isinstance(Bigram(), Policy)
    assert not isinstance(object(), Policy)


def test_a_minimal_member_is_scored_and_trained():
    policy = Bigram()
    batch, base = pack(GROUPS, range(3), "sdpa"), policy.base_checksum()
    assert batch_sequence_logps(policy, batch).tolist() == pytest.approx(expected_sums(policy, change(policy)))
    assert answer_logps(policy, batch).shape == (batch.scored_N.numel(),)

    budget = Budget(64, "sdpa")
    state = start_training(policy, "adamw", 0.0, scaled=False)
    state.optimizer.param_groups[0]["lr"] = 0.05
    losses = [train_step(policy, GROUPS[:3], Nll(), 1.0, budget, state)[0]["train/loss"] for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    assert policy.base_checksum() == base
    after = expected_sums(policy, change(policy))
    assert batch_sequence_logps(policy, batch).tolist() == pytest.approx(after, rel=1e-5)
    with policy.without_adapter():
        without = batch_sequence_logps(policy, batch).tolist()
    assert without == pytest.approx(expected_sums(policy, change(policy, 0.0)), rel=1e-5)


def test_the_canary_asks_a_minimal_member(tmp_path):
    policy = Bigram()
    with torch.no_grad():
        policy.model["lora_B"].normal_(generator=torch.Generator().manual_seed(1))
    measure, ids, own = policy_logps(policy, "sdpa"), (1, 2, 3, 4, 5), policy.adapter()
    found = [measure(ids, factor) for factor in (0, 1, 3)]
    for logps, factor in zip(found, (0, 1, 3), strict=True):
        table_VV = (policy.head_VD @ change(policy, factor) @ policy.table_VD.T).log_softmax(0)
        assert logps == pytest.approx(table_VV[list(ids[1:]), list(ids[:-1])].tolist(), rel=1e-5)
    policy.load_adapter(amplified(own, 3))
    assert measure(ids, 1) == pytest.approx(found[2], rel=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "embed_tokens"]], ids=["linears", "embedding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_a_restarted_policy_is_a_new_one_of_that_seed(tiny_model, targets, dtype):
    """Several runs are played in one session; PEFT draws on the CPU and rounds to the base's dtype."""

    def made(seed):
        lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets)
        base = load_base(tiny_model("llama"), dtype, torch.device("cpu"))
        return TransformersPolicy(base, lambda base: Lora(base, lora, seed), EAGER)

    policy, base = made(3), made(3).base_checksum()
    policy.load_adapter(amplified(made(4).adapter(), 3.0))
    policy.merge_and_restart(seed=9)
    policy.restart(5)
    assert policy.base_checksum() == base
    assert adapters.fingerprint(policy.adapter()) == adapters.fingerprint(made(5).adapter())
    assert adapters.fingerprint(policy.adapter()) != adapters.fingerprint(made(3).adapter())
