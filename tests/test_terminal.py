"""The command on any terminal, pipe or account: what it prints, where it goes on without, and how its line is read."""

import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_run import write_config

from spinfast.evaluate.cli import parse as parse_eval
from spinfast.progress import Display, open_console, show
from spinfast.report.closing import ANSWERS, HEADLINES, SHOWN, table
from spinfast.run import main, parse
from spinfast.terminal import PLAIN, lasting_streams, notes_to_log

CASES = Path(__file__).parent / "cases"
ROOT = Path(__file__).parents[1]


def stream(encoding):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)


def broken_pipe():
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_model):
    directory = tmp_path_factory.mktemp("terminal")
    path = write_config(directory, tiny_model("llama"), spin={"iterations": 1}, sft={"groups_per_step": 6})
    shutil.copy(CASES / "23-pipe-that-closes" / "heldout.jsonl", directory)
    return path


@pytest.fixture(scope="module")
def run_dir(config):
    """Played with nobody left to read what it prints, as `spinfast CONFIG | head -1` soon has it."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = broken_pipe(), broken_pipe()
    try:
        assert main([str(config), "--run-dir", str(config.parent / "run")]) == 0
        sys.stdout.flush()  # as the interpreter does at its end: nothing is left that could not be written
    finally:
        sys.stdout, sys.stderr = before
    return config.parent / "run"


def test_case_23_a_run_whose_output_nobody_reads_goes_on_and_logs(run_dir):
    assert [row["iteration"] for row in json.loads((run_dir / "results.json").read_text())] == ["base", "sft", 0]
    assert "finished in" in (run_dir / "log.txt").read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "encoding"),
    [
        *(("run", "ascii"), ("run", "latin-1"), ("run", "utf-8"), ("report", "cp1252"), ("report", "utf-8")),
        *(("dry-run", "ascii"), ("eval", "ascii"), ("spectrum", "ascii")),
    ],
)
def test_case_22_every_command_prints_in_every_encoding(run_dir, config, tmp_path, monkeypatch, command, encoding):
    task = tmp_path / "Größe → 1.jsonl"
    shutil.copy(CASES / "22-terminal-that-is-not-utf8" / "task.jsonl", task)
    model = yaml.safe_load(config.read_text())["model"]["name"]
    words = {
        "run": [str(config), "--run-dir", str(run_dir)],  # a finished run: it prints its closing
        "dry-run": [str(config), "--dry-run"],
        "report": ["report", str(run_dir), "--no-png", "--output", str(tmp_path / "α.html")],
        "eval": ["eval", "--model", model, "--tasks", str(task), "--output", str(tmp_path / "out"), "--profile", "cpu"],
        "spectrum": ["spectrum", model, "--top", "50", "--out", str(tmp_path / "α.yaml")],
    }[command]
    monkeypatch.setenv("SPINFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdout", stream(encoding))
    assert main(words) == 0
    printed = sys.stdout.buffer.getvalue().decode(encoding)
    if command == "run":
        assert ("first→last" if encoding == "utf-8" else "first->last") in printed
        assert (" ± " if encoding != "ascii" else " +- ") in printed
        inside = [line for line in printed.splitlines() if line[:1] in "┃│|" and line[-1:] in "┃│|" and line]
        assert len(inside) >= 4  # headings, the base, SFT, an iteration
        assert len({len(line) for line in inside}) == 1  # borders stand below one another
    if command == "report":
        assert printed.endswith("α.html\n" if encoding == "utf-8" else "?.html\n")
        assert (tmp_path / "α.html").is_file()
    if command == "eval":
        assert json.loads((tmp_path / "out" / "results.json").read_text())["results"].keys() == {"Größe → 1"}
        assert "Gr??e -> 1" in printed
    if command == "spectrum":
        assert printed.splitlines()[-1].endswith("?.yaml}")
        assert (tmp_path / "α.yaml").is_file()


def test_a_character_that_has_no_place_is_replaced_and_others_are_kept(monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream("ascii"))
    with lasting_streams():
        print("a → b ± 1 \udcff 漢 " + "".join(PLAIN))
    assert sys.stdout.buffer.getvalue() == b"a -> b +- 1 ? ? " + "".join(PLAIN.values()).encode() + b"\n"


def test_no_stdout_at_all(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["report", str(run_dir), "--no-png", "--output", str(tmp_path / "index.html")]) == 0
    assert main(["--nonsense"]) == 2
    assert sys.stdout is sys.stderr is None


def python(code, *words, before=(), shell="", **environment):
    command = [*before, sys.executable, "-c", code, *map(str, words)]
    if shell:
        command = ["bash", "-c", f'"$@" {shell}', "bash", *command]
    environment |= {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_closed_descriptor_is_not_given_to_a_file_of_the_run(tmp_path):
    code = (
        "import sys; from spinfast.terminal import lasting_streams\n"
        "with lasting_streams(), open(sys.argv[1], 'w') as file: print('lost', sys.stdin.read()); "
        "file.write(str(file.fileno()))"
    )
    assert python(code, tmp_path / "file", shell=">&- 2>&- <&-").returncode == 0
    assert int((tmp_path / "file").read_text()) > 2


def test_a_pipe_that_closes_leaves_one_line_and_code_0():
    code = (
        "import sys; from spinfast.terminal import lasting_streams\n"
        "with lasting_streams():\n  for _ in range(100_000): print('line')\nsys.exit(0)"
    )
    done = python(code, shell='| head -1; exit "${PIPESTATUS[0]}"')
    assert (done.returncode, done.stdout) == (0, "line\n")
    assert done.stderr == "spinfast: nobody reads the output any more; the work goes on without\n"


AS_NOBODY = "import os, getpass, pathlib; from spinfast import terminal; os.setuid(54321); "


@pytest.fixture
def shared_tmp():
    """A folder for temporary files that every user may use."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o777)
        yield path


@pytest.mark.parametrize("home", [None, "/", "/nonexistent"])
def test_case_24_a_user_without_a_home_has_one_for_caches(shared_tmp, home):
    code = "terminal.find_home(); print(getpass.getuser(), pathlib.Path.home(), os.getenv('XDG_CACHE_HOME'))"
    done = python(AS_NOBODY + code, TMPDIR=shared_tmp, **({} if home is None else {"HOME": home}))
    spare = f"{shared_tmp}/spinfast-54321"
    assert done.stdout.split() == ["uid-54321", *((spare, "None") if home is None else (home, spare))]
    assert f"they go to {spare} (set HOME to choose)" in done.stderr
    assert oct(os.stat(spare).st_mode) == "0o40700"


def test_anothers_directory_is_no_home(shared_tmp):
    os.mkdir(f"{shared_tmp}/spinfast-54321")
    done = python(AS_NOBODY + "terminal.find_home()", TMPDIR=shared_tmp)
    assert done.returncode
    assert "is another's: set HOME" in done.stderr


CONFIG, OVERRIDES = Path("config.yaml"), ["a=b", "c=-1"]


@pytest.mark.parametrize(
    "line",
    [
        "config.yaml a=b --run-dir x c=-1 --dry-run",
        "--run-dir x config.yaml a=b c=-1 --dry-run",
        "a=b --dry-run config.yaml --run-dir=x c=-1",
        "--dry-run a=b c=-1 --run-dir x config.yaml",
    ],
)
def test_options_stand_anywhere(line):
    assert parse(line.split()) == (CONFIG, OVERRIDES, Path("x"), True, False, False)
    assert parse(["config.yaml", "--show-config"]) == (CONFIG, [], None, False, False, True)
    assert parse([]) == (None, [], None, False, False, False)


def test_options_of_eval_and_report_stand_anywhere_and_may_have_a_dash_for_a_value(run_dir, tmp_path):
    words = ["--limit", "-3", "--template", "x=-1", "--tasks", "a,b", "--model=-m", "--harness"]
    found = parse_eval(words)
    assert (found.limit, found.template, found.tasks, found.model) == (-3, ["x=-1"], ["a", "b"], "-m")
    for words in (["--no-png", str(run_dir), "--output"], [str(run_dir), "--no-png", "--output"]):
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}.html"
        assert main(["report", *words, str(output)]) == 0
        assert output.is_file()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("config.yaml --dryrun", "unknown option --dryrun: did you mean --dry-run?"),
        ("config.yaml --rundir=x", "unknown option --rundir=x: did you mean --run-dir?"),
        ("config.yaml --spin.lr=3", "unknown option --spin.lr=3: expected CONFIG.yaml | section.key=value, -h"),
        ("config.yaml -x", "unknown option -x: expected"),
        ("a.yaml b.yaml", "expected one config file, got a.yaml, b.yaml"),
        ("a.yaml spin.lr = 1e-4", "'=': expected section.key=value in one word, without spaces around the ="),
        ("a.yaml spin.lr= 1e-4", "'spin.lr=': expected section.key=value in one word"),
        ("config.yaml --run-dir", "argument --run-dir: expected one argument"),
        ("eval --model m --tasks t --batchsize 3", "did you mean --batch-size?"),
        ("eval --model m", "the following arguments are required: --tasks"),
        ("report", "the following arguments are required: RUN"),
        ("report x --nopng", "unknown option --nopng: did you mean --no-png?"),
    ],
)
def test_a_line_that_is_wrong_is_one_line_of_complaint(capsys, line, said):
    assert main(line.split()) == 2
    complaint = capsys.readouterr().err
    assert said in complaint
    assert complaint.count("\n") == 1


def rows(*names):
    estimate = {"value": 0.12345, "stderr": 0.0123, "n": 5}
    train = {"first_loss": 0.6931, "last_loss": 0.512}
    return [
        {"iteration": name, "pairs": 400, "train": train, "evaluation": dict.fromkeys(HEADLINES, estimate)}
        for name in names
    ]


@pytest.mark.parametrize("width", [160, 120, 80, 60, 40])
@pytest.mark.parametrize("name", [0, "a-stage-with-quite-a-long-name"])
def test_the_results_fit(width, name):
    console = Console(file=io.StringIO(), width=width)
    table(rows("base", name), console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(console.file.getvalue().split())
    assert text.count("0.123 ± 0.012") == 2 * SHOWN  # no value is cut or broken
    assert ("┃" in text) == (width >= 60)
    if width >= 80 and name == 0:
        assert text.count("┏") == 1  # one table


@pytest.mark.parametrize("width", [160, 80, 40])
def test_what_answers_were_paid_for_fits(width):
    early, late = {"value": 0.1234, "stderr": 0.012, "n": 10}, {"value": 0.5678, "stderr": None, "n": 1}
    names = ("reward", "rewards/my_rewards.py:correct/mean", *ANSWERS)
    train = {"first": dict.fromkeys(names, early), "last": dict.fromkeys(names, late), "window": 10, "steps": 100}
    console = Console(file=io.StringIO(), width=width)
    row = {"iteration": "grpo", "pairs": 0, "train": train | {"first_loss": 0.7777, "last_loss": 0.0}, "evaluation": {}}
    table([*rows("base"), row], console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert text.count("0.123 ± 0.012") == len(names) + SHOWN
    assert text.count("0.568") == len(names)
    assert "reward by my_rewards.py:correct" in " ".join(text.split())
    assert "0.778" not in text  # a loss that says nothing


@pytest.fixture
def display(request, tmp_path):
    """Displays on a console of 80 columns, and its log."""
    terminal = request.param == "terminal"
    display = Display(Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None))
    with display.logged(tmp_path / "log.txt"):
        yield display


LONG = "memory: microbatches of 1024 tokens, [bold]head[/bold] in chunks of 1024; peak 0.97 GiB, 18.11 GiB available"


@pytest.mark.parametrize("display", ["pipe"], indirect=True)
def test_in_a_pipe_a_record_is_one_line_without_blanks_at_its_end(display, tmp_path):
    logging.getLogger("spinfast").info(LONG)
    logging.getLogger("spinfast").warning("the disk is nearly full")
    logging.getLogger("some.library").warning("deprecated")
    with display.phase("score", 2, "groups") as tick:
        tick.advance(2, tokens=10)
    said, warned, scored = display.console.file.getvalue().split("\n")[:-1]
    assert re.fullmatch(r"\d\d:\d\d:\d\d (.*)", said)[1] == LONG
    assert warned[9:] == "warning: the disk is nearly full"
    assert re.fullmatch(r"score: 2/2 groups in [\d.]+ s  [\d,]+ tok/s  [\d.]+ GiB", scored[9:])
    logged = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 3)[2] for line in logged] == ["INFO", "WARNING", "WARNING", "INFO"]
    assert logged[2].endswith(" WARNING deprecated")


@pytest.mark.parametrize("display", ["terminal"], indirect=True)
def test_on_a_terminal_of_80_columns_records_wrap_and_a_phase_is_one_live_line(display):
    logging.getLogger("spinfast").info(LONG)
    file = display.console.file
    first, *rest = file.getvalue().splitlines()
    assert len(rest) == 1
    assert rest[0].startswith(" " * 9)
    assert f"{first[9:].rstrip()} {rest[0].strip()}" == LONG
    file.truncate(file.seek(0))
    with display.phase("iter_000 generate", 256, "answers") as tick:
        tick.advance(200, tokens=10, metrics="loss 0.6931")
        file.truncate(file.seek(0))
        display.console._live_stack[-1].refresh()
        (frame,) = [line for line in re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", file.getvalue()).splitlines() if line.strip()]
    assert len(frame.strip("\r")) <= 80
    for part in ("iter_000 generate", "200/256 answers", "loss 0.6931", "tok/s", "GiB"):
        assert part in frame


def test_what_compiled_code_says_goes_to_the_log(tmp_path):
    code = (
        "import logging.config, os, sys; from spinfast.terminal import LogFile, notes_to_log\n"
        "with notes_to_log(): os.write(2, b'seen, ')\n"
        "logging.root.addHandler(LogFile(sys.argv[1]))\n"
        "logging.config.dictConfig({'version': 1})\n"  # a library's, which closes what others opened
        "with notes_to_log(): os.write(2, b'from C\\n'); print('from Python', file=sys.stderr)\n"
        "print('seen', file=sys.stderr)"
    )
    done = python(code, tmp_path / "log.txt")
    assert (done.returncode, done.stderr) == (0, "seen, seen\n")
    assert (tmp_path / "log.txt").read_text() == "from C\nfrom Python\n"


def test_a_log_ends_with_its_run(tmp_path, capfd):
    """What comes after in the same process, an engine for instance, must not look for a run's log."""
    handlers = logging.root.handlers[:], logging.getLogger("spinfast").handlers[:]
    with Display(Console(file=io.StringIO())).logged(tmp_path / "log.txt"):
        logging.getLogger("spinfast").info("seen")
    (tmp_path / "log.txt").unlink()
    with notes_to_log():
        os.write(2, b"from C")
    assert (logging.root.handlers, logging.getLogger("spinfast").handlers) == handlers
    assert capfd.readouterr().err == "from C"


@given(st.integers(60, 200), st.integers(1, 12), st.text("ab ", max_size=90), st.lists(st.text("12.±", max_size=25)))
def test_any_table_fits_and_loses_nothing(width, count, name, values):
    headings = ["task", "metric", *(f"heading {i}" for i in range(count))]
    cells = [*values[:count], *[""] * (count - len(values))]
    console = Console(file=io.StringIO(), width=width)
    show(console, "title", headings, [(name, "m", *cells)], keys=2)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert all(cell in text for cell in cells)


def test_columns_without_a_value_are_left_out():
    console = Console(file=io.StringIO(), width=80)
    show(console, None, ("iteration", "empty", "loss"), [("0", "", "1.5"), ("1", "", "")])
    assert "empty" not in console.file.getvalue()


def test_a_pipe_is_as_wide_as_columns_says(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert open_console(io.StringIO()).width == 160
    monkeypatch.setenv("COLUMNS", "72")
    assert open_console(io.StringIO()).width == 72
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's word for a terminal
    monkeypatch.setenv("TERM", "dumb")
    assert open_console(io.StringIO()).width == 72


@pytest.mark.parametrize(("variable", "value"), [("TERM", "dumb"), ("NO_COLOR", "1")])
def test_terminals_that_cannot_or_shall_not(variable, value):
    environment = {"TERM": "xterm-256color"} | {variable: value}
    console = Console(file=io.StringIO(), force_terminal=True, width=80, _environ=environment)
    display = Display(console)
    with display.phase("score", 2, "groups") as tick:
        tick.advance(2)
    table(rows("base", 0), console)
    printed = console.file.getvalue()
    assert not re.search(r"\x1b\[(\d+;)*[349]\d", printed)  # colours
    assert "held-out reward" in " ".join(printed.split())
    if variable == "TERM":
        assert "\x1b" not in printed
