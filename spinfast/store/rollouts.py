"""A rollout in a file: the answers of one sampling, a row each. It is whole or absent, and known by its seal.

    group sample index        position of the prompt in the rollout and of the answer in its group, row of the data
    prompt completion         as the model saw and wrote them; their ids beside; finish_reason "stop" or "length"
    sampler_logps old_logps reference_logps      of every token: of who wrote it, of the policy then, of the reference
    rewards/NAME reward       of every function, null where it does not apply; their weighted sum
    advantage active          what training weighs the answer by; 0 where it is left out
    extra                     JSON of what reward functions noted by log_extra

The schema's metadata names the rollout and the fingerprint of the adapter that wrote the answers, and holds the
figures of the whole rollout. A reader of any tool can take the file; the seal tells a run that it is its own.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from spinfast.store import files

log = logging.getLogger("spinfast")
FOLDER = "rollouts"
PER_TOKEN = pa.list_(pa.float32())
FIELDS = [
    ("group", pa.int64()),
    ("sample", pa.int64()),
    ("index", pa.int64()),
    ("prompt", pa.string()),
    ("prompt_ids", pa.list_(pa.int32())),
    ("completion", pa.string()),
    ("completion_ids", pa.list_(pa.int32())),
    ("finish_reason", pa.string()),
    ("sampler_logps", PER_TOKEN),
    ("old_logps", PER_TOKEN),
    ("reference_logps", PER_TOKEN),
    ("reward", pa.float64()),
    ("advantage", pa.float64()),
    ("active", pa.float64()),
    ("extra", pa.string()),
]


@dataclass(frozen=True)
class Rollout:
    """Rows as the columns above say, by group and sample; figures of the whole."""

    rows: list[dict]
    adapter: str
    figures: dict[str, float]


def path(stage_directory: Path, number: int) -> Path:
    return stage_directory / FOLDER / f"{number:06d}.parquet"


def write(file: Path, rollout: Rollout, owner: str) -> Rollout:
    """Keep it, and return it as `read` will."""
    rewards = [(name, pa.float64()) for name in rollout.rows[0] if name.startswith("rewards/")]
    table = pa.Table.from_pylist(rollout.rows, schema=pa.schema([*FIELDS, *rewards]))
    kept = Rollout(table.to_pylist(), rollout.adapter, rollout.figures)
    facts = {"adapter": kept.adapter, "figures": json.dumps(kept.figures), "owner": owner, "seal": _seal(kept, owner)}
    file.parent.mkdir(exist_ok=True)
    with files.replacing(file) as beside:
        pq.write_table(table.replace_schema_metadata(facts), beside, compression="zstd")
    return kept


def read(file: Path, owner: str) -> Rollout | None:
    """What was written for this owner; None if there is no such file or, with a warning, if it is anything else."""
    if not file.exists():
        return None
    try:
        table = pq.read_table(file)
        facts = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
        found = Rollout(table.to_pylist(), facts["adapter"], json.loads(facts["figures"]))
        if facts["seal"] == _seal(found, owner):
            return found
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, RecursionError):
        pass
    log.warning("%s is not as it was written; its prompts are answered again, by the policy as it stands", file)
    return None


def kept(stage_directory: Path) -> list[Path]:
    """The files of a stage's rollouts, in their order."""
    return sorted((stage_directory / FOLDER).glob("*.parquet"))


def _seal(rollout: Rollout, owner: str) -> str:
    value = {"rows": rollout.rows, "adapter": rollout.adapter, "figures": rollout.figures}
    return files.seal(value, owner)["seal"]


def by_group(rows: Sequence[dict]) -> list[list[dict]]:
    """The rows of every group."""
    groups: dict[int, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return list(groups.values())
