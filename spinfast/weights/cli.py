"""`spinfast spectrum MODEL [--top 25] [--from FILE] [--out FILE] [--json]`: which matrices are worth training whole."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from spinfast.errors import UserError
from spinfast.interrupt import catching_signals
from spinfast.models import resolve_model
from spinfast.store import files
from spinfast.terminal import Parser
from spinfast.weights import spectrum

TOP = 25.0  # per cent
MARK = "spinfast spectrum"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog=MARK,
        description="Which weight matrices are worth training whole: of each layer type those with the most signal for "
        "their noise. Writes the list that adapter.target_modules takes. Scores are kept, another --top is instant.",
    )
    parser.add_argument("model", metavar="MODEL", help="hub id, directory or .gguf, as in a config's model.name")
    parser.add_argument("--revision", help="commit of a hub model")
    parser.add_argument("--top", type=float, metavar="PERCENT", help=f"of each layer type (default: {TOP:g})")
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="no scan: Spectrum's results (.json), or a list, also in an Axolotl config (.yaml); held against MODEL",
    )
    parser.add_argument("--embeddings", action="store_true", help="choose embeddings and head too")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the list (default: NAME-spectrum-{TOP:g}.yaml)")
    parser.add_argument("--json", action="store_true", help="print scores in Spectrum's form instead of the table")
    return parser.parse(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Scan or read, choose, print, write the list; UserError for what the user can mend."""
    arguments = parse(argv)
    source = arguments.source
    listed = source is not None and source.suffix != ".json"
    top = TOP if arguments.top is None and not listed else arguments.top
    if top is not None:
        spectrum.check_top(top)
    name = files.expanded(arguments.model).absolute().name.removesuffix(".gguf")
    out = arguments.out or Path(f"{name}-spectrum{'' if top is None else f'-{top:g}'}.yaml")
    if out.exists() and not (out.is_file() and out.read_bytes().startswith(f"# {MARK}".encode())):
        raise UserError(f"--out {out}: is there and is no list of {MARK}; name another file")
    patterns = spectrum.read_list(source, top) if listed else ()
    scores = spectrum.read_scores(source) if source and not listed else {}

    from spinfast.progress import heard, open_console, show

    with catching_signals(), heard(open_console(sys.stderr)) as display:
        model = resolve_model(arguments.model, arguments.revision)
        shapes = spectrum.shapes_of(model.path)
        if not listed:
            scores = scores or spectrum.scan(model.path, display)
            patterns = [module for modules in spectrum.select(scores, top).values() for module in modules]
        asked = [*spectrum.EMBEDDINGS, *patterns] if arguments.embeddings else patterns
        names = spectrum.matched(shapes, asked, arguments.embeddings)
    chosen = _by_type(names, patterns if scores else ())
    note = f"{MARK}: {source or f'the best {top:g} % of each layer type'}, for {model.name} at {model.revision}"
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(out, spectrum.as_yaml(chosen, note, arguments.embeddings))
    if arguments.json:
        print(json.dumps(_results(scores, chosen), indent=4))
    else:
        headings = ("type", "layers", "chosen", "scores", "left out")
        show(open_console(), None, headings, _rows(shapes, scores, chosen), keys=2)
        print(f"{out}: {len(names)} matrices; to train them:")
        print(f"adapter: {{kind: full, target_modules: {out}}}")
    return 0


def _by_type(names: Iterable[str], order: Sequence[str]) -> dict[str, list[str]]:
    """The modules of the decoder's layers by type, in `order` where there is one."""
    modules = [name.removesuffix(".weight") for name in names if name not in (spectrum.HEAD, spectrum.TABLE)]
    rank = {module: place for place, module in enumerate(order)}
    modules.sort(key=lambda module: (spectrum.layer_type(module), rank.get(module, 0)))
    return {kind: list(of) for kind, of in groupby(modules, spectrum.layer_type)}


def _results(scores: spectrum.Scores, chosen: Mapping[str, Sequence[str]]) -> dict[str, dict]:
    """Spectrum's flat form, and of each module whether it is chosen; of a list the chosen ones, without a score."""
    modules = {module: {"type": kind} for kind, of in chosen.items() for module in of}
    if not scores:
        return {module: given | {"chosen": True} for module, given in modules.items()}
    return {
        module: {"snr": score.score, "type": score.type, "chosen": module in modules}
        for module, score in scores.items()
    }


def _rows(
    shapes: Mapping[str, Sequence[int]], scores: spectrum.Scores, chosen: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, ...]]:
    """Per type of matrix: its name, the chosen layers, how many of how many, scores of the chosen and of the others."""
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    for kind, modules in sorted(_by_type(matrices, ()).items()):
        best = chosen.get(kind, ())
        others = [module for module in modules if module not in best]
        layers = _ranges(sorted(next(int(part) for part in module.split(".") if part.isdigit()) for module in best))
        yield kind, layers, f"{len(best)} of {len(modules)}", _span(scores, best), _span(scores, others)


def _ranges(numbers: Sequence[int]) -> str:
    """0-3, 7"""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _span(scores: spectrum.Scores, modules: Iterable[str]) -> str:
    """The least and the largest score; nothing where there are none."""
    found = sorted(scores[module].score for module in modules if module in scores)
    return "-".join(f"{score:.3f}" if score < 1 else f"{score:.3g}" for score in (found[0], found[-1])) if found else ""
