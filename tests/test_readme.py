"""README and guide: what they link to exists, what they tell a reader to type is understood, and README stays short."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from spinfast.commands import split
from spinfast.config import parse_config
from spinfast.evaluate.cli import parse as parse_eval
from spinfast.hub.cli import parse as parse_publish
from spinfast.run import parse
from spinfast.studies.cli import parse_rate
from spinfast.weights.merge_cli import parse as parse_merge

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configs_and_requirements_that_are_named_exist(page):
    names = set(re.findall(r"(?<![\w/])((?:configs|requirements)/[\w.-]+\.\w+)", page.read_text(encoding="utf-8")))
    assert sorted(name for name in names if not (ROOT / name).exists()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_program_that_are_named_exist(page):
    """`room/file.py`, from the top, from spinfast/ or from kernels/; in capitals stands what a reader will write."""
    names = set(re.findall(r"`([\w.]+/[\w./]+\.py)`", page.read_text(encoding="utf-8")))
    places = ROOT, ROOT / "spinfast", ROOT / "kernels"
    gone = [name for name in names if not any((place / name).exists() for place in places)]
    assert [name for name in sorted(gone) if not Path(name).stem.isupper()] == []


def test_readme_is_a_page_and_a_half():
    lines = README.splitlines()
    assert len(lines) <= 125
    assert max(map(len, lines)) <= 140
    assert "When not to use self-play" in lines[2]


def test_every_config_has_a_machine():
    rows = [line for line in README.splitlines() if line.startswith("| `")]
    for path in (ROOT / "configs").glob("*.yaml"):
        model, method = re.fullmatch(r"(.*?[\d.]+[bm])-?(.*)-(?:t4|cpu)", path.stem).groups()
        assert any(model in row and (not method or method in row) for row in rows), path.stem


def test_the_config_of_ones_own_data_is_one():
    config = parse_config(yaml.safe_load(re.search(r"```yaml\n(.*?)```", README, re.S)[1]))
    assert [*config.method] == ["sft"]
    assert config.heldout is not None


@pytest.mark.parametrize("line", re.findall(r"^    (spinfast [^#\n]+)", README, re.M))
def test_commands_are_understood(line):
    name, words = split(shlex.split(line)[1:])
    if name == "eval":
        assert parse_eval(words).adapter == Path("runs/NAME")
    elif name == "run":
        path, *_ = parse(words)
        assert path.name == "mine.yaml" or (ROOT / path).exists()
    elif name == "merge":
        assert parse_merge(words).what == Path("runs/NAME")
    elif name == "publish":
        assert parse_publish(words).run == Path("runs/NAME")
    elif name == "rate":
        assert parse_rate(words).texts == ["book.txt", "essays/"]
    else:
        assert name in ("report", "doctor", "export", "chat", "serve")
