"""`spinfast export gguf MODEL | RUN | ADAPTER [--type] [--out]`: one file for llama.cpp, and an Ollama Modelfile."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spinfast.errors import UserError
from spinfast.interrupt import catching_signals
from spinfast.model_check import end_ids
from spinfast.models import gguf_file, load_tokenizer, resolve_model
from spinfast.store import files
from spinfast.terminal import Parser

if TYPE_CHECKING:
    from spinfast.weights.gguf import Source

MARK = "spinfast export gguf"
TYPES = (
    *("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0"),
    "q3_k_m",
)
FAMILIES = {  # before the role, after it, after the text
    "ChatML": ("<|im_start|>", "\n", "<|im_end|>\n"),
    "Llama 3": ("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="spinfast export",
        description="A model, with what was trained of it, as one .gguf file for llama.cpp, Ollama and phones. It is "
        "read back and compared before it gets its name. Beside it goes an Ollama Modelfile.",
    )
    parser.add_argument("format", choices=["gguf"], metavar="gguf")
    parser.add_argument("target", metavar="MODEL | RUN | ADAPTER", help="hub id, directory, .gguf; of a run its best")
    parser.add_argument("--type", metavar="TYPE", help=f"{', '.join(TYPES)} (default: q8_0; of a LoRA alone f32)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: NAME-TYPE.gguf")
    parser.add_argument("--adapter-only", action="store_true", help="the LoRA alone, for llama.cpp's --lora")
    parser.add_argument("--model", help="the adapter's base, where its own name for it does not lead there")
    parser.add_argument("--revision", help="commit of a hub model")
    return parser.parse(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Resolve, write, verify, say; UserError for what the user can mend."""
    arguments = parse(argv)
    if importlib.util.find_spec("gguf") is None:
        raise UserError("writing a .gguf file needs the gguf package: pip install gguf")
    kind = (arguments.type or ("f32" if arguments.adapter_only else "q8_0")).lower()
    if kind not in TYPES:
        raise UserError(
            f"--type {kind}: expected {', '.join(TYPES)}; of llama.cpp's others: export f16, then "
            f"llama-quantize FILE.gguf OUT.gguf {kind.upper()}"
        )
    if "_k" in kind and importlib.util.find_spec("libgguf") is None:
        raise UserError(
            f"--type {kind}: K-quants need the libgguf package: pip install libgguf; or export f16, then "
            f"llama-quantize FILE.gguf OUT.gguf {kind.upper()}"
        )
    name = files.expanded(arguments.target).absolute().name.removesuffix(".gguf")
    out = arguments.out or Path(f"{name}-{'lora-' if arguments.adapter_only else ''}{kind}.gguf")
    modelfile = out.with_suffix(".Modelfile")
    if out.suffix != ".gguf" or out.exists():
        raise UserError(f"--out {out}: {'is there already' if out.exists() else 'expected a name ending in .gguf'}")
    if modelfile.exists() and not modelfile.read_bytes().startswith(f"# {MARK}".encode()):
        raise UserError(f"{modelfile}: is there and is not of {MARK}; give another name by --out")

    from spinfast.progress import heard, open_console
    from spinfast.weights import gguf

    with catching_signals(), heard(open_console(sys.stderr)) as display:
        source = resolve(arguments.target, name, arguments.model, arguments.revision, arguments.adapter_only)
        if arguments.adapter_only and source.lora is None:
            raise UserError(f"--adapter-only: {arguments.target} holds no LoRA; leave it out")
        if arguments.adapter_only and kind not in gguf.LORA_TYPES:
            raise UserError(f"--type {kind}: a LoRA is {', '.join(gguf.LORA_TYPES)}")
        out.parent.mkdir(parents=True, exist_ok=True)
        if arguments.adapter_only:
            apart = gguf.write_lora(source, kind, out)
        else:
            text = ollama(source.path, out.name)
            apart = gguf.write_model(source, kind, out, display, lambda: files.write_text(modelfile, text))
    size, exact = out.stat().st_size / 1e6, "exact" if not apart else f"{apart:.2g} from the model's, relative"
    print(f"{out}: {size:.1f} MB, {kind.upper()}, verified: read back, its numbers are {exact}")
    if arguments.adapter_only:
        print(f"llama-cli -m BASE.gguf --lora {shlex.quote(str(out))}")
    else:
        print(f"{modelfile}: for Ollama, ollama create {_ollama_name(out)} -f {shlex.quote(str(modelfile))}")
    return 0


def _ollama_name(path: Path) -> str:
    """What Ollama takes for a model's name: small letters, digits and . _ -"""
    return re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower()).strip("-._") or "model"


def resolve(
    target: str, name: str, model: str | None = None, revision: str | None = None, alone: bool = False
) -> Source:
    """What a word of the command line means: a model, a finished run's best adapter, or an adapter, on its base.

    `alone`: what was trained will not be added to the base's weights.
    """
    from spinfast.opening import into_whole_weights
    from spinfast.policy.adapters import files as adapters
    from spinfast.policy.adapters.expand import as_lora
    from spinfast.weights.gguf import Source

    directory = files.expanded(target)
    if not directory.is_dir() or (directory / "config.json").exists():
        if model:
            raise UserError(f"--model {model}: is the base of an adapter; {target} is a model itself")
        found = resolve_model(target, revision)
        return Source(found.path, Path(found.name).name, found.architecture, gguf=gguf_file(target))
    place = adapters.find(directory)
    adapter = adapters.load(place)
    base_name = model or adapter.config.get("base_model_name_or_path")
    if not base_name:
        raise UserError(f"adapter {place}: names no base; give it by --model")
    found = resolve_model(base_name, revision or (None if model else adapter.config.get("revision")))
    adapters.load(place, found.revision, name=found.name)
    if not alone:
        into_whole_weights(place)
    trained = {"own": adapter.tensors} if adapter.kind == "full" else {}
    if not trained:
        trained["lora"] = as_lora(adapter, found)
    return Source(found.path, name, found.architecture, gguf=gguf_file(base_name), **trained)


def ollama(path: Path, file: str) -> str:
    """The Modelfile: which file, the chat template in Ollama's language where it is of a known family, what ends.

    A family is known by what the template renders, not by how it is written; a system prompt that the template brings
    by itself is said by SYSTEM.
    """
    tokenizer = load_tokenizer(path)
    ends = [*tokenizer.convert_ids_to_tokens([*end_ids(path)]), tokenizer.eos_token]
    lines = [f"# {MARK}", f"FROM ./{file}"]
    for family, (before, after, end) in FAMILIES.items():
        if (system := _system(tokenizer, before, after, end)) is None:
            continue
        lines += [
            f"# {family}, as the model's own chat template renders it",
            f'TEMPLATE """{{{{- range .Messages }}}}{before}{{{{ .Role }}}}{after}{{{{ .Content }}}}{end}{{{{ end }}}}'
            f'{before}assistant{after}"""',
        ]
        lines += [f'SYSTEM """{system}"""'] * bool(system)
        ends.append(end.strip())
        break
    else:
        lines.append("# no TEMPLATE: the model's chat template is of no family known here; Ollama looks into the file")
    lines += [f'PARAMETER stop "{end}"' for end in dict.fromkeys(filter(None, ends))]
    return "\n".join(lines) + "\n"


def _system(tokenizer, before: str, after: str, end: str) -> str | None:
    """The system prompt that the template brings by itself, "" for none; None if it renders no such turns."""
    if not tokenizer.chat_template:
        return None

    def turn(role: str, text: str) -> str:
        return f"{before}{role}{after}{text}{end}"

    talk = [{"role": role, "content": f"@{role}"} for role in ("user", "assistant", "user")]
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template may refuse anything
        return None
    turns = "".join(turn(each["role"], each["content"]) for each in talk) + f"{before}assistant{after}"
    given = re.escape(turn("system", "\0")).replace("\0", "(.*?)")
    found = re.fullmatch(f"(?:{re.escape(tokenizer.bos_token or '')})?(?:{given})?{re.escape(turns)}", text, re.DOTALL)
    return None if found is None else found[1] or ""
