"""One real row of every format that data may have, and the page that shows them: docs/data.md is its output.

python tests/data_rows.py > docs/data.md
"""

from __future__ import annotations

import json
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory

ASKED = {"role": "user", "content": "How many eggs?"}
TWELVE, DOZEN = ({"role": "assistant", "content": text} for text in ("Twelve.", "A dozen."))
SURE = {"role": "user", "content": "Sure?"}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Today's weather.", "parameters": {"type": "object"}},
}
FORMATS: dict[str, tuple[str, list[dict]]] = {  # what it is -> (who learns from it, rows)
    "plain text, no template": ("sft", [{"text": "Twelve eggs are a dozen."}]),
    "token ids, as other trainers prepare them": (
        "sft",
        [
            {
                "input_ids": [40, 74, 288, 34, 224, 55, 278, 315, 17, 2],
                "labels": [-100, -100, -100, -100, 224, 55, 278, 315, 17, 2],
            }
        ],
    ),
    "a conversation (OpenAI's form)": ("sft, spin", [{"messages": [ASKED, TWELVE, SURE, DOZEN]}]),
    "turns that are not learnt from": (
        "sft",
        [
            {"messages": [ASKED, {**TWELVE, "weight": 0}, SURE, DOZEN]},
            {"messages": [ASKED, TWELVE, SURE, {**DOZEN, "train": False}]},
        ],
    ),
    "a conversation with tools and reasoning": (
        "sft",
        [
            {
                "messages": [
                    {"role": "user", "content": "Rain?"},
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"function": {"name": "weather", "arguments": {}}}],
                    },
                    {"role": "tool", "content": "dry"},
                    {"role": "assistant", "content": "No.", "reasoning_content": "It says dry."},
                ],
                "tools": [WEATHER],
                "chat_template_kwargs": {"enable_thinking": True},
            }
        ],
    ),
    "a conversation (ShareGPT's form)": (
        "sft, spin",
        [
            {
                "system": "Be brief.",
                "conversations": [{"from": "human", "value": "How many eggs?"}, {"from": "gpt", "value": "Twelve."}],
            }
        ],
    ),
    "prompt and completion": ("sft, spin", [{"prompt": "How many eggs?", "completion": "Twelve."}]),
    "the same as turns": ("sft, spin", [{"prompt": [ASKED, DOZEN, SURE], "completion": [TWELVE]}]),
    "Alpaca": (
        "sft, spin",
        [{"instruction": "Add.", "input": "5 and 7", "output": "Twelve.", "history": [["Ready?", "Yes."]]}],
    ),
    "question and answer, the result after ####": (
        "sft, spin",
        [
            {"question": "Five and seven?", "answer": "5 + 7 = 12\n#### 12"},
            {"question": "Five and seven?", "answer": "Twelve.", "reference": "12"},
        ],
    ),
    "a preference": ("dpo", [{"prompt": "How many eggs?", "chosen": "Twelve.", "rejected": "Who knows?"}]),
    "a preference whose prompt is what both begin with": (
        "dpo",
        [{"chosen": [ASKED, TWELVE], "rejected": [ASKED, {"role": "assistant", "content": "Who knows?"}]}],
    ),
    "a transcript (hh-rlhf)": (
        "dpo",
        [
            {
                "chosen": "\n\nHuman: How many eggs?\n\nAssistant: Twelve.",
                "rejected": "\n\nHuman: How many eggs?\n\nAssistant: Who knows?",
            }
        ],
    ),
    "SPIN's own pairs": ("dpo, spin (real alone)", [{"real": [ASKED, TWELVE], "generated": [ASKED, DOZEN]}]),
    "ranked answers, best first": (
        "dpo",
        [{"prompt": "How many eggs?", "responses": ["Twelve.", "Ten.", "Who knows?"]}],
    ),
    "scored answers": ("dpo", [{"prompt": "How many eggs?", "responses": ["Ten.", "Twelve."], "scores": [2.5, 9]}]),
    "a labelled answer": (
        "dpo with kto, apo_zero_unpaired; sft (true alone)",
        [
            {"prompt": "How many eggs?", "completion": "Twelve.", "label": True},
            {"prompt": "How many eggs?", "completion": "Ten.", "label": False},
        ],
    ),
    "a prompt alone, any columns beside it": (
        "grpo",
        [
            {"prompt": "How many eggs?", "target": 12, "tests": ["is_number"]},
            {"prompt": [ASKED], "solution": "$12$"},
            {"messages": [ASKED, TWELVE, SURE], "ground_truth": 12},
        ],
    ),
    "a problem and its solution": (
        "grpo; sft, spin with columns: {question: problem, answer: solution}",
        [{"problem": "Five and seven?", "solution": "It is \\boxed{12}.", "answer": "12", "source": "olympiads"}],
    ),
    "a question and its result": (
        "grpo; sft, spin learn the result as the answer",
        [{"question": "Five and seven?", "answer": "12", "metadata": {"difficulty": 1}}],
    ),
    "the rows of verl": (
        "grpo",
        [
            {
                "data_source": "openai/gsm8k",
                "prompt": [ASKED],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": "12"},
                "extra_info": {"index": 0, "split": "train"},
            }
        ],
    ),
}
TOOLS = (  # a ChatML template that writes tools, calls and reasoning
    "{% if tools %}<|im_start|>system\n{{ tools | map(attribute='function.name') | join }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}{% if enable_thinking %}<think>{{ m.reasoning_content }}</think>{% endif %}{% endif %}"
    "{{ m.content or '' }}{% for c in m.tool_calls %}<call>{{ c.function.name }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INTRODUCTION = """# Data: every format with a real row

Rows are recognised by their columns, in the order of `spinfast/data/formats.py`; `data.columns` gives a column
another name (`data.columns={question: problem, answer: solution}`). A prompt stands in `prompt`, `question` or
`instruction` (for `grpo` in `problem` too), with `system` and `history` before it where there are. `tools` and
`chat_template_kwargs` go to the chat template, `reference` is what a held-out answer is compared with. A column that
looks like one of these and is not used is named in a warning.

Below, what is learnt from is **bold**; what stands before it is the prompt, as the model's own template writes it
(here ChatML; `⏎` is a line end). The page is made by the tests (`python tests/data_rows.py`), from these very rows.

- `data.turns` says which answers of a conversation are learnt: `first` (default), `last` or `all`. `all` is one
  packed row with several scored spans; a template that rewrites history (it drops earlier reasoning) is refused there
  by name.
- `prompt.max_prompt_tokens`, `prompt.max_answer_tokens`: longer rows are left out and counted; `prompt.overlong: cut`
  keeps the start of such answers, without an end-of-turn token.
- A string prompt is a user's turn and gets the chat template (TRL writes strings without one); for none use `text`.
- `grpo` writes the answers itself. Where it is among the methods, a row may be a prompt alone: it has no answer, or
  turns that end in a user's; an answer that is no text, or too long, is left out and counted, its prompt is used. `sft`
  and `spin` leave prompts alone out and count them. Held-out prompts are answered and compared with their reference.
- Reward functions get every column of the row under its own name, and under that which `data.columns` gives it; only
  pictures, sound and bytes are left out, by name. Rows of one prompt and one reference are equal, whatever their other
  columns (an id); without a reference any column tells two rows apart.
- Equal rows, and pairs whose two answers are equal, are dropped and counted. Faulty rows stop the run with their file
  and line; `data.bad_rows: skip` counts them.

| the file | what it may be |
|---|---|
| `data.source` | a hub id, a file, a glob or folder of files, a `save_to_disk` folder, or a list of them with weights |
| files | .jsonl, .json (list, wrapped list, objects), .csv, .tsv, .parquet, .arrow, each also .gz, .zst or .bz2 |
| `data.split` | a split, or a part of one: `train[:25%]`, `train+test` |

- A file is told by its first bytes; its name tells CSV from JSON. What holds no rows (a Git LFS pointer, a web page, a
  pickle, UTF-16) is called so. A cell of CSV is text as it is written (`007`), an empty one is null; `;`, `|` and tabs
  are seen in the header.
- A file is the split `train`, and the one its own name says (`test.jsonl`). A folder has the splits that the hub would
  see: those of the configs in its README.md (`data.subset`), else by the names of its files and folders.
- A list mixes sources, each with its own settings; the section's hold for what one leaves out:
  `source: [{source: a.jsonl, weight: 0.7}, {source: b.parquet, weight: 0.3, split: test, columns: {question: q}}]`.
  Weights are shares of `data.size` rows; without it the scarcest source is used up, and no row is there twice. Without
  weights the sources are as one. A prompt's number counts through all of them; equal examples are used once.

## A reference of one's own

`dpo` scores its reference once and leaves it in `reference.parquet`: a row per answer with `group`, `answer` (0 the
best), `tokens` (blake2b-128 of the little-endian int32 numbers: length of the prompt, length of the answer, both
ids), `length` and `logp` (sum in nats). The schema's metadata names the model's revision, the adapter's fingerprint,
the dtype. `dpo.reference: FILE.parquet` takes such a file, of another run or made by another tool, in any order; a
group that is not in it is an error.

"""


def page() -> str:
    parts = [INTRODUCTION.rstrip()]
    for name, (who, rows) in FORMATS.items():
        parts.append(f"## {name[0].upper()}{name[1:]}\n\nFor: {who}.")
        for row in rows:
            parts.append(f"```json\n{json.dumps(row, ensure_ascii=False)}\n```")
            parts.append("\n".join(f"- {line}" for line in shown(row, "grpo" in who)))
    return "\n\n".join(parts) + "\n"


def shown(row: dict, alone: bool) -> list[str]:
    """The row as it is learnt: answers best first, scored tokens bold; with `alone` it may be a prompt alone."""
    from fixtures import tiny_tokenizer

    from spinfast.data.examples import load_examples
    from spinfast.data.renderer import Renderer

    renderer = Renderer(tiny_tokenizer(TOOLS) if "tools" in row else tiny_tokenizer())
    with TemporaryDirectory() as directory:
        path = Path(directory) / "row.jsonl"
        path.write_text(json.dumps(row) + "\n")
        options = {"max_prompt_tokens": 999, "max_answer_tokens": 999, "turns": "all", "prompts_alone": alone}
        (example,) = load_examples(str(path), renderer=renderer, **options).examples
    lines = []
    labels = {True: "desirable: ", False: "undesirable: "}
    for number, answer in enumerate((example.real_ids, *example.others), 1):
        label = labels.get(example.desirable, f"answer {number}: " if example.others else "")
        spans = groupby(zip(example.scored or (True,) * len(answer), answer, strict=True), key=itemgetter(0))
        marks = [
            (mark := "**" * learnt) + _code(renderer, [token for _, token in span]) + mark for learnt, span in spans
        ]
        lines.append(" ".join([label + _code(renderer, example.prompt_ids), *marks]))
    if example.reference is not None:
        lines.append(f"reference: `{example.reference}`")
    return lines


def _code(renderer, ids) -> str:
    text = renderer.tokenizer.decode(list(ids)).replace("\n", "⏎")
    return f"`{text}`"


if __name__ == "__main__":
    print(page(), end="")
