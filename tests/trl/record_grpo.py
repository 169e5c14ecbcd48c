"""What TRL's GRPOTrainer makes of one rollout: run by hand with TRL on the path, as README.md says.

The trainer runs as it is; the answers, their sampler's log-probs and the rewards are given to it. Its correction for a
sampler, which it has for vLLM only, is switched on after it was made: TRL's vLLM needs CUDA, its arithmetic does not.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from pathlib import Path

import datasets
import peft
import torch
import transformers
import trl
from fixtures import tiny_model_dir
from peft import set_peft_model_state_dict
from record import FIXED, SHAPE, VALUES, gradient, model_with, tokenizer
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

# Groups: tokens of the prompt; of each answer its tokens, whether the last is EOS, and its two rewards

GROUPS = [
    (3, [(5, True, 1.0, 0.5), (1, True, 0.0, 0.1), (9, False, 0.0, None), (4, True, 1.0, 0.0)]),
    (11, [(2, True, 0.3, None), (12, False, None, None), (6, True, 0.9, 0.2), (3, True, None, 0.7)]),
    (1, [(7, True, 0.1, 0.1), (4, True, 0.1, 0.1), (2, True, 0.1, 0.1), (8, True, 0.1, 0.1)]),  # dead
    (6, [(3, True, 1.0, 1.0), (10, True, 0.0, 0.0), (1, False, 0.0, 0.0), (5, True, 0.0, 0.0)]),
]
WEIGHTS, MAX_TOKENS = {"right": 1.0, "form": 0.5}, 12
LOSSES = {name: {"loss_type": name} for name in ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo")}
LOSSES |= {"gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"}}
LOSSES["cispo"]["epsilon_high"] = 5.0
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
SAMPLER = {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.2}
ON_POLICY = {
    **LOSSES,
    "grpo, beta": {"loss_type": "grpo", "beta": 0.3},
    "dapo, beta": {"loss_type": "dapo", "beta": 0.3},
    "dapo, beta, base": {"loss_type": "dapo", "beta": 0.3},
    **{
        f"{loss}, mask_truncated": {**LOSSES[loss], "mask_truncated_completions": True}
        for loss in ("dapo", "bnpo", "cispo", "grpo", "dr_grpo")
    },
    **{f"dapo, {mode}": {"loss_type": "dapo", **SAMPLER, "vllm_importance_sampling_mode": mode} for mode in MODES},
    **{
        f"dapo, beta, {mode}": {"loss_type": "dapo", "beta": 0.3, **SAMPLER, "vllm_importance_sampling_mode": mode}
        for mode in MODES
    },
    "gspo, sequence_truncate": {**LOSSES["gspo"], **SAMPLER, "vllm_importance_sampling_mode": "sequence_truncate"},
    "dapo, temperature 0.7, token_truncate": {"loss_type": "dapo", "temperature": 0.7, **SAMPLER},
    "dapo, scale batch": {"loss_type": "dapo", "scale_rewards": "batch"},
    "dapo, scale none": {"loss_type": "dapo", "scale_rewards": "none"},
    "dapo, normalize_then_sum": {"loss_type": "dapo", "multi_objective_aggregation": "normalize_then_sum"},
}
AFTER_AN_UPDATE = {
    **LOSSES,
    "dapo, epsilon_high 0.5": {"loss_type": "dapo", "epsilon": 0.1, "epsilon_high": 0.5},
    "grpo, delta 1.5": {"loss_type": "grpo", "delta": 1.5},
    "gspo, delta 1.3": {**LOSSES["gspo"], "delta": 1.3},
    "cispo, epsilon_high 1.2": {"loss_type": "cispo", "epsilon_high": 1.2},
    "sapo, temperatures": {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.5},
    "grpo, beta, base": {"loss_type": "grpo", "beta": 0.3},
    "gspo, beta, base": {**LOSSES["gspo"], "beta": 0.3},
    "dapo, token_mask": {"loss_type": "dapo", **SAMPLER, "vllm_importance_sampling_mode": "token_mask"},
}


def rollout(path: Path, vocabulary: int) -> list[dict]:
    """An answer each, group by group: ids, rewards, and log-probs of a sampler that is nearly the policy."""
    source, model = random.Random(1), model_with(path, VALUES / "policy").eval()
    eos, rows = FIXED.index("<|im_end|>"), []
    for prompt, answers in GROUPS:
        prompt_ids = [source.randrange(len(FIXED), vocabulary) for _ in range(prompt)]
        for length, ends, *rewards in answers:
            ids = [source.randrange(len(FIXED), vocabulary) for _ in range(length)]
            ids = [*ids[:-1], eos] if ends else ids
            with torch.no_grad():
                logps = model(input_ids=torch.tensor([prompt_ids + ids])).logits[0, prompt - 1 : -1].log_softmax(-1)
            sampled = [logps[i, token].item() + source.gauss(0, 0.2) for i, token in enumerate(ids)]
            rewards = dict(zip(WEIGHTS, rewards, strict=True))
            rows.append({"prompt": prompt_ids, "answer": ids, "rewards": rewards, "sampler_logps": sampled})
    rows[4]["sampler_logps"][1] = None  # one that the engine did not tell
    return rows


class Moved(TrainerCallback):
    """After the first step the policy is another: the adapter whose loss is asked."""

    def on_step_end(self, args, state, control, model=None, **_):
        set_peft_model_state_dict(model, load_file(VALUES / "policy" / "adapter_model.safetensors"))


def played(path: Path, rows: list[dict], name: str, arguments: dict, updated: bool) -> dict:
    """The last step of a trainer on the rollout; `updated`: sampled under the reference, trained as the policy."""
    with tempfile.TemporaryDirectory() as output:
        config = trl.GRPOConfig(
            **{
                "output_dir": output, "per_device_train_batch_size": len(rows), "num_generations": len(GROUPS[0][1]),
                "max_completion_length": MAX_TOKENS, "num_iterations": 1 + updated, "max_steps": 1 + updated,
                "learning_rate": 0.0, "weight_decay": 0.0, "use_cpu": True, "bf16": False, "max_grad_norm": 0.0,
                "gradient_checkpointing": False, "logging_steps": 1, "shuffle_dataset": False, "save_strategy": "no",
                "report_to": "none", "disable_tqdm": True, "reward_weights": [*WEIGHTS.values()],
            } | arguments
        )  # fmt: skip
        losses: list[float] = []

        class Trainer(trl.GRPOTrainer):
            def compute_loss(self, *args, **kwargs):
                loss = super().compute_loss(*args, **kwargs)
                losses.append(loss.item())
                return loss

        def reward(which: str):
            def function(completion_ids, **_):
                assert completion_ids == [row["answer"] for row in rows]
                return [row["rewards"][which] for row in rows]

            function.__name__ = which
            return function

        model = model_with(path, VALUES / "reference")
        trainer = Trainer(
            model=model, args=config, reward_funcs=[reward(which) for which in WEIGHTS],
            train_dataset=datasets.Dataset.from_list([{"prompt": f"t{6 + i}"} for i in range(len(GROUPS))]),
            processing_class=tokenizer(model.config.vocab_size), callbacks=[Moved()] if updated else [],
            rollout_func=lambda prompts, _: {
                "prompt_ids": [row["prompt"] for row in rows], "completion_ids": [row["answer"] for row in rows],
                "logprobs": [row["sampler_logps"] for row in rows],
            },
        )  # fmt: skip
        if "base" in name:
            model.delete_adapter("ref")
        if not updated:
            set_peft_model_state_dict(model, load_file(VALUES / "policy" / "adapter_model.safetensors"))
        trainer.use_vllm, trainer._last_loaded_step = "vllm_importance_sampling_mode" in arguments, 0
        found: list[torch.Tensor] = []
        trainer.create_optimizer().register_step_pre_hook(lambda *_: found.append(gradient(model)))
        trainer.train()
        logged = [line for line in trainer.state.log_history if "loss" in line]
    metrics = {key: value for line in logged for key, value in line.items() if isinstance(value, float)}
    assert all(math.isfinite(value) for value in metrics.values())
    advantages = [*trainer._logs["advantages"]]
    return {"loss": losses[-1], "metrics": metrics, "advantages": advantages, "gradient": found[-1]}


def main() -> None:
    torch.set_num_threads(1)
    found, gradients = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        path = tiny_model_dir(Path(scratch), **SHAPE)
        rows = rollout(path, model_with(path, VALUES / "policy").config.vocab_size)
        cases = [(name, arguments, False) for name, arguments in ON_POLICY.items()]
        cases += [(name, arguments, True) for name, arguments in AFTER_AN_UPDATE.items()]
        for kind, arguments, updated in cases:
            name = kind + " after an update" * updated
            case = played(path, rows, kind, arguments, updated)
            gradients[name] = case.pop("gradient")
            found[name] = {"arguments": arguments, "updated": updated, "base": "base" in kind} | case
            print(f"{name:50} loss {case['loss']:.7f}  |gradient| {gradients[name].norm():.5f}", flush=True)
    versions = {module.__name__: module.__version__ for module in (trl, transformers, peft, torch)}
    lines = {
        "versions": versions, "weights": WEIGHTS, "samples": len(GROUPS[0][1]), "max_tokens": MAX_TOKENS,
        "rollout": rows, "cases": found,
    }  # fmt: skip
    (VALUES / "grpo.json").write_text(json.dumps(lines, indent=None) + "\n")
    save_file(gradients, VALUES / "grpo_gradients.safetensors")
    print(versions)


if __name__ == "__main__":
    main()
