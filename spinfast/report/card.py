"""The README.md that goes with an adapter: what it is, what it saw, what it scored, what it is not good for."""

from __future__ import annotations

import json
import math
from pathlib import Path

import yaml

from spinfast.evaluate.advice import warnings
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
)  # what describes an adapter, of one kind or another
EXPAND = """
    spinfast expand path/to/this/adapter --out path/to/peft

makes plain PEFT LoRA of it, which every tool reads:
"""

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


def write_card(adapter_dir: Path, run_dir: Path, stage: str) -> Path:
    """Write adapter_dir/README.md for the adapter that `stage` of the run made."""
    written = next(path for name in FORMS if (path := adapter_dir / name).exists())
    config = json.loads(written.read_text(encoding="utf-8"))
    path = adapter_dir / "README.md"
    files.write_text(path, card(read_run(run_dir), stage, config))
    return path


def card(run: Run, stage: str, adapter_config: dict) -> str:
    """The card's text. `adapter_config` is PEFT's, or that of another kind of adapter."""
    c, base = run.config, adapter_config["base_model_name_or_path"]
    revision = adapter_config.get("revision") or c["model"]["revision"] or "not recorded"
    row, method = next((row for row in run.rows if row["stage"] == stage), None), run.method(stage)
    played = ["self-play"] if method == "spin" else []
    kind = adapter_config.get("kind", "lora")
    library = {"library_name": "peft"} if kind == "lora" else {}
    front = library | {"tags": [kind, method, *played, "spinfast"]}
    if not base.startswith(("package:", "/", ".")):
        front["base_model"] = base
    made = (run.control if method == "spin" else None) or method
    facts = {
        "base model": f"{base}, revision {revision}",
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
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---
# {Path(base).name}: {run.label(stage)} of spinfast run {run.name}

{"Weights" if kind == "full" else "A low-rank adapter"} made by {MADE_BY.get(made, made)}.

| | |
|---|---|
{table}

## Use
{_use(kind, base)}
Write prompts with the base model's chat template.

## Results
{_results(run, row)}

## Limits
{_limits(run, stage)}
"""


def _use(kind: str, base: str) -> str:
    made, loads = "from peft import PeftModel", 'model = PeftModel.from_pretrained(base, "path/to/{}")'
    if kind == "full":
        made, loads = "from safetensors.torch import load_file", "base.load_state_dict({}, strict=False)"
        loads = loads.format('load_file("path/to/this/adapter/full.safetensors")')
    return f"""{EXPAND if kind in ("lora_xs", "tiny_lora") else ""}
```python
{made}
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base!r})
{loads.format("this/adapter" if kind == "lora" else "peft")}
```"""


def _adapter(config: dict) -> str:
    if "kind" not in config:
        keys = ("use_rslora", "rank_pattern", "alpha_pattern")
        more = [f"{key} = {config[key]}" for key in keys if config.get(key)]
        return ", ".join(["LoRA", f"r = {config['r']}", f"alpha = {config['lora_alpha']:g}", *more])
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
