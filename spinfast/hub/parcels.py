"""A publication -> parcels: what goes into each repository, laid out in RUN/publish as the hub will have it.

Of each stage its adapter and, of self-play, the pairs it was trained on in SPIN's format; on request GRPO's rollouts,
and whole models. No file that is made here holds a path of this machine.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from spinfast.errors import UserError
from spinfast.hub.publication import DATA, Publication
from spinfast.policy.adapters import files as adapters
from spinfast.policy.adapters.expand import as_lora
from spinfast.report import card as cards
from spinfast.store import files

if TYPE_CHECKING:
    from spinfast.progress import Display

FOLDER = "publish"
PARQUET = "data/train-00000-of-00001.parquet"
PAIRS = ("real", "generated", "iteration")
ROLLOUTS = ("group", "sample", "prompt", "completion", "finish_reason", "reward", "advantage")  # and rewards/NAME
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}


@dataclass(frozen=True)
class Parcel:
    """One repository's content. `holds`: of each file what is in it; `mark`: what its card is known by."""

    repo: str
    type: str  # model or dataset
    directory: Path
    holds: Mapping[str, str]
    mark: str

    @property
    def files(self) -> dict[str, Path]:
        """Name in the repository -> the file here."""
        found = (path for path in sorted(self.directory.rglob("*")) if path.is_file() and path.name != files.MANIFEST)
        return {path.relative_to(self.directory).as_posix(): path for path in found}


@dataclass(frozen=True)
class Content:
    """What is laid out: the card's text, what is in which file, how they are made; with a key made only once."""

    card: str
    holds: dict[str, str]
    fill: Callable[[Path], None]
    key: str = ""


def lay_out(of: Publication, stage: str, what: str, display: Display) -> Parcel:
    """Make the parcel's directory, whole or not at all."""
    content = CONTENTS[what](of, stage, display)
    directory = of.run.path / FOLDER / "-".join(filter(None, (stage, what, content.key)))
    if not content.key or files.damage(directory):
        files.write_directory(directory, content.fill)
    mark = f"<!-- spinfast publish: run {of.id}, {stage}, {what} -->"
    files.write_text(directory / "README.md", f"{content.card}\n{mark}\n")
    kind = "dataset" if what in DATA else "model"
    return Parcel(of.repo(stage, what), kind, directory, content.holds | {"README.md": "the card"}, mark)


# Data sets -------------------------------------------------------------------------------------------------------


def pairs(of: Publication, stage: str, display: Display) -> Content:
    """Real against generated, in the columns of the paper's authors."""
    source, repo = of.run.path / stage / "pairs.parquet", of.repo(stage, "data")
    known = (files.read_sealed(source.with_name("phases.json"), stage) or {}).get("pair", {}).get("files", {})
    if known.get(source.name) != files.sha256(source):
        raise UserError(f"{source}: not as it was written; run the same config again to mend it")
    table = pq.read_table(source, columns=[*PAIRS]).replace_schema_metadata(None)
    generations = ", ".join(map(str, sorted({*table["iteration"].to_pylist()})))
    card = f"""{_front(of, table.num_rows, "spin", "self-play", "dpo")}
# {repo.rpartition("/")[2]}: what {of.run.label(stage)} of self-play was trained on

| column | |
|---|---|
| `real` | messages: a prompt and the data's answer |
| `generated` | messages: the same prompt and the answer of the model as it was before iteration `iteration` |
| `iteration` | {generations} |

Prompts and real answers come from {of.data_told} and stay under its terms. Generated
answers are the output of {of.base_told}, as it was trained by then. Rows that the run rejected for their
length are not here, nor pairs of equal answers.

The columns are SPIN's (arXiv 2401.01335); to DPO `real` is chosen, `generated` rejected. Trained on it: the model
{repo}.

```python
from datasets import load_dataset

pairs = load_dataset({repo!r}, split="train")
```
"""
    said = f"{table.num_rows} pairs: prompts and answers of {of.data_told}; generated answers of {of.base_told}"
    return Content(card, {PARQUET: said}, partial(_write, [table]))


def rollouts(of: Publication, stage: str, display: Display) -> Content:
    """What GRPO sampled, with its rewards; token ids, log-probs and reward functions' notes stay here."""
    paths, repo = of.run.rollouts[stage], of.repo(stage, "rollouts")
    columns = [*ROLLOUTS, *(name for name in pq.read_schema(paths[0]).names if name.startswith("rewards/"))]
    tables = [pq.read_table(path, columns=columns).replace_schema_metadata(None) for path in paths]
    tables = [table.append_column("rollout", pa.array([n] * len(table), pa.int64())) for n, table in enumerate(tables)]
    rows = sum(table.num_rows for table in tables)
    card = f"""{_front(of, rows, "grpo", "rewards")}
# {repo.rpartition("/")[2]}: answers that GRPO sampled and reward functions rated

Columns: `rollout`, which sampling; `group`, one prompt's answers, and `sample` among them; `prompt` as the model saw
it; `completion`; `finish_reason`; `rewards/NAME` of each function; `reward`, their weighted sum; `advantage`, what
training weighed the answer by.

Prompts come from {of.data_told} and stay under its terms. Completions are the output of
{of.base_told}, as it was trained by then. Trained on it: the model {of.repo(stage, "adapter")}.
"""
    said = f"{rows} sampled answers with rewards: prompts of {of.data_told}; answers of {of.base_told}"
    return Content(card, {PARQUET: said}, partial(_write, tables))


def _front(of: Publication, rows: int, *tags: str) -> str:
    """The data set's front matter: what the hub shows, and which file is which split."""
    hub, licences = cards.hub_data(of.run.config["data"]), [*of.data_licences.values()]
    front = of.licence(licences[0] if len(licences) == 1 else {})
    front |= {"task_categories": ["text-generation"], "tags": [*tags, "synthetic", "spinfast"]}
    front |= {"size_categories": [next((name for most, name in SIZES.items() if rows < most), "n>10M")]}
    front |= {"source_datasets": hub} if hub else {}
    splits = [{"split": "train", "path": PARQUET}]
    return cards.front_matter(front | {"configs": [{"config_name": "default", "data_files": splits}]})


def _write(tables: list[pa.Table], directory: Path) -> None:
    (directory / PARQUET).parent.mkdir()
    pq.write_table(pa.concat_tables(tables), directory / PARQUET, compression="zstd")


# Models ----------------------------------------------------------------------------------------------------------


def adapter(of: Publication, stage: str, display: Display) -> Content:
    """As the run has it; with --expanded plain LoRA beside a small form, which every tool finds."""
    loaded, repo = adapters.load(of.run.path / stage / "adapter"), of.repo(stage, "adapter")
    public = [replace(loaded, config=of.public(loaded.config))]
    if of.wanted.expanded and loaded.kind in ("lora_xs", "tiny_lora"):
        lora = as_lora(loaded, of.model)
        public.append(replace(lora, config=of.public(lora.config)))

    def fill(directory: Path) -> None:
        for each in public:
            adapters.save(each, directory)

    data = (repo,) if of.wanted.data and of.played(stage) else ()
    place = cards.Place(repo, "adapter", len(public) > 1, of.licence(of.base_licence), data)
    own = [path.name for path in (of.run.path / stage / "adapter").iterdir()]
    said = dict.fromkeys(own, f"{loaded.kind} of {stage}, made on {of.base}")
    if len(public) > 1:
        said |= dict.fromkeys((adapters.CONFIG_FILE, adapters.TENSOR_FILE), "the same as plain LoRA")
    return Content(cards.card(of.run, stage, public[0].config, place), said, fill)


def merged(of: Publication, stage: str, display: Display) -> Content:
    """What `spinfast merge` makes of the stage."""
    from spinfast.weights import merging
    from spinfast.weights.checkpoint import with_base
    from spinfast.weights.recipe import Recipe

    source = of.run.path / stage / "adapter"
    tree = {"models": [{"model": f"{of.base}+{of.repo(stage, 'adapter')}"}], "merge_method": "passthrough"}

    def fill(directory: Path) -> None:
        recipe = Recipe(merge_method="passthrough", models=[{"model": with_base(source, of.moved)}])
        merging.merge(recipe, yaml.safe_dump(tree, sort_keys=False), directory / "whole", display)
        for file in (directory / "whole").iterdir():
            if file.name != files.MANIFEST:
                file.rename(directory / file.name)
        shutil.rmtree(directory / "whole")
        for file in directory.glob("*.json"):
            _without_paths(file)

    said = {"*.safetensors": f"{of.base_told} with {stage} folded in", merging.RECIPE_FILE: "how it was made"}
    return _whole(of, stage, "merged", said, fill)


def gguf(of: Publication, stage: str, display: Display) -> Content:
    """What `spinfast export gguf` makes of the stage."""
    from spinfast.weights import export, gguf

    name = of.repo(stage, "adapter").rpartition("/")[2]
    names = {kind: f"{name}-{kind.upper()}.gguf" for kind in of.wanted.gguf}

    def fill(directory: Path) -> None:
        source = export.resolve(str(of.run.path / stage / "adapter"), name, of.moved)
        for kind, file in names.items():
            gguf.write_model(source, kind, directory / file, display)
            ollama = export.ollama(source.path, file)
            (directory / file).with_suffix(".Modelfile").write_text(ollama, encoding="utf-8")

    said = dict.fromkeys(names.values(), f"{of.base_told} with {stage}") | {"*.Modelfile": "for Ollama"}
    return _whole(of, stage, "gguf", said, fill)


def _whole(of: Publication, stage: str, form: str, said: dict[str, str], fill: Callable[[Path], None]) -> Content:
    """A whole model: made once for its adapter, its base and its files."""
    loaded = adapters.load(of.run.path / stage / "adapter")
    place = cards.Place(of.repo(stage, form), form, licence=of.licence(of.base_licence))
    key = "-".join([*(of.wanted.gguf if form == "gguf" else ()), adapters.fingerprint(loaded)[:12]])
    return Content(cards.card(of.run, stage, of.public(loaded.config), place), said, fill, key)


def _without_paths(file: Path) -> None:
    """Older transformers note in a model's files where it was loaded from."""
    tree = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(tree, dict) and (noted := {"_name_or_path", "name_or_path"} & tree.keys()):
        kept = {key: value for key, value in tree.items() if key not in noted}
        file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


CONTENTS = {"data": pairs, "rollouts": rollouts, "adapter": adapter, "merged": merged, "gguf": gguf}
