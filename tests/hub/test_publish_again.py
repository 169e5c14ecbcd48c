"""`spinfast publish` where something is there already, where the hub or the network fails, where it is killed."""

import json
import multiprocessing
import re
import signal
import socket

import pytest
import yaml
from hub_server import OTHER, READER, TOKEN, Answer, Cut
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import close_session
from publishing import ADAPTER, REPOS, publish, refused

from spinfast.store import files


def test_the_second_time_nothing_is_sent(hub, run, capsys):
    assert publish(run, "--yes") == 0
    heads = {key: repo.head for key, repo in hub.repos.items()}
    hub.requests.clear()
    assert publish(run, "--yes") == 0
    assert not hub.sent("PUT", ".*")
    assert not hub.sent("POST", "commit|create|batch")
    assert {key: repo.head for key, repo in hub.repos.items()} == heads
    assert capsys.readouterr().out.count("nothing to send") == 4


def test_what_another_run_or_hand_put_there_is_not_written_over(hub, run, capsys):
    hub.add(
        "models", "me/sums-iter0", {"README.md": b"by hand", "adapter_model.safetensors": b"theirs", "old.txt": b""}
    )
    assert publish(run, "--yes") == 2
    assert "holds something else than this stage of this run; give another --to, or --replace" in refused(capsys)
    assert hub.files("models", "me/sums-iter0")["README.md"] == b"by hand"
    assert publish(run, "--yes", "--replace", "--public") == 0
    assert {*hub.files("models", "me/sums-iter0")} == ADAPTER
    capsys.readouterr()
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"seed": 7}))
    assert publish(run, "--yes", "--public") == 2
    assert "me/sums-iter0: is there and holds something else" in refused(capsys)


def test_private_stays_private_until_it_is_asked_otherwise(hub, run, capsys):
    assert publish(run, "--yes") == 0
    assert publish(run, "--yes", "--public") == 0
    assert not any(repo.private for repo in hub.repos.values())
    capsys.readouterr()
    assert publish(run, "--yes") == 2
    assert "is public at the hub; publish with --public, or under another name" in refused(capsys)


def test_a_stage_that_was_published_before_the_run_ended_is_not_sent_again(hub, run, capsys):
    """An unfinished run: the stages that are finished go, and that is said."""
    whole = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(whole[:2]))
    (run / "best.json").rename(run / "later.json")
    assert publish(run, "--yes") == 0
    assert "the run is not finished; finished of it, and published, is iter_000" in capsys.readouterr().err
    assert [*hub.repos] == REPOS[:2]
    large = {*hub.large}
    (run / "results.json").write_text(json.dumps(whole))
    (run / "later.json").rename(run / "best.json")
    hub.requests.clear()
    assert publish(run, "--yes") == 0
    assert not hub.sent("POST", "datasets/me/sums-iter0/commit")
    assert not [path for path in hub.sent("PUT", ".") if path.split("/")[2] in large]  # of its model only the card
    assert [*hub.repos] == REPOS


# Faults ----------------------------------------------------------------------------------------------------------


def once(what, method, pattern):
    """A fault that happens at the first request that fits."""
    seen = []

    def fault(verb, path):
        if verb == method and re.search(pattern, path) and not seen:
            seen.append(path)
            raise what

    return fault


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("/lfs/[0-9a-f]+", Answer(500)),
        ("/lfs/[0-9a-f]+", Cut(1000)),
        ("batch", Answer(503, "try again")),
        ("preupload", Cut(0)),
        ("verify", Answer(500)),
    ],
    ids=repr,
)
def test_one_failure_of_the_hub_is_tried_again(hub, run, pattern, what):
    hub.faults = once(what, "PUT" if "lfs" in pattern else "POST", pattern)
    assert publish(run, "--yes") == 0
    assert [*hub.repos] == REPOS
    assert hub.files("models", "me/sums-iter1")["adapter_model.safetensors"]


def test_a_connection_that_ends_in_the_middle_of_an_upload_leaves_nothing_half(hub, run, capsys):
    large = files.sha256(run / "iter_001" / "adapter" / "adapter_model.safetensors")

    def cut(method, path):
        if method == "PUT" and large in path:
            raise Cut(2000)

    hub.faults = cut
    assert publish(run, "--yes") == 2
    assert "model me/sums-iter1: the connection to the hub failed" in refused(capsys)
    assert hub.files("models", "me/sums-iter1") == {}
    hub.faults = lambda method, path: None
    hub.requests.clear()
    assert publish(run, "--yes") == 0
    assert all(large in path for path in hub.sent("PUT", "."))
    assert len(hub.sent("POST", "/commit/")) == 1
    assert {*hub.files("models", "me/sums-iter1")} == ADAPTER


REFUSALS = {
    "POST /api/repos/create": [
        (Answer(403, "You have exceeded your private storage limit"), "403 (You have exceeded your private storage"),
        (Answer(409, "You already created this repo"), "the name is taken: give another --to"),
        (Answer(401, "Invalid credentials in Authorization header"), "the token is wrong or has expired"),
    ],
    "POST /commit/": [
        (Answer(412, "A commit has happened since"), "somebody changed it meanwhile: run the same command again"),
        (Answer(403, "quota"), "its storage is full"),
        (Answer(500, "oh"), "the hub answers 500 (oh); the same command again sends only what is missing"),
        (Cut(10), "the connection to the hub failed"),
    ],
    "POST batch": [(Answer(413, "File size exceeds the limit"), "too large")],
    "GET /api/whoami": [
        (Answer(401, "Invalid credentials in Authorization header"), "the token is wrong or has expired"),
        (Answer(429, "slow down"), "too many requests"),
    ],
}


@pytest.mark.parametrize(
    ("where", "what", "said"),
    [(where, *case) for where, cases in REFUSALS.items() for case in cases],
    ids=lambda value: repr(value)[:40],
)
def test_what_the_hub_refuses_is_one_line_and_can_be_done_again(hub, run, capsys, where, what, said):
    method, pattern = where.split()
    hub.faults = once(what, method, pattern)
    assert publish(run, "--yes") == 2
    line = refused(capsys)
    assert said in line
    assert TOKEN not in line
    assert publish(run, "--yes") == 0
    assert [*hub.repos] == REPOS


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, "no token of the hub: run `hf auth login`"),
        ("hf_wrong", "the token is wrong or has expired"),
        (READER, "the token of me may only read"),
        (OTHER, "you may not write there"),
    ],
)
def test_tokens_that_do_not_serve(hub, run, capsys, monkeypatch, token, said):
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    assert publish(run, "--yes") == 2
    assert said in refused(capsys)
    assert not hub.repos


def test_no_network(hub, run, capsys, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert publish(run, "--yes") == 2
    assert "the connection to the hub failed" in refused(capsys)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert publish(run, "--yes") == 2
    assert "HF_HUB_OFFLINE is set" in refused(capsys)


def test_metadata_that_the_hub_does_not_take(hub, run, capsys):
    assert publish(run, "--yes", "--license", "my-own") == 2
    assert 'Invalid metadata in README.md. - "license" must be one of' in refused(capsys)
    assert hub.files(*REPOS[0]) == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--stage", "iter_009"], "--stage iter_009: expected best or of iter_000, iter_001"),
        (["--gguf", "q9_9"], "--gguf q9_9: expected f32"),
        (["--base", "tiny"], "--base tiny: expected OWNER/NAME"),
        (["--license", "My own"], "--license My own: expected an id as the hub has them"),
        (["--rollouts"], "only GRPO keeps what it samples"),
        (["--base", "lab/none"], "model lab/none: the hub knows none of that name"),
    ],
)
def test_wrong_options_are_told_before_anything_is_sent(hub, run, capsys, options, said):
    assert publish(run, "--yes", *options) == 2
    assert said in refused(capsys)
    assert not hub.sent("POST", ".")


@pytest.mark.parametrize("to", ["me", "me/a--b", "me/" + "a" * 96, "me/-a", "me/a/b", "https://huggingface.co/me/a"])
def test_names_that_no_repository_has(hub, run, capsys, to):
    assert publish(run, "--yes", to=to) == 2
    assert refused(capsys).startswith("spinfast: --to")
    assert hub.requests == []


def test_runs_that_cannot_be_published(hub, run, tmp_path, capsys):
    assert publish(tmp_path) == 2
    assert "expected a run directory" in refused(capsys)
    (run / "iter_001" / "adapter" / "adapter_model.safetensors").write_bytes(b"torn")
    assert publish(run, "--yes") == 2
    assert "adapter_model.safetensors is not as it was written" in refused(capsys)
    assert publish(run, "--stage", "iter_000") == 0
    capsys.readouterr()
    (run / "iter_000" / "pairs.parquet").write_bytes(b"torn")
    assert publish(run, "--stage", "iter_000") == 2
    assert "pairs.parquet: not as it was written; run the same config again" in refused(capsys)
    (run / "results.json").write_text("[]")
    assert publish(run) == 2
    assert "no stage is finished yet" in refused(capsys)


@pytest.mark.parametrize("where", ["PUT /lfs/", "POST sums-iter1/commit/"])
def test_killed_in_the_middle_the_same_command_ends_it(hub, run, where):
    method, pattern = where.split()
    close_session()  # the child opens connections of its own
    process = multiprocessing.get_context("fork").Process(target=publish, args=(run, "--yes"))

    def kill(verb, path):
        if verb == method and re.search(pattern, path):
            process.kill()
            raise Cut(100)

    hub.faults = kill
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    hub.faults = lambda verb, path: None
    assert all("README.md" in files or len(files) == 1 for repo in hub.repos.values() for _, files in repo.commits)
    kept = {*hub.large}
    hub.requests.clear()
    assert publish(run, "--yes") == 0
    assert [*hub.repos] == REPOS
    assert not [path for path in hub.sent("PUT", ".") if path.split("/")[2] in kept]
    assert HfApi().repo_info("me/sums-iter1").siblings
