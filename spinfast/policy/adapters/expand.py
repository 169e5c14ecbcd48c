"""`spinfast expand`: an adapter of few numbers as plain PEFT LoRA, from the base's files alone."""

from __future__ import annotations

from pathlib import Path

from spinfast.errors import UserError
from spinfast.models import ResolvedModel, resolve_model
from spinfast.policy.adapters import KINDS, compact, files, frames
from spinfast.policy.adapters.framed import check_probe, expanded
from spinfast.store.files import write_directory
from spinfast.types import Adapter


def expand(directory: Path, out: Path, model: str | None = None) -> str:
    """Write it under `out` and say what it is. `model`: the base, where the adapter's own name for it leads nowhere.

    Raises UserError if it is no such adapter, of another base, or rebuilt otherwise than it was saved.
    """
    if out.exists():
        raise UserError(f"--out {out}: is there already; give another name")
    found = files.find(directory)
    if not (found / files.CONFIG_FILE).exists() and compact.kind_of(found) is None:
        raise UserError(f"{directory}: expected an adapter, or a finished run with best.json")
    if (kind := compact.kind_of(found)) in (None, "full"):
        hint = (
            f"the whole model of trained weights: spinfast merge {directory} --out DIR" if kind else "it is plain LoRA"
        )
        raise UserError(f"adapter {directory}: expected lora_xs or tiny_lora, got {kind or 'another'}; {hint}")
    adapter = files.load(found)
    config = adapter.config
    lora = as_lora(
        adapter, resolve_model(model or config["base_model_name_or_path"], None if model else config["revision"])
    )
    write_directory(out, lambda path: files.save(lora, path))
    return f"LoRA of rank {config['r']}, {len(lora.tensors)} matrices"


def as_lora(adapter: Adapter, base: ResolvedModel) -> Adapter:
    """The same update as plain LoRA. Raises UserError for another base, or one that is rebuilt otherwise here."""
    if adapter.kind == "lora":
        return adapter
    if adapter.kind == "calm":
        raise UserError(
            f"adapter: calm joins {base.name} with {adapter.config['augmenting']} while both run, so no update of one "
            "model's weights is the same: it cannot be merged, expanded, exported or opened beside others"
        )
    kind, config = KINDS[adapter.kind], adapter.config
    rebuilt = frames.of_model(base.path, base.revision, config["modules"], config["r"])
    if rebuilt.base != config["base_sha256"]:
        raise UserError(f"adapter: made on other weights than those of {base.name}; give its base by --model")
    smalls = kind.smalls(config, adapter.tensors)
    if not config.get("probe"):
        raise UserError("adapter: a checkpoint's, without the probe that tells its update; take a stage's")
    check_probe(config["probe"], frames.probe(rebuilt.by_module, smalls, config["scaling"]))
    return expanded(config, smalls, rebuilt)
