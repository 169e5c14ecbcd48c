"""`spinfast run [CONFIG.yaml] [section.key=value ...] [option ...]`, and all commands.

Without a config one is picked by device. The same command continues an interrupted run of the same config.
`python -m spinfast.run` is `spinfast run`. What takes long to import is imported late, so that help, a wrong line and a
wrong config are told at once.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from spinfast import spread
from spinfast.commands import COMMANDS, PURPOSE, ConfigParser, overview, split
from spinfast.errors import UserError, out_of_memory
from spinfast.interrupt import EXIT_CODE, Stopped
from spinfast.names import label
from spinfast.terminal import find_home, lasting_streams

if TYPE_CHECKING:
    from spinfast.config import Config

log = logging.getLogger("spinfast")
HERE = Path(__file__).parent
CONFIGS = next(path for path in (HERE / "configs", HERE.parent / "configs") if path.is_dir())  # wheel, checkout
SPREAD = {"run", "study", "rate"}  # commands that torchrun may start
LONGEST = 1000  # characters of a complaint
MENDABLE = {  # what a file system may refuse: its user can choose another name or give rights
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EEXIST,  # a file where a directory is to be made
    errno.EISDIR,
    errno.ELOOP,
    errno.EIO,
    errno.EINVAL,
}


def command() -> int:
    """`spinfast` itself: alone, or asked for help, it says what commands there are."""
    if sys.argv[1:] not in ([], ["-h"], ["--help"]):
        return main()
    with lasting_streams():
        print(overview())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 the user can mend it (one line on stderr), 75 stopped by a signal, resumable.

    torchrun starts it once for every rank (spread.py); which of them says what went wrong is settled among them.
    """
    spread.settle()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with lasting_streams():
        return _main(list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    refuse_remote_code()
    try:
        find_home()
        if any("\0" in word for word in argv):
            raise UserError("a word of the command line holds a null character; expected text")
        name, words = split(argv)
        if name not in SPREAD and spread.launched()[1] > 1:
            raise UserError(f"torchrun starts several of {name}, which is one's work: start it alone")
        return COMMANDS[name][0](words)
    except Stopped as stopped:
        by_signal = "stopped by a signal; everything done is saved. Run the same command again to go on"
        return _complain(str(stopped) or by_signal, EXIT_CODE)
    except UserError as error:
        return _complain(str(error))
    except (OSError, SafetensorError) as error:
        if _disk_is_full(error):
            return _complain("no space left for the run's files: make room and run the same command again to go on")
        if getattr(error, "errno", None) in MENDABLE:
            return _complain(f"{error.filename}: {error.strerror}; give another place, or the right to write there")
        raise


def parse(argv: Sequence[str]) -> tuple[Path | None, list[str], Path | None, bool, bool, bool]:
    parser = ConfigParser(
        prog="spinfast run",
        description=f"{PURPOSE}. The same command continues an interrupted run.",
    )
    parser.add_argument("--run-dir", type=Path, help="where the run's files go (default: runs/NAME-HASH)")
    parser.add_argument("--dry-run", action="store_true", help="show what would run and what it needs, then stop")
    parser.add_argument("--show-config", action="store_true", help="print every setting, the defaults too, then stop")
    parser.add_argument(
        "--controls", action="store_true", help="then play the controls of self-play too, see methods/controls.py"
    )
    a = parser.parse(argv)
    return a.path, a.overrides, a.run_dir, a.dry_run, a.controls, a.show_config


def run(
    config_path: Path | None,
    overrides: list[str],
    run_dir: Path | None,
    dry_run: bool,
    controls: bool,
    show_config: bool = False,
) -> int:
    from spinfast.config import load_config

    why = "asked for"
    if config_path is None:
        config_path, why = default_config()
    config = load_config(config_path, overrides)
    if show_config:
        spread.told("the config", lambda: print(config.dump(), end=""))
        return 0
    spare_imports()
    run_dir = run_dir or Path("runs") / f"{config_path.stem}-{config.hash()}"
    if dry_run:
        from spinfast.dry_run import dry_run as plan_only

        spread.told("the dry run", lambda: plan_only(config) and None)
        return 0
    gc.disable()  # until the run is open: what is imported stays, and looking for garbage in it is a fifth of the time
    try:
        return play(config, run_dir, f"{config_path} ({why})", controls)
    finally:
        gc.enable()


def play(config: Config, run_dir: Path, chosen: str, controls: bool = False) -> int:
    """Open the run directory and play, the controls too where asked for."""
    # imported late, so that a wrong config is told at once
    import torch

    from spinfast.environment import describe
    from spinfast.evaluate.advice import warnings
    from spinfast.methods import play as play_methods
    from spinfast.methods.controls import check, play_controls
    from spinfast.methods.run import open_run
    from spinfast.progress import Display
    from spinfast.report.closing import closing
    from spinfast.report.read import read_run
    from spinfast.store.record import open_directory

    if controls:
        check(config)
    quiet_libraries()
    started = time.monotonic()
    display = Display()
    try:
        with open_directory(run_dir, config) as record, display.logged(run_dir / "log.txt"):
            log.info("config: %s, run directory: %s", chosen, run_dir)
            if spread.world() > 1:
                log.info("ranks: %d; rank 0 writes and logs", spread.world())
            describe(run_dir / "environment.json")
            with open_run(config, record, display) as opened:
                gc.enable()
                for row in play_methods(opened):
                    log.info("%s done", label(row["iteration"]))
                for name, row in play_controls(opened) if controls else ():
                    log.info("control %s: %s done", name, label(row["iteration"]))
            if spread.first():
                for sentence in warnings(record.results()):
                    log.warning(sentence)
                took = time.monotonic() - started
                log.info("finished in %.0f s; adapters, pairs and figures are in %s", took, run_dir)
                closing(read_run(run_dir), display.console)
        return 0
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error) from error


def refuse_remote_code() -> None:
    """bitsandbytes, which PEFT imports, takes a compiled kernel from the hub as it is imported, where Hugging Face's
    `kernels` package is there, and else says that it could not; torchao, which it imports too, has notes on torch."""
    sys.modules.setdefault("kernels", None)
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Only spinfast speaks: no progress bars of loaders, no notes of libraries to their own developers.

    A log line that does not fit on the disk is no news, and a library's thread that dies of it gets a line, no trace.
    """
    import threading
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.raiseExceptions = False
    threading.excepthook = lambda died: log.warning("a library's thread ended: %s", died.exc_value)
    warnings.filterwarnings("ignore", category=FutureWarning)


def spare_imports() -> None:
    """Where scikit-learn is installed, transformers imports it for a way of decoding that nobody here asks for: 1 s."""
    if "sklearn" not in sys.modules:
        from transformers.utils import is_sklearn_available

        sys.modules["sklearn"] = None
        is_sklearn_available()  # remembers that it is not
        del sys.modules["sklearn"]


def default_config() -> tuple[Path, str]:
    """The config for this machine and why it was chosen."""
    import torch

    if torch.cuda.is_available():
        return CONFIGS / "qwen2.5-0.5b-t4.yaml", "no config given; a CUDA GPU is visible"
    return CONFIGS / "smollm2-135m-sums-cpu.yaml", "no config given; no CUDA GPU is visible"


def _disk_is_full(error: OSError | SafetensorError) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"os error {errno.ENOSPC}" in str(error)  # safetensors' writer has no errno


def _complain(message: str, code: int = 2) -> int:
    """One printable line, whatever a name or a value in it holds."""
    if not spread.speaks():
        return code
    if (rank := spread.launched()[0]) > 0:
        message = f"rank {rank}: {message}"
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    print(f"spinfast: {shown if len(shown) <= LONGEST else shown[:LONGEST] + ' ...'}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
