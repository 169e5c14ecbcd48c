"""Adapters outside a model: LoRA in PEFT's directory layout, the others in compact.py's, fingerprints, and stacking.

`load` reads what PEFT writes, by an allow-list of the keys of adapter_config.json: what it takes equals PEFT's own
log-probs (tests/test_adapters.py), all else is refused by name. An `Adapter` may have patterns of ranks and alphas and
rank-stabilised scaling, as PEFT has them; `uniform` is the same with one rank and one scaling, for who knows no other.

Stacking writes the sum of several adapters as one: A's rows and B's columns are concatenated, the rank is the sum
and alpha grows with it, so that the scaling stays. Merged rounds (adapter.init: merge) are saved that way, which keeps
every saved adapter relative to the original base.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from spinfast.errors import UserError
from spinfast.policy.adapters import compact
from spinfast.types import Adapter

log = logging.getLogger("spinfast")
CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))")


def save(adapter: Adapter, directory: Path) -> None:
    """Write PEFT's two files, or those of another kind; the directory is created."""
    directory.mkdir(parents=True, exist_ok=True)
    if adapter.kind != "lora":
        return compact.save(adapter, directory)
    save_file(
        {name: tensor.contiguous() for name, tensor in adapter.tensors.items()},
        directory / TENSOR_FILE,
        metadata={"format": "pt"},
    )
    (directory / CONFIG_FILE).write_text(json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")


def load(directory: Path, base: str | None = None, finite: bool = True, name: str | None = None) -> Adapter:
    """Read PEFT's two files, or another kind's.

    Raises UserError for whatever is missing, torn, not finite, of another base, or not plain LoRA to PEFT. `base` is
    the revision of the model it is meant for: a hub commit or a sha256, as its config records it; with `name` another
    base by name is told where no revision can decide.
    """
    if compact.kind_of(directory):
        adapter = compact.load(directory)
        if "base_sha256" not in adapter.config:  # else the weights themselves decide, when it is loaded
            check_base(directory, adapter.config, base, name)
        return _finite(adapter, directory) if finite else adapter
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(directory / TENSOR_FILE)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise UserError(
            f"adapter {directory}: cannot be read ({' '.join(str(error).split())[:200]}); expected {CONFIG_FILE} and "
            f"{TENSOR_FILE}; pickled adapters (.bin) are never loaded"
        ) from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"adapter {directory}: expected peft_type LORA in {CONFIG_FILE}, got {found!r}")
    for key, (holds, expected) in FIELDS.items():
        if not holds(config.get(key)):
            raise UserError(f"adapter {directory}: {key} in {CONFIG_FILE} is {config.get(key)!r}, expected {expected}")
    for key, value in config.items():
        if value and key not in FIELDS and key not in NO_MATTER and value != DEFAULTS.get(key):
            raise UserError(
                f"adapter {directory}: {key} in {CONFIG_FILE} is {value!r}, which the engine does not compute; "
                "expected its default"
            )
    try:
        _check_tensors(config, tensors)
    except (ValueError, re.error) as error:
        raise UserError(f"adapter {directory}: {error}") from None
    adapter = Adapter(config, tensors)
    if finite:
        _finite(adapter, directory)
    check_base(directory, config, base, name)
    return adapter


def _finite(adapter: Adapter, directory: Path) -> Adapter:
    if wrong := not_finite(adapter.tensors):
        raise UserError(f"adapter {directory}: {wrong} is not finite; its training diverged, use an earlier one")
    return adapter


def check_base(directory: Path, config: dict, base: str | None, name: str | None) -> None:
    """Raises UserError where an adapter's config tells of another base; warns where its name alone does."""
    made_on, made_by_name = (
        config.get("revision"),
        str(config.get("base_model_name_or_path") or "a base without a name"),
    )
    known = base is not None and isinstance(made_on, str) and len(made_on) == len(base)
    if known and made_on != base:
        raise UserError(
            f"adapter {directory}: made on base {made_by_name} of revision {made_on[:12]}, this base has {base[:12]}; "
            "use the base that it was trained on"
        )
    if name and not known and Path(made_by_name).name.casefold() != Path(name).name.casefold():
        log.warning(
            "adapter %s: made on %s, used on %s; nothing in it says they are the same", directory, made_by_name, name
        )


def _check_tensors(config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Raises ValueError where PEFT would see another adapter."""
    targets = SimpleNamespace(**{key: config.get(key) for key in SELECTING})
    everything = config["target_modules"] == "all-linear"
    if not tensors:
        raise ValueError("it holds no LoRA matrix")
    for name, tensor in tensors.items():
        found = MATRIX.fullmatch(name)
        if not found or not tensor.is_floating_point() or tensor.ndim != 2:
            raise ValueError(f"{name} is no LoRA matrix; only plain LoRA is supported")
        module = found[1]
        if module.endswith("lm_head"):
            raise ValueError("lm_head has an adapter; the engine's head takes none")
        if not (everything or check_target_module_exists(targets, module)):
            raise ValueError(f"{module} has tensors, but {CONFIG_FILE} does not target it; PEFT would leave them out")
        if twin(name) not in tensors:
            raise ValueError(f"{name} is there, {twin(name)} is not; only both are a LoRA")
        rank, _ = scale(config, name)
        if tensor.shape[rank_axis(name)] != rank:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{name} is {dtype} {tuple(tensor.shape)}, r is {rank}; expected LoRA matrices of rank r")


def scale(config: dict, name: str) -> tuple[int, float]:
    """Rank and scaling that PEFT gives the module of a tensor of this name."""
    module = MATRIX.fullmatch(name)[1]
    rank, alpha = (
        (config.get(pattern) or {}).get(get_pattern_key((config.get(pattern) or {}).keys(), module), config[key])
        for pattern, key in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def largest_rank(adapter: Adapter) -> int:
    """Of any module of a LoRA."""
    return max(scale(adapter.config, name)[0] for name in adapter.tensors)


def uniform(adapter: Adapter) -> Adapter:
    """The same with one rank and one scaling; the very adapter where it has no other."""
    config = adapter.config
    if adapter.kind != "lora" or not any(map(config.get, SCALING[2:])):
        return adapter
    r = largest_rank(adapter)
    alpha = config["lora_alpha"] * (math.sqrt(r) if config.get("use_rslora") else 1)
    return fitted(adapter, {"r": r, "lora_alpha": alpha})


def settings(adapter: Adapter) -> dict:
    """The config's adapter section that an adapter fits: the modules by their full names."""
    if adapter.kind != "lora":
        return compact.settings(adapter)
    modules = sorted({MATRIX.fullmatch(name)[1] for name in adapter.tensors})
    more = {key: adapter.config[key] for key in SCALING[2:] if adapter.config.get(key)}
    return {"r": adapter.config["r"], "alpha": adapter.config["lora_alpha"], **more, "target_modules": modules}


def rank_axis(name: str) -> int:
    """Which axis of a tensor is the rank: A is (r, in), B (out, r)."""
    return int("lora_B." in name or "lora_embedding_B" in name)


def linear(name: str) -> bool:
    """Whether what is added is linear in the tensor of this name while the others stand: B, R, v, CALM's W_O; not A."""
    return bool(rank_axis(name)) or name == "v" or name.endswith((".R", ".o"))


def idle(adapter: Adapter) -> bool:
    """Whether it changes nothing: every B A is zero to fp32's rounding, of which |B A|^2 = tr(B'B AA') tells.

    Of whole weights that cannot be told.
    """
    if adapter.kind != "lora":
        return adapter.kind != "full" and not any(t.any() for name, t in adapter.tensors.items() if linear(name))
    for name, a in adapter.tensors.items():
        if rank_axis(name) == 0:
            grams_rr = [side.double() @ side.double().t() for side in (a, adapter.tensors[twin(name)].t())]
            if (grams_rr[0] * grams_rr[1]).sum() > ROUNDING**2 * grams_rr[0].trace() * grams_rr[1].trace():
                return False
    return True


def not_finite(tensors: dict[str, torch.Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or inf."""
    return next((name for name, tensor in tensors.items() if not tensor.float().isfinite().all()), None)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e6


def _is_rank(value) -> bool:
    return isinstance(value, int) and _is_number(value)


def _pattern_of(holds):
    return lambda v: not v or (isinstance(v, dict) and all(map(holds, v.values())))


def _are_names(value) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


INITS = (True, False, None, "gaussian", "orthogonal", "eva")  # those that leave the base as it is
FIELDS = {  # of adapter_config.json -> (what it must be, in words)
    "r": (_is_rank, "a positive integer below a million"),
    "lora_alpha": (_is_number, "a positive number below a million"),
    "rank_pattern": (_pattern_of(_is_rank), "module names with a positive integer each"),
    "alpha_pattern": (_pattern_of(_is_number), "module names with a positive number each"),
    "target_modules": (lambda v: bool(v) and _are_names(v), "module names"),
    "exclude_modules": (lambda v: not v or _are_names(v), "module names"),
    "layers_pattern": (lambda v: not v or _are_names(v), "module names"),
    "layers_to_transform": (
        lambda v: v is None or all(type(i) is int for i in (v if isinstance(v, list) else [v])),
        "numbers of layers",
    ),
    "use_rslora": (lambda v: v in (True, False, None), "true or false"),
    "init_lora_weights": (
        lambda v: isinstance(v, (bool, str, type(None))) and v in INITS,
        "true, false, gaussian, orthogonal or eva; the others change the base: convert it to plain LoRA, by PEFT's "
        "save_pretrained(path_initial_model_for_weight_conversion=...)",
    ),
    "use_dora": (lambda v: not v, "false; DoRA is not supported"),
    "bias": (lambda v: v in (None, "none"), "none; trained biases are not supported"),
    "modules_to_save": (lambda v: not v, "none; only LoRA tensors are supported"),
    "task_type": (lambda v: v in (None, "CAUSAL_LM"), "CAUSAL_LM"),
}
SELECTING = (
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "target_parameters"),
)
SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
ROUNDING = 1e-6  # of a product of two fp32 matrices, relative to their sizes
NO_MATTER = {  # whatever their value: where it comes from, how it was trained, what a dense linear layer does not read
    *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("lora_dropout", "eva_config", "runtime_config", "fan_in_fan_out", "megatron_core", "qalora_group_size"),
}
DEFAULTS = {field.name: field.default for field in fields(LoraConfig) if field.default is not MISSING}


def fingerprint(adapter: Adapter) -> str:
    """sha256 over scaling, names and bytes: equal adapters, equal hex."""
    scaling = [f"{key} {adapter.config[key]}" for key in SCALING[2:] if adapter.config.get(key)]
    digest = hashlib.sha256(
        "/".join([f"{adapter.config['r']}/{adapter.config['lora_alpha']}", *scaling]).encode()
        if adapter.kind == "lora"
        else json.dumps(compact.settings(adapter), sort_keys=True).encode()
    )
    for name in sorted(adapter.tensors):
        tensor = adapter.tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def stack(adapters: list[Adapter]) -> Adapter:
    """One adapter that equals the sum of `adapters`, which share ranks and scalings."""
    first, count = adapters[0], len(adapters)
    if count == 1:
        return first
    tensors = {name: torch.cat([a.tensors[name] for a in adapters], dim=rank_axis(name)) for name in first.tensors}
    return Adapter(first.config | times(first.config, count), tensors)


def times(config: dict, count: int) -> dict:
    """`count` times the ranks, the scalings as they are."""
    more = math.sqrt(count) if config.get("use_rslora") else count
    ranks = {key: rank * count for key, rank in (config.get("rank_pattern") or {}).items()}
    alphas = {key: alpha * more for key, alpha in (config.get("alpha_pattern") or {}).items()}
    grown = {"r": config["r"] * count, "lora_alpha": config["lora_alpha"] * more}
    return grown | {"rank_pattern": ranks, "alpha_pattern": alphas}


def fitted(adapter: Adapter, config: dict) -> Adapter:
    """One of the ranks and scalings of `config` that adds the same to the weights: zeros beside A and B, B scaled."""
    tensors = {}
    for name, tensor in adapter.tensors.items():
        (own, scaling), (rank, wanted) = (scale(c, name) for c in (adapter.config, config))
        if own > rank:
            raise UserError(f"adapter: rank {own} exceeds the policy's {rank} in {MATRIX.fullmatch(name)[1]}")
        tensors[name] = _fit(name, tensor, rank, scaling / wanted)
    none = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    return Adapter(adapter.config | none | {key: config[key] for key in SCALING if key in config}, tensors)


def _fit(name: str, tensor: torch.Tensor, r: int, factor: float) -> torch.Tensor:
    """A matrix of rank r: zeros beside it, B times the factor; the very tensor where nothing is to do."""
    axis = rank_axis(name)
    if axis == 1 and factor != 1:
        tensor = tensor.float() * factor
    missing = r - tensor.shape[axis]
    return F.pad(tensor, (0, 0, 0, missing) if axis == 0 else (0, missing)) if missing else tensor


def updates(adapter: Adapter) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """(name of the base's weight, (B, A) in fp32): what a LoRA adds to the weight is B A, its scaling is in B.

    Ranks that add nothing, as those beside a lower rank of a pattern, are left out.
    """
    for name, tensor in adapter.tensors.items():
        if rank_axis(name) == 0:
            A, B = tensor.float(), adapter.tensors[twin(name)].float() * scale(adapter.config, name)[1]
            weight = f"{MATRIX.fullmatch(name)[1]}.weight"
            used = A.any(1) & B.any(0)
            A, B = A[used], B[:, used]
            yield weight, (A.T, B.T) if "lora_embedding" in name else (B, A)


def find(directory: Path) -> Path:
    """The adapter that a directory means: its own, or that of a finished run's best stage."""
    if not directory.is_dir():
        raise UserError(f"adapter {directory}: no such directory; expected an adapter's, or a finished run's")
    if (directory / CONFIG_FILE).exists() or compact.kind_of(directory):
        return directory
    if not (directory / "best.json").exists():
        if (directory / "config.yaml").exists():
            raise UserError(f"run {directory}: not finished, so no stage is its best; name the adapter of one of them")
        return directory
    try:
        return directory / json.loads((directory / "best.json").read_text())["adapter"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{directory / 'best.json'}: damaged; name the adapter of one of the run's stages") from None


def grown(start: Adapter, own: Adapter) -> Adapter:
    """`start` in the place of `own`, which adds nothing: it adds what `start` does, at own's ranks and scalings.

    Ranks and modules that `start` lacks stay as they are in `own`, which changes nothing and can be trained; zeros in
    both A and B never could. Where only all of own's ranks together add nothing (orthogonal), its B there is zero.
    Raises UserError if `start` has what `own` lacks.
    """
    wide = fitted(start, own.config).tensors
    if misfits := [name for name, t in wide.items() if name not in own.tensors or own.tensors[name].shape != t.shape]:
        raise UserError(
            f"adapter: {len(misfits)} of its tensors have no place in the run's adapter, first {misfits[0]}; give "
            "adapter.target_modules what it was trained on, and check model.name"
        )
    tensors = dict(own.tensors)
    for name in wide:
        if rank_axis(name) == 0:
            b = twin(name)
            used_r = wide[name].any(1) | wide[b].any(0)
            adds_r = own.tensors[name].any(1) & own.tensors[b].any(0)
            tensors[name] = torch.where(used_r[:, None], wide[name].float(), own.tensors[name])
            tensors[b] = torch.where(used_r, wide[b].float(), own.tensors[b].masked_fill(adds_r, 0))
    return Adapter(own.config, tensors)


def twin(name: str) -> str:
    """B's name for A's, and A's for B's."""
    return re.sub(r"(lora_(?:embedding_)?)([AB])", lambda m: m[1] + ("B" if m[2] == "A" else "A"), name)


def unstack(adapter: Adapter, config: dict) -> list[Adapter]:
    """The parts with the ranks of `config` that `stack` joined, oldest first."""
    r, own = adapter.config["r"], config["r"]
    if r % own:
        raise UserError(f"adapter of rank {r}: expected a multiple of adapter.r = {own}")
    shrunk = adapter.config | {key: config[key] for key in SCALING}
    parts = {name: tensor.chunk(r // own, dim=rank_axis(name)) for name, tensor in adapter.tensors.items()}
    return [Adapter(shrunk, {name: split[i].contiguous() for name, split in parts.items()}) for i in range(r // own)]
