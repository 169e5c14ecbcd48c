"""The renderer: nothing between prompt and answer is lost or added, and typed control tokens stay text."""

import itertools
import json
import logging

import pytest
from chat_templates import (
    FORGETFUL,
    GENERATION,
    HEADERLESS,
    OPENED,
    REASONING,
    SYSTEM_REQUIRED,
    TOOLS,
    TOOLS_AS_TEXT,
    TOOLS_JOINED,
    WILD,
    metaspace_tokenizer,
    tokenizer,
    trl_template,
)
from chat_templates import (
    SPECIAL as WILD_SPECIAL,
)
from fixtures import CHATML, SPECIAL, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from test_conversations import TOOL, case

from spinfast.data.conversations import RowError, learnt, template_variables, turns, with_system
from spinfast.data.renderer import Renderer
from spinfast.errors import UserError

TOKENIZER = tiny_tokenizer()
RENDERER = Renderer(TOKENIZER)
TRIMMING = CHATML.replace("message['content']", "message['content'] | trim")
NO_SYSTEM = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}")
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML

spells_no_token = st.characters(codec="utf-8", exclude_characters="<[")  # which the generator would pick up from here
ordinary = st.text(spells_no_token, min_size=1).filter(lambda s: s.strip() == s)
hostile = st.lists(
    st.sampled_from([*SPECIAL, "<|im_", "end|>", "q7SPINFAST", "1p", "\n", " ", "user", "é"]), min_size=1
).map("".join)


def conversations(text):
    def build(system, texts):
        turns = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
        return [{"role": "system", "content": s} for s in system] + turns

    odd = st.integers(0, 2).flatmap(lambda n: st.lists(text, min_size=2 * n + 1, max_size=2 * n + 1))
    return st.builds(build, st.lists(text, max_size=1), odd)


def user(content="How many?"):
    return [{"role": "user", "content": content}]


def answered(content="42", **more):
    return [{"role": "assistant", "content": content, **more}]


def render(renderer, row, which="last", system=None):
    """What the loader does with a row: (prompt, answer) as texts, the turns that are not learnt from in brackets."""
    messages = with_system(turns(row["messages"]), system)
    rendered = renderer.conversation(messages, learnt(messages, which), template_variables(row))
    scored = rendered.scored or [True] * len(rendered.answer_ids)
    assert len(scored) == len(rendered.answer_ids)
    answer, inside = "", True
    for token, learns in zip(rendered.answer_ids, scored, strict=True):
        answer += ("" if learns == inside else "]" if learns else "[") + renderer.tokenizer.decode([token])
        inside = learns
    return renderer.tokenizer.decode(rendered.prompt_ids), answer


@given(conversations(ordinary), ordinary)
def test_prompt_and_answer_are_the_whole_rendering(messages, answer):
    whole = [*messages, {"role": "assistant", "content": answer}]
    expected = TOKENIZER.apply_chat_template(whole, tokenize=True, return_dict=False)
    prompt_ids, answer_ids = RENDERER.example_ids(messages, answer)
    newline = TOKENIZER.encode("\n")
    assert [*prompt_ids, *answer_ids, *newline] == expected
    assert prompt_ids == RENDERER.prompt_ids(messages)


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
    assert RENDERER.text(RENDERER.example_ids(user(), answer)[1]) == answer


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
    renderer = Renderer(tiny_tokenizer(REASONING), kwargs)
    assert renderer.text(renderer.example_ids(user(), answer)[1]) == expected
    several = [*user(), {"role": "assistant", "content": "<think>old</think>7"}, *user()]
    assert "old" not in renderer.text(renderer.prompt_ids(several))


@pytest.mark.parametrize(
    ("template", "messages", "answer", "message"),
    [
        (REASONING, user(), "<think>sum</think>42", "does not continue the prompt"),
        (NO_SYSTEM, [{"role": "system", "content": "Be brief."}, *user()], "42", "drops the system turn"),
        (REFUSING, [{"role": "system", "content": "Be brief."}, *user()], "42", "System role not supported"),
    ],
    ids=["answer-rewritten", "system-dropped", "system-refused"],
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
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "expected a special token"),
        ("{{ strftime_now('%d %b %Y') }}" + CHATML, "today's date"),
        ("{% for m in messages %}", "refuses the turns user, assistant"),
        ("{{ 1 + 'a' }}" + CHATML, "refuses the turns"),
        (
            "{% for m in messages if m.role != 'assistant' %}{{ m.content }}<|im_end|>{% endfor %}",
            "drops the assistant",
        ),
    ],
    ids=["no-end", "date", "syntax", "type-error", "no-assistant"],
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


# -- templates of the wild --------------------------------------------------------------------------------------------

WILD_RENDERERS = {name: Renderer(tokenizer(*template)) for name, template in WILD.items()}


@pytest.mark.parametrize("name", WILD)
@given(messages=conversations(ordinary), answer=ordinary)
def test_templates_of_the_wild(name, messages, answer):
    renderer = WILD_RENDERERS[name]
    whole = [*messages, *answered(answer)]
    written = renderer.tokenizer.apply_chat_template(whole, tokenize=False)
    prompt_ids, answer_ids = renderer.example_ids(messages, answer)
    ids = [*prompt_ids, *answer_ids]
    whole_ids = renderer.tokenizer(written, add_special_tokens=False).input_ids[: len(ids)]
    if whole_ids[: len(prompt_ids)] == list(prompt_ids):  # else the tokenizer merges over the border: "\n\n2"
        assert ids == whole_ids
    assert written.removeprefix(renderer.tokenizer.decode(ids)).split() in ([], ["<|end|>"])  # Phi-3's end of all
    assert prompt_ids == renderer.prompt_ids(messages)
    prompt = renderer.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(prompt_ids) == prompt
    assert answer_ids[-1] == renderer.end_id
    assert renderer.text(answer_ids).strip() == answer


wild_hostile = st.lists(st.sampled_from([*WILD_SPECIAL, *SPECIAL, "x", " ", "\n"]), min_size=1).map("".join)


@pytest.mark.parametrize("name", WILD)
@given(messages=conversations(wild_hostile), answer=wild_hostile)
def test_control_tokens_typed_into_templates_of_the_wild(name, messages, answer):
    renderer = WILD_RENDERERS[name]
    prompt_ids, answer_ids = renderer.example_ids(messages, answer)
    assert answer_ids[-1] == renderer.end_id
    assert answer_ids.count(renderer.end_id) == 1
    prompt = renderer.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert renderer.tokenizer.decode(prompt_ids) == prompt
    assert renderer.text(answer_ids).strip() == answer.strip()


def test_a_template_that_requires_a_system_turn():
    renderer = Renderer(tiny_tokenizer(SYSTEM_REQUIRED))
    (row,) = case("25-templates-of-the-wild/system.jsonl")
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert render(renderer, row) == (prompt, "2<|im_end|>")
    (row,) = case("25-templates-of-the-wild/one.jsonl")
    assert render(renderer, row, system="Be brief.") == (prompt, "2<|im_end|>")
    with pytest.raises(RowError, match=r"a system turn is required; if it wants a system turn, set prompt\.system"):
        render(renderer, row)


@pytest.mark.parametrize(("name", "count"), [("two-users", 1), ("system-row", 0)])
def test_what_a_template_refuses_is_a_fault_of_its_row(name, count):
    renderer = WILD_RENDERERS["mistral"]  # turns must alternate
    refused = []
    for row in case(f"12-bad-rows-skip-and-templates/{name}.jsonl"):
        try:
            render(renderer, row)
        except RowError as error:
            refused.append(error.reason)
    assert refused == ["the template refuses the turns"] * count


def test_a_header_that_prompts_lack_is_part_of_the_prompt(caplog):
    with caplog.at_level(logging.WARNING, "spinfast"):
        renderer = Renderer(tiny_tokenizer(HEADERLESS))
    assert r"prompts end with what it writes before an answer, '<|im_start|>assistant\n'" in caplog.text
    (row,) = case("25-templates-of-the-wild/one.jsonl")
    assert render(renderer, row) == ("<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n", "2<|im_end|>")
    several = {"messages": [*user(), *answered("7"), *user("Sure?"), *answered()]}
    assert render(renderer, several, "all") == render(RENDERER, several, "all")


@pytest.mark.parametrize("name", ["llama-2", "mistral"])
def test_a_tokenizer_that_puts_a_space_before_a_text(name):
    renderer = Renderer(metaspace_tokenizer(WILD[name][0]))
    messages = [*user("x\ny"), *answered("42"), *user("How many?"), *answered("The sum")]
    whole = renderer.tokenizer.apply_chat_template(messages, return_dict=False)
    rendered = renderer.conversation(messages, [1, 3])
    assert [*rendered.prompt_ids, *rendered.answer_ids] == whole
    assert spans(renderer.tokenizer, rendered.answer_ids, rendered.scored, "</s>") == ["42", "The sum"]
    typed = user("1</s>2")
    prompt = renderer.tokenizer.apply_chat_template(typed, tokenize=False, add_generation_prompt=True)
    assert renderer.tokenizer.decode(renderer.prompt_ids(typed)) == prompt


def test_a_token_over_the_border_of_prompt_and_answer():
    renderer = Renderer(
        metaspace_tokenizer(
            "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else ' [/INS') }}{% endfor %}"
        )
    )
    assert "▁[/INST]" in renderer.tokenizer.tokenize("42 [/INST]")
    prompt_ids, answer_ids = renderer.example_ids(user("42"), "T]")
    assert prompt_ids == renderer.prompt_ids(user("42"))
    assert renderer.tokenizer.decode([*prompt_ids, *answer_ids]).strip() == "42 [/INST]</s>"


# -- reasoning --------------------------------------------------------------------------------------------------------

REASONED = "one and one\n</think>\n\n2</s>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (OPENED, REASONED),
        (OPENED.replace(".split('</think>')[-1]", ""), REASONED),
        (FORGETFUL, "<think>\n" + REASONED),
        (FORGETFUL.replace(".split('</think>')[-1]", ""), "<think>\n" + REASONED),
    ],
    ids=["opened", "opened-and-kept", "forgotten", "kept"],
)
@pytest.mark.parametrize("form", ["text", "field", "raw"])
def test_reasoning_is_learnt_whatever_the_template_makes_of_history(template, expected, form):
    renderer = Renderer(tokenizer(template, "</s>"))
    (row,) = case("13-r1-distill-generation-prompt/reasoned.jsonl")
    if form == "field":
        (row,) = case("04-tool-calls-dropped/reasoning.jsonl")
        renderer = Renderer(tokenizer(template + "{# reads </think> #}", "</s>"))
    elif form == "raw":  # as the model's own answers are: the block was opened by the prompt
        row["messages"][1]["content"] = row["messages"][1]["content"].removeprefix("<think>\n")
        expected = expected.removeprefix("<think>\n")
    opened = "<think>\n" if template.startswith(OPENED[:40]) and "<think>\n" in template else ""
    assert render(renderer, row) == (f"<s><|user|>1+1?<|assistant|>{opened}", expected)


def test_an_answer_without_reasoning_closes_the_block_that_the_prompt_opened():
    renderer = Renderer(tokenizer(OPENED, "</s>"))
    (row,) = case("13-r1-distill-generation-prompt/plain.jsonl")
    assert render(renderer, row) == ("<s><|user|>1+1?<|assistant|><think>\n", "\n</think>\n\n2</s>")
    renderer = Renderer(tokenizer(OPENED.replace("{{ m.content.split", "<think></think>{{ m.content.split"), "</s>"))
    assert render(renderer, row) == ("<s><|user|>1+1?<|assistant|><think>\n", "</think>2</s>")


@pytest.mark.parametrize(
    ("answer", "template"),
    [
        ("<think>a</think>b</think>2", REASONING),
        ("4#2", CHATML.replace("['content']", "['content'].split('#')[0]")),
        ("<think>a</think>4#2", OPENED.replace("[-1]", "[-1].split('#')[0]")),
    ],
    ids=["two-blocks", "cut", "cut-behind-reasoning"],
)
def test_an_answer_that_loses_a_part_is_refused(answer, template):
    with pytest.raises(RowError, match="lacks a part of the answer") as caught:
        Renderer(tokenizer(template)).example_ids(user(), answer)
    assert caught.value.reason == "the template does not keep the answer"


# -- tools ------------------------------------------------------------------------------------------------------------

CALLED = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Sampleville"}}\n</tool_call><|im_end|>'
ASKED = "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n"
ANSWERED = f"{CALLED}[\n<|im_start|>user\nsunny<|im_end|>\n<|im_start|>assistant\n]It is sunny.<|im_end|>"


@pytest.mark.parametrize("template", [TOOLS, TOOLS_AS_TEXT, TOOLS_JOINED], ids=["object", "shown", "joined"])
@pytest.mark.parametrize("dump", [json.dumps, dict], ids=["text", "object"])
def test_tool_calls(template, dump):
    renderer = Renderer(tiny_tokenizer(template))
    (row,) = case("04-tool-calls-dropped/tool-role.jsonl")
    function = row["messages"][1]["tool_calls"][0]["function"]
    function["arguments"] = dump(function["arguments"])
    assert render(renderer, row, "all") == (ASKED, ANSWERED)
    assert render(renderer, row, "first") == (ASKED, CALLED)
    (row,) = case("04-tool-calls-dropped/tools.jsonl")
    prompt, answer = render(renderer, row)
    assert prompt.startswith('<|im_start|>system\n{"type": "function", "function": {"name": "get_weather"')
    assert prompt.endswith(ASKED)
    assert answer == "Let me look." + CALLED


REFUSING_TOOLS = "{% if messages | length > 2 %}{{ raise_exception('one turn each') }}{% endif %}" + TOOLS
SILENT = TOOLS.replace("m.content or ''", "'' if m.tool_calls else m.content")  # as Llama 3.1 beside a call


@pytest.mark.parametrize(
    ("template", "row", "reason"),
    [
        (CHATML, "tools", "the template drops the tool_calls"),
        (CHATML, "tool-role", "the template drops the tool_calls"),
        (CHATML, "reasoning", "the template drops the reasoning_content"),
        (TOOLS.replace("{% if tools %}", "{% if tools == 7 %}"), "tools", "the template drops the tools"),
        (SILENT, "tools", "the template drops the assistant turn"),
        (REFUSING_TOOLS, "tool-role", "the template refuses the turns"),
    ],
)
def test_what_a_template_drops_is_told(template, row, reason):
    if reason == "the template drops the tool_calls":
        template = template.replace("message['content']", "message['content'] or ''")
    (row,) = case(f"04-tool-calls-dropped/{row}.jsonl")
    with pytest.raises(RowError) as caught:
        render(Renderer(tiny_tokenizer(template)), row)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


def test_tools_beside_answers_without_calls_are_not_dropped():
    with pytest.raises(RowError, match="drops the tools of user, assistant; "):
        RENDERER.conversation([*user(), *answered()], [1], {"tools": [TOOL]})


def test_control_tokens_typed_into_calls_and_tools_stay_text():
    renderer = Renderer(tiny_tokenizer(TOOLS))
    call = {"type": "function", "function": {"name": "<|im_end|>", "arguments": {"<|im_start|>": "<|endoftext|>"}}}
    tool = {"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}
    rendered = renderer.conversation([*user(), *answered("", tool_calls=[call])], [1], {"tools": [tool]})
    assert rendered.prompt_ids.count(renderer.end_id) == 2
    assert rendered.answer_ids.count(renderer.end_id) == 1
    assert '{"<|im_start|>": "<|endoftext|>"}' in renderer.tokenizer.decode(rendered.answer_ids)


def test_developer_turns_are_system_turns_where_the_template_has_none():
    messages = [{"role": "developer", "content": "Be brief."}, *user()]
    assert RENDERER.prompt_ids(messages) == RENDERER.prompt_ids([messages[0] | {"role": "system"}, *user()])
    renderer = Renderer(tiny_tokenizer(CHATML + "{# developer #}"))
    assert "developer\nBe brief." in renderer.tokenizer.decode(renderer.prompt_ids(messages))


# -- several learnt turns ---------------------------------------------------------------------------------------------


@given(conversations(ordinary), st.data())
def test_learnt_turns_of_one_row_are_those_of_each_alone(messages, data):
    messages = [*messages, *answered("42")]
    positions = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    chosen = sorted(data.draw(st.sets(st.sampled_from(positions), min_size=1)))
    rendered = RENDERER.conversation(messages, chosen)
    ids = [*rendered.prompt_ids, *rendered.answer_ids]
    scored = [False] * len(rendered.prompt_ids) + list(rendered.scored or [True] * len(rendered.answer_ids))
    assert (rendered.scored is None) == (len(chosen) == 1)
    for position in chosen:
        prompt_ids, answer_ids = RENDERER.example_ids(messages[:position], messages[position]["content"])
        start, end = len(prompt_ids), len(prompt_ids) + len(answer_ids)
        assert ids[:end] == [*prompt_ids, *answer_ids]
        assert scored[start:end] == [True] * len(answer_ids)
        scored[start:end] = [False] * len(answer_ids)
    assert not any(scored)


GENERATION_RENDERER = Renderer(tiny_tokenizer(GENERATION))


def assistant_mask(made, messages, **kwargs):
    """(ids, transformers' mask of the assistant's tokens) up to the last of these."""
    found = made.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **kwargs)
    end = max(i for i, mask in enumerate(found["assistant_masks"], 1) if mask)
    return found["input_ids"][:end], [bool(mask) for mask in found["assistant_masks"][:end]]


@given(conversations(ordinary))
def test_spans_are_transformers_assistant_tokens(messages):
    messages = [*messages, *answered("42")]
    rendered = GENERATION_RENDERER.conversation(messages, learnt(messages, "all"))
    ids, mask = assistant_mask(GENERATION_RENDERER.tokenizer, messages)
    assert [*rendered.prompt_ids, *rendered.answer_ids] == ids
    assert [False] * len(rendered.prompt_ids) + list(rendered.scored or [True] * len(rendered.answer_ids)) == mask


def test_a_template_that_rewrites_history_holds_no_row_of_several_turns():
    messages = [*user(), *answered("<think>a</think>7"), *user("Sure?"), *answered("<think>b</think>42")]
    for renderer in (Renderer(tiny_tokenizer(REASONING)), Renderer(tokenizer(OPENED, "</s>"))):
        with pytest.raises(RowError, match=r"data\.turns: last") as caught:
            renderer.conversation(messages, [1, 3])
        assert caught.value.reason == "the template rewrites history"
        assert renderer.conversation(messages, [3]).scored is None


def test_reasoning_of_every_learnt_turn_is_looked_for():
    messages = [*user(), *answered("7", reasoning_content="a"), *user("Sure?"), *answered()]
    assert RENDERER.conversation(messages, [3]).answer_ids == RENDERER.example_ids(messages[:3], "42")[1]
    with pytest.raises(RowError, match="drops the reasoning_content"):
        RENDERER.conversation(messages, [1, 3])


# -- one row's variables, plain text ----------------------------------------------------------------------------------


def test_a_rows_variables_go_over_the_runs(caplog):
    renderer = Renderer(tiny_tokenizer(REASONING), {"enable_thinking": False})
    closed = "<think>\n\n</think>\n\n"
    assert renderer.tokenizer.decode(renderer.prompt_ids(user())).endswith(closed)
    with caplog.at_level(logging.WARNING, "spinfast"):
        for _ in range(2):
            prompt_ids = renderer.prompt_ids(user(), {"enable_thinking": True, "shout": True, "xml_tools": []})
    assert not renderer.tokenizer.decode(prompt_ids).endswith(closed)
    assert [record.getMessage() for record in caplog.records] == [
        "chat_template_kwargs: the chat template has no variable 'shout'; it has no effect"
    ]
    with pytest.raises(RowError, match="'chat_template' is no variable"):
        renderer.prompt_ids(user(), {"chat_template": "x"})


@pytest.mark.parametrize("text", ["12 + 30", "42<|im_end|>", "<|im_start|>user\n1+1?<|im_end|>\n"])
def test_plain_text_is_tokenised_as_it_is_and_ended(text):
    rendered = RENDERER.text_ids(text)
    expected = TOKENIZER(text if text.endswith("<|im_end|>") else text + "<|im_end|>").input_ids
    assert [*rendered.prompt_ids, *rendered.answer_ids] == expected
    assert (len(rendered.prompt_ids), rendered.scored) == (1, None)


def test_a_text_of_one_token_predicts_nothing():
    with pytest.raises(RowError, match="two tokens or more"):
        RENDERER.text_ids("<|im_end|>")


# -- real templates ---------------------------------------------------------------------------------------------------


def spans(made, ids, mask, end):
    """The texts that are learnt from, each up to its end-of-turn token: TRL's have the line ends around it too."""
    runs = itertools.groupby(zip(mask, ids, strict=True), key=lambda pair: pair[0])
    texts = [made.decode([token for _, token in run]) for learns, run in runs if learns]
    return [text.partition(end)[0].strip() for text in texts if end in text]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3", "gemma", "phi3"])
def test_spans_of_real_templates_are_those_of_trl(name):
    if not (template := trl_template(name + "_training")):
        pytest.skip("TRL is not installed")
    renderer = Renderer(tokenizer(template, "</s>"))
    messages = [*user("1+1?"), *answered("2"), *user("Sure?"), *answered("Yes.")]
    rendered = renderer.conversation(messages, [1, 3])
    ids, mask = assistant_mask(renderer.tokenizer, messages)
    end = renderer.tokenizer.decode([renderer.end_id])
    expected = spans(renderer.tokenizer, ids, mask, end)
    assert len(expected) == 2
    assert spans(renderer.tokenizer, rendered.answer_ids, rendered.scored, end) == expected


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("qwen2_5", "Let me look.\n" + CALLED),
        ("qwen3", "<think>\n\n</think>\n\nLet me look.\n" + CALLED),
        ("llama3", None),
        ("llama3_1", None),
        ("gemma", None),
        ("deepseek_r1_distill", None),
    ],
)
def test_tool_calls_in_real_templates(name, answer):
    if not (template := trl_template(name)):
        pytest.skip("TRL is not installed")
    renderer = Renderer(tokenizer(template, "<｜end▁of▁sentence｜>" if "deepseek" in name else "</s>"))
    (row,) = case("04-tool-calls-dropped/tools.jsonl")
    if answer:
        assert render(renderer, row)[1] == answer
        return
    with pytest.raises(RowError, match=r"the chat template drops the (tool_calls|assistant turn) of"):
        render(renderer, row)
