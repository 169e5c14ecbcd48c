"""The server as programs meet it: by OpenAI's client, by curl-like requests, by clients that leave."""

import http.client
import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from process import Spinfast
from transformers import AutoModelForCausalLM, AutoTokenizer

from spinfast.run import main

HELLO = [{"role": "user", "content": "What is the sum of 1 and 2?"}]


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def name(tiny_model):
    return str(tiny_model("llama"))


def post(address, path, body, kind="application/json", host=None):
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    headers = {"Content-Type": kind} | ({"Host": host} if host else {})
    connection.request("POST", path, body if isinstance(body, (bytes, str)) else json.dumps(body), headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_models_are_the_adapters_and_their_base(client, name):
    assert [model.id for model in client.models.list()] == ["all", "few", name]
    assert client.models.retrieve(name).max_model_len == 512
    with pytest.raises(openai.NotFoundError, match="no model 'none'"):
        client.models.retrieve("none")


@pytest.mark.parametrize("voice", ["base", "all", "few"])
def test_greedy_answers_are_transformers_own(client, name, adapters, voice):
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model = model if voice == "base" else PeftModel.from_pretrained(model, adapters[voice])
    ids = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    out = model.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=tokenizer.eos_token_id)
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    asked = {"model": name if voice == "base" else voice, "messages": HELLO, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == expected
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (ids.shape[1], 20)
    assert whole.choices[0].finish_reason == "length"
    chunks = [*client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})]
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[-2:-1]] == ["length"]
    assert len({c.id for c in chunks}) == 1
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], ids.shape[1] + 20)


def test_32_requests_at_once_get_the_answers_they_get_alone(client, name):
    def ask(number):
        model = (name, "all", "few")[number % 3]
        question = [
            {"role": "user", "content": f"Question {number}: how many eggs? " + "And how many? " * (number % 5)}
        ]
        asked = {
            "model": model,
            "messages": question,
            "max_tokens": 5 + number % 13,
            "temperature": 0.8,
            "seed": number,
        }
        if number % 2:
            return client.chat.completions.create(**asked).choices[0].message.content
        return "".join(c.choices[0].delta.content or "" for c in client.chat.completions.create(**asked, stream=True))

    alone = [ask(number) for number in range(32)]
    with ThreadPoolExecutor(32) as pool:
        together = [*pool.map(ask, range(32))]
    assert together == alone
    assert len({*alone}) > 25


def test_several_answers_differ_and_a_seed_repeats_them(served, client, name):
    asked = {"model": name, "prompt": ["Natalia sold", [5, 6, 7]], "n": 3, "temperature": 1, "max_tokens": 9}
    first = client.completions.create(**asked, seed=4)
    assert [choice.index for choice in first.choices] == list(range(6))
    assert len({choice.text for choice in first.choices}) == 6
    assert [c.text for c in client.completions.create(**asked, seed=4).choices] == [c.text for c in first.choices]
    assert [c.text for c in client.completions.create(**asked).choices] != [c.text for c in first.choices]
    assert first.usage.completion_tokens == 54
    served[1].wait(r"tokens read, 54 written, 6 length\n")


def test_stop_strings_end_an_answer_and_are_left_out(client, name):
    asked = {"model": name, "prompt": "How many eggs", "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = text[10:13]
    expected = text[: text.find(stop)]
    cut = client.completions.create(**asked, stop=["never to be met", stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (expected, "stop")
    chunks = [*client.completions.create(**asked, stop=stop, stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_log_probs_are_those_of_the_drawn_tokens(client, name):
    asked = {"model": name, "max_tokens": 6, "temperature": 0}
    told = client.chat.completions.create(**asked, messages=HELLO, logprobs=True).choices[0]
    assert len(told.logprobs.content) == 6
    assert all(-20 < token.logprob <= 0 for token in told.logprobs.content)
    plain = client.completions.create(**asked, prompt="eggs", logprobs=0).choices[0]
    assert len(plain.logprobs.token_logprobs) == len(plain.logprobs.tokens) == 6


def test_too_long_a_request_is_told_as_openai_tells_it(client, name):
    long = [{"role": "user", "content": "eggs " * 600}]
    with pytest.raises(openai.BadRequestError, match="context is 512 tokens") as caught:
        client.chat.completions.create(model=name, messages=long)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="512 are asked for the answer") as caught:
        client.chat.completions.create(model=name, messages=HELLO, max_tokens=512, stream=True)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize(
    ("path", "changes", "status", "message"),
    [
        ("chat/completions", {"temprature": 1}, 400, "temprature: no such key; did you mean temperature?"),
        ("chat/completions", {"xyz": None}, 200, '"finish_reason"'),
        ("chat/completions", {"user": "me", "presence_penalty": 0, "tools": [], "n": 1}, 200, '"finish_reason"'),
        ("chat/completions", {"presence_penalty": 0.0, "frequency_penalty": 0.0}, 200, '"finish_reason"'),
        ("chat/completions", {"stream_options": {"include_usage": "yes"}}, 400, "stream_options: "),
        ("chat/completions", {"stream_options": {"include_obfuscation": False}}, 200, '"finish_reason"'),
        ("chat/completions", {"chat_template_kwargs": {"tools": [1]}}, 400, "expected a list of function schemas"),
        ("chat/completions", {"stop": ["\ud800"]}, 400, "surrogate"),
        ("completions", {"prompt": "\ud800"}, 400, "surrogate"),
        ("chat/completions", {"echo": 0}, 400, "echo: not supported here"),
        ("chat/completions", {"presence_penalty": 0.5}, 400, "presence_penalty: not supported here, got 0.5"),
        ("chat/completions", {"tools": [{"type": "function"}]}, 400, "tools: not supported here"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, 400, "response_format: not supported"),
        ("chat/completions", {"top_logprobs": 5, "logprobs": True}, 400, "top_logprobs: not supported"),
        ("chat/completions", {"temperature": -1}, 400, "temperature: -1 is not what it can be; expected a number"),
        ("chat/completions", {"temperature": True}, 400, "temperature: true is not"),
        ("chat/completions", {"top_p": 0}, 400, "top_p: 0 is not"),
        ("chat/completions", {"max_tokens": 0}, 400, "max_tokens: 0 is not"),
        ("chat/completions", {"n": 1000}, 400, "n: 1000 is not"),
        ("chat/completions", {"stop": ["a"] * 17}, 400, "stop: "),
        ("chat/completions", {"stop": [""]}, 400, "stop: "),
        ("chat/completions", {"stream": "yes"}, 400, "expected true or false"),
        ("chat/completions", {"messages": []}, 400, "messages: [] is not what it can be; expected a list of turns"),
        ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, 400, "turn 1 has role 'robot'"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages: no turn 1 (user)"),
        ("chat/completions", {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate"),
        ("chat/completions", {"messages": "x"}, 400, "expected a list of turns"),
        ("chat/completions", {"model": "gpt"}, 404, "there is no model 'gpt'; expected all, few, "),
        ("chat/completions", {"model": 3}, 400, "model: 3 is not"),
        ("completions", {"prompt": [400]}, 400, "expected a text, a list of texts, or token ids"),
        ("completions", {"prompt": ""}, 400, "prompt: "),
        ("completions", {"prompt": "x", "logprobs": 3}, 400, "logprobs: 3 is not"),
        ("completions", {"prompt": "x", "echo": True}, 400, "echo: not supported"),
        ("completions", {}, 400, "prompt: is missing"),
    ],
)
def test_what_is_wrong_is_named_and_what_has_no_effect_is_refused(served, path, changes, status, message):
    own = {"messages": HELLO} if path == "chat/completions" else {}
    code, text = post(served[0], f"/v1/{path}", own | {"max_tokens": 1} | changes)
    assert message in (text if code == 200 else json.loads(text)["error"]["message"])
    assert code == status


@pytest.mark.parametrize(
    ("body", "options", "status", "message"),
    [
        (b"{", {}, 400, "not valid JSON"),
        (b"[" * 100_000, {}, 400, "not valid JSON"),
        (b"\xff\xfe", {}, 400, "not valid JSON"),
        (b"[]", {}, 400, "the body is list"),
        (b"", {}, 400, "not valid JSON"),
        (b" " * (17 << 20), {}, 413, "larger than 16 MiB"),
        (b"{}", {"kind": "text/plain"}, 415, "expected application/json"),
        (b"{}", {"host": "evil.example"}, 400, "Invalid host header"),
    ],
)
def test_bodies_that_are_no_requests(served, body, options, status, message):
    code, text = post(served[0], "/v1/chat/completions", body, **options)
    assert (code, message in text) == (status, True)


def test_paths_that_are_not_there(served):
    code, text = post(served[0], "/v1/embeddings", {})
    assert (code, json.loads(text)["error"]["message"]) == (404, "POST /v1/embeddings: Not Found")
    assert post(served[0], "/v1/models", {})[0] == 405


def test_clients_that_leave_free_their_places(served, client, name):
    """Eight places, eight clients that ask for long answers and leave, streaming or not: the next one gets a place."""
    address, server = served
    begun = len(server.seen)
    for stream in (True, False):
        connections = []
        for _ in range(8):
            connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
            asked = {"model": name, "prompt": "eggs", "max_tokens": 500, "stream": stream, "temperature": 0}
            connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
            connections.append(connection)
        if stream:
            for connection in connections:
                assert connection.getresponse().read(40)
        else:
            time.sleep(0.3)
        for connection in connections:
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
        client.completions.create(model=name, prompt="eggs", max_tokens=2)
    server.wait(r"(?s)" + r".*, left" * 16)
    left = [line for line in server.seen[begun:].splitlines() if line.endswith("left")]
    assert len(left) == 16
    assert max(int(line.split(" written")[0].split()[-1]) for line in left) < 400


def test_a_port_that_is_taken_is_said_before_a_model_is_loaded(served, capfd):
    port = served[0].rpartition(":")[2]
    assert main(["serve", "no-such-model", "--port", port]) == 2
    assert capfd.readouterr().err == (
        f"spinfast: --port {port}: Address already in use; give another, or 0 for any free one\n"
    )
    assert main(["serve", "no-such-model", "--port", "70000"]) == 2
    assert "--port 70000: expected 0 to 65535" in capfd.readouterr().err


def test_the_lines_for_a_person(served, name, adapters):
    line = next(line for line in served[1].seen.splitlines() if "for many users" in line)
    assert line.endswith(
        f"vllm serve {name} --served-model-name {name} --max-model-len 512 --enable-lora --max-lora-rank 8 "
        f"--lora-modules all={adapters['all']} few={adapters['few']}"
    )
    assert f"curl {served[0]}/v1/chat/completions" in served[1].seen


def test_a_signal_ends_it_with_answers_in_progress(served, client, name):
    """Last of this file: the server is gone after it."""
    address, server = served
    heard = []

    def listen():
        try:
            for chunk in client.completions.create(model=name, prompt="a", max_tokens=400, temperature=0, stream=True):
                heard.append(chunk.choices[0])
        except openai.APIError as error:
            heard.append(error)

    listener = threading.Thread(target=listen)
    listener.start()
    while not heard:
        time.sleep(0.01)
    assert server.end(signal.SIGTERM) == 0
    listener.join()
    assert "Traceback" not in server.seen
    assert server.seen.splitlines()[-1].endswith("ended")
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), 1).close()


def test_ctrl_c_while_the_model_is_loaded_ends_it_too(tiny_model):
    server = Spinfast("serve", tiny_model("qwen2"), "--profile", "cpu", "--port", "0")
    server.wait("attention: |kernels: ")
    assert server.end(signal.SIGINT) in (0, 130)
    assert "Traceback" not in server.seen
