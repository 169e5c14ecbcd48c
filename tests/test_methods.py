"""Methods in order, a method of one's own in a few lines, and several runs in one session."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import yaml
from fixtures import tiny_tokenizer
from pydantic import Field
from test_run import fingerprints, train_rows, write_config
from transformers import AutoModelForCausalLM

from spinfast import methods
from spinfast.config import Config, Passes, at, parse_config
from spinfast.data.pairs import read_pairs
from spinfast.errors import UserError
from spinfast.fit import fit
from spinfast.interrupt import Stopped
from spinfast.memory.planner import Load, steps
from spinfast.methods import Method
from spinfast.methods.controls import play_controls
from spinfast.methods.phases import conclude, epochs
from spinfast.methods.run import Run, begin, open_run
from spinfast.objectives import Loss, Nll, Plain
from spinfast.policy.adapters import files as adapters
from spinfast.progress import Display, Tick
from spinfast.report import study
from spinfast.report.cli import write_report
from spinfast.report.read import read_run
from spinfast.run import main
from spinfast.store.record import RunDir
from spinfast.sums import segment_sums
from spinfast.types import Example, Group

# A method: a section, a generator function, its fullest step ------------------------------------------------------


class Echo(Passes):
    tokens: int = Field(4, gt=0, description="the prompt's first tokens, to be said again")


class EchoConfig(Config):
    echo: Echo = Echo()


def echo(run: Run, last) -> Iterator[dict]:
    c, stage = run.config.echo, run.stage("echo", last, "echo")
    start = run.become(last)
    groups = [Group(example.prompt_ids, (example.prompt_ids[: c.tokens],)) for example in run.examples]
    fit(run, stage, epochs(run, groups, c, 0), Nll(), c, at(c.lr, 0))
    yield conclude(run, stage, last, start)


def echo_load(config: EchoConfig, examples: Sequence[Example]) -> Load:
    c = config.echo
    groups = [Group(e.prompt_ids, ((0,) * c.tokens,)) for e in examples]
    return Load("echo", groups, Nll(), c, c.groups_per_step, (steps(c, len(groups)),))


@pytest.fixture
def register(monkeypatch):
    """register(play, load): the method "echo" is there as if config/ had its section."""

    def add(play: Callable = echo, load: Callable = echo_load) -> None:
        monkeypatch.setitem(methods.METHODS, "echo", Method(play, load))
        monkeypatch.setattr("spinfast.report.read.parse_config", partial(parse_config, kind=EchoConfig))

    return add


def configured(directory, model, kind: type[Config] = Config, **changes) -> Config:
    """test_run's config with these sections changed, None to leave one out; also in directory/config.yaml."""
    path = write_config(directory, model)
    tree = yaml.safe_load(path.read_text())
    for name, change in changes.items():
        tree[name] = tree.get(name, {}) | change if isinstance(change, dict) else change
    tree = {name: section for name, section in tree.items() if section is not None}
    path.write_text(yaml.safe_dump(tree))
    return parse_config(tree, kind=kind)


@contextmanager
def opened(config: Config, run_dir) -> Iterator[Run]:
    display = Display()
    with closing(RunDir(run_dir, config)) as directory, display.logged(run_dir / "log.txt"):
        with open_run(config, directory, display) as run:
            yield run


def played(config: Config, run_dir) -> list[dict]:
    with opened(config, run_dir) as run:
        return list(methods.play(run))


FEW = {"problems": 2, "pairs": 2}
ECHO = {"kind": EchoConfig, "evaluate": FEW, "echo": {"lr": 1e-2, "groups_per_step": 4, "epochs": 2}}


def test_a_method_of_20_lines_trains_and_goes_on_where_it_stopped(tmp_path, tiny_model, monkeypatch, register):
    register()
    every_step = {"save_every_steps": 1}
    config = configured(tmp_path, tiny_model("llama"), method="echo", spin=None, train=every_step, **ECHO)
    rows = played(config, tmp_path / "whole")
    assert [(row["stage"], row["method"]) for row in rows] == [("base", "base"), ("echo", "echo")]
    losses = [row["train/loss"] for row in train_rows(tmp_path / "whole")]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.5

    advance = Tick.advance

    def stopping(tick, *args, **kwargs):
        advance(tick, *args, **kwargs)
        if tick.name == "echo train" and tick.done == 4:
            raise Stopped

    monkeypatch.setattr(Tick, "advance", stopping)
    with pytest.raises(Stopped):
        played(config, tmp_path / "stopped")
    assert len(train_rows(tmp_path / "stopped")) == 4
    monkeypatch.setattr(Tick, "advance", advance)
    played(config, tmp_path / "stopped")
    assert "training continues after step 4" in (tmp_path / "stopped" / "log.txt").read_text()
    assert fingerprints(tmp_path / "stopped") == fingerprints(tmp_path / "whole")
    assert write_report([tmp_path / "whole"], tmp_path / "report.html", png=False)[1]


def test_a_method_of_ones_own_stands_in_line_with_others(tmp_path, tiny_model, register):
    """Its memory is planned with theirs, and the game that follows starts at ln 2."""
    register()
    automatic = {"microbatch_tokens": "auto", "checkpointing": "auto"}
    config = configured(tmp_path, tiny_model("llama"), method=["echo", "spin"], train=automatic, **ECHO)
    rows = played(config, tmp_path / "run")
    assert [row["stage"] for row in rows] == ["base", "echo", "iter_000", "iter_001"]
    assert rows[2]["train"]["first_loss"] == pytest.approx(0.6931, abs=1e-4)
    predicted = json.loads((tmp_path / "run" / "plan.json").read_text())["predicted_mib"]
    assert predicted.keys() == {"echo", "spin", "score", "generate"}


def test_the_report_shows_the_memory_that_training_was_predicted_to_need(tmp_path, tiny_model):
    automatic = {"microbatch_tokens": "auto", "checkpointing": "auto"}
    config = configured(tmp_path, tiny_model("llama"), train=automatic, evaluate=FEW, spin={"iterations": 1})
    played(config, tmp_path / "run")
    predicted = {phase: mib for phase, _, mib in study.memory_table(read_run(tmp_path / "run"))}
    assert predicted["score"] > 0
    assert predicted["train"] > 0


def test_two_methods_that_both_number_their_stages_keep_all_rows(tmp_path, tiny_model, register):
    def rounds(run, last):
        for number in range(2):
            stage = run.stage(f"echo_{number:03d}", last, "echo", number)
            start = run.become(last)
            groups = [Group(example.prompt_ids, (example.prompt_ids[:4],)) for example in run.examples]
            fit(run, stage, epochs(run, groups, run.config.echo, number), Nll(), run.config.echo, 1e-3)
            yield conclude(run, stage, last, start)
            last = stage

    register(rounds)
    config = configured(tmp_path, tiny_model("llama"), method=["echo", "spin"], **ECHO)
    stages = [row["stage"] for row in played(config, tmp_path / "run")]
    assert stages == ["base", "echo_000", "echo_001", "iter_000", "iter_001"]
    assert [row["stage"] for row in json.loads((tmp_path / "run" / "results.json").read_text())] == stages


def test_an_adapters_card_does_not_call_another_method_self_play(tmp_path, tiny_model, register):
    register()
    played(configured(tmp_path, tiny_model("llama"), method="echo", spin=None, **ECHO), tmp_path / "run")
    card = (tmp_path / "run" / "echo" / "adapter" / "README.md").read_text()
    assert "self-play" not in card.split("---")[2]


# An objective: its weight, its loss from the constants that groups carry -----------------------------------------


@dataclass(frozen=True)
class Weighted(Plain):
    """The answers' log-probs, each times the advantage that its group gives it."""

    def weight(self, group: Group) -> float:
        return float(len(group.answers))

    def __call__(self, batch, logps_N: torch.Tensor, ops) -> Loss:
        logps_S = segment_sums(logps_N, batch.sequence_ids_N, batch.sequences)
        return Loss(-(batch.given["advantage"] * logps_S).sum(), {"train/logp": logps_S.detach().sum()})


def weighed(run: Run, last) -> Iterator[dict]:
    c, stage = run.config.echo, run.stage("echo", last, "echo")
    start = run.become(last)
    groups = [
        Group(e.prompt_ids, (e.prompt_ids[: c.tokens], e.real_ids), {"advantage": (1.0, -0.1)}) for e in run.examples
    ]
    fit(run, stage, epochs(run, groups, c, 0), Weighted(), c, at(c.lr, 0))
    yield conclude(run, stage, last, start)


def weighed_load(config: EchoConfig, examples: Sequence[Example]) -> Load:
    c = config.echo
    groups = [Group(e.prompt_ids, ((0,) * c.tokens, e.real_ids), {"advantage": (0.0, 0.0)}) for e in examples]
    return Load("echo", groups, Weighted(), c, c.groups_per_step, (steps(c, len(groups)),))


@pytest.mark.parametrize("microbatch_tokens", [256, "auto"])
def test_an_objective_of_a_few_lines_is_trained_on_what_groups_carry(tmp_path, tiny_model, register, microbatch_tokens):
    register(weighed, weighed_load)
    train = {"microbatch_tokens": microbatch_tokens}
    config = configured(tmp_path, tiny_model("llama"), method="echo", spin=None, train=train, **ECHO)
    played(config, tmp_path / "run")
    losses = [row["train/loss"] for row in train_rows(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("name", ["sft", "spin", "dpo"])
def test_what_learns_from_answers_leaves_prompts_alone_out_and_needs_an_answer(name):
    config = parse_config({"model": {"name": "m"}, "data": {"source": "d"}, "method": name})
    prompt = Example(0, ({"role": "user", "content": "q"},), "", (1, 2), (), "3")
    answered = replace(prompt, answer="a", real_ids=(4, 5), others=((6,),))
    (group,) = methods.METHODS[name].load(config, [prompt, answered]).everything
    assert group.answers[0] == (4, 5)
    with pytest.raises(UserError, match=rf"method {name}\b.*the data has no "):
        methods.METHODS[name].load(config, [prompt])


# Methods in order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "stages"),
    [
        (["sft"], ["base", "sft"]),
        ("spin", ["base", "iter_000", "iter_001"]),
        (["sft", "spin"], ["base", "sft", "iter_000", "iter_001"]),
        (["spin", "sft"], ["base", "iter_000", "iter_001", "sft"]),
    ],
)
def test_methods_are_played_in_order(tmp_path, tiny_model, names, stages):
    sections = {"method": names, "sft": {"groups_per_step": 6}, "evaluate": FEW}
    sections |= {name: None for name in ("sft", "spin") if name not in names}
    config = configured(tmp_path, tiny_model("llama"), **sections)
    run_dir = tmp_path / "run"
    assert main([str(tmp_path / "config.yaml"), "--run-dir", str(run_dir)]) == 0
    rows = json.loads((run_dir / "results.json").read_text())
    assert [row["stage"] for row in rows] == stages
    assert [row["method"] for row in rows[1:]] == [{"sft": "sft"}.get(stage, "spin") for stage in stages[1:]]
    for stage in stages:
        assert json.loads((run_dir / stage / "stage.json").read_text())["method"] in ("base", *config.method)
        assert adapters.load(run_dir / stage / "adapter")
    assert json.loads((run_dir / "best.json").read_text())["stage"] in stages
    assert write_report([run_dir], tmp_path / "report.html", png=False)[1]
    before = fingerprints(run_dir)
    assert main([str(tmp_path / "config.yaml"), "--run-dir", str(run_dir)]) == 0
    assert fingerprints(run_dir) == before


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"lora": {"r": 4}, "adapter": None}, "lora: is now adapter, its keys adapter.r ..."),
        ({"train": {"lr": 1e-3}}, "train.lr: is now spin.lr"),
        ({"train": {"pairs_per_step": 4}}, "train.pairs_per_step: is now spin.groups_per_step"),
        (
            {"method": ["sft", "spin"], "sft": {"examples_per_step": 4}},
            "sft.examples_per_step: is now sft.groups_per_step",
        ),
        ({"sft": {"epochs": 1}}, "section sft has no use, method is [spin]; name sft there too"),
        ({"method": ["sft"]}, "section spin has no use, method is [sft]; name spin there too"),
        ({"method": ["sft", "ppo"]}, "method: expected sft, spin, dpo, grpo, got 'ppo'"),
        ({"method": ["sft", "sft"]}, "method: expected each method once"),
    ],
)
def test_a_config_that_names_no_such_key_or_method_gets_one_line(tmp_path, capsys, changes, line):
    with pytest.raises(UserError):
        configured(tmp_path, "m", **changes)
    assert main([str(tmp_path / "config.yaml"), "--run-dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


# Runs in one session ---------------------------------------------------------------------------------------------


def adapter_files(run_dir) -> dict[str, bytes]:
    paths = sorted(run_dir.glob("*/adapter/adapter_*"))
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("init", ["continue", "merge"])
def test_runs_in_one_session_are_those_of_sessions_of_their_own(tmp_path, tiny_model, init):
    """A run leaves nothing behind in the session: not its adapter, not what it merged into the base."""
    config = configured(tmp_path, tiny_model("llama"), adapter={"init": init}, evaluate={"problems": 0, "pairs": 0})
    seeded = {seed: config.model_copy(update={"seed": seed}) for seed in (0, 1)}
    alone = {seed: tmp_path / f"alone {seed}" for seed in seeded}
    for seed, run_dir in alone.items():
        played(seeded[seed], run_dir)
    with opened(config, tmp_path / "first") as run:
        list(methods.play(run))
        for seed, name in ((0, "again"), (1, "another"), (0, "once more")):
            session = replace(run.session, config=seeded[seed])
            with closing(RunDir(tmp_path / name, session.config)) as place:
                list(methods.play(begin(session, place, Display(), run.examples, run.heldout)))
            assert adapter_files(tmp_path / name) == adapter_files(alone[seed])
    assert adapter_files(tmp_path / "first") == adapter_files(alone[0])
    assert adapter_files(alone[0]) != adapter_files(alone[1])
    assert len(adapter_files(alone[0])) == 6


@pytest.mark.parametrize("names", [["spin"], ["sft", "spin"]])
def test_controls_of_a_run_that_merges_start_from_the_base_as_it_was(tmp_path, tiny_model, monkeypatch, names):
    sft = {"groups_per_step": 6} if "sft" in names else None
    config = configured(
        tmp_path,
        tiny_model("llama"),
        method=names,
        sft=sft,
        adapter={"init": "merge"},
        evaluate={"problems": 0, "pairs": 0},
    )
    bases: dict[str, list[str]] = {}
    become = Run.become

    def watched(run, *args, **kwargs):
        start = become(run, *args, **kwargs)
        bases.setdefault(run.directory.path.name, []).append(run.base)
        return start

    with opened(config, tmp_path / "run") as run:
        (tmp_path / "run" / "environment.json").write_text("{}")
        original = run.policy.base_checksum()
        monkeypatch.setattr(Run, "become", watched)
        list(methods.play(run))
        assert run.policy.base_checksum() != original
        list(play_controls(run))
    played_rounds = bases.pop("run")
    assert played_rounds[0] == original != played_rounds[-1]
    assert bases.keys() == {"sft", "shuffled", "coin"}
    for control in bases.values():
        assert control[0] == (original if names == ["spin"] else played_rounds[1])  # SFT's merge is the run's own
        assert control[-1] not in played_rounds


# The game is won -------------------------------------------------------------------------------------------------


@pytest.fixture
def parrot(tiny_model, tmp_path):
    """A model whose greedy answer to every prompt is "A" and the end token: layers add nothing, the head is a table."""
    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama", tied=False))
    first, end = tokenizer.encode("A")[0], tokenizer.eos_token_id
    before = tokenizer.encode("<|im_start|>assistant\n")[-1]  # the last token of every prompt
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, following in ((before, first), (first, end)):
            model.lm_head.weight[following] = model.get_input_embeddings().weight[token] / model.model.norm.weight
    model.save_pretrained(tmp_path / "parrot")
    tokenizer.save_pretrained(tmp_path / "parrot")
    return tmp_path / "parrot"


@pytest.mark.parametrize("names", [["spin"], ["spin", "sft"]])
def test_a_game_whose_answers_are_all_real_is_won(tmp_path, parrot, names):
    sft = {"groups_per_step": 6} if "sft" in names else None
    configured(tmp_path, parrot, method=names, sft=sft, generation={"temperature": 0.0})
    for name in ("train.jsonl", "heldout.jsonl"):
        rows = [json.loads(line) | {"answer": "A"} for line in (tmp_path / name).read_text().splitlines()]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dir = tmp_path / "run"
    command = [str(tmp_path / "config.yaml"), "--run-dir", str(run_dir)]
    assert main(command) == 0
    assert json.loads((run_dir / "iter_000" / "rejected.json").read_text()) == {"identical": 12}
    assert read_pairs(run_dir / "iter_000" / "pairs.parquet") == []
    assert "the game is won" in (run_dir / "log.txt").read_text()
    rows = json.loads((run_dir / "results.json").read_text())
    assert [row["stage"] for row in rows] == ["base", *names[1:]]
    assert rows[0]["evaluation"]["heldout/pair_accuracy"]["value"] == 0.5
    before = fingerprints(run_dir)
    assert main(command) == 0
    assert fingerprints(run_dir) == before
    assert write_report([run_dir], tmp_path / "report.html", png=False)[1]
