"""A disk that fills up in each phase: one clear line, earlier work intact, the same result once there is room."""

import os

import pytest
from warm import computed, differing, fill, one_line

from spinfast.errors import UserError
from spinfast.progress import Tick
from spinfast.run import main
from spinfast.store import files, room

pytestmark = pytest.mark.faults
PHASES = [
    "base evaluate",
    "sft train",
    "sft evaluate",
    "iter_000 generate",
    "iter_000 score",
    "iter_000 train",
    "iter_000 evaluate",
    "iter_001 generate",
    "iter_001 train",
]


@pytest.mark.parametrize("left", [0, 3000])
@pytest.mark.parametrize("phase", PHASES)
def test_full_in_a_phase(runs, small_disk, phase, left, monkeypatch, capfd):
    place = small_disk("64m")
    arguments = [str(runs.config), "--run-dir", str(place / "run")]
    advance, done = Tick.advance, []

    def advance_and_fill(tick, *args, **kwargs):
        advance(tick, *args, **kwargs)
        if tick.name == phase and not done:
            done.append(phase)
            fill(place, left)

    monkeypatch.setattr(Tick, "advance", advance_and_fill)
    assert main(arguments) == 2
    assert done
    assert "no space left" in one_line(capfd)
    for adapter in (place / "run").glob("*/adapter"):
        assert files.damage(adapter) is None  # earlier work is whole
    assert main(arguments) == 2  # nothing is harmed by trying again too early
    one_line(capfd)
    (place / "filler").unlink()
    assert main(arguments) == 0
    assert differing(computed(place / "run"), computed(runs.undisturbed)) == set()


def test_too_small_from_the_start(runs, small_disk, capsys):
    place = small_disk("1m")
    assert main([str(runs.config), "--run-dir", str(place / "run")]) == 2
    line = one_line(capsys)
    assert "no space left for the run" in line
    assert "MiB are free" in line
    assert os.listdir(place) == []  # nothing half-made is left


def test_room_is_asked_for_before_a_save(small_disk):
    place = small_disk("4m")
    room.check(place / "not" / "there" / "yet", 1 << 20, "a checkpoint")
    with pytest.raises(
        UserError, match=r"no space left for a checkpoint in .*: needs 5 MiB, 4 MiB are free; make room"
    ):
        room.check(place, 4 << 20, "a checkpoint")
