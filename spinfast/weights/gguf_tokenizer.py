"""A tokenizer as GGUF metadata, and back: tokens, their types, merges, special tokens, chat template.

llama.cpp splits text by rules that it knows by name (tokenizer.ggml.pre). The name is decided by the pre-tokenizer of
the tokenizer that training used, not by what the files say: transformers gives some models another. A rule without a
name here is refused; llama.cpp would take its default and tokenise otherwise, without a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
from gguf import GGUFValueType, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from spinfast.errors import UserError
from spinfast.models import load_tokenizer

CONVERTER = "convert it by llama.cpp's convert_hf_to_gguf.py"
GPT2_WORDS = ("ByteLevel", True, False)
BYTES = ("ByteLevel", False, False)
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {  # steps, whether words that are tokens skip the merges -> tokenizer.ggml.pre
    ((GPT2_WORDS,), False): "gpt-2",
    ((("Digits", True), GPT2_WORDS), False): "smollm",
    ((("Split", WORDS % "", "Isolated", False), BYTES), False): "qwen2",
    ((("Split", WORDS % "{1,3}", "Isolated", False), BYTES), True): "llama-bpe",
}
RULES = {name: rule for rule, name in PRE_TOKENIZERS.items()}
COMPOSED = ("qwen2",)  # rules of models whose tokenizers compose accents first (NFC); llama.cpp has no word for it
BEGUN = ("llama-bpe",)  # rules by which llama.cpp begins a text with the bos token, unless the file says otherwise
FIELDS = {  # of a pre-tokenizer, what decides
    "ByteLevel": lambda step: (step["use_regex"], step["add_prefix_space"]),
    "Digits": lambda step: (step["individual_digits"],),
    "Split": lambda step: (step["pattern"].get("Regex"), step["behavior"], step["invert"]),
}


def add_tokenizer(writer: gguf.GGUFWriter, path: Path, rows: int) -> None:
    """Write the tokenizer of a model directory; `rows` of the embedding, those without a token are named [PADi].

    Raises UserError for a tokenizer that llama.cpp would not follow, or that has no end token.
    """
    tokenizer = load_tokenizer(path)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre(backend, path))
    tokens, types = zip(*_tokens(tokenizer, rows), strict=True)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(path, load_merges=True)
    special.merges = [_merge(pair) for pair in backend["model"]["merges"]]  # of the tokenizer as it was used
    if "eos" not in special.special_token_ids:
        raise UserError(f"tokenizer {path}: names no eos_token, llama.cpp would take token 11; name it")
    begun = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    special.add_special_token["bos"] = begun  # said in any case: llama.cpp has a default for each rule
    special.add_to_gguf(writer, quiet=True)


def read_tokenizer(fields: Mapping) -> PreTrainedTokenizerFast:
    """The tokenizer that a file's metadata {key: value} tell of. Raises ValueError for a rule that has no name here."""
    said = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    rule = said.get("pre")
    if said.get("model") != "gpt2" or rule not in RULES:
        raise ValueError(
            f"its tokenizer ({said.get('model')}, {rule}) is not known to be converted faithfully, expected "
            f"{', '.join(RULES)}; use the model's safetensors checkpoint from the hub"
        )
    tokens, (steps, ignore_merges) = said["tokens"], RULES[rule]
    named = {name: said.get(f"{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    types = dict(enumerate(said.get("token_type") or ())) | {
        number: TokenType.CONTROL for number in named.values() if number is not None
    }
    vocab = {token: number for number, token in enumerate(tokens) if types.get(number) != TokenType.UNUSED}
    merges = [tuple(pair.split(" ")) for pair in said["merges"]]
    backend = Tokenizer(BPE(vocab, merges, ignore_merges=ignore_merges))
    backend.normalizer = normalizers.NFC() if rule in COMPOSED else None
    backend.pre_tokenizer = pre_tokenizers.Sequence([_step(*step) for step in steps])
    backend.decoder = decoders.ByteLevel()
    for kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
        whole = [tokens[number] for number in sorted(types) if types[number] == kind]
        backend.add_tokens([AddedToken(token, special=kind == TokenType.CONTROL, normalized=False) for token in whole])
    bos = None if named["bos"] is None else tokens[named["bos"]]
    if bos and said.get("add_bos_token", rule in BEGUN):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, named["bos"])]
        )
    words = {"unknown": "unk", "padding": "pad"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{f"{words.get(name, name)}_token": tokens[n] for name, n in named.items() if n is not None},
    )


def _step(kind: str, *options):
    """A pre-tokenizer of PRE_TOKENIZERS."""
    if kind == "ByteLevel":
        use_regex, add_prefix_space = options
        return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)
    if kind == "Digits":
        return pre_tokenizers.Digits(individual_digits=options[0])
    pattern, behavior, invert = options
    return pre_tokenizers.Split(Regex(pattern), behavior.lower(), invert)


def copy_tokenizer(writer: gguf.GGUFWriter, source: Path) -> None:
    """Write the tokenizer of another .gguf file, key by key as it is there."""
    for name, field in gguf.GGUFReader(source).fields.items():
        if name.startswith("tokenizer."):
            kind = field.types[0]
            element = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=element)


def _pre(backend: dict, path: Path) -> str:
    model, step = backend["model"], backend["pre_tokenizer"] or {"type": "none"}
    if model["type"] != "BPE" or model.get("byte_fallback") or (backend["decoder"] or {}).get("type") != "ByteLevel":
        raise UserError(f"tokenizer {path}: expected a byte-level BPE, got {model['type']}; {CONVERTER}")
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    rule = tuple((each["type"], *FIELDS.get(each["type"], lambda _: ())(each)) for each in steps)
    try:
        return PRE_TOKENIZERS[rule, bool(model.get("ignore_merges"))]
    except KeyError:
        raise UserError(
            f"tokenizer {path}: splits text by {' + '.join(map(str, rule))}, for which no name of llama.cpp's is known "
            f"({', '.join(PRE_TOKENIZERS.values())} are); {CONVERTER}"
        ) from None


def _tokens(tokenizer, rows: int) -> Iterator[tuple[str, TokenType]]:
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    for number in range(rows):
        if number not in by_id:
            yield f"[PAD{number}]", TokenType.UNUSED
        elif number not in added:
            yield by_id[number], TokenType.NORMAL
        elif added[number].special or _looks_special(by_id[number]):
            yield by_id[number], TokenType.CONTROL
        else:
            yield by_id[number].replace("▁", " "), TokenType.USER_DEFINED


def _looks_special(token: str) -> bool:
    """As the official converter has it: tokens that control, but that some models do not call special."""
    return any(token.startswith(start) and token.endswith(end) for start, end in (("<|", "|>"), ("<｜", "｜>")))


def _merge(pair: list[str] | str) -> str:
    """The two parts with a space between; a space in a part as the byte-level alphabet writes it."""
    return pair if isinstance(pair, str) else " ".join(part.replace(" ", "Ġ") for part in pair)
