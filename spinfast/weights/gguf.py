"""A model, or a LoRA, as one .gguf file, which llama.cpp runs on any machine: llama, qwen2, qwen3.

Tensors are read from safetensors, changed by what was trained, brought into their type and written one by one: a
tensor and a block of rows are in memory, never a model. Every tensor is then read back from the file and held against
what it was made from. Names, types and keys are those of llama.cpp's own converter (b10605): tests compare the bytes.

Llama's rotary embedding pairs neighbours in llama.cpp, halves of a head in transformers: rows of q and k are reordered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Q
from gguf import LlamaFileType
from transformers import AutoConfig

from spinfast.errors import UserError
from spinfast.model_check import HEAD, RECOMPUTED, TABLE, log, open_weights, read_json, window
from spinfast.models import gguf_header
from spinfast.policy.adapters import files as adapters
from spinfast.progress import Display
from spinfast.store import files, room
from spinfast.types import Adapter
from spinfast.weights.gguf_tokenizer import CONVERTER, add_tokenizer, copy_tokenizer
from spinfast.weights.gguf_types import KINDS, fitting, quantised, type_of

ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
}
LORA_TYPES = ("f32", "f16", "bf16", "q8_0")
BLOCK = 1 << 22  # numbers of a tensor that are in fp32 at a time
SAMPLING = {"top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "temperature": "temp"}
YARN = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"}
YARN_DEFAULTS = {("beta_fast", 32), ("beta_slow", 1)}  # with others llama.cpp computed another model (cyllama 0.2.18)


@dataclass(frozen=True)
class Source:
    """A resolved model and what was trained of it."""

    path: Path
    name: str  # what people call the model
    architecture: str
    lora: Adapter | None = None  # plain LoRA
    own: Mapping[str, torch.Tensor] = field(default_factory=dict)  # weights in place of the model's, by their names
    gguf: Path | None = None  # the file that the model comes from: its tokenizer is kept as it is

    @property
    def config(self):
        return AutoConfig.from_pretrained(self.path, local_files_only=True)


@dataclass(frozen=True)
class Piece:
    """A tensor of the file."""

    name: str
    weight: str  # its name in the model
    shape: tuple[int, ...]
    type: Q
    heads: int = 0  # whose rows are reordered within each

    def steps(self) -> Iterator[slice]:
        """Rows that are worked on at a time; all of them where they are reordered."""
        step = self.shape[0] if self.heads else max(1, BLOCK // math.prod(self.shape[1:]))
        return (slice(start, min(start + step, self.shape[0])) for start in range(0, self.shape[0], step))

    @property
    def stored(self) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype of the numpy array that `gguf` writes."""
        if self.type in (Q.F32, Q.F16):
            return self.shape, np.dtype(np.float32 if self.type == Q.F32 else np.float16)
        return gguf.quant_shape_to_byte_shape(self.shape, self.type), np.dtype(np.uint8)

    @property
    def nbytes(self) -> int:
        shape, dtype = self.stored
        return math.prod(shape) * dtype.itemsize


def write_model(
    source: Source, kind: str, out: Path, display: Display, before: Callable[[], None] = lambda: None
) -> float:
    """Write the model to `out` in a type of KINDS; how far its numbers are from the model's, relative.

    `before`: called when the file is verified, before it gets its name.

    Raises UserError for what llama.cpp would compute otherwise, numbers that are not finite or that the type cannot
    hold; then there is no file.
    """
    config, limit = source.config, KINDS[kind].limit
    with ExitStack() as stack:
        weights = Weights(source, stack)
        pieces = weights.pieces(config, kind)
        room.check(out.parent, sum(piece.nbytes for piece in pieces), out.name)
        writer, beside = stack.enter_context(_replacing(out, source))
        factors = _llama3_factors(config)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for piece in pieces:
            shape, dtype = piece.stored
            writer.add_tensor_info(piece.name, shape, dtype, piece.nbytes, raw_dtype=piece.type)
        _describe(writer, source, config, KINDS[kind].file)
        if source.gguf:
            copy_tokenizer(writer, source.gguf)
        else:
            add_tokenizer(writer, source.path, config.vocab_size)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.view(Written))
        with display.phase("write", len(pieces), "tensors") as tick:
            for piece in pieces:
                writer.write_tensor_data(weights.encoded(piece).view(Written))
                tick.advance()
        writer.close()
        with display.phase("verify", len(pieces), "tensors") as tick:
            found = weights.difference(beside, pieces, tick.advance)
        if not found <= limit:
            raise UserError(
                f"{out.name}: read back, its numbers are {found:.2g} from the model's, {kind.upper()} rounds by up to "
                f"{limit:g}: the weights have numbers that it cannot hold; use --type bf16 or f32"
            )
        before()
    return found


class Written(np.ndarray):
    """As `gguf` writes it: numpy's own tofile loses small arrays on a full disk without a word."""

    def tofile(self, file) -> None:
        file.write(self.data)


@contextmanager
def _replacing(out: Path, source: Source) -> Iterator[tuple[gguf.GGUFWriter, Path]]:
    """A writer and its file, which takes the name `out` in one step."""
    with files.replacing(out) as beside:
        writer = gguf.GGUFWriter(beside, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[source.architecture]])
        try:
            yield writer, beside
        finally:
            writer.close()


class Weights:
    """The weights of a source, read in blocks of rows; open as long as `stack`."""

    def __init__(self, source: Source, stack: ExitStack):
        self.source, self.slices = source, open_weights(source.path, stack)
        self.added = dict(adapters.updates(source.lora)) if source.lora else {}
        for name in {*self.added, *source.own}:
            self._check(name)

    def _check(self, name: str) -> None:
        shape = self.slices[name].get_shape() if name in self.slices else None
        left, right = self.added.get(name, (None, None))
        trained = [*self.source.own[name].shape] if left is None else [left.shape[0], right.shape[1]]
        if shape != trained:
            raise UserError(f"{name}: trained as {trained}, the base's is {shape}; give its base by --model")

    def pieces(self, config, kind: str) -> list[Piece]:
        """The tensors of the file, in the order of the model's files."""
        names = gguf.get_tensor_name_map(ARCHITECTURES[self.source.architecture], config.num_hidden_layers)
        tied = config.tie_word_embeddings
        found, head = [], TABLE if tied else HEAD
        for weight, slice_ in self.slices.items():
            if RECOMPUTED.fullmatch(weight) or (tied and weight == HEAD):
                continue
            name, shape = names.get_name(weight, try_suffixes=(".weight", ".bias")), tuple(slice_.get_shape())
            if name is None or (weight.endswith(".bias") and self.source.architecture == "Qwen3ForCausalLM"):
                raise UserError(f"model {self.source.path}: {weight} has no place in llama.cpp's; {CONVERTER}")
            heads = _heads(self.source, config, weight.rpartition(".")[0])
            as_type = type_of(KINDS[kind], name, shape, config.num_hidden_layers, weight == head)
            found.append(Piece(name, weight, shape, as_type, heads))
        if tied and TABLE in self.added:  # a LoRA of the embedding leaves the head as it is
            table = next(piece for piece in found if piece.weight == TABLE)
            found.append(Piece("output.weight", HEAD, table.shape, table.type))
        return found

    def rows(self, piece: Piece, which: slice) -> np.ndarray:
        """Rows of a tensor of the file, in fp32."""
        name = TABLE if piece.name == "output.weight" and piece.weight not in self.slices else piece.weight
        weight = self.source.own[name] if name in self.source.own else self.slices[name]
        rows = weight[which].float()
        if not rows.isfinite().all():
            raise UserError(f"model {self.source.path}: {piece.weight} is not finite; its training diverged")
        if piece.weight in self.added:
            left, right = self.added[piece.weight]
            rows = rows + left[which] @ right
        return permuted(rows, piece.heads).numpy()

    def encoded(self, piece: Piece) -> np.ndarray:
        """The whole tensor as the file holds it."""
        shape, dtype = piece.stored
        out = np.empty(shape, dtype)
        with np.errstate(over="ignore"):  # what does not fit is found when it is read back
            for which in piece.steps():
                out[which] = quantised(self.rows(piece, which), piece.type)
        return out

    def difference(self, file: Path, pieces: list[Piece], advance) -> float:
        """||written - meant|| / ||meant|| over all tensors, the written ones read from the file."""
        reader = gguf.GGUFReader(file)
        gguf_header(reader)
        written = {tensor.name: tensor for tensor in reader.tensors}
        apart = meant = 0.0
        for piece in pieces:
            tensor = written[piece.name]
            if (tuple(map(int, reversed(tensor.shape))), tensor.tensor_type) != (piece.shape, piece.type):
                raise UserError(f"{file}: {piece.name} is not as it was written; the disk is damaged")
            for which in piece.steps():
                rows = self.rows(piece, which).astype(np.float64)
                apart += np.square(gguf.dequantize(tensor.data[which], piece.type) - rows).sum()
                meant += np.square(rows).sum()
            advance()
        return math.sqrt(apart / (meant or 1))


def write_lora(source: Source, kind: str, out: Path) -> float:
    """Write the source's LoRA alone, for llama.cpp's --lora; returns and raises as `write_model`.

    llama.cpp scales each matrix by alpha / its rank: patterns of alphas and rank-stabilised scaling go into B.
    """
    config, lora, limit = source.config, adapters.uniform(source.lora), KINDS[kind].limit
    names = gguf.get_tensor_name_map(ARCHITECTURES[source.architecture], config.num_hidden_layers)
    with ExitStack() as stack:
        Weights(source, stack)  # holds its shapes against the model's
        writer, beside = stack.enter_context(_replacing(out, source))
        _name(writer, source, "adapter")
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(lora.config["lora_alpha"]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        meant = {}
        for name, tensor in lora.tensors.items():
            found = adapters.MATRIX.fullmatch(name)
            module, which = found[1], found[2]
            if which is None:
                raise UserError(
                    f"{module} has a LoRA, which is no tensor of llama.cpp's; export without --adapter-only"
                )
            matrix = tensor.float()
            if which == "B":
                matrix = permuted(matrix, _heads(source, config, module))
            meant[f"{names.get_name(module)}.weight.lora_{which.lower()}"] = matrix.contiguous().numpy()
        for name, matrix in meant.items():
            as_type = fitting(KINDS[kind].type, matrix.shape[-1])
            with np.errstate(over="ignore"):
                writer.add_tensor(name, quantised(matrix, as_type).view(Written), raw_dtype=as_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        read = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(beside).tensors}
        apart = sum(float(np.square(read[name] - matrix).sum()) for name, matrix in meant.items())
        found = math.sqrt(apart / (sum(float(np.square(matrix).sum()) for matrix in meant.values()) or 1))
        if not found <= limit:
            raise UserError(f"{out.name}: {kind.upper()} cannot hold the adapter's numbers; use --type f32")
    return found


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from (real parts, imaginary parts) to neighbours; as they are for 0 heads."""
    if not heads:
        return weight
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _heads(source: Source, config, module: str) -> int:
    """Within how many heads the rows of a module are reordered."""
    if source.architecture != "LlamaForCausalLM":
        return 0
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(module.split(".")[-1], 0)


def _rope(config) -> dict:
    """transformers 5 has all in rope_parameters, 4.57 the base beside rope_scaling."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return {"rope_theta": getattr(config, "rope_theta", None), "rope_type": "default"} | given


def _name(writer: gguf.GGUFWriter, source: Source, kind: str) -> None:
    writer.add_type(kind)
    generation = source.path / "generation_config.json"
    given = read_json(generation) if generation.exists() and kind == "model" else {}
    for key, name in SAMPLING.items():
        if given.get(key) is not None:
            getattr(writer, f"add_sampling_{name}")(given[key])
    writer.add_name(source.name)
    total, shared, expert, experts = writer.get_total_parameter_count()
    if total > 0:
        writer.add_size_label(gguf.size_label(total, shared, expert, experts))


def _describe(writer: gguf.GGUFWriter, source: Source, config, file_type: LlamaFileType) -> None:
    """All keys but the tokenizer's. Some llama.cpp needs, without the others it loads and computes something else."""
    _name(writer, source, "model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    rope = _rope(config)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        given = {(key, value) for key, value in rope.items() if value is not None and key not in YARN}
        if strangers := sorted(key for key, _ in given - YARN_DEFAULTS):
            raise UserError(f"model {source.path}: yarn with {strangers[0]} is not computed alike by llama.cpp")
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_file_type(file_type)
    if source.architecture == "LlamaForCausalLM":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head_dim)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if size := window(config):
        log.warning("model %s: llama.cpp sees all tokens in every layer, equal up to %d tokens", source.path, size)


def _llama3_factors(config) -> np.ndarray | None:
    """By what each frequency (head_dim / 2) is divided, where the scaling is Llama 3's: its own formula."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequency = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    wavelength = 2 * math.pi / frequency
    length, low, high = (
        rope[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    smooth = ((length / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).numpy()


def read_rope(fields: Mapping, factors: np.ndarray | None) -> dict | None:
    """The config's rope_parameters by a file's metadata {key: value} and its rope_freqs; None: without scaling.

    Raises ValueError for scaling that is not known to be computed alike. Of Llama 3's the file has the factors alone,
    so its settings are those that give these.
    """
    prefix = f"{fields['general.architecture']}.rope."
    said = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    found = {"rope_theta": said.get("freq_base", 10000.0), "rope_type": said.get("scaling.type", "none")}
    if factors is not None:
        wide = {"factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        for length in (1 << bits for bits in range(5, 18)):
            rope = found | wide | {"rope_type": "llama3", "original_max_position_embeddings": length}
            if np.allclose(_llama3_factors(SimpleNamespace(rope_parameters=rope, head_dim=2 * len(factors))), factors):
                return rope
    names = {"scaling.factor": "factor", "scaling.original_context_length": "original_max_position_embeddings"}
    scaling = {key: said[key] for key in said if key.startswith("scaling.")}
    if factors is None and found["rope_type"] == "none":
        return None
    if factors is None and found["rope_type"] in ("linear", "yarn") and scaling.keys() <= {"scaling.type", *names}:
        return found | {name: scaling[key] for key, name in names.items() if key in scaling}
    raise ValueError(f"its RoPE is scaled by {', '.join(sorted(scaling)) or 'factors'}, which are not known here")
