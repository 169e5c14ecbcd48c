"""What TRL makes of one batch: run by hand with TRL on the path, as README.md says.

Its trainers run as they are, data preparation included, on texts whose every word is one token. A case is what one
`train()` of one step did: the loss, the adapter's gradient as the optimizer found it, what was logged.
"""

from __future__ import annotations

import json
import random
import tempfile
from contextlib import contextmanager
from pathlib import Path

import datasets
import peft
import torch
import transformers
import trl
from fixtures import tiny_model_dir
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from spinfast.config import Lora
from spinfast.device import profile
from spinfast.ops import EAGER
from spinfast.policy.transformers import load_policy

VALUES = Path(__file__).parent / "values"
SHAPE = {"layers": 1, "hidden": 32}  # of tests/fixtures.tiny_model_dir
EOS = "<|im_end|>"
FIXED = ("<|pad|>", "<|im_start|>", EOS, "<|endoftext|>", "user", "assistant")
TEMPLATE = (  # one space between tokens; the end of an assistant's turn belongs to it
    "{% for message in messages %}<|im_start|> {{ message['role'] }} "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }} <|im_end|>{% endgeneration %} "
    "{% else %}{{ message['content'] }} <|im_end|> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)

# The data: numbers of tokens; every completion gets EOS beside, so that 0 makes an answer of one token ---------------

PAIRS = [(3, 5, 4), (12, 1, 9), (1, 0, 3), (7, 14, 0), (20, 6, 6)]  # prompt, chosen, rejected
ROWS = [(4, 6, True), (9, 0, False), (2, 11, True), (15, 3, True), (6, 8, False), (1, 5, False)]  # with a label
CONVERSATIONS = [(3, 4), (5, 1, 2, 6), (1, 2, 8, 1, 4, 3)]  # user, assistant, user ...
TEXTS = [9, 1, 14]


class Words:
    """Random tokens as text, the same for each run."""

    def __init__(self, vocabulary: int):
        self.source, self.vocabulary = random.Random(0), vocabulary

    def __call__(self, count: int) -> str:
        return "".join(f" t{self.source.randrange(len(FIXED), self.vocabulary)}" for _ in range(count))


def data(vocabulary: int) -> dict[str, list[dict]]:
    words = Words(vocabulary)
    pairs = [{"prompt": words(p), "chosen": words(c), "rejected": words(r)} for p, c, r in PAIRS]
    rows = [{"prompt": words(p), "completion": words(c), "label": label} for p, c, label in ROWS]
    short = [pair | {"prompt": pair["prompt"].rsplit(" ", 1)[1]} for pair in pairs]
    talks = [
        {"messages": [{"role": ("user", "assistant")[i % 2], "content": words(n).strip()} for i, n in enumerate(turns)]}
        for turns in CONVERSATIONS
    ]
    texts = [{"text": words(n)} for n in TEXTS]
    answers = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    return {"pairs": pairs, "short": short, "rows": rows, "talks": talks, "answers": answers, "text": texts}


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A word for each id of the model."""
    words = [*FIXED, *(f"t{i}" for i in range(len(FIXED), vocabulary))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|pad|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=FIXED[0], eos_token=EOS, chat_template=TEMPLATE)


# The cases: name -> trainer, data, arguments -------------------------------------------------------------------------

DPO = {name: {"loss_type": name} for name in (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero",
    "apo_down", "discopop", "sft",
)}  # fmt: skip
DPO["robust"]["label_smoothing"], DPO["exo_pair"]["label_smoothing"] = 0.1, 1e-3
DPO |= {
    "sigmoid, beta 0.5": {"loss_type": "sigmoid", "beta": 0.5},
    "hinge, beta 1": {"loss_type": "hinge", "beta": 1.0},  # of some pairs 0
    "discopop, tau 0.5": {"loss_type": "discopop", "discopop_tau": 0.5},
    "exo_pair, label_smoothing 0.1": {"loss_type": "exo_pair", "label_smoothing": 0.1},
    "sigmoid + sft": {"loss_type": ["sigmoid", "sft"]},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
}
KTO = {
    "kto": {},
    "kto, beta 0.5, weights": {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.5},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
    "apo_zero_unpaired, weights": {"loss_type": "apo_zero_unpaired", "undesirable_weight": 2.0},
}
CPO = {
    "cpo": {},
    "cpo, label_smoothing 0.1": {"label_smoothing": 0.1},
    "cpo, alpha 0": {"cpo_alpha": 0.0},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5},
    "simpo, label_smoothing 0.1": {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "label_smoothing": 0.1},
    "cpo-simpo": {"loss_type": "simpo", "cpo_alpha": 1.0, "beta": 2.0, "simpo_gamma": 1.0},
}
# ORPO's likelihood term is over the prompt's tokens as well: with one of them, which nothing predicts, it is ours
ORPO = {"orpo": {}, "orpo, beta 0.5": {"beta": 0.5}}
SFT = {
    "sft completion only": ("answers", {}),
    "sft whole rows": ("answers", {"completion_only_loss": False}),
    "sft assistant only": ("talks", {"assistant_only_loss": True}),
    "sft conversations": ("talks", {}),
    "sft text": ("text", {}),
    "sft completion only, accumulated": (
        "answers",
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
    ),
}


STARTS = {"": ("reference", "policy"), " at start": ("policy", "policy")}  # where the trainer starts, where it is asked


def cases():
    """(name, trainer, its config, kind of rows, arguments, adapter of the start, adapter of the step)."""
    for name, arguments in DPO.items():
        for when, ends in STARTS.items():
            yield name + when, trl.DPOTrainer, trl.DPOConfig, "pairs", arguments, *ends
    for name, arguments in KTO.items():
        for when, ends in {**STARTS, " reversed": ("policy", "reference")}.items():  # a KL below 0 is 0
            yield name + when, trl.KTOTrainer, trl.KTOConfig, "rows", arguments, *ends
    for name, arguments in CPO.items():
        yield name, CPOTrainer, CPOConfig, "pairs", arguments, "policy", "policy"
    for name, arguments in ORPO.items():
        yield name, ORPOTrainer, ORPOConfig, "short", arguments, "policy", "policy"
    for name, (kind, arguments) in SFT.items():
        yield name, trl.SFTTrainer, trl.SFTConfig, kind, arguments, "policy", "policy"


# One case ------------------------------------------------------------------------------------------------------------


def model_with(path: Path, adapter: Path) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter, is_trainable=True)


TIMES = ("epoch", "step", "learning_rate")


def gradient(model: PeftModel) -> torch.Tensor:
    """Of A and B end to end, in the order of their names in a saved adapter."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if ".default." in name}
    return torch.cat([found[name].flatten() for name in sorted(found)])


@contextmanager
def sums_of(model: PeftModel):
    """The log-prob sums of each forward with TRL's head, in the order of the calls."""
    found: list[list[float]] = []

    def keep(_module, _arguments, output):
        if getattr(output, "log_probs", None) is not None:
            found.append(output.log_probs.detach().sum(1).tolist())

    handle = model.register_forward_hook(keep)
    yield found
    handle.remove()


def played(model_dir: Path, trainer_type, config_type, rows: list[dict], arguments: dict, start: str, end: str) -> dict:
    """One step of a trainer on all rows, as one batch where the arguments say no other."""
    with tempfile.TemporaryDirectory() as output:
        config = config_type(
            **{
                "output_dir": output, "per_device_train_batch_size": len(rows), "max_steps": 1, "use_cpu": True,
                "bf16": False, "gradient_checkpointing": False, "max_grad_norm": 0.0, "logging_steps": 1,
                "train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": "none",
                "disable_tqdm": True,
            } | arguments
        )  # fmt: skip
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, VALUES / start, is_trainable=True)
        words = tokenizer(base.config.vocab_size)
        losses: list[float] = []  # of the step's batches

        class Trainer(trainer_type):
            def compute_loss(self, *args, **kwargs):
                loss = super().compute_loss(*args, **kwargs)
                losses.append(loss.item())
                return loss

        rows = datasets.Dataset.from_list(rows)
        trainer = Trainer(model=model, args=config, train_dataset=rows, processing_class=words)
        set_peft_model_state_dict(model, load_file(VALUES / end / "adapter_model.safetensors"))  # no longer the start
        found: list[torch.Tensor] = []
        trainer.create_optimizer().register_step_pre_hook(lambda *_: found.append(gradient(model)))
        with sums_of(model) as forwards:
            trainer.train()
        metrics = {name: value for name, value in trainer.state.log_history[0].items() if name not in TIMES}
    return {
        "loss": sum(losses), "metrics": metrics, "sums": forwards, "gradient": found[0],
        "rows": [*map(prepared, trainer.train_dataset)],
    }  # fmt: skip


def prepared(row: dict) -> dict:
    """A row as its trainer had it: prompt, answers, label, and which tokens of the answers are scored if not all."""
    if "prompt_ids" in row:
        names = ("chosen_ids", "rejected_ids", "completion_ids", "KL_completion_ids")
        answers = [row[name] for name in names if name in row]
        return {"prompt": row["prompt_ids"], "answers": answers} | {k: row[k] for k in ("label",) if k in row}
    sides = [
        (row[f"{side}input_ids"], row[f"{side}labels"])
        for side in ("", "chosen_", "rejected_")
        if f"{side}labels" in row
    ]
    begin = max(1, [label >= 0 for label in sides[0][1]].index(True))  # nothing predicts the first token
    scored = [[label >= 0 for label in labels[begin:]] for _, labels in sides]
    found = {"prompt": sides[0][0][:begin], "answers": [ids[begin:] for ids, _ in sides]}
    return found if all(map(all, scored)) else found | {"scored": scored}


# All -----------------------------------------------------------------------------------------------------------------


def adapters(model_dir: Path) -> None:
    """The policy and its reference: random A and B, some nats apart in the log-probs of the answers."""
    lora = Lora(r=2, alpha=4)
    policy = load_policy(
        model_dir, "tiny", None, lora=lora, ops=EAGER, profile=profile("cpu", dtype="float32"), load_in_4bit=False,
        seed=0,
    )  # fmt: skip
    source = torch.Generator().manual_seed(4)
    for name, noise in (("reference", 0.3), ("policy", 0.1)):
        for parameter in policy.trainable_parameters().values():
            parameter.data += noise * torch.randn(parameter.shape, generator=source)
        policy.save_adapter(VALUES / name)


def main() -> None:
    torch.set_num_threads(1)
    VALUES.mkdir(exist_ok=True)
    found, rows, gradients = {}, {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = tiny_model_dir(Path(scratch), **SHAPE)
        adapters(model_dir)
        given = data(AutoConfig.from_pretrained(model_dir).vocab_size)
        for name, trainer, config, kind, arguments, start, end in cases():
            case = played(model_dir, trainer, config, given[kind], arguments, start, end)
            gradients[name], used = case.pop("gradient"), case.pop("rows")
            key = next((key for key, known in rows.items() if known == used), f"{trainer.__name__}: {name}")
            rows[key] = used
            found[name] = {"trainer": trainer.__name__, "arguments": arguments, "start": start, "end": end} | case
            found[name]["rows"] = key
            print(f"{name:40} loss {case['loss']:.7f}  |gradient| {gradients[name].norm():.5f}", flush=True)
    versions = {module.__name__: module.__version__ for module in (trl, transformers, peft, torch)}
    lines = {"versions": versions, "rows": rows, "cases": found}
    (VALUES / "values.json").write_text(json.dumps(lines, indent=None) + "\n")
    save_file(gradients, VALUES / "gradients.safetensors")
    print(versions)


if __name__ == "__main__":
    main()
