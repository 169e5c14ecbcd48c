"""`spinfast eval` plays a model as its run did: system turn, template variables, dtype; options win."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fixtures import CHATML, tiny_model_dir
from test_run import play
from tokenizers.processors import TemplateProcessing

from spinfast.errors import UserError
from spinfast.evaluate.cli import main, open_engine, parse
from spinfast.evaluate.harness import HarnessModel
from spinfast.models import load_tokenizer
from spinfast.run import main as spinfast

TASK = Path(__file__).parent.parent / "cases" / "15-eval-cannot-take-template-variables" / "task.jsonl"
DATED = (
    "<|im_start|>system\nToday is {{ date_string or strftime_now('%d %b %Y') }}."
    "{% if not enable_thinking %} /no_think{% endif %}<|im_end|>\n" + CHATML
)
DATE, QUESTION = "26 Jul 2024", [{"role": "user", "content": "1+1?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose template wants a date and knows enable_thinking."""
    path = tiny_model_dir(tmp_path_factory.mktemp("dated"), "llama")
    (path / "chat_template.jinja").write_text(DATED)
    return path


@pytest.fixture(scope="module")
def run_dir(model, tmp_path_factory):
    prompt = {"template": {"date_string": DATE, "enable_thinking": True}, "system": "Add."}
    few = {"problems": 2, "pairs": 0, "max_tokens": 6}
    directory = tmp_path_factory.mktemp("dated run")
    return play(directory, model, spin={"iterations": 1}, prompt=prompt, evaluate=few)


def opened(*words):
    return open_engine(parse([*map(str, words), "--tasks", "gsm8k", "--profile", "cpu"]))


def prompt_of(engine):
    return engine.tokenizer.decode(engine.prompt_ids(QUESTION))


def test_template_variables_by_option(model, tmp_path, capsys):
    words = ["--model", str(model), "--tasks", str(TASK), "--profile", "cpu", "--max-length", "256"]
    assert spinfast(["eval", *words]) == 2
    assert f'eval: --template date_string="{DATE}"' in capsys.readouterr().err
    assert main([*words, "--template", f"date_string={DATE}", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())["config"]
    assert (found["template"], found["system"]) == ({"date_string": DATE}, None)
    with opened("--model", model, "--template", f"date_string={DATE}", "--template", "enable_thinking=true") as engine:
        assert prompt_of(engine).startswith(f"<|im_start|>system\nToday is {DATE}.<|im_end|>\n<|im_start|>user\n1+1?")


def test_an_adapter_of_a_run_is_played_as_the_run_played_it(run_dir, model, tmp_path):
    best = json.loads((run_dir / "best.json").read_text())["adapter"]
    for adapter in (run_dir, run_dir / "iter_000" / "adapter", run_dir / best):
        with opened("--adapter", adapter) as engine:
            systems = f"<|im_start|>system\nToday is {DATE}.<|im_end|>\n<|im_start|>system\nAdd.<|im_end|>\n"
            assert prompt_of(engine).startswith(systems + "<|im_start|>user\n")
            assert engine.settings == {
                "model": str(model),
                "revision": None,
                "load_in_4bit": False,
                "system": "Add.",
                "template": {"date_string": DATE, "enable_thinking": True},
                "dtype": "float32",
            }
    out = tmp_path / "out"
    assert main(["--adapter", str(run_dir), "--tasks", str(TASK), "--profile", "cpu", "--output", str(out)]) == 0
    found = json.loads((out / "results.json").read_text())["config"]
    assert (found["model"], found["dtype"], found["system"]) == (str(model), "float32", "Add.")


def test_options_win_over_the_run(run_dir, model, tmp_path):
    elsewhere = shutil.copytree(model, tmp_path / "the same model")
    words = ["--template", "enable_thinking=false", "--system", "", "--dtype", "bfloat16", "--model", elsewhere]
    with opened("--adapter", run_dir / "iter_000" / "adapter", *words) as engine:
        assert prompt_of(engine).startswith(
            f"<|im_start|>system\nToday is {DATE}. /no_think<|im_end|>\n<|im_start|>user"
        )
        assert (engine.settings["model"], engine.settings["dtype"]) == (str(elsewhere), "bfloat16")


def test_an_adapter_outside_a_run_brings_its_base_and_no_settings(run_dir, model, tmp_path):
    adapter = shutil.copytree(run_dir / "iter_000" / "adapter", tmp_path / "adapter")
    with opened("--adapter", adapter, "--template", f"date_string={DATE}") as engine:
        assert engine.settings["model"] == str(model)
        assert "Add." not in prompt_of(engine)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match=r"names no base; give it by --model"), opened("--adapter", adapter):
        pass


def test_the_harness_gets_system_turn_and_template_variables(run_dir):
    with opened("--adapter", run_dir) as engine:
        text = HarnessModel(engine).apply_chat_template(QUESTION)
        assert engine.ids(text) == engine.prompt_ids(QUESTION)
        own = [{"role": "system", "content": "Be brief."}, *QUESTION]
        assert "Add." not in HarnessModel(engine).apply_chat_template(own)


def test_a_tokenizer_that_adds_its_begin_token_adds_it_once(tmp_path, tiny_model):
    path = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    tokenizer = load_tokenizer(path)
    tokenizer.bos_token = "<|endoftext|>"
    bos = ("<|endoftext|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[bos])
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    tokenizer.save_pretrained(path)
    with opened("--model", path) as engine:
        assert engine.ids("two eggs").count(bos[1]) == 1
        text = HarnessModel(engine).apply_chat_template(QUESTION)
        assert engine.ids(text) == engine.prompt_ids(QUESTION)
        assert engine.ids(text).count(bos[1]) == 1


def test_adapters_that_changed_their_base_are_refused_by_the_command(tiny_model, tmp_path, capsys):
    """Case 18."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    task = TASK.parent.parent / "18-adapters-that-changed-their-base" / "task.jsonl"
    words = ["--model", str(tiny_model("llama")), "--adapter", str(tmp_path / "adapter"), "--tasks", str(task)]
    capsys.readouterr()
    assert spinfast(["eval", *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "init_lora_weights in adapter_config.json is 'pissa'" in said
