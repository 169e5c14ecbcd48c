"""Prompts, few-shot draws, verdicts and end-to-end figures against lm_eval's own task files on the same rows."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import scipy.special
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED

from spinfast.errors import UserError
from spinfast.evaluate import cli, tasks
from spinfast.evaluate.benchmark import evaluate, judge_choices
from spinfast.evaluate.cli import main, open_engine, parse
from spinfast.types import Group, Request, Sampling

N = 12


def qa(i):
    return {"question": f" What is {i} + {i % 3}? ", "answer": f"{i} + {i % 3} = {i + i % 3}\n#### {i + i % 3}"}


ROWS = {  # name -> (the harness's task file, row number -> row)
    "gsm8k": ("gsm8k/gsm8k.yaml", qa),
    "aime24": ("aime/aime24.yaml", lambda i: {"Problem": f"Find ${i}^2$.", "Answer": i * i}),
    "hendrycks_math500": (
        "hendrycks_math/hendrycks_math500.yaml",
        lambda i: {"problem": f"What is $\\sqrt{{{i}}}$?", "solution": f"It is $\\boxed{{\\sqrt{i}}}$.", "answer": ""},
    ),
    "boolq": (
        "super_glue/boolq/default.yaml",
        lambda i: {"passage": f"The sky number {i}. ", "question": f"is the sky {i} blue", "label": i % 2},
    ),
    "arc_challenge": (
        "arc/arc_challenge.yaml",
        lambda i: {
            "question": f"Which of these is {i}?",
            "choices": {"text": [f"the {i}", "a stone", f"{i} trees"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[i % 3],
        },
    ),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        lambda i: {
            "activity_label": "Cutting [title] wood",
            "ctx_a": f"Man {i} holds  an axe.",
            "ctx_b": "he THEN",
            "endings": [f"cuts {i} logs. [step] More.", "sleeps.", " leaves the  yard.", f"buys {i}."],
            "label": str(i % 4),
        },
    ),
    "winogrande": (
        "winogrande/default.yaml",
        lambda i: {
            "sentence": f"Ann gave {i} eggs to Eve because _ was hungry that day.",
            "option1": "Ann",
            "option2": "Eve",
            "answer": str(i % 2 + 1),
        },
    ),
    "mmlu": (
        "mmlu/default/mmlu_high_school_physics.yaml",
        lambda i: {
            "question": f"The force {i} is ",
            "choices": ["one", f"{i} N", "three", "none"],
            "answer": i % 4,
            "subject": "high_school_physics",
        },
    ),
    "truthfulqa_mc1": (
        "truthfulqa/truthfulqa_mc1.yaml",
        lambda i: {
            "question": f"What happens after {i}?",
            "mc1_targets": {"choices": [f"{i + 1} comes", "The end"], "labels": [1, 0]},
            "mc2_targets": {"choices": ["Nothing", f"{i + 1} comes", "The end"], "labels": [1, 1, 0]},
        },
    ),
}
ROWS["arc_easy"] = ("arc/arc_easy.yaml", ROWS["arc_challenge"][1])


def rows_of(name):
    """(the rows asked, the rows that examples are drawn from); the same ones where the task has one split."""
    task, make = tasks.TASKS[name], ROWS[name][1]
    asked = [make(i) for i in range(N)]
    return asked, asked if task.split == task.shot_split else [make(i) for i in range(100, 100 + 3 * N)]


def harness_task(name, shots):
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.tasks.__file__).parent / ROWS[name][0])
    asked, pool = rows_of(name)
    splits = {}
    for kind in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if split := config.get(kind):
            splits[split] = datasets.Dataset.from_list(asked if split == tasks.TASKS[name].split else pool)
    task = ConfigurableTask(config=config | {"custom_dataset": lambda **_: splits, "num_fewshot": shots})
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)
    return task


def shots_of(name):
    task = tasks.TASKS[name]
    return (0, 3) if task.shot_split and not task.name.startswith("truthful") else (0,)


@pytest.mark.parametrize(("name", "shots"), [(name, shots) for name in ROWS for shots in shots_of(name)])
def test_prompts_are_the_harness_own(name, shots):
    theirs = harness_task(name, shots)
    task = tasks.find_task(f"{name}:{shots}")
    asked, pool = rows_of(name)
    before = tasks.introductions(task, asked, pool)
    for doc, row, text in zip(theirs.eval_docs, asked, before, strict=True):
        context = theirs.fewshot_context(doc, shots)
        requests = theirs.construct_requests(doc, context)
        if task.options:
            assert [request.args for request in requests] == [(text + q, rest) for q, rest in task.options(row)]
        else:
            assert requests.args[0] == text + task.text(row)
            assert tuple(requests.args[1]["until"]) == task.until
            assert requests.args[1].get("max_gen_toks", 256) == task.max_tokens
            reference = doc.get("answer", doc.get("Answer"))
            assert task.target(row) == str(reference)


@pytest.mark.parametrize("name", [name for name in ROWS if tasks.TASKS[name].options])
def test_choices_are_judged_as_the_harness_does(name):
    theirs, task = harness_task(name, 0), tasks.TASKS[name]
    random = np.random.default_rng(0)
    seen = set()
    for doc, row in zip(theirs.eval_docs, rows_of(name)[0], strict=True):
        choices = [rest for _, rest in task.options(row)]
        logps = random.normal(-20, 2, len(choices))
        verdict = theirs.process_results(doc, [(value, False) for value in logps.tolist()])
        ours = judge_choices(task, row, choices, logps)
        assert ours == pytest.approx({f"{metric},none": value for metric, value in verdict.items()})
        seen.add(ours["acc,none"])
    assert len(seen) > 1


def test_acc_norm_does_not_count_the_blank_before_a_choice():
    row = ROWS["arc_easy"][1](1)
    verdict = judge_choices(tasks.TASKS["arc_easy"], row, [" bbb", " a"], np.array([-3.0, -1.1]))
    assert tasks.TASKS["arc_easy"].gold(row) == 1
    assert verdict == {"acc,none": 1.0, "acc_norm,none": 0.0}  # -1.0 per character against -1.1


def test_mc2_is_the_probability_on_true_choices():
    """Not through the harness's file: it imports rouge_score."""
    task, row = tasks.TASKS["truthfulqa_mc2"], ROWS["truthfulqa_mc1"][1](3)
    logps = np.array([-800.0, -801.0, -799.5])  # far below what exp can hold
    expected = scipy.special.softmax(logps)[:2].sum()
    assert judge_choices(task, row, ["", "", ""], logps) == {"acc,none": pytest.approx(expected)}
    assert [rest for _, rest in task.options(row)] == [" Nothing", " 4 comes", " The end"]


def test_shots_shown_are_other_rows():
    task = tasks.find_task("aime24:3")
    rows = rows_of("aime24")[0]
    for row, text in zip(rows, tasks.introductions(task, rows, rows), strict=True):
        assert text.count("Question:") == 3
        assert task.text(row) not in text


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("gsm8k", "arc_easy", "winogrande"):
        asked, pool = rows_of(name)
        (folder / name).mkdir()
        task = tasks.TASKS[name]
        for split, rows in ((task.split, asked), (task.shot_split, pool)):
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.jsonl").write_text('{"question": "2 + 2?", "answer": 4}\n{"question": "3 + 3?", "answer": "6"}\n')
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products: threads cost more than they bring, the more so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def engine(tiny_model):
    words = ["--model", str(tiny_model("llama")), "--tasks", "gsm8k", "--dtype", "float32", "--profile", "cpu"]
    with open_engine(parse([*words, "--max-length", "128"])) as engine:
        yield engine


@pytest.mark.parametrize("name", ["gsm8k:1", "arc_easy:2", "winogrande:1", "boolq:0"])
def test_figures_equal_a_run_of_the_harness(engine, name):
    import lm_eval

    from spinfast.evaluate.harness import HarnessModel

    task = tasks.find_task(name)
    asked, pool = rows_of(task.name)
    ours = evaluate(task, engine, asked, pool)
    theirs = lm_eval.evaluate(
        lm=HarnessModel(engine),
        task_dict={task.name: harness_task(task.name, task.shots)},
        bootstrap_iters=0,
        log_samples=True,
    )
    summary = ours.summary()
    for metric, value in theirs["results"][task.name].items():
        if "," in metric and "stderr" not in metric:
            assert summary[metric] == pytest.approx(value), metric
    for sample, row in zip(theirs["samples"][task.name][:N], ours.samples, strict=False):
        if task.options:
            logps = [answer[0][0] for answer in sample["resps"]]
            assert logps == pytest.approx(row["logps"], abs=2e-4)
        else:
            assert sample["resps"][0][0] == row["texts"][0]


def test_harness_refuses_what_the_engine_cannot_do(engine):
    from spinfast.evaluate.harness import HarnessModel

    with pytest.raises(UserError, match="no rolling likelihood"):
        HarnessModel(engine).loglikelihood_rolling([])


YAML = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/capitals.jsonl}}}}
test_split: test
output_type: {kind}
doc_to_text: "The capital of {{{{land}}}} is"
doc_to_target: "{{{{city}}}}"
{fields}
"""
KINDS = {
    "generate_until": ("generation_kwargs: {until: ['.'], max_gen_toks: 5}", "exact_match,none"),
    "multiple_choice": ("doc_to_choice: [Rome, Paris]", "acc,none"),
    "loglikelihood": ("", ""),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_harness_runs_its_own_tasks_from_the_cli(tiny_model, tmp_path, kind, chat):
    (tmp_path / "capitals.jsonl").write_text('{"land": "Italy", "city": "Rome"}\n{"land": "France", "city": "Paris"}\n')
    (tmp_path / "capitals.yaml").write_text(YAML.format(folder=tmp_path, kind=kind, fields=KINDS[kind][0]))
    argv = ["--model", str(tiny_model("llama")), "--harness", "--tasks", str(tmp_path / "capitals.yaml")]
    argv += ["--profile", "cpu", "--max-length", "96", "--output", str(tmp_path / "out")]
    if kind == "loglikelihood":
        with pytest.raises(UserError, match=r"harness task capitals: expected one that generates or chooses"):
            main(argv)
        return
    assert main(argv + ["--chat-template"] * chat) == 0
    outcome = json.loads((tmp_path / "out" / "results.json").read_text())
    assert 0 <= outcome["results"]["capitals"][KINDS[kind][1]] <= 1
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples_capitals.jsonl").read_text().splitlines()]
    assert len(samples) == 2
    assert ("<|im_start|>user" in json.dumps(samples[0]["arguments"])) == chat


def test_avg_at_k_draws_different_answers(engine):
    task = tasks.TASKS["aime24_chat"]
    result = evaluate(task, engine, rows_of("aime24")[0][:2])
    assert [len(set(sample["texts"])) for sample in result.samples] == [8, 8]
    assert all(0 <= score <= 1 for score in result.scores["exact_match,none"])


def test_cli(tiny_model, data, tmp_path, capsys):
    argv = ["--model", str(tiny_model("llama")), "--tasks", f"gsm8k:1,arc_easy,{data}/mine.jsonl", "--limit", "3"]
    argv += ["--data", f"gsm8k={data}/gsm8k", "--data", f"arc_easy={data}/arc_easy", "--max-length", "96"]
    assert main([*argv, "--output", str(tmp_path), "--profile", "cpu"]) == 0
    outcome = json.loads((tmp_path / "results.json").read_text())
    assert set(outcome["results"]["gsm8k"]) == {
        "alias",
        *("exact_match,strict-match", "exact_match_stderr,strict-match"),
        *("exact_match,flexible-extract", "exact_match_stderr,flexible-extract"),
    }
    assert set(outcome["results"]["arc_easy"]) > {"acc,none", "acc_norm,none", "acc_stderr,none"}
    assert outcome["n-shot"] == {"gsm8k": 1, "arc_easy": 0, "mine": 0}
    assert outcome["n-samples"]["mine"] == {"effective": 2}
    samples = [json.loads(line) for line in (tmp_path / "samples_gsm8k.jsonl").read_text().splitlines()]
    assert len(samples) == 3
    assert samples[0]["reference"] == qa(0)["answer"]
    assert "exact_match,strict-match" in capsys.readouterr().out


def test_adapter_is_what_answers(tiny_model, tmp_path):
    """Likelihoods of base + adapter are those of the two merged by PEFT, rank 8 on two modules."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=24, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(base, lora)
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=random)
    model.save_pretrained(tmp_path / "adapter")
    prompt, answer = (3, 4, 5, 6), (7, 8, 9)
    ids = torch.tensor([[*prompt, *answer]])
    logps = model(ids).logits.log_softmax(-1)[0, 3:6].gather(1, torch.tensor(answer)[:, None]).sum().item()
    found = {}
    for adapter in ([], ["--adapter", str(tmp_path / "adapter")]):
        words = ["--model", str(tiny_model("llama")), "--tasks", "gsm8k", "--dtype", "float32", "--profile", "cpu"]
        with open_engine(parse([*words, *adapter])) as engine:
            found[bool(adapter)] = engine.sequence_logps([Group(prompt, (answer,))])[0][0]
            request = Request(0, prompt, seed=1)
            (written,) = engine.generate([request], Sampling(0.0, 1.0, 5, ()))
            if adapter:
                greedy = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=5, do_sample=False)
                assert written.token_ids == tuple(greedy[0, 4:].tolist())
    assert found[True] == pytest.approx(logps, abs=1e-4)
    assert abs(found[False] - logps) > 0.1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--tasks", "gsm9k"], "task 'gsm9k': expected one of gsm8k, gsm8k_chat"),
        (["--tasks", "gsm8k:many"], "expected a number of shots"),
        (["--tasks", "gsm8k_chat:5"], "a task that takes shots"),
        (["--tasks", "truthfulqa_mc1:5"], "a task that takes shots"),
        (["--tasks", "gsm8k", "--chat-template"], "--chat-template: goes with --harness"),
        (["--tasks", "gsm8k", "--limit", "0"], "--limit: expected at least 1, got 0"),
        (["--tasks", "gsm8k", "--data", "gsm8k"], "expected TASK=FOLDER with an existing folder"),
    ],
)
def test_cli_says_what_is_wrong_before_it_loads_a_model(argv, said):
    with pytest.raises(UserError, match=said):
        main(["--model", "none", *argv])


def test_a_missing_harness_is_told_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="lm_eval is not installed; pip install lm_eval"):
        main(["--model", "none", "--tasks", "mine", "--harness"])


def test_missing_rows(tmp_path):
    with pytest.raises(UserError, match=r"no such file: .*test\.jsonl"):
        tasks.load_rows(tasks.TASKS["gsm8k"], "test", tmp_path)
    with pytest.raises(UserError, match="4 rows are needed to show 3, got 2"):
        rows = rows_of("boolq")[0][:2]
        tasks.introductions(tasks.find_task("boolq:3"), rows, rows)


def test_a_hub_data_set_is_read_at_the_commit_that_is_named(monkeypatch, capsys):
    """No hub here: what is asked of `datasets` is all that can be seen."""
    asked = []

    def nowhere(*args, **options):
        asked.append((args, options))
        raise ConnectionError

    monkeypatch.setattr("datasets.load_dataset", nowhere)
    for where, revision in (
        (None, None),
        ("740312add88f781978c0658806c59bfc2815b986", "740312add88f781978c0658806c59bfc2815b986"),
    ):
        with pytest.raises(UserError, match="neither on this machine nor reachable"):
            tasks.load_rows(tasks.TASKS["gsm8k"], "test", where)
        assert asked.pop() == (("openai/gsm8k", "main"), {"split": "test", "revision": revision})
