"""All adapters of a study in one engine, mixed in one batch as a server of many gives their answers (LoRA Land, arXiv
2405.00732), and the index of them that such a server reads.

vLLM takes the PEFT directories that the cells left; SLOTS of them and the base share a batch. Before their answers
count, the engine tells log p of gold answers under each: it must be what the cell's own policy measured, and not the
base's.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from spinfast.errors import UserError
from spinfast.generation import prompt_seed
from spinfast.generation.canary import BOUNDS
from spinfast.memory.planner import engine_cache
from spinfast.policy.adapters.files import CONFIG_FILE
from spinfast.progress import Display
from spinfast.session import Machine
from spinfast.store import files
from spinfast.studies.design import Cell, Design
from spinfast.studies.outcomes import Problems, Readings
from spinfast.studies.play import owner_of
from spinfast.types import Request, Sampling

log = logging.getLogger("spinfast")
SLOTS = 8  # adapters in one batch
ASKED = 4  # gold answers of each set that tell whether an adapter is applied
TOGETHER = "together.json"
BASE = ""  # its name among the adapters'


def check(design: Design, cells: Sequence[Cell]) -> None:
    """Raises UserError where the cells' adapters cannot be answered for together."""
    config = cells[0].config
    others = [cell for cell in cells if cell.config.adapter.kind != "lora"]
    reasons = {
        "expected a set of problems with exact: true, whose answers are written": any(
            items.source and items.exact for items in design.learning.values()
        ),
        "vLLM is not installed; pip install the set of requirements/": find_spec("vllm") is not None,
        "vLLM loads the model's own weights, got model.load_in_4bit": not config.model.load_in_4bit,
        f"vLLM serves plain LoRA, got adapter.kind {others[0].config.adapter.kind if others else ''}": not others,
    }
    if wrong := [reason for reason, holds in reasons.items() if not holds]:
        raise UserError(f"study: together: {wrong[0]}; or leave together out")


def adapter_of(directory: Path, cell: Cell) -> Path:
    """Where the adapter lies whose outcomes the cell has: that of its last stage."""
    path = directory / "cells" / cell.name
    return path / json.loads((path / "best.json").read_text())["of"][-1] / "adapter"


def together(
    cells: Sequence[Cell],
    measured: Mapping[str, Readings],
    base: Readings,
    directory: Path,
    probes: Sequence,
    machine: Machine,
    display: Display,
) -> tuple[dict[str, Readings], Readings]:
    """What the cells' written answers tell, and the base's, from one engine; what is on the disk is not asked again."""
    sets = [probe for probe in probes if isinstance(probe, Problems) and probe.max_tokens]
    owner = owner_of(sets)
    places = {BASE: (directory / TOGETHER, owner)}
    places |= {cell.name: (directory / "cells" / cell.name / TOGETHER, owner + cell.config.hash()) for cell in cells}
    found = {name: files.read_sealed(*place) for name, place in places.items()}
    if missing := [cell for cell in cells if found[BASE] is None or found[cell.name] is None]:
        gc.collect()  # the session that the cells were played in
        torch.cuda.empty_cache()
        paths = {BASE: None} | {cell.name: adapter_of(directory, cell).resolve() for cell in missing}
        with _engine(cells[0], [path for path in paths.values() if path], sets, machine) as engine:
            for first in range(0, len(missing), SLOTS):
                these = [BASE, *(cell.name for cell in missing[first : first + SLOTS])]
                check_applied(engine, sets, these, paths, measured | {BASE: base}, machine.device.dtype)
                asked = these[first > 0 :]  # the base once
                for name, readings in _answers(engine, sets, asked, paths, machine, display).items():
                    found[name] = readings
                    files.write_sealed(places[name][0], readings, places[name][1])
    own = found.pop(BASE)
    return found, own


def _engine(cell: Cell, adapters: Sequence[Path], sets: Sequence[Problems], machine: Machine):
    from spinfast.generation.vllm import VLLMGenerator

    ranks = [json.loads((path / CONFIG_FILE).read_text())["r"] for path in adapters]
    config, longest = cell.config, max(probe.max_tokens for probe in sets)
    context = config.prompt.max_prompt_tokens + max(longest, config.prompt.max_answer_tokens)
    return VLLMGenerator(
        machine.model.path,
        device=machine.device.device,
        capability=machine.device.capability,
        dtype=machine.device.dtype,
        max_model_len=min(context + 1, machine.shape.max_position_embeddings),  # vLLM adds a token to what it scores
        max_lora_rank=max(ranks),
        kv_cache_bytes=engine_cache(config, machine.shape, machine.device),
        batch_size=config.generation.batch_size,
        seed=config.seed,
        slots=min(SLOTS, len(adapters)),
    )


def _answers(engine, sets, names, paths, machine: Machine, display: Display) -> dict[str, Readings]:
    """Greedy ones to all items, an item under all adapters after the other, so that they share batches."""
    asked = [(name, probe, example) for probe in sets for example in probe.examples for name in names]
    requests = [
        Request(number, tuple(example.prompt_ids), prompt_seed(0, 0, number, probe.name))
        for number, (_, probe, example) in enumerate(asked)
    ]
    sampling = [Sampling(0.0, 1.0, probe.max_tokens, machine.renderer.stop_ids) for _, probe, _ in asked]
    found = {}
    with display.phase("adapters together", len(asked), "answers") as tick:
        for answer in engine.mixed(requests, sampling, [paths[name] for name, _, _ in asked]):
            found[answer.index] = answer
            tick.advance(tokens=len(answer.token_ids))
    readings: dict[str, Readings] = {}
    for name in names:
        for probe in sets:
            own = [found[n] for n, (whose, of, _) in enumerate(asked) if (whose, of) == (name, probe)]
            told = {f"{probe.name}/{reading}": values for reading, values in probe.verdicts(own).items()}
            readings.setdefault(name, {}).update(told)
    return readings


def check_applied(engine, sets, names, paths, measured: Mapping[str, Readings], dtype: torch.dtype) -> None:
    """Raises RuntimeError where the engine's log-probs under an adapter are not those of the cell's own policy."""
    room = engine.max_model_len
    asked = [(name, probe, item) for probe in sets for item in _with_room(probe, room) for name in names]
    groups = [probe.worked[item] for _, probe, item in asked]
    prompts = [(*group.prompt_ids, *group.answers[0]) for group in groups]
    found = dict(engine.mixed_logps(prompts, [paths[name] for name, _, _ in asked]))
    told: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for n, ((name, probe, item), group) in enumerate(zip(asked, groups, strict=True)):
        logps = np.array(found[n][len(group.prompt_ids) - 1 :])
        mean = logps[np.array(group.scored[0])].mean() if group.scored else logps.mean()
        told[name].append((float(mean), measured[name][f"{probe.name}/worked"][item]))
    engines, policys = (np.array([[pair[side] for pair in told[name]] for name in names]) for side in (0, 1))
    errors = np.abs(engines - policys).mean(1)
    wrong = ~(errors <= BOUNDS[dtype])
    if wrong.any():
        first = int(wrong.argmax())
        raise RuntimeError(
            f"study: together: the engine does not answer as {names[first] or 'the base'}: log p of gold answers is "
            f"{errors[first]:.2g} nats per token from what was measured of it (bound {BOUNDS[dtype]:g} for {dtype})"
        )
    same = [
        name
        for name, own, was in zip(names[1:], engines[1:], policys[1:], strict=True)
        if (own == engines[0]).all() and (was != policys[0]).any()
    ]
    if same:
        raise RuntimeError(f"study: together: the engine answers as the base for {same[0]}: its adapter is not applied")
    log.info("together: %d adapters are those of their cells, within %.2g nats per token", len(names) - 1, errors.max())


def _with_room(probe: Problems, room: int) -> list[int]:
    """The first ASKED items whose gold answers the engine has room for."""
    lengths = [len(group.prompt_ids) + len(group.answers[0]) for group in probe.worked]
    return [item for item, length in enumerate(lengths) if length < room][:ASKED]


def index(design: Design, cells: Sequence[Cell], measured: Mapping[str, Readings], directory: Path) -> list[dict]:
    """A row per adapter that a server can load: name, path, base, rank, task (the set that one of its levels is named
    as), means of all outcomes.
    """
    rows = []
    for cell in cells:
        if cell.name in measured and cell.config.adapter.kind == "lora":
            path = adapter_of(directory, cell)
            config = json.loads((path / CONFIG_FILE).read_text())
            rows.append(
                {
                    "name": cell.name,
                    "path": str(path.relative_to(directory)),
                    "base": config["base_model_name_or_path"],
                    "revision": config.get("revision"),
                    "rank": config["r"],
                    "alpha": config["lora_alpha"],
                    "task": next((level for level in cell.levels if level in design.learning), None),
                    "scores": {name: float(np.mean(values)) for name, values in measured[cell.name].items()},
                }
            )
    return rows
