"""`spinfast chat` driven in terminals: what a person types, what the screen shows."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from process import ROOT, Screen

CPU = ("--profile", "cpu", "--dtype", "float32", "--context", "512", "--max-tokens", "12")
DONE = r"\(12 tokens, [\d.]+ tokens/s, first after [\d.]+ s, cut at max_tokens: /set max_tokens N\)"


@pytest.fixture(scope="module")
def screen(tiny_model, adapters):
    screen = Screen("chat", tiny_model("llama"), *CPU, "--adapter", f"all={adapters['all']}", "--temperature", "0")
    screen.wait("Ctrl-D leaves")
    screen.wait(">>>")
    yield screen
    screen.process.kill()


def test_a_question_is_answered_with_its_speed(screen):
    answer = r"the sum\? (\S.*) " + DONE
    first = screen.ask("What is the sum?", answer)[1]
    screen.ask("/clear", "conversation is empty")
    assert screen.ask("What is the sum?", answer)[1] == first, "temperature 0"


def test_who_answers_is_chosen_and_more_are_loaded(screen, adapters, tmp_path):
    screen.ask("/adapter", r"base \[all\]")
    screen.ask("/adapter base", r"\[base\] all")
    screen.ask(f"/adapter {adapters['few']}", r"base all \[few\]")
    screen.ask("Why?", DONE)
    screen.ask("/adapter none-such", "none-such: expected base, all, few, or an adapter's directory")
    (tmp_path / "broken").mkdir()
    screen.ask(f"/adapter {tmp_path / 'broken'}", "cannot be read")
    screen.ask("/adapter", r"base all \[few\]")
    screen.ask("And now?", DONE)


def test_settings_are_checked(screen):
    screen.ask("/set", "temperature 0.0, top_p 0.95, max_tokens 12, seed 0")
    screen.ask("/set temperature hot", "temperature: expected a number from 0")
    screen.ask("/set top_p=2", "top_p: expected a number above 0, 1 at most, got '2'")
    screen.ask("/set max_tokens", "max_tokens: expected a whole number")
    screen.ask("/set beams 4", "beams: expected one of temperature, top_p, max_tokens, seed")
    screen.ask("/set seed = 7", "seed 7")


def test_system_prompt_retry_and_words_that_are_no_command(screen):
    screen.ask("/system You are terse.", "system: You are terse.")
    screen.ask('/system ""', "no system prompt")
    screen.ask("/retry", DONE)
    screen.ask("/retri", r"there is no /retri: did you mean /retry\?")
    screen.ask(" /usr/bin is what?", DONE)
    screen.ask('"""one', r"\.\.\.$")
    screen.ask('two"""', DONE)
    screen.ask("/help", "as Ctrl-D does")
    assert all(f"/{name}" in screen.seen for name in ("clear", "retry", "system", "set", "adapter", "compare", "save"))


def test_the_talk_is_saved_once_and_only_where_nothing_was(screen, tmp_path):
    screen.ask(f"/save {tmp_path}", "is a directory")
    screen.ask("/save", "expected a name")
    (tmp_path / "mine.jsonl").write_text("precious")
    screen.ask(f"/save {tmp_path / 'mine.jsonl'}", "is there already")
    screen.ask(f"/save {tmp_path / 'none' / 'x.jsonl'}", "No such file or directory")
    for _ in range(2):
        screen.ask(f"/save {tmp_path / 'talk.jsonl'}", "turns, as data.source")
    (row,) = map(json.loads, (tmp_path / "talk.jsonl").read_text().splitlines())
    assert [m["role"] for m in row["messages"]][:2] == ["user", "assistant"]
    assert (tmp_path / "mine.jsonl").read_text() == "precious"


def test_unicode_very_long_lines_and_bytes_that_are_no_text(screen):
    screen.ask("/clear", "empty")
    screen.ask("naïve 你好 🙂?", DONE)
    for _ in range(3):  # a terminal takes a line of 4095 bytes at most
        os.write(screen.master, b"eggs " * 250)
        time.sleep(0.1)
    screen.type("")
    screen.wait(r"the question has \d+ tokens with what the template adds")
    os.write(screen.master, b"\xff\xfe\n")
    screen.wait("no text in this terminal's encoding: type it again")
    screen.ask("Still there?", DONE)


def test_ctrl_c_ends_the_answer_alone_and_twice_at_the_prompt_the_talk(screen):
    screen.ask("/set max_tokens 400", "max_tokens 400")
    screen.ask("Tell me everything.", r"everything\. \S+")
    os.write(screen.master, b"\x03")
    screen.wait(r", stopped\)|stopped before")
    screen.ask("/set max_tokens 12", "max_tokens 12")
    screen.ask("Are you there?", DONE + " >>>$")
    screen.press(b"\x03", "Ctrl-C again, Ctrl-D or /bye leaves >>>$")
    screen.ask("Still?", DONE + " >>>$")
    screen.press(b"\x03", "Ctrl-C again, .* >>>$")
    screen.press(b"\x03", "")
    assert screen.process.wait(60) == 0
    assert "Traceback" not in screen.seen


@pytest.mark.slow
def test_forty_columns_another_encoding_and_a_model_that_compares(tiny_model, adapters):
    words = ["chat", adapters["few"], *CPU, "--compare", "--system", "Für dich"]
    screen = Screen(*words, columns=40, encoding="latin-1", PYTHONIOENCODING="latin-1", LC_ALL="C")
    screen.wait(">>>")
    assert "system: Für dich" in screen.seen
    screen.ask("Größe?", r"\[base\].*first after.*\[few\].*first after.*>>>")
    screen.ask("/compare", "few alone >>>$")
    screen.press(b"\x04", "")
    assert screen.process.wait(60) == 0
    assert "Traceback" not in screen.seen


@pytest.mark.skipif(not shutil.which("tmux"), reason="tmux is not installed")
def test_base_and_adapter_stand_side_by_side(tiny_model, adapters, tmp_path):
    """On 80 columns by 24 lines, as tmux shows them."""
    socket = f"spinfast-{os.getpid()}"
    words = [sys.executable, "-m", "spinfast.run", "chat", str(adapters["all"]), *CPU, "--max-tokens", "60"]
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "LC_ALL": "C.UTF-8"}

    def tmux(*words):
        return subprocess.run(["tmux", "-L", socket, *words], env=os.environ | env, text=True, capture_output=True)

    def shown(pattern, seconds=120):
        end = time.monotonic() + seconds
        while not re.search(pattern, text := tmux("capture-pane", "-p").stdout.rstrip()):
            assert time.monotonic() < end, text
            time.sleep(0.2)
        return text

    try:
        tmux("new-session", "-d", "-x", "80", "-y", "24", *words)
        shown(">>>$")
        tmux("send-keys", "/compare", "Enter")
        shown(r"base \| all")
        tmux("send-keys", "What is the sum of twelve and thirty?", "Enter")
        text = shown(r"(?s)\(\d+ tokens,.*\(\d+ tokens,.*>>>$")
        assert re.search(r"^base {30,}all *$", text, re.MULTILINE), text
        assert all(len(line) <= 80 for line in text.splitlines())
        tmux("send-keys", "/bye", "Enter")
    finally:
        tmux("kill-server")


PAUSES = """
import ctypes, readline
hook = ctypes.c_void_p.in_dll(ctypes.CDLL(readline.__file__), "rl_pre_input_hook")
hook.value = ctypes.cast(ctypes.CDLL(None).pause, ctypes.c_void_p).value
"""


@pytest.mark.parametrize(
    "when", [pytest.param("while readline waits", marks=pytest.mark.slow), "between its prompt and its wait"]
)
def test_a_signal_ends_it_and_says_so_to_the_shell(when, tiny_model, tmp_path):
    if when != "while readline waits":
        (tmp_path / "sitecustomize.py").write_text(PAUSES)  # the signal comes before readline begins to wait
    screen = Screen("chat", tiny_model("llama"), *CPU, PYTHONPATH=f"{tmp_path}:{ROOT}:{ROOT / 'kernels'}")
    screen.wait(">>>$")
    screen.process.send_signal(signal.SIGTERM)
    assert screen.process.wait(60) == 128 + signal.SIGTERM
    assert "Traceback" not in screen.seen
