"""A conversation without its terminal: what is asked of the model, what is kept, what is left out."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spinfast.chat import cli
from spinfast.chat.options import RULES, parse_chat
from spinfast.chat.speaker import named, open_speaker, sampling_defaults
from spinfast.chat.talk import Settings, Talk
from spinfast.data.conversations import turns
from spinfast.errors import UserError


def talk_of(speaker, *names, system=None, **changes):
    return Talk(speaker, Settings(**{"temperature": 0.0, "top_p": 1.0, "max_tokens": 8} | changes), system, names)


def said(talk, question=None):
    if question:
        talk.ask(question)
    for _ in talk.answer(talk.names):
        pass
    return {voice: answer.text for voice, answer in talk.turns[-1].answers.items()}


def test_greedy_answers_over_three_turns_are_transformers_own(speaker):
    tokenizer = AutoTokenizer.from_pretrained(speaker.path)
    model = AutoModelForCausalLM.from_pretrained(speaker.path, dtype=torch.float32)
    talk, messages = talk_of(speaker, "base", system="Be brief."), [{"role": "system", "content": "Be brief."}]
    for question in ("What is the sum?", "naïve 🙂?", "Step 1\n\nStep 2"):
        answer = said(talk, question)["base"]
        messages.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        out = model.generate(ids, do_sample=False, max_new_tokens=8, eos_token_id=tokenizer.eos_token_id)
        assert answer == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
    assert talk.messages("base") == messages
    assert [a.ends for t in talk.turns for a in t.answers.values()] == ["length"] * 3


def test_voices_that_are_compared_have_histories_of_their_own(speaker):
    both, alone = talk_of(speaker, "base", "all"), {name: talk_of(speaker, name) for name in ("base", "all")}
    for question in ("What?", "And then?"):
        found = said(both, question)
        assert found == {name: said(talk, question)[name] for name, talk in alone.items()}
        assert found["base"] != found["all"]


def test_a_voice_that_was_not_asked_reads_what_the_other_said(speaker):
    talk = talk_of(speaker, "base")
    text = said(talk, "What?")["base"]
    talk.choose(("few",))
    said(talk, "Why?")
    assert talk.messages("few")[:2] == [{"role": "user", "content": "What?"}, {"role": "assistant", "content": text}]


def test_another_try_is_another_answer_and_the_same_talk_the_same_one(speaker):
    tries = []
    for _ in range(2):
        talk = talk_of(speaker, "base", temperature=1.0)
        tries.append([said(talk, "What?")])
        for _ in range(2):
            talk.retry()
            tries[-1].append(said(talk))
        assert len(talk.turns) == 1
    assert tries[0] == tries[1]
    assert len({text["base"] for text in tries[0]}) == 3
    assert said(talk_of(speaker, "base", temperature=1.0, seed=5), "What?") not in tries[0]
    with pytest.raises(UserError, match="nothing was asked"):
        talk_of(speaker).retry()


def test_the_oldest_turns_go_where_the_context_is_full(speaker):
    talk = talk_of(speaker, "base", system="Short.", max_tokens=100)
    for number in range(6):
        said(talk, f"{number}: " + "eggs " * 8)
        ids, left_out = talk.prompt("base")
        assert len(ids) + 100 <= 512
    text = speaker.renderer.tokenizer.decode(ids)
    assert left_out > 0
    assert "Short." in text
    assert "5: eggs" in text
    assert f"user\n{left_out - 1}: " not in text
    before = len(talk.turns)
    with pytest.raises(UserError, match=r"question has \d+ tokens .* context of 512: shorten it"):
        talk.ask("é" * 600)
    assert len(talk.turns) == before


def test_an_answer_ends_where_the_context_does(speaker):
    talk = talk_of(speaker, "base", max_tokens=4000)
    said(talk, "eggs " * 40)
    (answer,) = talk.turns[-1].answers.values()
    assert answer.ends == "context"
    assert answer.tokens + len(talk.prompt("base")[0]) == 512


def test_leaving_early_keeps_what_was_said_and_frees_the_place(speaker):
    talk = talk_of(speaker, "base", max_tokens=100)
    talk.ask("What?")
    pieces = talk.answer(talk.names)
    heard = [next(pieces)[1] for _ in range(5)]
    pieces.close()
    answer = talk.turns[-1].answers["base"]
    assert (answer.text, answer.ends, answer.tokens) == ("".join(heard), None, 5)
    assert len(speaker.voices) == 0
    said(talk, "Go on.")
    assert [m["role"] for m in talk.messages("base")] == ["user", "assistant"] * 2


def test_a_question_that_was_stopped_before_its_answer_is_not_read_again(speaker):
    talk = talk_of(speaker, "base")
    talk.ask("Never answered")
    said(talk, "What?")
    assert talk.messages("base")[0]["content"] == "What?"


def test_an_answer_stands_where_another_cannot_be_asked_for(speaker):
    talk = talk_of(speaker, "base")
    said(talk, "What is 1 + 1?")
    answer, talk.system = talk.turns[0].answers["base"], "Count. " * 600
    with pytest.raises(UserError, match="context of 512"):
        talk.retry()
    assert talk.turns[0].answers == {"base": answer}


@pytest.mark.parametrize("fault", [UserError, KeyboardInterrupt])
def test_an_adapter_that_is_not_loaded_leaves_a_talk_that_answers(tiny_model, adapters, monkeypatch, fault):
    def failing_once(arguments, batch_size):
        monkeypatch.setattr(cli, "open_speaker", open_speaker)
        raise fault

    words = [str(tiny_model("llama")), "--profile", "cpu", "--dtype", "float32", "--max-tokens", "4"]
    with cli.Opened(parse_chat(words)) as opened:
        talk = opened.talk()
        before = said(talk, "What?")
        monkeypatch.setattr(cli, "open_speaker", failing_once)
        with pytest.raises(fault):
            opened.load(talk, str(adapters["all"]))
        assert talk.speaker is opened.speaker
        assert talk.speaker.names == ("base",)
        talk.turns.clear()
        assert said(talk, "What?") == before
        talk.choose((opened.load(talk, str(adapters["all"])),))
        assert talk.names == ("all",)


def test_what_is_saved_is_data(speaker):
    talk = talk_of(speaker, "base", "few")
    with pytest.raises(UserError, match="nothing was said"):
        talk.record()
    said(talk, "What is 1 + 1?")
    rows = json.loads(json.dumps(talk.record()))
    assert [row["voice"] for row in rows] == ["base", "few"]
    assert [message["role"] for message in turns(rows[0]["messages"])] == ["user", "assistant"]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("value", ["", "x", "-1", "nan", "inf", "1e9", "0x1"])
def test_settings_are_numbers_in_their_range(name, value):
    settings = Settings(0.5, 0.5)
    with pytest.raises(UserError, match=f"^{name}: expected a .*number.*, got '{value}'"):
        settings.set(name, value)
    assert vars(settings) == vars(Settings(0.5, 0.5))
    settings.set("max_tokens", "9" * 400)
    assert "max_tokens 999" in str(settings)
    with pytest.raises(UserError, match="topp: expected one of temperature, top_p"):
        settings.set("topp", "1")


@pytest.mark.parametrize(
    ("items", "names"),
    [
        (["a/b"], ["b"]),
        (["runs/x/iter_000/adapter", "runs/x"], ["iter_000", "x"]),
        (["n=a/b", "b.gguf"], ["n", "b"]),
        (["runs/x/base/adapter", "runs/x/base"], "there is one named 'x-base' already"),
        (["a/b", "c/b"], "there is one named 'b' already"),
        (["base=a"], "not 'base'"),
        (["=a"], "expected DIR or NAME=DIR"),
        (["a="], "expected DIR or NAME=DIR"),
        (["a b=c"], "without blanks"),
    ],
)
def test_names_of_adapters(items, names):
    if isinstance(names, str):
        with pytest.raises(UserError, match=names):
            named(items)
    else:
        assert [*named(items)] == names


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, (0.7, 0.95)),
        ({"temperature": 0.2, "top_p": 0.9}, (0.2, 0.9)),
        ({"temperature": "hot"}, (0.7, 0.95)),
        ({"top_p": 7}, (0.7, 0.95)),
        (None, (0.7, 0.95)),
    ],
)
def test_sampling_is_the_models_own_where_it_says(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert sampling_defaults(tmp_path) == expected
