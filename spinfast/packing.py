"""Packing with a shared prompt: groups end to end in one row, each prompt stored and computed once.

A group [prompt | answer 1 | answer 2 ...] becomes query segments (prompt + answer 1), (answer 2), ..., where the
keys of a later answer are the prompt and itself. Its positions restart at len(prompt). Tokens computed equal the
tokens of the distinct content: no padding, no repeated prompt, and an answer's last token, which predicts
nothing, is not computed at all. Only on a CPU a row is filled up to a multiple of 64 tokens: oneDNN compiles every
product anew for every token count, which took a tenth of a step (bench/LOG.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, compress

import torch

from spinfast.errors import UserError
from spinfast.types import Group, PackedBatch, PackedLayout

MULTIPLE_OF = {"numba": 64}  # attention backend -> what the tokens of a batch are a multiple of


def packed_length(group: Group) -> int:
    """Packed tokens of one group."""
    return len(group.prompt_ids) + sum(len(answer) - 1 for answer in group.answers)


def bins(groups: Sequence[Group], max_tokens: int) -> list[list[int]]:
    """Positions of the groups per batch: first-fit decreasing, deterministic, each bin <= max_tokens.

    Raises UserError if a single group is longer than max_tokens.
    """
    lengths = [packed_length(group) for group in groups]
    if lengths and max(lengths) > max_tokens:
        raise UserError(
            f"a group of {max(lengths)} packed tokens exceeds the microbatch of {max_tokens} tokens; "
            "raise train.microbatch_tokens or lower prompt.max_prompt_tokens / generation.max_tokens"
        )
    filled: list[tuple[list[int], int]] = []
    for row in sorted(range(len(groups)), key=lambda i: (-lengths[i], i)):
        for i, (rows, used) in enumerate(filled):
            if used + lengths[row] <= max_tokens:
                filled[i] = ([*rows, row], used + lengths[row])
                break
        else:
            filled.append(([row], lengths[row]))
    return [rows for rows, _ in filled]


def on_common_prefix(
    prompts: Sequence[tuple[int, ...]], answers: Sequence[tuple[int, ...]], max_tokens: int
) -> list[tuple[Group, list[int]]]:
    """Answers to different prompts as few long groups on what all prompts begin with, which is computed once in each.

    The rest of a prompt goes before its answer, unscored. Returns the groups, each at most max_tokens when packed, with
    the positions of their answers.
    """
    first, last = min(prompts), max(prompts)
    prefix = first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]
    rests = [prompt[len(prefix) :] for prompt in prompts]
    alone = [Group(rest, (answer,)) for rest, answer in zip(rests, answers, strict=True)]

    def together(rows: Sequence[int]) -> Group:
        scored = ((False,) * len(rests[i]) + (True,) * len(answers[i]) for i in rows)
        return Group(prefix, tuple(rests[i] + answers[i] for i in rows), scored=tuple(scored))

    return [(together(rows), rows) for rows in bins(alone, max_tokens - len(prefix))]


def pack(groups: Sequence[Group], rows: Sequence[int], backend: str = "sdpa") -> PackedBatch:
    """The groups at `rows` as one batch on the host; `backend` is the attention that will run it."""
    tokens: list[int] = []
    positions: list[int] = []
    scored: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    kv_index: list[int] = []
    segments: list[tuple[int, int]] = []
    for row in rows:
        group = groups[row]
        start, prompt = len(tokens), len(group.prompt_ids)
        tokens += group.prompt_ids
        positions += range(prompt)
        for number, answer in enumerate(group.answers):
            begin, queries = len(tokens), len(answer) - 1
            tokens += answer[:-1]
            positions += range(prompt, prompt + queries)
            chosen = group.scored[number] if group.scored else (True,) * len(answer)
            scored += compress([start + prompt - 1, *range(begin, begin + queries)], chosen)
            targets += compress(answer, chosen)
            lengths.append(sum(chosen))
            if number == 0:
                segments.append((prompt + queries, prompt + queries))
            elif queries:
                segments.append((queries, prompt + queries))
            else:
                continue
            kv_index += [*range(start, start + prompt), *range(begin, begin + queries)]
    if padding := -len(tokens) % MULTIPLE_OF.get(backend, 1):  # a longer last answer, of which nothing is scored
        kv_index += range(len(tokens), len(tokens) + padding)
        tokens += [0] * padding
        positions += [0] * padding
        segments[-1] = segments[-1][0] + padding, segments[-1][1] + padding
    layout = PackedLayout(
        q_starts=_starts([q for q, _ in segments]),
        kv_starts=_starts([kv for _, kv in segments]),
        kv_index_K=torch.tensor(kv_index, dtype=torch.int64),
        segments=tuple(segments),
        backend=backend,
    )
    return PackedBatch(
        rows=tuple(rows),
        token_ids_T=torch.tensor(tokens, dtype=torch.int64),
        position_ids_T=torch.tensor(positions, dtype=torch.int64),
        layout=layout,
        scored_N=torch.tensor(scored, dtype=torch.int64),
        targets_N=torch.tensor(targets, dtype=torch.int64),
        sequence_ids_N=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64)),
        answers=tuple(len(groups[row].answers) for row in rows),
        lengths_S=torch.tensor(lengths, dtype=torch.float32),
        given=_given([groups[row] for row in rows]),
    )


def _given(groups: Sequence[Group]) -> dict[str, torch.Tensor]:
    """The groups' constants end to end, in fp32; all groups of a batch have the same."""

    def numbers(name: str) -> Iterator[float]:
        for value in (value for group in groups for value in group.given[name]):
            yield from value if isinstance(value, tuple) else (value,)

    return {name: torch.tensor([*numbers(name)], dtype=torch.float32) for name in groups[0].given}


def _starts(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
