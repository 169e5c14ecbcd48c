"""The page in a real browser: no complaint, no request, everything readable at desktop and phone width."""

import json
import shutil

import pytest
from browser import Browser
from rewarded import add_grpo

from spinfast.report.cli import write_report

CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def report(played, tmp_path_factory):
    return write_report(played, tmp_path_factory.mktemp("report") / "index.html", png=False)[0]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_quiet_and_within_its_width(browser, report, width, dark, tmp_path):
    seen = browser.open(report, width, dark=dark)
    assert seen.errors == []
    assert seen.requests == []
    assert browser.run("document.documentElement.scrollWidth") == width
    assert browser.run("document.querySelectorAll('figure svg').length") >= 25
    assert browser.run("[...document.querySelectorAll('figure svg')].every(svg => svg.clientHeight > 150)")
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 50_000


def test_search_and_filters(browser, report):
    browser.open(report, 1280)
    count = "document.querySelectorAll('#answers article').length"
    assert browser.run(count) == 8
    type_in = "(text => { search.value = text; search.dispatchEvent(new Event('input')); })"
    browser.run(f"{type_in}('plus 53')")
    assert browser.run(count) == 1
    assert browser.run("document.querySelector('#answers mark').textContent") == "plus 53"
    browser.run(f"{type_in}('no such words')")
    assert browser.run(count) == 0
    browser.run(f"{type_in}('')")
    browser.run("(() => { which.value = 'gained'; which.dispatchEvent(new Event('change')); })()")
    assert browser.run(count) == 0
    browser.run("(() => { which.value = 'all'; run.value = '1'; run.dispatchEvent(new Event('change')); })()")
    assert browser.run(count) == 8


def test_rollouts_by_step_search_and_kind(browser, run_copy):
    add_grpo(run_copy)
    seen = browser.open(write_report([run_copy], png=False)[0], 1280)
    count = "[...document.querySelectorAll('#rollouts article')].filter(node => node.checkVisibility()).length"
    assert browser.run(count) == 3  # the newest is open
    put = "((id, text, event) => { const node = document.getElementById(id); node.value = text; "
    put += "node.dispatchEvent(new Event(event)); })"
    browser.run(f"{put}('rollout-step', '0', 'change')")
    assert browser.run(count) == 3
    browser.run(f"{put}('rollout-kind', 'dead', 'change')")
    assert browser.run(count) == 1
    browser.run(f"{put}('rollout-step', '', 'change')")
    browser.run(f"{put}('rollout-search', '39 plus 2', 'input')")
    assert browser.run(count) == 1
    assert browser.run("document.getElementById('rollout-count').textContent") == "1 groups"
    assert (seen.errors, seen.requests) == ([], [])


def test_values_under_the_pointer(browser, report, played):
    seen = browser.open(report, 1280)
    script = """(() => {
        const svg = document.querySelector('svg[data-plot="heldout-margin"]');
        svg.scrollIntoView();
        const box = svg.getBoundingClientRect();
        svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right - 12, clientY: box.top + 50}));
        return svg.closest('figure').querySelector('.tip').innerText;
    })()"""
    text = browser.run(script)
    value = json.loads((played[0] / "results.json").read_text())[-1]["evaluation"]["heldout/margin"]["value"]
    assert text.splitlines()[0] == "stage iter. 1"
    assert f"seed0: {float(f'{value:.4g}'):g}" in text
    assert seen.errors == []


def test_text_of_a_model_makes_no_element(browser, run_copy):
    path = run_copy / "base" / "heldout.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    evil = "</script><img src='http://example.invalid/x.png' onerror='throw 1'>"
    row |= {"text": evil, "prompt": [{"role": "user", "content": evil}], "real": evil}
    path.write_text(json.dumps(row) + "\n")
    seen = browser.open(write_report([run_copy], png=False)[0], 390)
    assert (seen.errors, seen.requests) == ([], [])
    assert browser.run("document.images.length") == 0
    assert evil in browser.run("document.getElementById('answers').textContent")
