"""Rows of a data set -> examples: where rows come from, what they mean, how they become token ids."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from spinfast.config import Config, Data
from spinfast.data.examples import LoadedData, check_overlap, load_examples
from spinfast.data.renderer import Renderer
from spinfast.data.sources import Table, draw, open_table, shares
from spinfast.errors import UserError
from spinfast.evaluate.references import unmatched
from spinfast.types import Example

log = logging.getLogger("spinfast")


def load_data(config: Config, renderer: Renderer) -> dict[str, LoadedData]:
    """The training data and, where configured, the held-out data; warns of prompts in both."""
    sets = {name: getattr(config, name) for name in ("data", "heldout") if getattr(config, name)}
    loaded = {name: _load(config, data, renderer, name) for name, data in sets.items()}
    if "heldout" in loaded and (shared := check_overlap(loaded["data"].examples, loaded["heldout"].examples)):
        log.warning("heldout: %d of %d prompts are in the training data too", shared, len(loaded["heldout"].examples))
    return loaded


def _load(config: Config, data: Data, renderer: Renderer, name: str) -> LoadedData:
    parts = [part for _, part in data.parts()]
    rewarded = "grpo" in config.method
    tables, sizes = _open(data)
    loaded = [
        load_examples(
            table,
            size=size,
            seed=part.seed,
            turns=part.turns,
            columns=part.columns,
            bad_rows=part.bad_rows,
            system=config.prompt.system,
            renderer=renderer,
            max_prompt_tokens=config.prompt.max_prompt_tokens,
            max_answer_tokens=config.prompt.max_answer_tokens,
            overlong=config.prompt.overlong,
            prompts_alone=rewarded,
            keep_columns=rewarded,
        )
        for part, table, size in zip(parts, tables, sizes, strict=True)
    ]
    for part, one in zip(parts, loaded, strict=True):
        log.info("%s: %d examples from %s", name, len(one.examples), part.source)
    whole = loaded[0] if len(parts) == 1 else _mixed(name, tables, loaded, data.seed)
    learners = [method for method in config.method if method in ("sft", "spin")]
    if "dpo" in config.method:
        whole.warnings.extend(_left_out(config, whole.examples))
    elif learners:
        if name == "data":
            whole.warnings.extend(_best_alone(one.compared, learners) for one in loaded if one.compared)
        if any(example.desirable is False for example in whole.examples):
            whole.warnings.append("answers labelled undesirable are not learnt from; dpo with loss kto takes them")
    if learners and (alone := sum(not example.real_ids for example in whole.examples)):
        verb = "leaves" if len(learners) == 1 else "leave"
        count = f"{alone} of {len(whole.examples)} rows"
        whole.warnings.append(f"{' and '.join(learners)} {verb} out {count}: they are prompts alone")
    for warning in (*whole.warnings, *unmatched(whole.examples)):
        log.warning("%s: %s", name, warning)
    return whole


def _best_alone(columns: Sequence[str], learners: Sequence[str]) -> str:
    """What of answers that are compared is learnt."""
    best, *worse = columns
    who, s = " and ".join(learners), "s" * (len(learners) == 1)
    if worse:
        return f"{who} learn{s} the answers in {best!r}; those in {worse[0]!r} are not used (dpo compares the two)"
    return f"{who} learn{s} the best of the answers in {best!r}; the others are not used (dpo compares them)"


def _left_out(config: Config, examples: Sequence[Example]) -> list[str]:
    """What the losses of dpo do not learn from in a mixture of formats."""
    if config.dpo.unpaired:
        kind, used = "neither labelled nor compared", [e for e in examples if e.others or e.desirable is not None]
    else:
        kind, used = "not compared with another answer", [example for example in examples if example.others]
    count, labels = len(examples) - len(used), {e.desirable for e in used if not e.others}
    said = [f"dpo leaves out {count} of {len(examples)} rows: they are {kind}"] if used and count else []
    if len(labels) == 1 and not any(e.others for e in used) and config.dpo.unpaired:
        said.append(f"all answers are labelled {labels.pop()}: there is nothing to tell apart")
    return said


def _open(data: Data) -> tuple[list[Table], list[int | None]]:
    """The table of each source, and how many of its rows are used.

    By weight: `size` rows are divided; without it the scarcest source is used up and no row is used twice.
    Without weights: all rows, or `size` of them, as if the sources were one.
    """
    weights, parts = zip(*data.parts(), strict=True)
    sizes: list[int | None] = [data.size] * len(parts)
    weighted = weights[0] is not None
    if weighted and data.size:
        sizes = list(shares(weights, data.size))
    tables = [
        open_table(part.source, subset=part.subset, split=part.split, revision=part.revision, rows=size, seed=part.seed)
        for part, size in zip(parts, sizes, strict=True)
    ]
    if len(parts) > 1 and not (weighted and data.size):
        lengths = [table.length for table in tables]
        weights = weights if weighted else lengths
        total = min(length * sum(weights) / weight for length, weight in zip(lengths, weights, strict=True))
        sizes = list(map(min, lengths, shares(weights, data.size or total)))
    if 0 in sizes:
        raise UserError(
            f"data: {data.size or sum(sizes)} rows by weight leave none for source {sizes.index(0) + 1}; raise its "
            "weight or data.size"
        )
    return tables, sizes


def _mixed(name: str, tables: Sequence[Table], loaded: Sequence[LoadedData], seed: int) -> LoadedData:
    """The examples in one shuffle, numbered as if the sources followed one another; each that is there twice, once."""
    starts = list(accumulate((table.length for table in tables[:-1]), initial=0))
    kept = {}
    for start, part in zip(starts, loaded, strict=True):
        for example in part.examples:
            kept.setdefault(example.content, replace(example, index=start + example.index))
    examples = sorted(kept.values(), key=lambda example: draw(seed, example.index))
    rejected = sum((Counter(part.rejected) for part in loaded), Counter())
    if twice := sum(len(part.examples) for part in loaded) - len(examples):
        log.warning("%s: %d examples are in several sources; each is used once", name, twice)
        rejected["duplicate"] += twice
    log.info("%s: %d examples in the mixture of %d sources", name, len(examples), len(loaded))
    digest = hashlib.sha256(repr([starts, [part.fingerprint for part in loaded]]).encode()).hexdigest()
    return LoadedData(examples, dict(rejected), [warning for part in loaded for warning in part.warnings], digest)
