"""`spinfast rate`: a study of texts. Each trains as many tokens as the others, and so does its twin, the same tokens in
random order, which is its control: what is left is what the text says, not what any training on its words does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from spinfast.config import Data
from spinfast.data.renderer import Renderer
from spinfast.errors import UserError
from spinfast.store import files
from spinfast.studies.design import Design
from spinfast.studies.outcomes import Probe, Problems
from spinfast.studies.samples import (
    Contamination,
    Encoded,
    Sample,
    contamination,
    encode,
    mixture,
    take,
    token_shuffled,
)
from spinfast.studies.texts import Text, read_texts, sentence_shuffled

TWIN = ", shuffled"
MIXTURE = "mixture"
SPARE = 16  # tokens that may be left out at a text's end so that no two rows are equal
PLAIN = {  # how a text's rows are read, however the base config reads its own
    f"data.{key}": Data.model_fields[key].default for key in ("subset", "split", "revision", "size", "turns", "columns")
}
CONTROLS = ("sums:wrong", "sums:right")  # the form of worked solutions without their truth, and with it


@dataclass(frozen=True)
class Rated:
    """A text as it is trained: for scores.csv."""

    name: str
    sha256: str
    note: str
    tokens: int
    passes: float


def text_study(
    design: Design,
    sources: Sequence[str],
    directory: Path,
    renderer: Renderer,
    tokens: int,
    length: int,
    sentences: bool = False,
) -> tuple[Design, list[Rated], list[Text]]:
    """The design with an axis of texts, whose rows are written under directory/texts."""
    if design.axes or design.controls:
        raise UserError("rate: a preset has no axes and no controls; for a study of your own there is spinfast study")
    texts = read_texts([*sources, *(each for each in CONTROLS if each not in sources)])
    if taken := {text.name for text in texts} & {MIXTURE}:
        raise UserError(f"rate: a text is named {taken.pop()}; rename its file")
    if sentences:
        texts += [sentence_shuffled(text, 0) for text in texts[: len(sources)]]
    names = [*(text.name for text in texts), MIXTURE]
    files_of = Counter(_path(directory, level, 0) for name in names for level in (name, name + TWIN))
    if twice := [path.name for path, count in files_of.items() if count > 1]:
        raise UserError(f"rate: two texts would have one file, {twice[0]}; rename one of theirs")
    encoded = {text.name: encode(text, renderer) for text in texts}
    levels, controls, rated = {}, {}, []
    for name in names:
        for seed in design.seeds:
            sample = _sample(name, encoded, len(sources), tokens, length, seed)
            _write(directory, name, seed, sample)
            _write(directory, name + TWIN, seed, token_shuffled(sample, seed))
        text = next((text for text in texts if text.name == name), None)
        sha, note = (text.sha256, text.note) if text else ("", "equal stretches of the texts")
        rated.append(Rated(name, sha, note, tokens, round(sample.passes, 3)))
        for level in (name, name + TWIN):
            levels[level] = {"data.source": str(_path(directory, level, "{seed}").absolute())}
        controls[name] = name + TWIN
    rows = {"method": ["sft"], "heldout": None, "prompt.max_answer_tokens": length, "sft.epochs": 1, **PLAIN}
    design = design.model_copy(update={"axes": {"text": levels}, "controls": controls, "set": rows | design.set})
    return Design.model_validate(design.model_dump()), rated, texts


def contaminated(texts: Sequence[Text], probes: Sequence[Probe]) -> list[tuple[str, str, Contamination]]:
    """(text, item set, what they share), of sets of problems of which a text holds something."""
    found = []
    for probe in probes:
        if isinstance(probe, Problems):
            items = [" ".join((*(m["content"] for m in e.messages), e.answer)) for e in probe.examples]
            shared = [(text.name, probe.name, contamination(text, items)) for text in texts]
            found += [each for each in shared if each[2].share]
    return found


def told_twice(texts: Sequence[Text], design: Design) -> list[str]:
    """What is said of texts that are trained on and tell forgetting too."""
    told = {text.sha256: text.name for text in read_texts(design.forgetting.texts)}
    return [
        f"{text.name} is trained on and tells forgetting ({told[text.sha256]}): what it forgets says nothing; give the "
        "preset another text"
        for text in texts
        if text.sha256 in told
    ]


def _sample(name: str, encoded: dict[str, Encoded], own: int, tokens: int, length: int, seed: int) -> Sample:
    """A text's share of its words for this seed; its last token is left out as long as two rows would be one."""
    if name == MIXTURE:
        return mixture(list(encoded.values())[:own], tokens, length, seed)
    whole = encoded[name]
    for left_out in range(min(SPARE, len(whole.ids) - 1)):
        text = Encoded(name, whole.ids[: len(whole.ids) - left_out], whole.before, whole.after)
        sample = take(text, tokens, length, seed)
        if len({*sample.rows}) == len(sample.rows):
            return sample
    raise UserError(
        f"text {name}: {len(whole.ids)} tokens over and over give equal rows, which a run takes once; give a longer "
        "text, or lower --tokens"
    )


def _path(directory: Path, level: str, seed: int | str) -> Path:
    name = re.sub(r"[^\w.-]+", "-", level.replace(TWIN, ".shuffled"))
    return directory / "texts" / f"{name}.{seed}.parquet"


def _write(directory: Path, level: str, seed: int, sample: Sample) -> None:
    """Rows of token ids: a run trains them as they are."""
    path = _path(directory, level, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as beside:
        pq.write_table(pa.table({"input_ids": [list(row) for row in sample.rows]}), beside)
