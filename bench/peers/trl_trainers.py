"""TRL's DPOTrainer or SFTTrainer on the same token ids, in the same order; nothing else of it is changed.

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
    sft = work.method == "sft"

    class Trainer(trl.SFTTrainer if sft else trl.DPOTrainer):
        """TRL's, with token ids for texts, file order for a shuffle, and a watch."""

        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def _precompute_ref_logps(self, *args):
            with watch.phase("score"):
                return super()._precompute_ref_logps(*args)

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

    config = (trl.SFTConfig if sft else partial(trl.DPOConfig, beta=work.beta))(
        output_dir=work.scratch, per_device_train_batch_size=work.pairs_per_step, num_train_epochs=1,
        learning_rate=work.lr, lr_scheduler_type="constant", optim="adamw_torch", weight_decay=0.0,
        max_grad_norm=work.max_grad_norm, max_length=None, train_sampling_strategy="sequential",
        fp16=work.dtype == "float16", bf16=False, gradient_checkpointing=work.gradient_checkpointing,
        use_cpu=work.device == "cpu", save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
        **options,
    )  # fmt: skip
    watch.loaded(model)
    rows, tokenizer = Dataset.from_list([*map(_row, work.groups())]), AutoTokenizer.from_pretrained(work.model)
    trainer = Trainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    with watch.phase("train"):
        trainer.train()
        watch.step(losses.pop().item())
    return {"trl": trl.__version__, "scored_positions": "all" if work.device == "cpu" else "answers"}


def _row(group) -> dict[str, list[int]]:
    """A group as TRL has it after its own preparation."""
    prompt, (chosen, *others) = list(group.prompt_ids), map(list, group.answers)
    if not others:
        return {"input_ids": prompt + chosen, "labels": [-100] * len(prompt) + chosen}
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": others[0]}
