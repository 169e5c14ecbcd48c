"""Merging and exporting met by kills, power cuts and full disks: what has its final name is whole, a rerun makes it."""

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from fixtures import tiny_model_dir
from test_saves import DIED, with_fault
from warm import FORK, SECONDS, child, fill, one_line

from spinfast.interrupt import EXIT_CODE
from spinfast.progress import Tick
from spinfast.run import main
from spinfast.store import files

sys.path.append(str(Path(__file__).parents[1] / "weights" / "gguf"))
from lora import tiny_lora

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Two models of six layers, two adapters of the first, and recipes of both pairs."""
    room = tmp_path_factory.mktemp("given")
    models = [tiny_model_dir(room / name, "llama", layers=6) for name in "ab"]
    adapters = [tiny_lora(models[0], room / name, r=rank) for name, rank in (("one", 2), ("two", 4))]
    for name, parts in (("models", models), ("adapters", adapters)):
        inputs = [{"model": str(part), "parameters": {"weight": 0.5}} for part in parts]
        (room / f"{name}.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": inputs}))
    return room


COMMANDS = {  # what is written under its final name last
    "models": ("merge {given}/models.yaml --out {room}/out", "out"),
    "adapters": ("merge {given}/adapters.yaml --out {room}/out", "out"),
    "adapter into its base": ("merge {given}/one --out {room}/out", "out"),
    "export": ("export gguf {given}/one --type q8_0 --out {room}/out.gguf", "out.gguf"),
    "export of a LoRA": ("export gguf {given}/one --adapter-only --out {room}/out.gguf", "out.gguf"),
}


def words(command, given, room):
    return [word.format(given=given, room=room) for word in COMMANDS[command][0].split()]


def content(room):
    return {str(file.relative_to(room)): files.sha256(file) for file in sorted(room.rglob("*")) if file.is_file()}


def begun(command, given, room):
    process = FORK.Process(target=child, args=(words(command, given, room), str(given / "said"), None))
    process.start()
    return process


@pytest.fixture(scope="module")
def undisturbed(given, tmp_path_factory):
    """Of each command what it leaves, and its seconds."""
    found = {}
    for command in COMMANDS:
        room = tmp_path_factory.mktemp("whole")
        begun(command, given, room).join(SECONDS)  # the first one pays for imports
        shutil.rmtree(room)
        room.mkdir()
        start = time.monotonic()
        process = begun(command, given, room)
        process.join(SECONDS)
        assert process.exitcode == 0, (given / "said").read_text()
        found[command] = content(room), time.monotonic() - start
    return found


@pytest.mark.parametrize("power_cut", [False, True], ids=["kill", "power cut"])
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_each_step(given, undisturbed, tmp_path, command, power_cut):
    """Steps as in test_saves.py: files opened, fsyncs, renames, removals."""
    expected, last = undisturbed[command][0], COMMANDS[command][1]

    def killed(at):
        room = tmp_path / str(at)
        room.mkdir()
        return room, with_fault(room, at, power_cut, lambda: main(words(command, given, room)))

    _, count = killed(0)
    assert count > 5
    for at in range(1, count + 1):
        room, code = killed(at)
        assert code == DIED
        if (room / last).exists():
            assert {name: sum_ for name, sum_ in content(room).items() if not name.startswith(".")} == expected
        else:
            assert main(words(command, given, room)) == 0, at
            assert content(room) == expected


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "SIGINT"])
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_any_instant(given, undisturbed, tmp_path, command, how, kills):
    """The final name is absent or whole; the same command then makes it, and clears what the killed one left."""
    expected, seconds = undisturbed[command]
    draw, met, last = random.Random(int(os.environ.get("SPINFAST_SEED", "0"))), 0, COMMANDS[command][1]
    for number in range(kills + 30):
        room = tmp_path / str(number)
        room.mkdir()
        process = begun(command, given, room)
        time.sleep(draw.uniform(0.2, 1) * seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, how)
        process.join(SECONDS)
        if (room / last).exists():
            assert {name: sum_ for name, sum_ in content(room).items() if not name.startswith(".")} == expected
            seconds *= 0.8  # it was too fast
            continue
        assert process.exitcode in (-how, EXIT_CODE, 1)  # 1: Python's own, before or after the command
        if how == signal.SIGINT:
            assert content(room).keys() <= {"out.Modelfile"}
        assert main(words(command, given, room)) == 0
        assert content(room) == expected
        met += 1
        if met == kills:
            return
    pytest.fail(f"{met} of {kills} were killed before the end")


@pytest.mark.parametrize("after", [1, 5])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_disk_is_full(given, undisturbed, small_disk, monkeypatch, capfd, command, after):
    """A few tensors into the work: one line, nothing left; with room again the same command makes it."""
    place, advance, calls = small_disk("8m"), Tick.advance, []

    def advance_and_fill(tick, *words, **named):
        advance(tick, *words, **named)
        calls.append(tick.name)
        if len(calls) == after:
            fill(place)

    monkeypatch.setattr(Tick, "advance", advance_and_fill)
    if command == "export of a LoRA":  # has no steps
        fill(place)
    assert main(words(command, given, place)) == 2
    assert "no space left" in one_line(capfd)
    assert content(place).keys() == {"filler"}
    (place / "filler").unlink()
    assert main(words(command, given, place)) == 0
    assert content(place) == undisturbed[command][0]


@pytest.mark.parametrize("command", COMMANDS)
def test_too_small_a_disk(given, undisturbed, small_disk, capfd, command):
    place = small_disk("16k")
    assert main(words(command, given, place)) == 2
    assert "no space left" in one_line(capfd)
    assert content(place) == {}
