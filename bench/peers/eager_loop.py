"""The loop one writes by hand: transformers + PEFT, an answer a padded row, log-softmax of all logits."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from bench.peers.watch import Watch
from bench.peers.work import Work
from spinfast.objectives import ADVANTAGE
from spinfast.types import Group


def stock_model(work: Work) -> PeftModel:
    """The base as transformers loads it, the common adapter on it, trainable in fp32."""
    base = AutoModelForCausalLM.from_pretrained(work.model, dtype=work.torch_dtype).to(work.device)
    model = PeftModel.from_pretrained(base, work.adapter, is_trainable=True, autocast_adapter_dtype=True)
    model.train()
    return model


def play(work: Work, watch: Watch) -> dict:
    model = stock_model(work)
    if work.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    watch.loaded(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=work.lr, weight_decay=0.0)
    watch.optimizer(optimizer, model)
    groups = work.groups()
    steps = [groups[i : i + work.pairs_per_step] for i in range(0, len(groups), work.pairs_per_step)]
    if work.method in ("spin", "dpo"):
        with watch.phase("score"), torch.no_grad():
            reference = [sequence_logps(model, step, work) for step in steps]
    with watch.phase("train"):
        for number, step in enumerate(steps):
            logps_PA = sequence_logps(model, step, work)
            lengths_PA = torch.tensor([group.lengths for group in step], device=work.device)
            if work.method == "sft":
                loss = -logps_PA.sum() / lengths_PA.sum()
            elif work.method == "grpo":  # ratios of 1 have the gradient of the log-probs
                advantages_PA = torch.tensor([group.given[ADVANTAGE] for group in step], device=work.device)
                loss = -(advantages_PA * (lengths_PA + logps_PA - logps_PA.detach())).sum() / lengths_PA.sum()
            else:
                chosen_P, rejected_P = (logps_PA - reference[number]).unbind(1)
                loss = -logsigmoid(work.beta * (chosen_P - rejected_P)).mean()
            (loss * work.loss_scale).backward()
            for parameter in trained:
                parameter.grad.div_(work.loss_scale)
            torch.nn.utils.clip_grad_norm_(trained, work.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            watch.step(loss.item())
    return {"scored_positions": "all"}


def sequence_logps(model, groups: list[Group], work: Work) -> torch.Tensor:
    """(pairs, answers of each): summed log-probs."""
    rows = [(g.prompt_ids + answer, len(g.prompt_ids)) for g in groups for answer in g.answers]
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), work.pad_id)
    mask, answer = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (tokens, prompt) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        answer[row, prompt : len(tokens)] = 1
    ids, mask, answer = (t.to(work.device) for t in (ids, mask, answer))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    logps = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return (logps * answer[:, 1:]).sum(1).view(len(groups), -1)
