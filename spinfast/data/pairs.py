"""(Example, Completion) -> Pair, or a rejection counted by its reason; and the pairs' parquet file.

The file holds SPIN's own columns `real` and `generated` ([user, assistant] messages), so that it can be read by
the paper's code and by DPO trainers, and the token ids that training really uses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from spinfast.errors import UserError
from spinfast.types import Completion, Example, Pair

SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("iteration", pa.int64()),
        ("real", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("generated", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("prompt_ids", pa.list_(pa.int32())),
        ("real_ids", pa.list_(pa.int32())),
        ("generated_ids", pa.list_(pa.int32())),
    ]
)


def make_pairs(
    examples: Sequence[Example], completions: Iterable[Completion], iteration: int
) -> tuple[list[Pair], dict[str, int]]:
    """Pairs in the order of `examples`, and how many were rejected for what.

    Identical answers carry no gradient and are dropped; so are completions without a token.
    """
    answers = {completion.index: completion for completion in completions}
    pairs, rejected = [], Counter()
    for example in examples:
        generated_ids = answers[example.index].token_ids
        if not generated_ids:
            rejected["empty"] += 1
        elif generated_ids == example.real_ids:
            rejected["identical"] += 1
        else:
            pairs.append(Pair(example.index, iteration, example.prompt_ids, example.real_ids, generated_ids))
    return pairs, dict(rejected)


def write_pairs(path: Path, pairs: Sequence[Pair], examples: Sequence[Example], text: Callable) -> None:
    """One row per pair; `text` turns token ids into text, special tokens left out."""
    messages = {example.index: example.messages for example in examples}

    def row(pair: Pair) -> dict:
        prompt = list(messages[pair.index])
        return {
            "index": pair.index,
            "iteration": pair.iteration,
            "real": [*prompt, {"role": "assistant", "content": text(pair.real_ids)}],
            "generated": [*prompt, {"role": "assistant", "content": text(pair.generated_ids)}],
            "prompt_ids": pair.prompt_ids,
            "real_ids": pair.real_ids,
            "generated_ids": pair.generated_ids,
        }

    pq.write_table(pa.Table.from_pylist([row(pair) for pair in pairs], schema=SCHEMA), path, compression="zstd")


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a parquet file written by write_pairs."""
    try:
        table = pq.read_table(path, columns=["index", "iteration", "prompt_ids", "real_ids", "generated_ids"])
    except (OSError, pa.ArrowException, KeyError) as error:
        raise UserError(f"pairs {path}: cannot be read ({' '.join(str(error).split())})") from None
    return [
        Pair(
            row["index"],
            row["iteration"],
            tuple(row["prompt_ids"]),
            tuple(row["real_ids"]),
            tuple(row["generated_ids"]),
        )
        for row in table.to_pylist()
    ]
