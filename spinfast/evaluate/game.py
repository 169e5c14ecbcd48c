"""The game on held-out prompts: who gives which answer what log-prob, and which of that is known already.

Three sides, the real answers, the policy's samples and the rivals (its opponent's samples), stand under three players:
policy, opponent, base. Numbers that are compared must come out of one cut, another one rounds otherwise. So every side
is packed on its own, in microbatches that do not depend on what else a round scores, and of the nine columns a round
computes five: its opponent was the last round's policy, its rivals were that one's samples. An adapter that changes
nothing is the base. An answer that is a real one too is scored there alone: its place would tell the two apart.

A column is kept with a seal, a sum over its values and over all that they follow from: the player's weights, the
microbatches as they are packed, the machine. It is taken where that sum holds, whatever the file, else made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spinfast import __version__, spread
from spinfast.evaluate.selfplay import (
    Metrics,
    fresh_opponent_metrics,
    generation_metrics,
    kl_metrics,
    log_ratios,
    selfplay_metrics,
)
from spinfast.objectives import Pairwise
from spinfast.packing import on_common_prefix, packed_length
from spinfast.policy import Policy
from spinfast.policy.adapters import files as adapters
from spinfast.progress import Tick
from spinfast.scoring import Budget, logps_in_cut, with_room, within_memory
from spinfast.store import files
from spinfast.types import Adapter, Completion, Example, Group

log = logging.getLogger("spinfast")
Ids = tuple[int, ...]
Columns = dict[str, dict[str, np.ndarray]]  # player -> side -> log-prob sums, one per prompt
Keys = dict[tuple[str, str], str]  # (player, side) -> a digest of all that its column follows from
Cut = list[tuple[Group, list[tuple[Ids, Ids]]]]  # microbatches, with the (prompt, answer) of each of their answers
SEALS = "seals"


def metrics(
    columns: Columns,
    players: Sequence[Example],
    samples: Sequence[Completion],
    rivals: Sequence[Completion],
    objective: Pairwise,
) -> Metrics:
    """What the columns of `scored` say."""
    own, before, base = columns["policy"], columns["opponent"], columns.get("base")
    real_lengths = [len(e.real_ids) for e in players]
    sample_lengths = [len(c.token_ids) for c in samples]
    found = selfplay_metrics(
        own["real"],
        own["rival"],
        before["real"],
        before["rival"],
        real_lengths,
        [len(c.token_ids) for c in rivals],
        objective.beta,
        objective.kind,
        base_real_logps=base["real"] if base else None,
        base_generated_logps=base["rival"] if base else None,
    )
    ended = [c.finish_reason == "stop" for c in samples]
    found |= generation_metrics([c.token_ids for c in samples], real_lengths, ended)
    found |= fresh_opponent_metrics(
        log_ratios(own["real"], before["real"]),
        log_ratios(own["sample"], before["sample"]),
        real_lengths,
        sample_lengths,
        [True] * len(players),
        ended,
    )
    return found | (kl_metrics(own["sample"], base["sample"], sample_lengths) if base else {})


def scored(
    policy: Policy,
    opponent: Adapter,
    prompts: Sequence[Ids],
    sides: Mapping[str, Sequence[Ids]],
    budget: Budget,
    known: Known,
    phase: Callable[[int, str], AbstractContextManager[Tick]],
) -> tuple[Columns, Keys]:
    """Every side's answers under policy, opponent and, where it is still there, base; sides["real"] comes first.

    If memory runs out all are scored again, so that all are cut alike; what is known of another cut is of no use then.
    """
    weights, pairs = policy.base_checksum(), {side: list(zip(prompts, sides[side], strict=True)) for side in sides}
    players = {"policy": policy.adapter(), "opponent": opponent} | ({} if policy.folded else {"base": None})
    players = {who: None if adapter is None or adapters.idle(adapter) else adapter for who, adapter in players.items()}
    names = {who: adapter and adapters.fingerprint(adapter) for who, adapter in players.items()}
    alone = [Group(prompt, (answer,)) for side in pairs.values() for prompt, answer in side]
    machines = sorted({*map(str, spread.gather("machines", machine(policy)))})  # ranks may have other cards, or cores

    @cache
    def prepared(budget: Budget) -> tuple[dict[str, Cut], Keys, dict[str, np.ndarray], dict[str, tuple[str, str]]]:
        """Microbatches by side, the columns' keys, what of them is known, and whose those are that are not."""
        cuts = {side: cut(pairs[side], () if side == "real" else pairs["real"], budget) for side in sides}
        here = [__version__, *machines, budget.attention, budget.microbatch_tokens, weights]
        keys = {
            (who, side): _digest(here, names[who], cuts["real"], cuts[side], sides[side])
            for who in players
            for side in sides
        }
        found = {key: column for key in keys.values() if (column := known(key)) is not None}
        todo = {}
        for place, key in keys.items():
            if key not in found:
                todo.setdefault(key, place)
        return cuts, keys, found, todo

    def attempt(budget: Budget) -> list[tuple[str, int, list[float]]]:
        """(key, microbatch, log-probs of its answers) of those that are scored here."""
        cuts, _, _, todo = prepared(budget)
        scores, total = [], sum(len(members) for _, side in todo.values() for _, members in cuts[side])
        with phase(total, "answers") if total else nullcontext() as tick:
            for key, (who, side) in todo.items():
                with playing(policy, players[who], who == "policy"):
                    for number in chain(*spread.shares(len(cuts[side]))):
                        group, members = cuts[side][number]
                        scores.append((key, number, logps_in_cut(policy, [group], budget)[0]))
                        tick.advance(len(members), tokens=packed_length(group))
        return scores

    of_ranks, budget = within_memory(with_room(budget, alone), alone, attempt)
    cuts, keys, found, todo = prepared(budget)
    scores = {(key, number): logps for key, number, logps in chain(*of_ranks)}
    for key, (who, side) in todo.items():
        table = {} if side == "real" else dict(zip(pairs["real"], found[keys[who, "real"]], strict=True))
        for number, (_, members) in enumerate(cuts[side]):
            table |= zip(members, scores[key, number], strict=True)
        found[key] = np.array([table[pair] for pair in pairs[side]], dtype=np.float64)
    return {who: {side: found[keys[who, side]] for side in sides} for who in players}, keys


def cut(pairs: Sequence[tuple[Ids, Ids]], others: Sequence[tuple[Ids, Ids]], budget: Budget) -> Cut:
    """The microbatches of the distinct (prompt, answer), without those of `others`."""
    there = {*others}
    distinct = [pair for pair in dict.fromkeys(pairs) if pair not in there]
    packed = on_common_prefix(*zip(*distinct, strict=True), budget.microbatch_tokens) if distinct else []
    return [(group, [distinct[row] for row in rows]) for group, rows in packed]


def playing(policy: Policy, adapter: Adapter | None, live: bool) -> AbstractContextManager[None]:
    """The policy's module with that adapter, which may be its `live` one, or with none."""
    if adapter is None:
        return policy.without_adapter()
    return nullcontext() if live else policy.playing(adapter)


def machine(policy: Policy) -> list:
    """What rounding depends on besides the numbers."""
    card = torch.cuda.get_device_name(policy.device) if policy.device.type == "cuda" else torch.get_num_threads()
    return [torch.__version__, torch.backends.cpu.get_cpu_capability(), card, str(policy.dtype), policy.ops.name]


class Known:
    """The columns of a file, found by what they follow from; one that is not as it was written is none."""

    def __init__(self, path: Path):
        self.columns: list[tuple[str, np.ndarray]] = []  # with their seals
        if not path.exists():
            return
        try:
            with safe_open(path, "np") as file:
                seals = json.loads(file.metadata()[SEALS])
                self.columns = [(seal, file.get_tensor(name)) for name, seal in seals.items()]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
            log.warning("%s is not as it was written; its log-probs are made again", path)

    def __call__(self, key: str) -> np.ndarray | None:
        return next((column for seal, column in self.columns if seal == sealed(key, column)), None)


def write(path: Path, columns: Columns, keys: Keys) -> None:
    """PLAYER.SIDE -> its column, fp64; the seals are the file's metadata."""
    named = {f"{who}.{side}": column for who, has in columns.items() for side, column in has.items()}
    seals = {f"{who}.{side}": sealed(key, columns[who][side]) for (who, side), key in keys.items()}
    with files.replacing(path) as beside:
        save_file(named, beside, metadata={SEALS: json.dumps(seals)})


def sealed(key: str, column: np.ndarray) -> str:
    return hashlib.blake2b(column.tobytes(), key=bytes.fromhex(key), digest_size=16).hexdigest()


def _digest(*parts) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=32).hexdigest()
