"""Rows of a data set -> examples: where rows come from, what they mean, how they become token ids."""

from __future__ import annotations

import logging

from spinfast.config import Config, Data
from spinfast.data.examples import LoadedData, check_overlap, load_examples
from spinfast.data.renderer import Renderer
from spinfast.evaluate.references import unmatched

log = logging.getLogger("spinfast")


def load_data(config: Config, renderer: Renderer) -> dict[str, LoadedData]:
    """The training data and, where configured, the held-out data; warns of prompts in both."""
    sets = {name: getattr(config, name) for name in ("data", "heldout") if getattr(config, name)}
    loaded = {name: _load(config, data, renderer, name) for name, data in sets.items()}
    if "heldout" in loaded and (shared := check_overlap(loaded["data"].examples, loaded["heldout"].examples)):
        log.warning("heldout: %d of %d prompts are in the training data too", shared, len(loaded["heldout"].examples))
    return loaded


def _load(config: Config, data: Data, renderer: Renderer, name: str) -> LoadedData:
    loaded = load_examples(
        data.source,
        subset=data.subset,
        split=data.split,
        revision=data.revision,
        size=data.size,
        seed=data.seed,
        turns=data.turns,
        columns=data.columns,
        bad_rows=data.bad_rows,
        system=config.prompt.system,
        renderer=renderer,
        max_prompt_tokens=config.prompt.max_prompt_tokens,
        max_answer_tokens=config.prompt.max_answer_tokens,
        overlong=config.prompt.overlong,
    )
    log.info("%s: %d examples from %s", name, len(loaded.examples), data.source)
    if "dpo" not in config.method:
        if any(example.others for example in loaded.examples):
            loaded.warnings.append("of answers that are compared only the best is learnt from; dpo compares them")
        if any(example.desirable is False for example in loaded.examples):
            loaded.warnings.append("answers labelled undesirable are not learnt from; dpo with loss kto takes them")
    for warning in (*loaded.warnings, *unmatched(loaded.examples)):
        log.warning("%s: %s", name, warning)
    return loaded
