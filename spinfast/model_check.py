"""Is this a model that the engine computes as transformers does? Asked of config.json and of the weights' headers.

An allow-list: what it takes is proven equal to transformers' log-probs (tests/test_models.py), all else is refused by
name before a weight is loaded.
"""

from __future__ import annotations

import json
import logging
import re
from contextlib import ExitStack
from pathlib import Path

from spinfast.errors import UserError

log = logging.getLogger(__name__)

ARCHITECTURES = ("Qwen2ForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM")
DTYPES = ("F32", "F16", "BF16")  # of weights, as safetensors names them
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the others go by a sequence's length; a packed row has many
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
RECOMPUTED = re.compile(r".*\.rotary_emb\.inv_freq")  # weights that transformers makes itself
HARMLESS = {  # keys of config.json that change no log-prob, or that transformers reads under another name
    *("auto_map", "rope_theta", "rope_scaling", "torch_dtype", "_attn_implementation_autoset", "tokenizer_class"),
    *("is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version", "pretraining_tp"),
    *("is_causal", "head_dim", "use_sliding_window", "max_window_layers", "sliding_window"),
}


def check_model(path: Path) -> str:
    """The architecture's name, after checking config and weights by their headers: no weight is loaded.

    Raises UserError for what the engine would compute otherwise than transformers does.
    """
    raw = read_json(path / "config.json")
    architecture = (raw.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise UserError(f"model {path}: architecture {architecture} is not supported; use {', '.join(ARCHITECTURES)}")
    if quantised := {"quantization_config", "compression_config", "quantization"} & raw.keys():
        raise UserError(
            f"model {path}: the weights are quantised ({quantised.pop()} in config.json); "
            "use the unquantised checkpoint"
        )
    config, expected = _described(path)
    _check_config(path, raw, config, architecture)
    end_ids(path)
    _check_weights(path, config, expected)
    return architecture


def end_ids(path: Path) -> tuple[int, ...]:
    """The tokens that end an answer by generation_config.json or, where it names none, by config.json."""
    config, file = read_json(path / "config.json"), path / "generation_config.json"
    rows, given, where = config.get("vocab_size", 0), config.get("eos_token_id"), "config.json"
    if file.exists() and "eos_token_id" in (generation := read_json(file)):
        given, where = generation["eos_token_id"], file.name
    ends = [] if given is None else given if isinstance(given, list) else [given]
    for end in ends:
        if type(end) is not int or not 0 <= end < rows:
            raise UserError(
                f"model {path}: eos_token_id in {where} is {given!r}, expected tokens below vocab_size = {rows}"
            )
    return tuple(ends)


def window(shape) -> int | None:
    """Tokens that a token sees of those before it, itself included, in the layers that see fewest; None: all.

    The engine's attention knows no window: it computes what transformers does for sequences that are no longer. Where
    a config has a window and no kinds of layers, transformers' cache has it in all of them, a Llama's too.
    """
    size, kinds = getattr(shape, "sliding_window", None), getattr(shape, "layer_types", None)
    windowed = any(kind != "full_attention" for kind in kinds) if kinds else size is not None
    return (size or 0) if windowed else None


def _counts(value) -> bool:
    return type(value) is int and value > 0


def _described(path: Path):
    """(transformers' config, the shapes of the weights by name)"""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # any field of config.json may be missing or absurd
        raise UserError(f"model {path}: config.json describes no model: {first_line(error)}") from error
    return config, {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_config(path: Path, raw: dict, config, architecture: str) -> None:
    """Only what the engine is proven to compute as transformers does (tests/test_models.py)."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = {*map(str, getattr(config, "layer_types", None) or ())}
    for key, found, holds, expected in (
        ("model_type", config.model_type, f"{config.model_type}forcausallm" == architecture.lower(), architecture),
        ("hidden_act", config.hidden_act, config.hidden_act == "silu", "silu"),
        ("rope_type", kind := rope.get("rope_type", "default"), kind in ROPE_TYPES, "one of " + ", ".join(ROPE_TYPES)),
        ("partial_rotary_factor", part := rope.get("partial_rotary_factor", 1), part == 1, "1"),
        ("layer_types", sorted(kinds), kinds <= {"full_attention", "sliding_attention"}, "full or sliding attention"),
        ("sliding_window", size := getattr(config, "sliding_window", None), size is None or _counts(size), "a length"),
        ("is_causal", raw.get("is_causal"), raw.get("is_causal", True) is True, "true"),
        (
            "num_key_value_heads",
            heads[1],
            _counts(heads[1]) and heads[0] % heads[1] == 0,
            f"a divisor of num_attention_heads = {heads[0]}",
        ),
        ("head_dim", head_dim, head_dim % 2 == 0, "an even number"),
    ):
        if not holds:
            raise UserError(f"model {path}: {key} in config.json is {found!r}, expected {expected}; use another model")
    if config.attention_dropout:
        log.warning("model %s: attention_dropout %s is left out", path, config.attention_dropout)
    known = {*type(config)().to_dict(), *HARMLESS}
    if strangers := sorted(key for key, value in raw.items() if value and key not in known and not key.startswith("_")):
        log.warning(
            "model %s: %s in config.json has no effect on a %s, as in transformers",
            path,
            ", ".join(strangers),
            architecture,
        )


def _check_weights(path: Path, config, expected: dict[str, list[int]]) -> None:
    with ExitStack() as stack:
        found = open_weights(path, stack)
        if config.tie_word_embeddings:
            del expected[HEAD]
            if HEAD in found and TABLE in found and not _equal(found[HEAD], found[TABLE]):
                raise UserError(
                    f"model {path}: tie_word_embeddings is true, but {HEAD} is not {TABLE}; set it to false in "
                    f"config.json if the head is meant, or take {HEAD} out of the file"
                )
        missing = sorted(set(expected) - set(found))
        if missing:
            raise UserError(f"model {path}: {len(missing)} of {len(expected)} weights are missing, first {missing[0]}")
        for name, shape in expected.items():
            if found[name].get_shape() != shape:
                raise UserError(f"model {path}: {name} has shape {found[name].get_shape()}, config.json says {shape}")
            if found[name].get_dtype() not in DTYPES:
                raise UserError(
                    f"model {path}: {name} is {found[name].get_dtype()}, expected {', '.join(DTYPES)}; "
                    "use the unquantised checkpoint"
                )
        spare = sorted(name for name in set(found) - set(expected) - {HEAD} if not RECOMPUTED.fullmatch(name))
        if spare:
            raise UserError(
                f"model {path}: {len(spare)} weights have no place in the model that config.json describes, first "
                f"{spare[0]}; its results would be another model's"
            )


def _equal(one, other) -> bool:
    """Equal tensors of safetensors files, read in blocks of rows."""
    rows = one.get_shape()[0]
    return one.get_shape() == other.get_shape() and all(
        bool((one[start : start + 4096] == other[start : start + 4096]).all()) for start in range(0, rows, 4096)
    )


def open_weights(path: Path, stack: ExitStack) -> dict:
    """safetensors' slices by name, open as long as `stack`; nothing is read of them yet.

    Raises UserError where a file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    index, files = path / "model.safetensors.index.json", [path / "model.safetensors"]
    if not files[0].exists() and index.exists():
        files = [path / name for name in sorted({*map(str, dict(read_json(index).get("weight_map") or {}).values())})]
    found = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"model {path}: no {file.name}; pickled weights (.bin, .pt) are never loaded, convert them")
        try:
            tensors = stack.enter_context(safe_open(file, framework="pt"))
            found |= {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"model {file}: damaged safetensors file ({error}); download it again") from None
    return found


def read_json(file: Path) -> dict:
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected a model directory with config.json and *.safetensors")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
