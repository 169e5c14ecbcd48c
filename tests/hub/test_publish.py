"""`spinfast publish` to a hub on loopback, by huggingface_hub's own client: what goes up, and that others load it."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import load_dataset
from hub_server import TOKEN
from huggingface_hub import snapshot_download
from peft import PeftModel
from publishing import ADAPTER, PARQUET, REPOS, environment, front, publish, refused
from transformers import AutoModelForCausalLM

from spinfast.models import resolve_model
from spinfast.policy.adapters import files as adapters
from spinfast.run import main
from spinfast.store import files


def test_without_yes_it_shows_what_would_go_and_sends_nothing(hub, run, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert publish(run) == 0
    out, err = capsys.readouterr()
    assert hub.requests == []
    for name in ("base tiny-llama-tied-2x64", "data train.jsonl"):
        assert f"warning: {name}: its licence is not known here" in err
    assert "as private repositories" in out
    assert "nothing was uploaded; --yes uploads it" in out
    for kind, name in REPOS:
        assert f"{'data set' if kind == 'datasets' else 'model'} {name}\n" in out
    rows = pq.read_metadata(run / "iter_001" / "pairs.parquet").num_rows
    assert f"{rows} pairs: prompts and answers of train.jsonl (licence: unknown)" in out
    assert "adapter_model.safetensors" in out
    assert "licences: base tiny-llama-tied-2x64: unknown; data train.jsonl: unknown" in out


@pytest.mark.parametrize(("answer", "sent"), [("y\n", REPOS), ("\n", []), ("", [])])
def test_at_a_terminal_it_asks(hub, run, monkeypatch, answer, sent):
    terminal = io.StringIO(answer)
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    assert publish(run) == 0
    assert [*hub.repos] == sent


def test_what_is_uploaded_is_what_the_run_has(hub, run, capsys):
    assert publish(run, "--yes") == 0
    assert [*hub.repos] == REPOS
    assert all(repo.private for repo in hub.repos.values())
    for number in (0, 1):
        stage = run / f"iter_00{number}"
        data, model = (hub.files(kind, f"me/sums-iter{number}") for kind in ("datasets", "models"))
        assert {*data} == {"README.md", PARQUET}
        assert {*model} == ADAPTER
        assert model["adapter_model.safetensors"] == (stage / "adapter" / "adapter_model.safetensors").read_bytes()
        up = pq.read_table(pa.BufferReader(data[PARQUET]))
        assert up.column_names == ["real", "generated", "iteration"]
        assert up.to_pylist() == pq.read_table(stage / "pairs.parquet", columns=up.column_names).to_pylist()
        own = json.loads((stage / "adapter" / "adapter_config.json").read_text())
        known = json.loads(model["adapter_config.json"])
        assert known == own | {"base_model_name_or_path": "tiny-llama-tied-2x64", "revision": None}
        for name, path in {PARQUET: "data", "adapter_model.safetensors": "adapter"}.items():
            assert hub.large[files.sha256(run / "publish" / f"iter_00{number}-{path}" / name)]


def test_cards_say_where_it_comes_from_and_what_it_scored(hub, run):
    hub.add("models", "lab/tiny", {"README.md": b"---\nlicense: apache-2.0\n---\n"})
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["source"] = "lab/sums"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    hub.add("datasets", "lab/sums", {"README.md": b"---\nlicense: cc-by-4.0\n---\n"})
    assert publish(run, "--yes", "--base", "lab/tiny") == 0
    data, model = (hub.files(kind, "me/sums-iter1")["README.md"].decode() for kind in ("datasets", "models"))
    told = front(model)
    assert told["base_model"] == "lab/tiny"
    assert told["base_model_relation"] == "adapter"
    assert told["library_name"] == "peft"
    assert told["license"] == "apache-2.0"
    assert told["datasets"] == ["me/sums-iter1", "lab/sums"]
    assert {"lora", "spin", "self-play"} <= {*told["tags"]}
    row = json.loads((run / "results.json").read_text())[-1]
    (result,) = told["model-index"][0]["results"]
    values = {metric["name"]: metric["value"] for metric in result["metrics"]}
    known = row["evaluation"]["heldout/perplexity"]["value"]
    assert values["perplexity of real answers"] == pytest.approx(known, abs=1e-4)
    assert "PeftModel.from_pretrained(base, 'me/sums-iter1')" in model
    told = front(data)
    assert told["license"] == "cc-by-4.0"
    assert told["source_datasets"] == ["lab/sums"]
    assert told["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": PARQUET}]}]
    assert "lab/sums (licence: cc-by-4.0)" in data
    assert "lab/tiny (licence: apache-2.0)" in data


LOADING = """
import json, sys, torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM
from pathlib import Path
from spinfast.policy.adapters import files as adapters
base, ids = sys.argv[1], torch.tensor([[5, 9, 17, 33]])
rows = load_dataset("me/sums-iter1", split="train")
logits = [
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), where)(ids).logits
    for where in ("me/sums-iter1", sys.argv[2])
]
print(json.dumps([rows.column_names, rows[0], len(rows), torch.equal(*logits)]))
"""


@torch.no_grad()
def test_datasets_and_peft_load_what_was_published(hub, run, tiny_model):
    assert publish(run, "--yes") == 0
    data, adapter = snapshot_download("me/sums-iter1", repo_type="dataset"), snapshot_download("me/sums-iter1")
    rows = load_dataset(data, split="train")
    assert rows.column_names == ["real", "generated", "iteration"]
    assert rows.to_list() == pq.read_table(run / "iter_001" / "pairs.parquet", columns=rows.column_names).to_pylist()
    ids, logits = torch.tensor([[5, 9, 17, 33]]), []
    for where in (adapter, run / "iter_001" / "adapter"):
        base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
        logits.append(PeftModel.from_pretrained(base, where)(ids).logits)
    assert torch.equal(*logits)


@pytest.mark.slow
def test_datasets_and_peft_load_it_from_the_hub(hub, run, tiny_model, tmp_path):
    assert publish(run, "--yes") == 0
    adapter = run / "iter_001" / "adapter"
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(tiny_model("llama")), str(adapter)],
        env=environment(hub, tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    names, first, count, equal = json.loads(done.stdout.splitlines()[-1])
    known = pq.read_table(run / "iter_001" / "pairs.parquet").to_pylist()
    assert names == ["real", "generated", "iteration"]
    assert first == {name: known[0][name] for name in names}
    assert count == len(known)
    assert equal


def test_our_own_loader_takes_what_was_published(hub, run, tiny_model):
    assert publish(run, "--yes") == 0
    where = Path(snapshot_download("me/sums-iter0"))
    base = resolve_model(str(tiny_model("llama")))
    found = adapters.load(where, base.revision, name=base.name)
    assert adapters.fingerprint(found) == adapters.fingerprint(adapters.load(run / "iter_000" / "adapter"))


def test_nothing_of_this_machine_goes_up(hub, run, tmp_path):
    """Neither in text nor in the bytes of weights."""
    assert publish(run, "--yes", "--merged", "--gguf", "q8_0") == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    places = {
        config["model"]["name"],
        config["data"]["source"],
        str(run),
        str(Path.home()),
        TOKEN,
    }
    for (kind, name), repo in hub.repos.items():
        for file, data in repo.commits[-1][1].items():
            for place in places:
                assert place.encode() not in data, f"{kind} {name}: {place} is in {file}"


def test_a_token_in_a_card_stops_it(hub, run, capsys, monkeypatch):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["split"] = TOKEN
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert publish(run, "--yes") == 2
    assert "holds the hub's token" in refused(capsys)
    assert hub.requests == []


def test_small_adapters_and_plain_lora_beside_them(hub, small, tmp_path, tiny_model):
    run = shutil.copytree(small, tmp_path / "run")
    assert publish(run, "--yes") == 0
    assert {*hub.files("models", "me/sums-iter0")} == {"README.md", "lora_xs.json", "lora_xs.safetensors"}
    assert publish(run, "--yes", "--expanded") == 0
    up = hub.files("models", "me/sums-iter0")
    assert {*up} == {
        "README.md",
        "lora_xs.json",
        "lora_xs.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert up["lora_xs.safetensors"] == (run / "iter_000" / "adapter" / "lora_xs.safetensors").read_bytes()
    assert main(["expand", str(run / "iter_000" / "adapter"), "--out", str(tmp_path / "plain")]) == 0
    assert up["adapter_model.safetensors"] == (tmp_path / "plain" / "adapter_model.safetensors").read_bytes()
    assert front(up["README.md"].decode())["library_name"] == "peft"


def test_whole_models_are_those_of_merge_and_export(hub, run, tmp_path):
    best = json.loads((run / "best.json").read_text())["stage"]
    number = "sums-iter" + best[-1]
    assert publish(run, "--yes", "--no-data", "--stage", best, "--merged", "--gguf", "q8_0", "--gguf", "F16") == 0
    assert [name for _, name in hub.repos] == [f"me/{number}", f"me/{number}-merged", f"me/{number}-GGUF"]
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    merged = hub.files("models", f"me/{number}-merged")
    assert merged["model.safetensors"] == (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert {"config.json", "tokenizer.json", "mergekit_config.yml"} <= merged.keys()
    assert main(["export", "gguf", str(run), "--out", str(tmp_path / "x.gguf"), "--type", "f16"]) == 0
    ggufs = hub.files("models", f"me/{number}-GGUF")
    assert {f"{number}-Q8_0.gguf", f"{number}-F16.gguf", f"{number}-F16.Modelfile"} < ggufs.keys()
    assert len(ggufs[f"{number}-F16.gguf"]) == pytest.approx((tmp_path / "x.gguf").stat().st_size, abs=64)  # its name
    assert front(merged["README.md"].decode())["library_name"] == "transformers"


def test_whole_models_are_made_once(hub, run):
    assert publish(run, "--merged") == 0
    (made,) = (run / "publish").glob("*-merged-*/model.safetensors")
    before = made.stat().st_mtime_ns
    assert publish(run, "--merged", "--yes") == 0
    assert made.stat().st_mtime_ns == before


def test_rollouts_go_up_only_on_request_and_without_notes(hub, run, capsys):
    sys.path.append(str(Path(__file__).parent.parent / "report"))
    from rewarded import add_grpo

    add_grpo(run, steps=3)
    shutil.copytree(run / "iter_001" / "adapter", run / "grpo" / "adapter")
    (run / "best.json").write_text(
        json.dumps({"adapter": "grpo/adapter", "of": ["base", "iter_000", "iter_001", "grpo"]})
    )
    assert publish(run, "--yes", "--stage", "grpo") == 0
    assert [*hub.repos] == [("models", "me/sums-grpo")]
    assert publish(run, "--yes", "--stage", "best", "--rollouts") == 0
    up = pq.read_table(pa.BufferReader(hub.files("datasets", "me/sums-grpo-rollouts")[PARQUET]))
    assert up.num_rows == 3 * 12
    assert up["rollout"].to_pylist() == [n for n in range(3) for _ in range(12)]
    assert {"prompt", "completion", "reward", "rewards/gsm8k", "rewards/format"} < {*up.column_names}
    assert not {"extra", "prompt_ids", "completion_ids", "sampler_logps"} & {*up.column_names}
    assert publish(run, "--rollouts", "--stage", "iter_000") == 2
    assert "only GRPO keeps what it samples" in refused(capsys)
