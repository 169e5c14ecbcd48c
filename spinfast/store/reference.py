"""A reference's log-probs in a file that other runs and other tools can take: one row per answer.

    group answer   position of the group and, in it, of the answer (0 the best)
    tokens         what was scored, as a hash: see `fingerprint`
    length logp    scored tokens, and the sum of their log-probs in nats

The schema's metadata names the model's revision, the adapter's fingerprint (empty: none was on), the compute dtype,
the microbatch's tokens, and into how many shares groups were dealt. Rows are found by their tokens, in any order; what
the run asks for must be there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spinfast.errors import UserError
from spinfast.store import files
from spinfast.types import Group

SCHEMA = pa.schema(
    [
        ("group", pa.int64()),
        ("answer", pa.int64()),
        ("tokens", pa.string()),
        ("length", pa.int64()),
        ("logp", pa.float64()),
    ]
)
FACTS = ("model", "adapter", "dtype", "microbatch_tokens", "shares")


@dataclass(frozen=True)
class Reference:
    """logps per group and answer; by whom they were scored, in microbatches of how many tokens, in how many shares."""

    logps: list[list[float]]
    model: str
    adapter: str
    dtype: str
    microbatch_tokens: int
    shares: int = 1


def fingerprint(prompt_ids: Sequence[int], answer: Sequence[int], scored: Sequence[bool] = ()) -> str:
    """blake2b-128 of the lengths of prompt and answer, their ids and the scored flags, all little-endian int32."""
    numbers = [len(prompt_ids), len(answer), *prompt_ids, *answer, *(map(int, scored) if not all(scored) else ())]
    return hashlib.blake2b(np.asarray(numbers, dtype="<i4").tobytes(), digest_size=16).hexdigest()


def write(path: Path, groups: Sequence[Group], reference: Reference) -> None:
    rows = [
        {"group": i, "answer": j, "tokens": tokens, "length": groups[i].lengths[j], "logp": reference.logps[i][j]}
        for i, j, tokens in _answers(groups)
    ]
    facts = {name: str(getattr(reference, name)) for name in FACTS}
    with files.replacing(path) as beside:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(facts)), beside, compression="zstd")


def read(path: Path, groups: Sequence[Group]) -> Reference:
    """What the file knows of these groups. Raises UserError where it is no such file, or knows not all of them."""
    try:
        table = pq.read_table(path)
        columns = table.select(["tokens", "logp"]).to_pydict()
        known = {b"shares": b"1"} | (table.schema.metadata or {})  # other tools deal nothing
        facts = {name: known[name.encode()].decode() for name in FACTS}
        numbers = {name: int(facts.pop(name)) for name in ("microbatch_tokens", "shares")}
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"reference {path}: expected a reference.parquet of a run: {' '.join(str(error).split())[:200]}"
        ) from None
    asked = list(_answers(groups))
    found = columns["logp"]
    if columns["tokens"] != [answer for *_, answer in asked]:  # not this very list of groups
        by_tokens = dict(zip(columns["tokens"], columns["logp"], strict=True))
        found = [by_tokens.get(answer) for *_, answer in asked]
    logps: list[list[float]] = [[] for _ in groups]
    for (i, *_), logp in zip(asked, found, strict=True):
        logps[i].append(logp)
    if missing := sum(None in found for found in logps):
        raise UserError(
            f"reference {path}: {missing} of {len(groups)} groups are not in it, of {table.num_rows} answers; it must "
            "come from the same model, data, template and limits"
        )
    return Reference(logps, **facts, **numbers)


def _answers(groups: Sequence[Group]) -> Iterator[tuple[int, int, str]]:
    for i, group in enumerate(groups):
        for j, answer in enumerate(group.answers):
            yield i, j, fingerprint(group.prompt_ids, answer, group.scored[j] if group.scored else ())
