"""Chat templates of the kinds in use, in few words: what counts is how each is built, not what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fixtures import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

GENERATE = "{% if add_generation_prompt %}"
ALTERNATE = (
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
)
SPLIT = (  # the system turn goes into the first user's
    "{% set turns = messages %}{% set first = '' %}{% if messages[0].role == 'system' %}"
    "{% set turns = messages[1:] %}{% set first = messages[0].content %}{% endif %}"
)
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
HEADER = GENERATE + "<|im_start|>assistant\n{% endif %}"

# Each with its end-of-turn token; the tokenizer's other special tokens are in SPECIAL.
WILD = {
    "chatml-default-system": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
        "{% for m in messages %}" + TURN + "{% endfor %}" + HEADER,
        "<|im_end|>",
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}",
        "</s>",
    ),
    "llama-2": (
        SPLIT + ALTERNATE + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
        "{% if loop.first and first %}<<SYS>>\n{{ first }}\n<</SYS>>\n\n{% endif %}{{ m.content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        "</s>",
    ),
    "mistral": (
        "{{ bos_token }}" + SPLIT + ALTERNATE + "{% if m.role == 'user' %}[INST] "
        "{{ first + '\n\n' if loop.first and first }}{{ m.content }}[/INST]"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        "</s>",
    ),
    "gemma": (
        "{{ bos_token }}"
        + SPLIT
        + ALTERNATE
        + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) }}\n"
        "{{ first + '\n\n' if loop.first and first }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        + GENERATE
        + "<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
    ),
    "phi-3": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        + GENERATE
        + "<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|end|>",
    ),
    "llama-3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        + GENERATE
        + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>",
    ),
    "plain-words": (
        "{% for m in messages %}{{ {'user': 'User: ', 'assistant': 'Assistant: '}.get(m.role, '') }}{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else '\n\n' }}{% endfor %}" + GENERATE + "Assistant:{% endif %}",
        "</s>",
    ),
}
SYSTEM_REQUIRED = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('a system turn is required') }}{% endif %}"
    "{% for m in messages %}" + TURN + "{% endfor %}" + HEADER
)
HEADERLESS = "{% for m in messages %}" + TURN + "{% endfor %}"
GENERATION = (  # tells transformers which tokens are the assistant's
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}" + HEADER
)
REASONING = (  # as Qwen3: reasoning is written for the last turn and taken out of earlier ones
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set thought = m.reasoning_content or '' %}"
    "{% set answer = m.content %}{% if m.role == 'assistant' and '</think>' in answer %}"
    "{% set thought = answer.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set answer = answer.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ answer }}<|im_end|>\n{% endfor %}" + GENERATE + "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
OPENED = (  # as R1's distillations: the prompt opens the reasoning, finished turns are written without it
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
    "{{ m.content.split('</think>')[-1] + eos_token }}{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
    + GENERATE
    + "<|assistant|><think>\n{% endif %}"
)
FORGETFUL = OPENED.replace("<think>\n", "")  # the same before its prompt opened the block
TOOLS = (  # as Qwen2.5 and Qwen3
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n{{ m.content or '' }}"
    '{% for call in m.tool_calls or [] %}<tool_call>\n{"name": "{{ call.function.name }}", "arguments": '
    "{{ ARGUMENTS }}}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}" + HEADER
)
TOOLS_AS_TEXT = TOOLS.replace("ARGUMENTS", "call.function.arguments")  # as DeepSeek's, or it prints Python's objects
TOOLS_JOINED = TOOLS.replace("ARGUMENTS", "'' + call.function.arguments")
TOOLS = TOOLS.replace("ARGUMENTS", "call.function.arguments | tojson")

SPECIAL = ["<s>", "</s>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def tokenizer(template: str, end: str = "<|im_end|>"):
    """The tiny tokenizer with the special tokens of all templates; `end` is its eos token."""
    made = tiny_tokenizer(template)
    made.add_special_tokens({"extra_special_tokens": SPECIAL, "bos_token": "<s>", "eos_token": end})
    return made


def metaspace_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """As Llama 2's: a text's first word gets a space before it, bytes stand for what has no token."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<pad>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False, min_frequency=1)
    backend.train_from_iterator(["How many? [INST] 42 [/INST] The sum is 42."], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=template
    )


def trl_template(name: str) -> str | None:
    """A real model's template as TRL ships it, or None without TRL."""
    spec = importlib.util.find_spec("trl")
    path = spec and Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja"
    return path.read_text() if path and path.is_file() else None
