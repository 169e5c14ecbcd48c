"""Every config file: it parses, and those for a T4 are planned within a T4 by --dry-run, with no GPU and no hub.

The real shapes of the models, a small tokenizer and a few rows stand in for what the hub would give.
"""

import json
from pathlib import Path

import pytest
import torch
from fixtures import tiny_tokenizer
from rich.console import Console
from transformers import Qwen2Config

from spinfast.config import load_config
from spinfast.device import GIB
from spinfast.dry_run import dry_run
from spinfast.models import ResolvedModel
from spinfast.run import CONFIGS
from spinfast.studies.design import cells_of, load_design

SHAPES = {  # hidden, inner, layers, heads, key/value heads, vocabulary, tied: the models' config.json
    "Qwen/Qwen2.5-0.5B-Instruct": (896, 4864, 24, 14, 2, 151_936, True),
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 8960, 28, 12, 2, 151_936, True),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (1536, 8960, 28, 12, 2, 151_936, False),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 18_944, 28, 28, 4, 152_064, False),
}
FILES = sorted(CONFIGS.glob("*.yaml"))
T4 = [path for path in FILES if path.stem.endswith("-t4")]


def _fast(path):
    """The small model's; the others are `slow`."""
    small = load_config(path).model.name == "Qwen/Qwen2.5-0.5B-Instruct"
    return pytest.param(path, marks=[] if small else pytest.mark.slow)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """stand_in(): models are directories of their shapes without weights; returns overrides that name local data."""

    def hollow(name, *_):
        hidden, inner, layers, heads, groups, vocabulary, tied = SHAPES[name]
        path = tmp_path / Path(name).name
        Qwen2Config(
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            vocab_size=vocabulary,
            tie_word_embeddings=tied,
            max_position_embeddings=32_768,
            architectures=["Qwen2ForCausalLM"],
        ).save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
        return ResolvedModel(path, name, "none", "Qwen2ForCausalLM")

    def make():
        for module in ("session", "policy.calm"):  # there are no weights to resolve
            monkeypatch.setattr(f"spinfast.{module}.resolve_model", hollow)
        answer = "It is 2. " * 20 + "\n#### 2"
        row = {"chosen": answer, "rejected": answer.upper()}  # which all methods take
        rows = [row | {"prompt": f"{i}. " + "What is 1 + 1? " * 20} for i in range(64)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = f"{{source: {tmp_path / 'rows.jsonl'}}}"
        return [f"data={source}", f"heldout={source}"]

    return make


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_parses(path):
    config = load_config(path)
    assert config.heldout is not None
    assert len(config.spin.beta) in (1, config.spin.iterations)
    assert len(config.spin.lr) in (1, config.spin.iterations)


def test_every_t4_config_has_a_shape():
    assert len(T4) == 10
    assert {load_config(path).model.name for path in T4} == set(SHAPES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans a card that is not there")
@pytest.mark.parametrize("path", [_fast(path) for path in T4], ids=lambda path: path.stem)
def test_t4_config_fits_a_t4(path, stand_in):
    name = load_config(path).model.name
    console = Console(record=True, width=160)
    planned = dry_run(load_config(path, [*stand_in(), "device.profile=t4"]), console)
    assert planned.budget == int(14.7 * GIB)
    assert planned.peak <= planned.budget
    methods = load_config(path).method
    assert {*methods, *(["score"] if {"spin", "dpo"} & {*methods} else [])} <= planned.phases.keys()
    assert planned.phases[methods[-1]].by_kind["weights"] > 0.9 * GIB
    text = console.export_text()
    assert "float16: capability < 8.0 has fp16 tensor cores only" in text
    assert f"of {SHAPES[name][2]} layers checkpointed" in text


@pytest.mark.parametrize("path", sorted((CONFIGS / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_cell_of_a_ready_study_is_a_config(path):
    design = load_design(path)
    cells = cells_of(design, path.parent)
    assert len({cell.config.hash() for cell in cells}) == len(cells)
    assert all(cell.config.heldout is None for cell in cells) or path.stem.startswith("rate")
