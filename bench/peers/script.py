"""The script one writes today: `python -m bench.peers.script generate|train DIR`. vLLM writes text, TRL reads it."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def generate(work: dict, scratch: Path) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        work["model"], dtype=work["dtype"], max_model_len=work["context"], enable_lora=True, max_lora_rank=16,
        enforce_eager=work["device"] == "cpu", max_num_seqs=64, max_num_batched_tokens=16384,
    )  # fmt: skip
    answers = llm.chat(
        [row["messages"] for row in work["rows"]],
        SamplingParams(temperature=1.0, max_tokens=work["max_tokens"]),
        lora_request=LoRARequest("opponent", 1, str(scratch / "adapter")),
    )
    texts = [{**row, "generated": answer.outputs[0].text} for row, answer in zip(work["rows"], answers, strict=True)]
    (scratch / "generated.json").write_text(json.dumps(texts))


def train(work: dict, scratch: Path) -> None:
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    def turn(text: str) -> list[dict]:
        return [{"role": "assistant", "content": text}]

    rows = [
        {"prompt": row["messages"], "chosen": turn(row["answer"]), "rejected": turn(row["generated"])}
        for row in json.loads((scratch / "generated.json").read_text())
    ]
    base = AutoModelForCausalLM.from_pretrained(work["model"], dtype=getattr(torch, work["dtype"])).to(work["device"])
    model = PeftModel.from_pretrained(base, scratch / "adapter", is_trainable=True)
    config = DPOConfig(
        output_dir=str(scratch / "trl"), per_device_train_batch_size=work["pairs_per_step"], num_train_epochs=1,
        beta=0.1, learning_rate=5e-5, lr_scheduler_type="constant", max_length=None, bf16=False,
        fp16=work["dtype"] == "float16", gradient_checkpointing=False, use_cpu=work["device"] == "cpu",
        precompute_ref_log_probs=True, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(work["model"])
    trainer = DPOTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(scratch / "trained"))


if __name__ == "__main__":
    directory = Path(sys.argv[2])
    {"generate": generate, "train": train}[sys.argv[1]](json.loads((directory / "script.json").read_text()), directory)
