"""`spinfast report RUN [RUN ...] [--output FILE.html] [--watch SECONDS]`"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from yaml import YAMLError

from spinfast.errors import UserError
from spinfast.store import files
from spinfast.terminal import Parser

SPOILED = LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError  # what odd data ends in


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; with --watch again and again until every run is finished."""
    parser = Parser(
        prog="spinfast report",
        description="One self-contained HTML file about a run, or several side by side; PNG and CSV of each plot.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories")
    parser.add_argument("--output", type=Path, help="the HTML file (default: RUN/report/index.html of the first run)")
    parser.add_argument("--watch", type=int, metavar="SECONDS", help="write it again until the runs are finished")
    parser.add_argument("--no-png", action="store_true", help="HTML and CSV only (matplotlib is not needed then)")
    arguments = parser.parse(argv)
    while True:
        path, finished = write_report(arguments.runs, arguments.output, arguments.watch, not arguments.no_png)
        print(path, flush=True)
        if finished or not arguments.watch:
            return 0
        time.sleep(arguments.watch)


def write_report(
    paths: Sequence[Path], output: Path | None = None, watch: int | None = None, png: bool = True
) -> tuple[Path, bool]:
    """(the HTML file, whether every run is finished). PNG and CSV go beside it."""
    from spinfast.report import plots, study
    from spinfast.report.page import page
    from spinfast.report.read import read_runs

    try:
        runs = read_runs(paths)
        finished = all(run.finished for run in runs)
        text, drawn = page(runs, refresh=None if finished else watch), study.plots(runs)
    except (*SPOILED, SafetensorError, YAMLError) as error:
        if isinstance(error, UserError):
            raise
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"report {', '.join(map(str, paths))}: a file of the run is not as a run writes it "
            f"({type(error).__name__}: {said}); run the same config again to mend it"
        ) from error
    output = output or paths[0] / "report" / "index.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(output, text)
    for plot in drawn:
        files.write_text(output.parent / f"{plot.name}.csv", plots.to_csv(plot))
        if png:
            plots.write_png(plot, output.parent / f"{plot.name}.png")
    return output, finished
