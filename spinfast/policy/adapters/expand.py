"""`spinfast expand`: an adapter of few numbers as plain PEFT LoRA, trained weights as the whole model, both from the
base's files alone, a tensor at a time."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from spinfast.errors import UserError
from spinfast.models import ResolvedModel, resolve_model
from spinfast.policy.adapters import KINDS, compact, files, frames
from spinfast.policy.adapters.framed import check_probe, expanded
from spinfast.store.files import write_directory
from spinfast.types import Adapter

FRAMED = ("lora_xs", "tiny_lora")


def expand(directory: Path, out: Path, model: str | None = None) -> str:
    """Write it under `out` and say what it is. `model`: the base, where the adapter's own name for it leads nowhere.

    Raises UserError if it is no such adapter, of another base, or rebuilt otherwise than it was saved.
    """
    if out.exists():
        raise UserError(f"--out {out}: is there already; give another name")
    found = files.find(directory)
    if compact.kind_of(found) is None:
        raise UserError(f"adapter {directory}: expected a {' or '.join(compact.KINDS)}; LoRA is plain as it is")
    adapter = files.load(found)
    config = adapter.config
    base = resolve_model(model or config["base_model_name_or_path"], None if model else config["revision"])
    if adapter.kind == "full":
        if base.revision != config["revision"]:
            raise UserError(
                f"adapter {found}: trained on {config['base_model_name_or_path']} of revision {config['revision']}, "
                f"{base.name} is of {base.revision}; give its base by --model"
            )
        write_directory(out, partial(_whole, base.path, adapter))
        return f"{base.name} with {len(adapter.tensors)} matrices of its own"
    lora = plain(adapter, base)
    write_directory(out, lambda path: files.save(lora, path))
    return f"LoRA of rank {config['r']}, {len(lora.tensors)} matrices"


def plain(adapter: Adapter, base: ResolvedModel) -> Adapter:
    """A LoRA-XS or TinyLoRA adapter as plain LoRA, from the base's files. Raises UserError if that is another's."""
    kind, config = KINDS[adapter.kind], adapter.config
    rebuilt = frames.of_model(base.path, base.revision, config["modules"], config["r"])
    if rebuilt.base != config["base_sha256"]:
        raise UserError(f"adapter: made on other weights than those of {base.name}; give its base by --model")
    smalls = {m: kind.small(config, number)(adapter.tensors) for number, m in enumerate(config["modules"])}
    if not config.get("probe"):
        raise UserError("adapter: a checkpoint's, without the probe that tells the update; take a stage's")
    check_probe(config["probe"], frames.probe(rebuilt.by_module, smalls, config["scaling"]))
    return expanded(kind, adapter, rebuilt)


def _whole(base: Path, adapter: Adapter, out: Path) -> None:
    """The base's files with the trained weights in place of theirs, all in the dtype in which they were trained: in
    another one small updates would be rounded away. A shard of weights at a time."""
    left, dtype = dict(adapter.tensors), next(iter(adapter.tensors.values())).dtype
    for file in sorted(base.iterdir()):
        if file.suffix != ".safetensors":
            if file.is_file():
                shutil.copyfile(file, out / file.name)
            continue
        with safe_open(file, "pt") as opened:
            own, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
        for name in own.keys() & left.keys():
            trained = left.pop(name)
            if trained.shape != own[name].shape:
                raise UserError(f"{name} is {tuple(trained.shape)}, the base's {tuple(own[name].shape)}; give its base")
            own[name] = trained
        own = {name: t.to(dtype) if t.is_floating_point() else t for name, t in own.items()}
        save_file(own, out / file.name, metadata=metadata)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config |= {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in config}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if left:
        raise UserError(f"the base has no {next(iter(left))}; give the base that was trained by --model")
