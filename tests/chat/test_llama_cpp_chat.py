"""A .gguf file by llama.cpp, with a LoRA beside it. Skipped where its wheel is not installed:

pip install --no-deps xllamacpp==2026.10.11549
"""

import pytest
from lora import tiny_lora

from spinfast.chat.options import parse_chat as parse
from spinfast.chat.speaker import open_speaker
from spinfast.chat.talk import Settings, Talk
from spinfast.chat.worker import Worker
from spinfast.errors import UserError
from spinfast.run import main
from spinfast.types import Request, Sampling

pytest.importorskip("xllamacpp")
GREEDY = Settings(0.0, 1.0, 12)


@pytest.fixture(scope="module")
def files(tiny_model, tmp_path_factory):
    """(model, LoRA, the model's file, the LoRA's file), in fp32; qwen2, whose file says how it splits text."""
    place, model = tmp_path_factory.mktemp("gguf"), tiny_model("qwen2")
    lora = tiny_lora(model, place / "lora")
    file, lora_file = place / "tiny.gguf", place / "few.gguf"
    assert main(["export", "gguf", str(model), "--type", "f32", "--out", str(file)]) == 0
    assert main(["export", "gguf", str(lora), "--adapter-only", "--out", str(lora_file)]) == 0
    return model, lora, file, lora_file


@pytest.fixture(scope="module")
def by_llama(files):
    with open_speaker(parse([str(files[2]), "--adapter", str(files[3]), "--context", "512"]), 4) as speaker:
        yield speaker


def answers(speaker, names, questions=("What is the sum?", "naïve 🙂?")):
    talk = Talk(speaker, GREEDY, "Be brief.", names)
    for question in questions:
        talk.ask(question)
        for _ in talk.answer(names):
            pass
    return [[turn.answers[name].text for name in names] for turn in talk.turns]


def test_base_and_lora_answer_as_by_transformers(files, by_llama):
    assert (by_llama.backend, by_llama.names) == ("llama.cpp", ("base", "few"))
    found = answers(by_llama, ("base", "few"))
    words = [str(files[1]), "--profile", "cpu", "--dtype", "float32", "--context", "512"]
    with open_speaker(parse(words), 4) as speaker:
        assert answers(speaker, ("base", "lora")) == found
    assert found[0][0] != found[0][1]


def test_more_answers_than_there_is_memory_for_wait(by_llama):
    """Each is asked for 300 of the 512 tokens; four contexts are in memory, nine are asked for."""
    import queue

    sampling, arrived = Sampling(1.0, 1.0, 300, ()), queue.SimpleQueue()
    requests = [Request(i, (5, 6, 7 + i), i) for i in range(9)]
    with Worker(by_llama.voices) as worker:
        worker.ask("base", requests, sampling, arrived.put)
        worker.drop(requests[:2])
        ended = {}
        while len(ended) < 7:
            token = arrived.get(timeout=60)
            assert not isinstance(token, Exception), token
            if token.ends:
                ended[token.request.index] = token.ends
    assert ended.keys() == {2, 3, 4, 5, 6, 7, 8}
    assert len(by_llama.voices) == 0


def test_what_a_gguf_file_cannot_be_asked(files, tmp_path):
    for words, message in (
        ([str(files[2]), "--adapter", str(files[1])], "expected a LoRA as a .gguf file"),
        ([str(files[2]), "--dtype", "float32"], "--dtype: a .gguf file is played as it is"),
        ([str(files[2]), "--context", "5000"], "has a context of 1024"),
        ([str(files[2]), "--attention", "sdpa"], "--attention: a .gguf file is played as it is"),
        ([str(files[3])], "it is a LoRA, no model: give its base's .gguf file"),
        ([str(tmp_path / "none.gguf")], "no such file"),
    ):
        with pytest.raises(UserError, match=message), open_speaker(parse(words), 1):
            pass
