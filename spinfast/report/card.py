"""The README.md that goes with an adapter: what it is, what it saw, what it scored, what it is not good for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from spinfast.data.sources import is_local
from spinfast.evaluate.advice import warnings
from spinfast.models import at_hub
from spinfast.names import amount, rewards_named, source_name
from spinfast.report import study
from spinfast.report.bounds import bounds
from spinfast.report.read import Run, read_run
from spinfast.store import files

SHOWN = {  # metric -> (name, digits, factor)
    "heldout/accuracy_strict": ("accuracy, strict (%)", 1, 100),
    "heldout/accuracy_flexible": ("accuracy, flexible (%)", 1, 100),
    "heldout/reward": ("reward of greedy answers", 3, 1),
    "heldout/pair_accuracy": ("pair accuracy against its opponent", 3, 1),
    "heldout/real_logp_vs_base": ("log p(real) − base's (nats per answer)", 2, 1),
    "heldout/perplexity": ("perplexity of real answers", 2, 1),
    "heldout/preference_accuracy": ("preference accuracy, %", 1, 100),
    "heldout/kl_k1": ("KL to the base (nats per answer)", 2, 1),
    "heldout/length": ("tokens of a sampled answer", 0, 1),
    "fresh/auc_log_ratio": ("fresh-opponent AUC", 3, 1),
}

FORMS = (
    "adapter_config.json",
    "lora_xs.json",
    "tiny_lora.json",
    "full.json",
    "calm.json",
)  # what describes an adapter, of one kind or another
EXPAND = """
    spinfast expand {} --out path/to/peft

makes plain PEFT LoRA of it, which every tool reads:
"""

UNLICENSED = "not known: the base model's, ask its authors"
MADE_BY = {  # method, or control -> how its adapters were made
    "base": "nothing in this run: it is the one before its training",
    "spin": "self-play fine-tuning (SPIN, arXiv 2401.01335): the model learned to tell the data's answers from its own",
    "sft": "supervised fine-tuning on the real answers",
    "dpo": "direct preference optimisation (DPO, arXiv 2305.18290, or one of its family) on answers that were compared",
    "grpo": "group relative policy optimisation (GRPO, arXiv 2402.03300, or a loss of its family) on answers that it "
    "sampled itself and reward functions rated",
    "shuffled": "a control of self-play fine-tuning, not a model to use: generated answers belong to other prompts",
    "coin": "a control of self-play fine-tuning, not a model to use: a coin said which answer counts as real",
}


@dataclass(frozen=True)
class Place:
    """What is described, where it lies, and what is known of it there."""

    path: str = "path/to/this/adapter"
    form: str = "adapter"  # or merged, gguf
    expanded: bool = False  # plain LoRA lies beside the small form
    licence: Mapping[str, str] | None = None  # front matter; {} where it is unknown
    data: tuple[str, ...] = ()  # hub ids of what it was trained on, where a run's own data is published


def write_card(adapter_dir: Path, run_dir: Path, stage: str) -> Path:
    """Write adapter_dir/README.md for the adapter that `stage` of the run made."""
    path = adapter_dir / "README.md"
    files.write_text(path, card(read_run(run_dir), stage, description(adapter_dir)))
    return path


def description(adapter_dir: Path) -> dict:
    """PEFT's config of an adapter, or the description of another kind."""
    written = next(path for name in FORMS if (path := adapter_dir / name).exists())
    return json.loads(written.read_text(encoding="utf-8"))


def card(run: Run, stage: str, adapter_config: dict, place: Place = Place()) -> str:
    """The card's text. `adapter_config` is PEFT's, or that of another kind of adapter."""
    c, base = run.config, adapter_config["base_model_name_or_path"]
    revision = adapter_config.get("revision") or c["model"]["revision"] or "not recorded"
    row, method = next((row for row in run.rows if row["stage"] == stage), None), run.method(stage)
    made = (run.control if method == "spin" else None) or method
    kind = adapter_config.get("kind", "lora")
    name = f"{Path(base).name}: {run.label(stage)} of spinfast run {run.name}"
    facts = {
        "base model": f"{base}, revision {revision}",
        "licence": "" if place.licence is None else ", ".join(place.licence.values()) or UNLICENSED,
        "training data": _data(c["data"]),
        "held-out data": _data(c["heldout"]) if c["heldout"] else "none",
        "started from": c["adapter"]["start"],
        "adapter": _adapter(adapter_config),
        "made by": _settings(run, stage),
        "rewards": rewards_named(c["grpo"]) if method == "grpo" and method in c["method"] else "",
        "training reward": study.reward_change(row) if row else "",
        "pairs": _pairs(row),
        "software": ", ".join(f"{name} {version}" for name, version in run.environment.get("versions", {}).items()),
    }
    table = "\n".join(f"| {name} | {str(value).replace('|', '/')} |" for name, value in facts.items() if value)
    return f"""{front_matter(_front(run, method, kind, base, place) | _model_index(run, row, name))}
# {name}

{_what(kind, place.form)} made by {MADE_BY.get(made, made)}.

| | |
|---|---|
{table}

## Use
{_use(kind, base, place)}
Write prompts with the base model's chat template.

## Results
{_results(run, row)}

## Limits
{_limits(run, stage)}
"""


def front_matter(values: dict) -> str:
    """YAML that the hub reads, between its lines."""
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True).strip()}\n---"


def hub_data(*sections: dict | None) -> list[str]:
    """The hub ids among the sources of a saved config's data sections."""
    sources = [section["source"] for section in sections if section]
    names = [each["source"] for of in sources if not isinstance(of, str) for each in of]
    names += [of for of in sources if isinstance(of, str)]
    return [*dict.fromkeys(name for name in names if not is_local(name))]


def _front(run: Run, method: str, kind: str, base: str, place: Place) -> dict:
    played, whole = ["self-play"] if method == "spin" else [], place.form != "adapter"
    peft = {"library_name": "peft"} if kind == "lora" or place.expanded else {}
    tags = ["gguf"] * (place.form == "gguf") + [kind, method, *played, "spinfast"]
    library = {"adapter": peft, "merged": {"library_name": "transformers"}, "gguf": {}}[place.form]
    front = library | {"tags": tags}
    if at_hub(base):
        front |= {"base_model": base, "base_model_relation": "finetune" if whole or kind == "full" else "adapter"}
    data = [*place.data, *hub_data(run.config["data"])]
    return (
        front | dict(place.licence or {}) | {"pipeline_tag": "text-generation"} | ({"datasets": data} if data else {})
    )


def _model_index(run: Run, row: dict | None, name: str) -> dict:
    """What the hub shows as results: those of _results."""
    found = row["evaluation"] if row else {}
    metrics = [
        {
            "type": "accuracy" if "accuracy" in title else metric.partition("/")[2],
            "name": title,
            "value": round(factor * found[metric]["value"], digits + 2),
        }
        for metric, (title, digits, factor) in SHOWN.items()
        if metric in found and math.isfinite(found[metric]["value"])
    ]
    if not metrics:
        return {}
    heldout = run.config["heldout"]
    data = {"name": _data(heldout), "type": next(iter(hub_data(heldout)), source_name(heldout["source"]))}
    task = {"type": "text-generation", "name": "held-out problems"}
    return {"model-index": [{"name": name, "results": [{"task": task, "dataset": data, "metrics": metrics}]}]}


def _what(kind: str, form: str) -> str:
    if form == "merged":
        return "A whole model, its training folded into the base,"
    if form == "gguf":
        return "Files for llama.cpp, Ollama and phones, of a model"
    return {"full": "Weights", "calm": "Connections of two models"}.get(kind, "A low-rank adapter")


def _use(kind: str, base: str, place: Place) -> str:
    if place.form == "gguf":
        return f"    llama-cli -hf {place.path}\n    ollama run hf.co/{place.path}\n"
    if kind == "calm":
        return "    spinfast chat path/to/this/directory\n"
    made, first, loads = "", "base", ""
    if place.form == "merged":
        first, base = "model", place.path
    elif kind == "full":
        made = "from safetensors.torch import load_file\n"
        loads = f"base.load_state_dict(load_file('{place.path}/full.safetensors'), strict=False)"
    else:
        made = "from peft import PeftModel\n"
        at = place.path if kind == "lora" or place.expanded else "path/to/peft"
        loads = f"model = PeftModel.from_pretrained(base, {at!r})"
    small = kind in ("lora_xs", "tiny_lora") and place.form == "adapter" and not place.expanded
    lines = [f"{made}from transformers import AutoModelForCausalLM\n"]
    lines += filter(None, [f"{first} = AutoModelForCausalLM.from_pretrained({base!r})", loads])
    return "\n".join([EXPAND.format(place.path) if small else "", "```python", *lines, "```"])


def _adapter(config: dict) -> str:
    if "kind" not in config:
        keys = ("use_rslora", "rank_pattern", "alpha_pattern")
        more = [f"{key} = {config[key]}" for key in keys if config.get(key)]
        return ", ".join(["LoRA", f"r = {config['r']}", f"alpha = {config['lora_alpha']:g}", *more])
    if config["kind"] == "calm":
        return f"CALM, {len(config['connections'])} connections with {config['augmenting']}"
    if config["kind"] == "full":
        return f"whole weights, {len(config['modules'])} matrices"
    if config["kind"] == "lora_xs":
        return f"LoRA-XS, r = {config['r']}, scaling = {config['scaling']:g}, {len(config['modules'])} modules"
    keys = ("r", "u", "tie", "sharing", "projection_seed", "payload")
    return ", ".join(["TinyLoRA", *(f"{key} = {config[key]}" for key in keys), f"{len(config['modules'])} modules"])


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _data(data: dict) -> str:
    parts = [
        source_name(data["source"]),
        data["subset"],
        f"split {data['split']}",
        data["revision"],
        f"seed {data['seed']}",
    ]
    return ", ".join([*(part for part in parts if part), f"{data['size'] or 'all'} examples"])


def _settings(run: Run, stage: str) -> str:
    """The stage and what its method was given."""
    method, c = run.method(stage), run.config
    if method not in c["method"]:
        return ""
    used, name = c[method], run.label(stage)
    game = []
    if method == "spin":
        name += f" of {used['iterations']} iterations"
        game = [f"beta {_list(used['beta'])}", f"{used['loss']} loss"]
    elif method == "dpo":
        losses = " + ".join(f"{weight:g} {loss}" for loss, weight in used["loss"].items())
        game = [f"loss {losses}", f"beta {used['beta']}"]
        game += [f"reference {used['reference']}"] * (used["reference"] != "start")
    elif method == "grpo":
        game = [f"{used['loss']} loss", f"{used['samples']} answers to each prompt", f"{used['scale_rewards']} scaling"]
        game += [f"temperature {c['generation']['temperature']:g}", f"KL weight {used['beta']:g}"]
    return ", ".join([name, *game, f"learning rate {_list(used['lr'])}", amount(used), f"seed {c['seed']}"])


def _pairs(row: dict | None) -> str:
    if row is None or not row["pairs"]:
        return ""
    rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(row["rejected"].items()))
    return f"{row['pairs']}" + (f" (rejected: {rejected})" if rejected else "")


def _results(run: Run, own: dict | None) -> str:
    base = next((row for row in run.rows if row["stage"] == "base"), None)
    if own is None or not own["evaluation"]:
        return "It was not evaluated."
    lines = ["Held-out problems, 95 % intervals.", "", "| | base | this adapter | n |", "|---|---|---|---|"]
    for metric, look in SHOWN.items():
        if metric in own["evaluation"]:
            cells = [_value(run, row["evaluation"].get(metric) if row else None, metric, look) for row in (base, own)]
            lines.append(f"| {look[0]} | {cells[0]} | {cells[1]} | {own['evaluation'][metric]['n']} |")
    if verdict := study.against_base(run, own, study.deciding(run)):
        sentence = verdict.sentence()
        lines += ["", f"{sentence[0].upper()}{sentence[1:]}. Test: McNemar's, exact, on the same problems."]
    return "\n".join(lines)


def _value(run: Run, of: dict | None, metric: str, look: tuple[str, int, float]) -> str:
    if of is None:
        return "–"
    _, digits, factor = look
    low, high = (factor * bound for bound in bounds(run, metric, of))
    interval = f" [{low:.{digits}f}, {high:.{digits}f}]" if math.isfinite(low) else ""
    return f"{factor * of['value']:.{digits}f}{interval}"


PULLED = "Training pulls the model towards the data's answers, their style, length and mistakes included."
PAID = "Training pulls the model towards what its reward functions pay for, where they are mistaken too."


def _limits(run: Run, stage: str) -> str:
    """What always holds, and what this run's figures warn of."""
    lines = [
        "- Measured on one held-out set of the kind it was trained on; other tasks and languages were not tried.",
        f"- {PAID if run.method(stage) == 'grpo' else PULLED}",
        "- Not examined for safety, bias or factuality beyond what the base model's card says.",
    ]
    if len(run.rows) > 2:
        lines.append("- Whoever picks the best of several iterations on these figures finds it a little too good.")
    position = run.stages.index(stage) if stage in run.stages else 0
    lines += [f"- {warning}" for warning in warnings(run.rows[: position + 1])]
    return "\n".join(lines)
