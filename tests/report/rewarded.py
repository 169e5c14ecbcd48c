"""A GRPO stage put into a run's directory: its files by hand, figures in straight lines, one rollout a step."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

from spinfast.fit import summary
from spinfast.store import rollouts

STEPS = 40
FUNCTIONS = {"gsm8k": 2.0, "format": {"weight": 0.5, "strict": True}}


def add_grpo(run: Path, steps: int = STEPS) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["method"], config["grpo"] = [*config["method"], "grpo"], {"rewards": FUNCTIONS, "steps": steps, "samples": 4}
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    stage = run / "grpo"
    stage.mkdir()
    (stage / "stage.json").write_text(json.dumps({"method": "grpo", "number": 0, "label": "grpo"}))
    rows = metrics(steps)
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    results = json.loads((run / "results.json").read_text())
    found = {"heldout/reward": {"value": 1.25, "stderr": 0.125, "n": 8}}
    row = {"iteration": "grpo", "stage": "grpo", "method": "grpo", "number": 0, "pairs": 0, "rejected": {}}
    row |= {"train": summary(rows), "evaluation": results[-1]["evaluation"] | found, "seconds": {"train": 60.0}}
    (run / "results.json").write_text(json.dumps([*results, row]))
    (stage / "heldout.jsonl").write_text((run / "iter_001" / "heldout.jsonl").read_text())
    for number in range(steps):
        write_rollout(run, number)


def metrics(steps: int) -> list[dict]:
    draw, rows = random.Random(0), []
    for step in range(1, steps + 1):
        reward = 0.3 + step / steps + draw.gauss(0, 0.1)
        row = {"stage": "grpo", "phase": "train", "step": step, "train/loss": 0.001, "train/lr": 1e-5}
        row |= {"reward": reward, "reward_std": 0.4, "groups/dead": 0.25, "entropy": 0.5, "kl": 0.0}
        row |= {"rewards/gsm8k/mean": reward / 2, "rewards/gsm8k/std": 0.5, "completions/mean_length": 30.0 + step}
        if step % 10 == 0:
            row |= {"heldout/reward": reward, "heldout/reward_stderr": 0.05}
        rows.append(row)
    return rows


def rollout(number: int, prompts: int = 3, samples: int = 4) -> list[dict]:
    """The last group is dead; a function does not apply to the second answer, the third is cut."""
    return [
        {
            **{"group": group, "sample": sample, "index": 10 * number + group},
            "prompt": f"<|im_start|>user\nWhat is {number} plus {group}?<|im_end|>\n<|im_start|>assistant\n",
            "completion": f"Let me see: {number} + {group} is {number + group + sample}.",
            "finish_reason": "length" if sample == 2 else "stop",
            "rewards/gsm8k": float(sample == 0 or group == prompts - 1),
            "rewards/format": None if sample == 1 else 0.5,
            "reward": 2.0 * (sample == 0 or group == prompts - 1) + 0.25 * (sample != 1),
            "advantage": 0.0 if group == prompts - 1 else 1.5 if sample == 0 else -0.5,
            "active": float(sample != 2),
            "extra": json.dumps({"seen": sample}) if sample == 3 else "{}",
            **{"prompt_ids": [1, 2], "completion_ids": [3, 4, 5], "sampler_logps": [-1.0, -0.5, -0.25]},
            **{"old_logps": None, "reference_logps": None},
        }
        for group in range(prompts)
        for sample in range(samples)
    ]


def write_rollout(run: Path, number: int, rows: list[dict] | None = None) -> None:
    path = rollouts.path(run / "grpo", number)
    rollouts.write(path, rollouts.Rollout(rows or rollout(number), "fingerprint", {"reward": 0.5}), "a test")
