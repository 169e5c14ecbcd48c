"""`spinfast publish RUN --to OWNER/NAME [...] [--yes]`: what would go to the hub; with --yes it goes."""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spinfast.errors import UserError
from spinfast.interrupt import catching_signals
from spinfast.names import HUB_ID
from spinfast.terminal import Parser
from spinfast.weights.export import TYPES

if TYPE_CHECKING:
    from spinfast.hub.parcels import Parcel
    from spinfast.hub.publication import Publication

log = logging.getLogger("spinfast")
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="spinfast publish",
        description="Of each finished stage the adapter and, of self-play, the pairs it was trained on (SPIN's "
        "format), to the hub: private repositories OWNER/NAME-iter0 and so on. It shows what would go; --yes sends it. "
        "The same command again sends only what is missing.",
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--to", required=True, metavar="OWNER/NAME", help="how the repositories' names begin")
    parser.add_argument("--yes", action="store_true", help="upload, without asking")
    parser.add_argument("--public", action="store_true", help="for everybody to see (default: private)")
    parser.add_argument("--stage", action="append", default=[], help="only this one, or best; may be given again")
    parser.add_argument("--no-data", action="store_true", help="no data sets: adapters alone")
    parser.add_argument("--rollouts", action="store_true", help="GRPO's sampled answers and rewards too")
    parser.add_argument("--expanded", action="store_true", help="beside LoRA-XS or TinyLoRA the same as plain LoRA")
    parser.add_argument("--merged", action="store_true", help="the best stage (or each --stage) as a whole model too")
    parser.add_argument("--gguf", action="append", default=[], metavar="TYPE", help=f"and as .gguf: {', '.join(TYPES)}")
    parser.add_argument("--base", metavar="OWNER/NAME", help="the base's hub id, where the run used a copy of it")
    parser.add_argument("--license", metavar="ID", help="for the cards (default: the base's, and the data's)")
    parser.add_argument("--replace", action="store_true", help="write over repositories that hold something else")
    return parser.parse(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Lay out, check, show, ask, send; UserError for what the user can mend."""
    arguments = parse(argv)
    for option in ("to", "base"):
        if (name := getattr(arguments, option)) and not HUB_ID.fullmatch(name):
            raise UserError(f"--{option} {name}: expected OWNER/NAME, as the hub names it")
    if arguments.license and not LICENCE.fullmatch(arguments.license):
        raise UserError(
            f"--license {arguments.license}: expected an id as the hub has them: apache-2.0, mit, other ..."
        )
    if unknown := [kind for kind in arguments.gguf if kind.lower() not in TYPES]:
        raise UserError(f"--gguf {unknown[0]}: expected {', '.join(TYPES)}")
    if int((version := importlib.metadata.version("huggingface_hub")).partition(".")[0]) < 1:
        raise UserError(f"publishing needs huggingface_hub 1 or newer, as transformers 5 brings it; found {version}")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # hf_xet reports on uploads

    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    from spinfast.hub.origin import check_private
    from spinfast.hub.parcels import lay_out
    from spinfast.hub.publication import Publication, Wanted
    from spinfast.hub.upload import Hub, check_names
    from spinfast.progress import heard, open_console

    hub_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    with catching_signals(), heard(open_console(sys.stderr)) as display:
        wanted = Wanted(
            to=arguments.to,
            stages=arguments.stage,
            data=not arguments.no_data,
            rollouts=arguments.rollouts,
            expanded=arguments.expanded,
            merged=arguments.merged,
            gguf=[*dict.fromkeys(kind.lower() for kind in arguments.gguf)],
            base=arguments.base,
            licence=arguments.license,
        )
        of = Publication(arguments.run, wanted)
        check_names([of.repo(*each) for each in of.parcels()])
        parcels = [lay_out(of, *each, display) for each in of.parcels()]
        for parcel in parcels:
            check_private(parcel.directory, of.run.path)
        _show(of, parcels, arguments.run, arguments.public)
        if not arguments.yes and not _agreed():
            print("nothing was uploaded; --yes uploads it")
            return 0
        hub = Hub()
        for parcel in parcels:
            done = hub.send(parcel, arguments.public, arguments.replace)
            what = f"{len(done.sent)} files sent" if done.sent else "nothing to send"
            there = f", {done.kept} were there already" if done.kept else ""
            print(f"{done.url}: {what}{there}; complete", flush=True)
    return 0


def _show(of: Publication, parcels: Sequence[Parcel], path: Path, public: bool) -> None:
    """What goes where, how large, whose it is."""
    from huggingface_hub.constants import ENDPOINT
    from rich.filesize import decimal

    from spinfast.hub.origin import in_words
    from spinfast.hub.parcels import FOLDER
    from spinfast.models import at_hub

    print(f"To {ENDPOINT}, {'for everybody to see' if public else 'as private repositories'}:")
    total = 0
    for parcel in parcels:
        print(f"{'data set' if parcel.type == 'dataset' else 'model'} {parcel.repo}")
        for name, file in parcel.files.items():
            held = next((said for known, said in parcel.holds.items() if fnmatch.fnmatch(name, known)), "of the base")
            total += (size := file.stat().st_size)
            print(f"    {name:36} {decimal(size):>9}  {held}")
    count = f"{len(parcels)} repositor{'ies' if len(parcels) > 1 else 'y'}"
    print(f"{count}, {decimal(total)}; laid out in {path / FOLDER}, to be looked at")
    licences = {f"base {of.base}": of.base_licence} | {f"data {name}": by for name, by in of.data_licences.items()}
    stated = f"; the cards say {of.wanted.licence}" if of.wanted.licence else ""
    print("licences: " + "; ".join(f"{name}: {in_words(by)}" for name, by in licences.items()) + stated)
    for name in (name for name, by in licences.items() if not by):
        log.warning("%s: its licence is not known here; make sure that you may publish what is made of it", name)
    if not at_hub(of.base):
        log.warning(
            "base %s: is no model at the hub, so nobody finds it by this name; --base OWNER/NAME names it", of.base
        )


def _agreed() -> bool:
    if not sys.stdin.isatty():
        return False
    print("Upload these? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().casefold() in ("y", "yes")
