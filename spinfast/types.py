"""The values that pass from phase to phase. All are plain data: no file, no model, no device logic.

Shape suffixes: T packed tokens, N scored tokens, S sequences (answers), K gathered key/value tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

import torch


@dataclass(frozen=True, slots=True)
class Example:
    """One row of the data, rendered: a prompt, its real answer, answers that are worse, the reference of a task.

    A prompt alone has no real answer: `answer` is "" and `real_ids` is ().
    """

    index: int  # row number in its data set; names the prompt in every file of the run
    messages: tuple[dict, ...]  # the prompt's turns, [{"role", "content"}]; none where the row is plain text
    answer: str  # the real answer as text
    prompt_ids: tuple[int, ...]  # chat template applied, generation prompt included
    real_ids: tuple[int, ...]  # the answer's tokens, end-of-turn token included
    reference: str | None = None  # the result to compare with in evaluation ("42"), where the data has one
    scored: tuple[bool, ...] | None = None  # which tokens of the answer are learnt from; None: all
    others: tuple[tuple[int, ...], ...] = ()  # answers that are ranked below the real one, best first
    desirable: bool | None = None  # the label of an answer that is not compared with another
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)  # the row itself, where rewards read it

    @property
    def wanted(self) -> bool:
        """Whether there is a real answer to learn: one that is not labelled undesirable."""
        return self.desirable is not False and bool(self.real_ids)

    @property
    def content(self) -> tuple:
        """What there is to learn from it: equal examples have one.

        Where rewards read the columns, rows of one prompt are told apart by their reference, else by any column.
        """
        told = (self.reference or repr(sorted(self.columns.items()))) if self.columns else None
        return self.prompt_ids, self.real_ids, self.scored, self.others, self.desirable, told

    @property
    def group(self) -> Group:
        """Prompt and real answer, as SFT learns them."""
        return Group(self.prompt_ids, (self.real_ids,), scored=() if self.scored is None else (self.scored,))

    @property
    def ranked(self) -> Group:
        """Prompt and all its answers, best first."""
        return Group(self.prompt_ids, (self.real_ids, *self.others))


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to be given to a prompt. Equal (prompt_ids, seed) under one adapter give one answer."""

    index: int
    prompt_ids: tuple[int, ...]
    seed: int  # derived from (run seed, iteration, index, sample), see generation.prompt_seed
    sample: int = 0  # which of several answers to the prompt


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0 is greedy; stop_ids end an answer and are kept as its last token."""

    temperature: float
    top_p: float
    max_tokens: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """One generated answer, as sampled: never decoded and tokenised again."""

    index: int
    token_ids: tuple[int, ...]  # the stop token included if finish_reason is "stop", none if "length"
    finish_reason: Literal["stop", "length"]
    logps: tuple[float, ...] = ()  # those each token was drawn by; of greedy answers at temperature 1
    sample: int = 0  # which of several answers to the prompt
    cached: int = 0  # tokens of the prompt that were not computed for it: their keys and values were there

    @property
    def logp(self) -> float | None:
        """The answer's log-prob by its sampler; None where it was not kept."""
        return sum(self.logps) if self.logps else None


@dataclass(frozen=True, slots=True)
class Token:
    """The newest token of an answer in progress; `ends` says that, and why, it is the last.

    An engine that decodes by itself gives `text`, of all tokens since its last one; id -1 then only ends the answer.
    """

    request: Request
    id: int
    logp: float | None  # it was drawn by; of a greedy answer at temperature 1
    ends: Literal["stop", "length"] | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """The two answers of SPIN's game: the data's (real) and the opponent's (generated)."""

    index: int
    iteration: int  # the iteration whose opponent wrote `generated_ids`
    prompt_ids: tuple[int, ...]
    real_ids: tuple[int, ...]
    generated_ids: tuple[int, ...]

    @property
    def group(self) -> Group:
        return Group(self.prompt_ids, (self.real_ids, self.generated_ids))


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and the answers that share it: two in SPIN, one in SFT, any number elsewhere.

    given: constants of the answers by name, that packing lays beside them as tensors: one number per answer (a
    reference's log-prob, an advantage, a label), or a tuple per answer with one number per scored token.
    scored: which tokens of each answer are scored; () all. An answer may be several turns of a conversation, the
    others' words between them.
    """

    prompt_ids: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    given: Mapping[str, tuple] = field(default_factory=dict, hash=False)
    scored: tuple[tuple[bool, ...], ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Scored tokens of each answer."""
        return tuple(map(sum, self.scored)) if self.scored else tuple(map(len, self.answers))

    def part(self, answers: Iterable[int]) -> Group:
        """The group with these of its answers, by their positions."""
        rows = list(answers)
        given = {name: tuple(values[row] for row in rows) for name, values in self.given.items()}
        scored = tuple(self.scored[row] for row in rows) if self.scored else ()
        return Group(self.prompt_ids, tuple(self.answers[row] for row in rows), given, scored)


@dataclass(frozen=True)
class PackedLayout:
    """Which packed tokens see which: block-diagonal causal attention aligned at the bottom right.

    Query segment i is rows [q_starts[i], q_starts[i+1]) of the packed tokens; its keys are the packed rows
    kv_index_K[kv_starts[i]:kv_starts[i+1]], the last of which stand under the segment's own queries.
    """

    q_starts: torch.Tensor  # (segments + 1,) int32
    kv_starts: torch.Tensor  # (segments + 1,) int32
    kv_index_K: torch.Tensor  # (K,) int64
    segments: tuple[tuple[int, int], ...]  # (query length, key length) of each segment, on the host
    backend: str = "sdpa"  # "xformers" | "aten_efficient" | "numba" | "sdpa", see attention.py


@dataclass(frozen=True)
class PackedBatch:
    """Groups laid end to end, each [prompt | answer 1 | answer 2 ...], the prompt stored once.

    An answer's last token predicts nothing and is left out. hidden[scored_N] are the rows that predict
    targets_N; the row of a prompt's last token occurs once for each of its answers.
    """

    rows: tuple[int, ...]  # positions of the groups in the list that was packed
    token_ids_T: torch.Tensor  # (T,) int64
    position_ids_T: torch.Tensor  # (T,) int64, each answer restarts at len(prompt)
    layout: PackedLayout
    scored_N: torch.Tensor  # (N,) int64
    targets_N: torch.Tensor  # (N,) int64
    sequence_ids_N: torch.Tensor  # (N,) int64, ascending, 0 .. sequences-1, group by group
    answers: tuple[int, ...]  # how many each group has
    lengths_S: torch.Tensor  # (S,) fp32, scored tokens of each answer
    given: Mapping[str, torch.Tensor]  # the groups' constants, fp32: (S,) per answer or (N,) per scored token

    @property
    def tokens(self) -> int:
        return self.token_ids_T.numel()

    @property
    def sequences(self) -> int:
        return sum(self.answers)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        return _moved(self, device)


def _moved(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: _moved(item, device) for name, item in value.items()}
    if is_dataclass(value):
        return replace(value, **{part.name: _moved(getattr(value, part.name), device) for part in fields(value)})
    return value


@dataclass(frozen=True)
class Adapter:
    """An adapter outside a model in its kind's own form, LoRA as PEFT's config and tensors under PEFT's names."""

    config: dict  # lora: the content of adapter_config.json; another kind says so under "kind"
    tensors: dict[str, torch.Tensor]  # "base_model.model.<module>.lora_A.weight" (r, in), "...lora_B.weight" (out, r)

    @property
    def kind(self) -> str:
        return self.config.get("kind", "lora")
