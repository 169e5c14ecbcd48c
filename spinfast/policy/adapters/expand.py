"""`spinfast expand`: an adapter of few numbers as plain PEFT LoRA, made from the base's files alone."""

from __future__ import annotations

from pathlib import Path

from spinfast.errors import UserError
from spinfast.models import resolve_model
from spinfast.policy.adapters import KINDS, compact, files, frames
from spinfast.policy.adapters.framed import check_probe, expanded
from spinfast.store.files import write_directory
from spinfast.types import Adapter

FRAMED = ("lora_xs", "tiny_lora")


def expand(directory: Path, out: Path, model: str | None = None) -> Adapter:
    """Write the LoRA under `out`. `model`: the base, where it is not found by the name that the adapter gives.

    Raises UserError if it is no such adapter, of another base, or rebuilt otherwise than it was saved.
    """
    if out.exists():
        raise UserError(f"--out {out}: is there already; give another name")
    found = files.find(directory)
    if compact.kind_of(found) not in FRAMED:
        raise UserError(f"adapter {directory}: expected a {' or '.join(FRAMED)}; LoRA is plain as it is")
    adapter = files.load(found)
    config, kind = adapter.config, KINDS[adapter.kind]
    base = resolve_model(model or config["base_model_name_or_path"], None if model else config["revision"])
    rebuilt = frames.of_model(base.path, base.revision, config["modules"], config["r"])
    if rebuilt.base != config["base_sha256"]:
        raise UserError(f"adapter {found}: made on other weights than those of {base.name}; give the base by --model")
    smalls = {m: kind.small(config, number)(adapter.tensors) for number, m in enumerate(config["modules"])}
    check_probe(config["probe"], frames.probe(rebuilt.by_module, smalls))
    lora = expanded(kind, adapter, rebuilt)
    write_directory(out, lambda path: files.save(lora, path))
    return lora
