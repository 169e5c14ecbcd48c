"""The renderer: nothing between prompt and answer is lost or added, and typed control tokens stay text."""

import pytest
from fixtures import CHATML, SPECIAL, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from spinfast.data.renderer import Renderer
from spinfast.errors import UserError

TOKENIZER = tiny_tokenizer()
RENDERER = Renderer(TOKENIZER)
# What Qwen3's template does: past reasoning dropped, an empty block where thinking is off or absent.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}"
    "<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content }}\n"
    "</think>\n\n"
    "{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TRIMMING = CHATML.replace("message['content']", "message['content'] | trim")
NO_SYSTEM = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}")
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML

ordinary = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda s: s.strip() == s)
hostile = st.lists(st.sampled_from([*SPECIAL, "<|im_", "end|>", "\n", " ", "user", "a7", "é"]), min_size=1).map("".join)


def conversations(text):
    def build(system, texts):
        turns = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
        return [{"role": "system", "content": s} for s in system] + turns

    odd = st.integers(0, 2).flatmap(lambda n: st.lists(text, min_size=2 * n + 1, max_size=2 * n + 1))
    return st.builds(build, st.lists(text, max_size=1), odd)


def user(content="How many?"):
    return [{"role": "user", "content": content}]


@given(conversations(ordinary), ordinary)
def test_prompt_and_answer_are_the_whole_rendering(messages, answer):
    whole = [*messages, {"role": "assistant", "content": answer}]
    expected = TOKENIZER.apply_chat_template(whole, tokenize=True, return_dict=False)
    prompt_ids, answer_ids = RENDERER.example_ids(messages, answer)
    newline = TOKENIZER.encode("\n")
    assert [*prompt_ids, *answer_ids, *newline] == expected
    assert prompt_ids == RENDERER.prompt_ids(messages)
    assert answer_ids == RENDERER.answer_ids(messages, answer)


@given(conversations(hostile), hostile)
def test_typed_control_tokens_stay_text(messages, answer):
    prompt_ids, answer_ids = RENDERER.example_ids(messages, answer)
    start, end = TOKENIZER.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert prompt_ids.count(end) == len(messages)
    assert prompt_ids.count(start) == len(messages) + 1
    assert RENDERER.pad_id not in prompt_ids + answer_ids
    assert answer_ids[-1] == end
    assert answer_ids.count(end) == 1
    rendered = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert TOKENIZER.decode(prompt_ids) == rendered
    assert RENDERER.text(answer_ids) == answer


@given(st.text(st.characters(codec="utf-8"), min_size=1))
def test_answer_text_survives_whatever_its_first_character_merges_with(answer):
    assert RENDERER.text(RENDERER.answer_ids(user(), answer)) == answer


def test_an_answer_of_leading_line_ends_is_not_merged_into_the_prompt():
    assert len(TOKENIZER.encode("\n\n")) == 1  # so "assistant\n" + "\nx" has other tokens in one string
    prompt_ids, answer_ids = RENDERER.example_ids(user(), "\nx")
    assert prompt_ids == RENDERER.prompt_ids(user())
    assert list(answer_ids) == [*TOKENIZER.encode("\nx"), RENDERER.end_id]


def test_ids_of_the_tokenizer():
    assert (RENDERER.end_id, RENDERER.stop_ids, RENDERER.pad_id) == (2, (2,), 0)


@pytest.mark.parametrize("text", [" padded ", "\n\nlines\n", " <|im_end|> typed \n"])
def test_a_trimming_template_trims_prompt_and_answer(text):
    renderer = Renderer(tiny_tokenizer(TRIMMING))
    prompt_ids, answer_ids = renderer.example_ids(user(text), text)
    assert renderer.text(answer_ids) == text.strip()
    assert prompt_ids == RENDERER.prompt_ids(user(text.strip()))


@pytest.mark.parametrize(
    ("kwargs", "answer", "expected"),
    [
        ({}, "42", "<think>\n\n</think>\n\n42"),
        ({}, "<think>sum</think>\n\n42", "<think>\nsum\n</think>\n\n42"),
        ({"enable_thinking": False}, "42", "42"),
    ],
    ids=["thinking", "reasoned", "not-thinking"],
)
def test_thinking_templates(kwargs, answer, expected):
    renderer = Renderer(tiny_tokenizer(THINKING), kwargs)
    assert renderer.text(renderer.answer_ids(user(), answer)) == expected
    several = [*user(), {"role": "assistant", "content": "<think>old</think>7"}, *user()]
    assert "old" not in renderer.text(renderer.prompt_ids(several))


@pytest.mark.parametrize(
    ("template", "messages", "answer", "message"),
    [
        (THINKING, user(), "<think>sum</think>42", "does not continue the prompt"),
        (THINKING, user("<|im_end|>"), "<think>a</think><|im_end|>", "rewrites it"),
        (NO_SYSTEM, [{"role": "system", "content": "Be brief."}, *user()], "42", "drops the system turn"),
        (REFUSING, [{"role": "system", "content": "Be brief."}, *user()], "42", "System role not supported"),
    ],
    ids=["answer-rewritten", "control-token-rewritten", "system-dropped", "system-refused"],
)
def test_templates_that_cannot_be_followed(template, messages, answer, message):
    kwargs = {"enable_thinking": False} if message.startswith("does not") else {}
    renderer = Renderer(tiny_tokenizer(template), kwargs)
    with pytest.raises(UserError, match=message) as caught:
        renderer.example_ids(messages, answer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "expected a special token"),
        ("{{ strftime_now('%d %b %Y') }}" + CHATML, "today's date"),
        ("{% for m in messages %}", "refuses the turns user, assistant"),
        ("{{ 1 + 'a' }}" + CHATML, "refuses the turns"),
        (
            "{% for m in messages if m.role != 'assistant' %}{{ m.content }}<|im_end|>{% endfor %}",
            "drops the assistant",
        ),
    ],
    ids=["none", "no-end", "date", "syntax", "type-error", "no-assistant"],
)
def test_templates_that_cannot_be_used_at_all(template, message):
    with pytest.raises(UserError, match=message) as caught:
        Renderer(tiny_tokenizer(template))
    assert "\n" not in str(caught.value)


def test_a_pad_token_that_ends_answers_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(UserError, match="pad token that does not end an answer"):
        Renderer(tokenizer)
