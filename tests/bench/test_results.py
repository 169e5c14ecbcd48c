"""RESULTS.md is what the rows say; the model of the step counts what a step does."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig

from bench import profile, results_page, roofline, rows
from spinfast.packing import pack
from spinfast.types import Group


def aged(text: str) -> str:
    """A page without what moves with every commit, and where there is no history."""
    return text.replace(results_page.OLDER, "").replace(results_page.UNKNOWN, "")


def test_results_md_is_generated():
    assert aged(results_page.PAGE.read_text()) == aged(results_page.page()), "run: python -m bench results"


def row(**changes) -> dict:
    return {
        "what": "training iteration", "peer": "trl", "model": "m", "dtype": "bfloat16", "device": "X, 2 cores, AMX",
        "pairs": 4, "tokens": 1500, "threads": 2, "load_1m": 0.1, "config": {"pairs_per_step": 4}, "commit": "abc",
        "dirty": False, "versions": {"torch": "2"}, "command": "python -m bench peers", "date": "2026-11-21T00:00:00",
        **changes,
    }  # fmt: skip


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The page of a few rows of peers.jsonl; every commit but HEAD is of another time."""

    def write(*found: dict, history: bool = True) -> str:
        (tmp_path / "peers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        monkeypatch.setattr(rows, "RESULTS", tmp_path)
        monkeypatch.setattr(rows, "git", lambda *args: args[3].replace("new", "HEAD") if history else None)
        results_page.age.cache_clear()
        return results_page.page()

    yield write
    results_page.age.cache_clear()


def test_targets_met_missed_and_not_measured(page):
    text = page(row(spinfast_speedup=7.0, spinfast_memory_ratio=0.4))
    assert "| cpu | pairs/s, times TRL's | >= 6 | 7 | met | X, 2 cores, AMX | abc, older |" in text
    assert (
        "| cpu | memory above the model, times TRL's | <= 0.35 | 0.4 | missed | X, 2 cores, AMX | abc, older |" in text
    )
    assert "| cuda | tokens/s, times TRL's | >= 3 | not measured |  |  |  |" in text
    assert "| cpu | SFT: tokens/s, times TRL's | >= 3 | not measured |  |  |  |" in text
    assert "never a T4's" not in text


def test_a_target_is_of_its_method(page):
    text = page(row(spinfast_speedup=7.0), row(spinfast_speedup=4.0, method="sft", command="of SFT"))
    assert "| cpu | pairs/s, times TRL's | >= 6 | 7 | met |" in text
    assert "| cpu | SFT: tokens/s, times TRL's | >= 3 | 4 | met |" in text
    assert "**SFT, m** on X" in text


def test_another_card_is_no_t4(page):
    text = page(row(spinfast_speedup=4.0, device="NVIDIA H200"))
    assert "measured on NVIDIA H200:\nfigures of that card, never a T4's." in text
    assert "| cuda | tokens/s, times TRL's | >= 3 | 4 | met | NVIDIA H200 | abc, older |" in text
    assert "| cpu | pairs/s, times TRL's | >= 6 | not measured |  |  |  |" in text
    assert "never a T4's" not in page(row(spinfast_speedup=4.0, device="Tesla T4"))


def test_the_newest_row_counts(page):
    found = [row(p50_pairs_per_s=1.0), row(p50_pairs_per_s=2.0), row(p50_pairs_per_s=3.0, device="Tesla T4")]
    tables = [line for line in page(*found).splitlines() if line.startswith("| trl |")]
    assert [line.split(" | ")[1] for line in tables] == ["2", "3"]
    assert [results_page.kind(r) for r in found] == ["cpu", "cpu", "cuda"]


def test_every_row_says_which_code_it_measured(page):
    """Its commit, whether the tree was clean, and whether the code was changed since; without history nobody knows."""

    def ends(*found, **options):
        return [line.split(" | ")[-1] for line in page(*found, **options).splitlines() if line.startswith("| trl |")]

    assert ends(row(commit="new")) == ["new |"]
    assert ends(row(commit="0123456789ab")) == ["0123456, older |"]
    assert ends(row(commit="new", dirty=True)) == ["new, tree changed |"]
    assert ends(row(commit="new", dirty=None)) == ["new, tree unknown |"]
    assert ends(row(commit="new"), history=False) == ["new, age unknown |"]


def test_a_commit_that_nobody_knows_has_no_age():
    assert results_page.age("f" * 40, ("spinfast",)) == results_page.UNKNOWN


def test_each_kind_of_adapter_with_each_method_is_a_row_of_its_own():
    page = results_page.page()
    for each in results_page.read("memory"):
        if "adapter" in each:
            assert f"| {each['model']} | {each['method']} | {each['adapter']} |" in page


def test_what_is_measured_is_there():
    """A file that moves would leave its rows young for ever."""
    for files in results_page.MEASURED.values():
        assert all((results_page.ROOT / name).exists() for name in files)


@pytest.mark.parametrize("name", sorted(results_page.MEASURED))
def test_rows_have_their_birth_certificate(name):
    for each in results_page.read(name):
        assert {"date", "device", "versions", "commit", "dirty", "command"} <= each.keys()


def test_work_of_a_step_by_hand():
    """One layer, one pair of 3 + 2 + 2 tokens: T = 5, 4 answer tokens are scored."""
    config = LlamaConfig(
        vocab_size=10, hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    batch = pack([Group((1, 2, 3), ((4, 5), (6, 7)))], [0])
    weights = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 2 * 4 * 6 + 6 * 4
    low_rank = 16 * (8 + 6 + 6 + 8 + 10 + 10 + 10)
    seen = (1 + 2 + 3 + 4) + 4  # four tokens of prompt and real answer, one that sees the prompt and itself
    head, attention = 2 * 4 * 4 * 10, 4 * 4 * seen
    work = roofline.work_of(config, [batch], 2)
    assert batch.tokens == 5
    assert work["score"]["flop"] == 2 * 5 * (weights + low_rank) + attention + head
    assert work["train"]["flop"] == 4 * 5 * weights + 6 * 5 * low_rank + 3.5 * attention + 2 * head
    assert work["score"]["bytes"] == (weights + 40) * 2


def test_rates_are_positive_and_name_the_shapes():
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4)
    rates = roofline.gemm_gflops(config, 8, torch.float32, "cpu")
    assert set(rates) == {*roofline.projections(config), "head"}
    assert min(rates.values()) > 0
    assert roofline.bandwidth_gbs("cpu", mib=4) > 0


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::mm", "GEMMs"), ("aten::addmm_", "GEMMs"), ("aten::mul_", "element-wise"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"), ("aten::silu_backward", "element-wise"),
        ("aten::copy_", "copies and casts"), ("aten::linalg_vector_norm", "reductions"), ("something", "other"),
    ],
)  # fmt: skip
def test_operators_have_a_class(operator, kind):
    assert profile.operator_class(operator) == kind


def test_rows_carry_the_versions_of_one_list():
    assert rows.certificate()["versions"]["torch"] == torch.__version__
    assert rows.certificate()["threads"] == torch.get_num_threads()
