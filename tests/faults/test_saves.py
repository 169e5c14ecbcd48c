"""A save interrupted at each of its steps, by a kill and by a power cut: the checkpoint before it loads, every time.

The steps are numbered: every file opened for writing, every write of tensors (before, torn, after), every fsync,
rename and removal. A power cut is a kill after which what was not fsynced is torn and renames whose directory was
not fsynced have not happened.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from packed_cases import tiny_policy

from spinfast.policy.adapters import files as adapters
from spinfast.store import checkpoint, files
from spinfast.train import start_training

DIED = 9
IDENTITY = {"stage": "iter_000"}
pytestmark = pytest.mark.faults


class Faults:
    """Counts the steps of a save under `directory` and dies at number `at`. Only for a forked child: hooks stay."""

    def __init__(self, directory: Path, at: int, power_cut: bool):
        self.directory, self.at, self.power_cut, self.count = str(directory), at, power_cut, 0
        self.safe = {entry.stat().st_ino for entry in directory.rglob("*")}
        self.renames: list[tuple[str, str]] = []  # not yet safe
        sys.addaudithook(self.audit)
        self.fsync, os.fsync = os.fsync, self.counted_fsync
        for module in (checkpoint, adapters):
            module.save_file = self.counted_save(module.save_file)

    def audit(self, event, arguments):
        path = str(arguments[0]) if arguments else ""
        if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # rmtree names files by their folder's descriptor
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
        if not path.startswith(self.directory) or self.at < 0:
            return
        if event == "open" and arguments[1] not in ("r", "rb", None):
            self.step()
        elif event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove"):
            self.step()
            if event == "os.rename" and not os.path.exists(arguments[1]):
                self.renames.append((path, str(arguments[1])))

    def counted_fsync(self, descriptor):
        self.step()
        self.fsync(descriptor)
        self.safe.add(os.fstat(descriptor).st_ino)
        here = os.readlink(f"/proc/self/fd/{descriptor}")
        self.renames = [(source, target) for source, target in self.renames if os.path.dirname(target) != here]

    def counted_save(self, save_file):
        def save(tensors, path, **options):
            self.step()
            save_file(tensors, path, **options)
            self.step(torn=path)
            self.step()

        return save

    def step(self, torn: Path | None = None):
        self.count += 1
        if self.count == self.at:
            self.at = -1  # what follows is the catastrophe's own
            if torn:
                os.truncate(torn, os.path.getsize(torn) // 2)
            if self.power_cut:
                for source, target in reversed(self.renames):
                    os.rename(target, source)
                for path in Path(self.directory).rglob("*"):
                    if path.is_file() and path.stat().st_ino not in self.safe:
                        os.truncate(path, path.stat().st_size // 2)
            os._exit(DIED)


def with_fault(directory, at, power_cut, work) -> int:
    """Do `work` in a forked child that dies at step `at`; its exit code, or with at=0 the number of steps."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        faults = Faults(directory, at, power_cut)
        work()
        os.write(write, str(faults.count).encode())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    os.close(write)
    count = os.read(read, 16)
    os.close(read)
    return int(count) if at == 0 else os.waitstatus_to_exitcode(status)


@pytest.fixture(scope="module")
def training(tiny_model):
    """policy, state: a training that has made a step"""
    policy = tiny_policy(tiny_model("llama"))
    state = start_training(policy, "adamw", 0.0, scaled=False)
    return policy, state


def advance(policy, state, step):
    """The state after `step`: every parameter and moment of it holds the step's number."""
    for parameter in policy.trainable_parameters().values():
        parameter.data.fill_(step)
        state.optimizer.state[parameter] = {
            name: torch.full_like(parameter, step) for name in ("exp_avg", "exp_avg_sq")
        } | {"step": torch.tensor(float(step))}
    state.step = step


def rows(step):
    return [{"step": number} for number in range(1, step + 1)]


def check_loaded(policy, state, directory, allowed):
    """The newest whole checkpoint is one of `allowed`, whole in adapter, optimizer, counters and metrics."""
    advance(policy, state, 99)
    assert checkpoint.load_latest(directory, policy, state, IDENTITY) == rows(state.step)
    assert state.step in allowed
    values = {value for p in policy.trainable_parameters().values() for value in p.data.unique().tolist()}
    moments = {v for entry in state.optimizer.state.values() for t in entry.values() for v in t.unique().tolist()}
    assert values == moments == {float(state.step)}


@pytest.mark.parametrize("power_cut", [False, True], ids=["kill", "power cut"])
def test_a_checkpoint_at_each_step_of_its_save(training, tmp_path, power_cut, capsys):
    policy, state = training

    def prepare(directory):
        for step in (1, 2):
            advance(policy, state, step)
            checkpoint.save(directory, policy, state, IDENTITY, rows(step))
        advance(policy, state, 3)

    def save(directory):
        return lambda: checkpoint.save(directory, policy, state, IDENTITY, rows(3))

    prepare(tmp_path / "count")
    steps = with_fault(tmp_path / "count", 0, power_cut, save(tmp_path / "count"))
    assert steps > 25
    seen = set()
    for at in range(1, steps + 1):
        directory = tmp_path / str(at)
        prepare(directory)
        assert with_fault(directory, at, power_cut, save(directory)) == DIED
        check_loaded(policy, state, directory, allowed={2, 3})
        seen.add(state.step)
        advance(policy, state, 3)
        checkpoint.save(directory, policy, state, IDENTITY, rows(3))  # and saving works again
        check_loaded(policy, state, directory, allowed={3})
    assert seen == {2, 3}
    with capsys.disabled():
        print(f"\na save killed at each of its {steps} steps, power cut: {power_cut}")


@pytest.mark.parametrize("power_cut", [False, True], ids=["kill", "power cut"])
def test_a_replaced_file_is_the_old_or_the_new_one(tmp_path, power_cut):
    path = tmp_path / "phases.json"
    files.write_sealed(path, {"which": "old" * 100}, "stage")
    steps = with_fault(tmp_path, 0, power_cut, lambda: files.write_sealed(path, {"which": "new" * 100}, "stage"))
    assert steps >= 4
    found = []
    for at in range(1, steps + 1):
        files.write_sealed(path, {"which": "old" * 100}, "stage")
        assert (
            with_fault(tmp_path, at, power_cut, lambda: files.write_sealed(path, {"which": "new" * 100}, "stage")) == 9
        )
        found.append(files.read_sealed(path, "stage")["which"])
    assert set(found) == {"old" * 100, "new" * 100}


FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "metrics.jsonl",
    "optimizer.safetensors",
    "state.json",
    files.MANIFEST,
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["truncated", "emptied", "bit flipped", "swapped", "removed"])
def test_a_harmed_checkpoint_is_passed_over(training, tmp_path, name, harm, caplog):
    policy, state = training
    for step in (1, 2, 3):
        advance(policy, state, step)
        checkpoint.save(tmp_path, policy, state, IDENTITY, rows(step))
    harm_file(tmp_path / "step_000003" / name, harm, other=tmp_path / "step_000002" / name)
    check_loaded(policy, state, tmp_path, allowed={2})
    assert "checkpoint passed over: step_000003" in caplog.text


def harm_file(path: Path, harm: str, other: Path) -> None:
    content = path.read_bytes()
    if harm == "removed":
        path.unlink()
        return
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    harmed = {
        "truncated": content[: len(content) * 2 // 3],
        "emptied": b"",
        "bit flipped": bytes(flipped),
        "swapped": other.read_bytes(),
    }[harm]
    if harmed == content:
        pytest.skip("both files are the same")
    path.write_bytes(harmed)


@pytest.mark.parametrize("name", ["extra.pkl", "adapter_model.bin", "rng.pt", "notes.txt"])
def test_a_checkpoint_with_a_pickle_is_refused_even_if_its_manifest_names_it(training, tmp_path, name, caplog):
    policy, state = training
    for step in (1, 2):
        advance(policy, state, step)
        checkpoint.save(tmp_path, policy, state, IDENTITY, rows(step))
    (tmp_path / "step_000002" / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    manifest = tmp_path / "step_000002" / files.MANIFEST
    sums = {p.name: files.sha256(p) for p in manifest.parent.iterdir() if p != manifest}
    manifest.write_text(json.dumps(sums))
    assert files.damage(manifest.parent) is None
    check_loaded(policy, state, tmp_path, allowed={1})
    assert f"holds {name}; only safetensors and JSON are read" in caplog.text


@pytest.mark.parametrize("key", ["stage", "basis", "config", "model"])
def test_a_checkpoint_of_something_else_is_passed_over(training, tmp_path, key, caplog):
    policy, state = training
    own = {"stage": "iter_000", "basis": "b", "config": "c", "model": "m"}
    advance(policy, state, 1)
    checkpoint.save(tmp_path, policy, state, own | {key: "another"}, rows(1))
    state.step = 0
    assert checkpoint.load_latest(tmp_path, policy, state, own) == []
    assert state.step == 0
    assert f"belongs to another {key}" in caplog.text
