"""TRL's DPOTrainer, SFTTrainer or GRPOTrainer on the same token ids, in the same order; nothing else is changed.

DPO plain (a reference forward in every step; the reference is TRL's own copy of the adapter it starts from), with the
reference's log-probs computed once before, SFT also without padding, both with Liger's kernels or Unsloth's model.
"""

from __future__ import annotations

from functools import partial

import torch
from datasets import Dataset
from peft import set_peft_model_state_dict
from transformers import AutoTokenizer

from bench.peers.eager_loop import stock_model
from bench.peers.watch import Watch
from bench.peers.work import Work
from spinfast.policy.adapters import files as adapters


def plain(work: Work, watch: Watch, **options) -> dict:
    return _play(work, watch, stock_model(work), **options)


precomputed = partial(plain, precompute_ref_log_probs=True)
padding_free = partial(plain, padding_free=True)
liger = partial(plain, use_liger_kernel=True)


def unsloth(work: Work, watch: Watch) -> dict:
    """Unsloth must be imported before TRL: it rewrites it."""
    from unsloth import FastLanguageModel

    longest = max(len(g.prompt_ids) + max(map(len, g.answers)) for g in work.groups())
    base, _ = FastLanguageModel.from_pretrained(
        work.model, max_seq_length=longest, dtype=work.torch_dtype, load_in_4bit=False
    )
    adapter = adapters.load(work.adapter)
    names = adapter.config["target_modules"]
    model = FastLanguageModel.get_peft_model(
        base, r=adapter.config["r"], lora_alpha=adapter.config["lora_alpha"], target_modules=names, lora_dropout=0.0,
        use_gradient_checkpointing="unsloth" if work.gradient_checkpointing else False,
    )  # fmt: skip
    set_peft_model_state_dict(model, adapter.tensors)
    return _play(work, watch, model)


def _play(work: Work, watch: Watch, model: torch.nn.Module, **options) -> dict:
    import trl

    losses: list[torch.Tensor] = []  # of the step that is under way
    config_of, trainer_of, given = {"sft": _sft, "grpo": _grpo}.get(work.method, _dpo)(work, watch, trl)

    class Trainer(trainer_of):
        """TRL's, with a watch."""

        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            watch.optimizer(optimizer, self.model)
            return optimizer

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach())
            if len(losses) > 1:
                watch.step(losses.pop(0).item())
            return loss

    config = config_of(
        output_dir=work.scratch, num_train_epochs=1, learning_rate=work.lr, lr_scheduler_type="constant",
        optim="adamw_torch", weight_decay=0.0, max_grad_norm=work.max_grad_norm,
        fp16=work.dtype == "float16", bf16=False, gradient_checkpointing=work.gradient_checkpointing,
        use_cpu=work.device == "cpu", save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
        **options,
    )  # fmt: skip
    watch.loaded(model)
    trainer = Trainer(model=model, args=config, processing_class=AutoTokenizer.from_pretrained(work.model), **given)
    with watch.phase("train"):
        trainer.train()
        watch.step(losses.pop().item())
    return {"trl": trl.__version__, "scored_positions": "all" if work.device == "cpu" else "answers"} | (
        {"engine": "transformers"} if work.whole else {}
    )


def _dpo(work: Work, watch: Watch, trl):
    """Configuration, trainer on token ids in the file's order, what it is made with besides."""

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def _precompute_ref_logps(self, *args):
            with watch.phase("score"):
                return super()._precompute_ref_logps(*args)

    return partial(trl.DPOConfig, beta=work.beta, **_listed(work)), Trainer, {"train_dataset": _rows(work)}


def _sft(work: Work, watch: Watch, trl):
    class Trainer(trl.SFTTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

    return partial(trl.SFTConfig, **_listed(work)), Trainer, {"train_dataset": _rows(work)}


def _grpo(work: Work, watch: Watch, trl):
    """The rollout is given, or sampled by transformers: TRL's vLLM needs CUDA. A prompt's text is its number."""
    groups = work.groups()

    class Trainer(trl.GRPOTrainer):
        def _tokenize_prompts(self, prompts):
            return [list(groups[int(prompt)].prompt_ids) for prompt in prompts], None, {}

        def _generate_and_score_completions(self, inputs):
            with watch.phase("generate" if work.whole else "given"):
                return super()._generate_and_score_completions(inputs)

    def rollout(prompts, _):
        rows = [(groups[int(prompt)], i % work.samples) for i, prompt in enumerate(prompts)]
        return {
            "prompt_ids": [list(group.prompt_ids) for group, _ in rows],
            "completion_ids": [list(group.answers[sample]) for group, sample in rows],
            "logprobs": None,
        }

    def right(completion_ids, **_):
        assert not work.whole or {work.max_tokens} == {*map(len, completion_ids)}, "expected full answers"
        return work.rewards * (len(completion_ids) // work.samples)

    longest = max(len(answer) for group in groups for answer in group.answers)
    config = partial(
        trl.GRPOConfig, per_device_train_batch_size=work.pairs_per_step * work.samples, num_generations=work.samples,
        max_completion_length=longest, shuffle_dataset=False, generation_kwargs={"min_new_tokens": work.max_tokens},
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": str(number)} for number in range(len(groups))])
    given = {"train_dataset": prompts, "reward_funcs": [right], "rollout_func": None if work.whole else rollout}
    return config, Trainer, given


def _listed(work: Work) -> dict:
    """How rows become steps where there is no rollout."""
    return {
        "per_device_train_batch_size": work.pairs_per_step, "max_length": None, "train_sampling_strategy": "sequential",
    }  # fmt: skip


def _rows(work: Work) -> Dataset:
    return Dataset.from_list([*map(_row, work.groups())])


def _row(group) -> dict[str, list[int]]:
    """A group as TRL has it after its own preparation."""
    prompt, (chosen, *others) = list(group.prompt_ids), map(list, group.answers)
    if not others:
        return {"input_ids": prompt + chosen, "labels": [-100] * len(prompt) + chosen}
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": others[0]}
