"""What the report and the card say of a GRPO stage, against its files."""

import json
import math
import re
import shutil
import statistics
from html import unescape
from pathlib import Path

import pytest
import torch
from rewarded import STEPS, add_grpo, metrics, rollout, write_rollout
from test_report import Page

from spinfast.config import load_config
from spinfast.evaluate import learning
from spinfast.names import rows_named
from spinfast.report import closing, rollouts, study, training
from spinfast.report.bounds import bounds
from spinfast.report.card import write_card
from spinfast.report.page import page
from spinfast.report.read import read_run, read_runs
from spinfast.run import play

PAID = """
def digits(completions, **kwargs):
    return [sum(character.isdigit() for character in text) / 4 for text in completions]
"""
REAL = """
model: {{name: {model}}}
data: {{source: {folder}/data.jsonl}}
heldout: {{source: {folder}/data.jsonl}}
method: grpo
grpo:
  rewards: {{"{folder}/paid.py:digits": 1, gsm8k: {{weight: 2}}}}
  completions: text
  samples: 4
  prompts_per_step: 2
  steps: 4
  steps_per_generation: 2
  evaluate_every: 2
  beta: 0.04
generation: {{max_tokens: 12, batch_size: 16, backend: transformers}}
train: {{microbatch_tokens: 512}}
evaluate: {{problems: 4, pairs: 4, max_tokens: 12}}
device: {{profile: cpu, dtype: float32}}
"""


@pytest.fixture(scope="module")
def made(played, tmp_path_factory):
    """A finished run that ends in a GRPO stage; only read it."""
    path = shutil.copytree(played[0], tmp_path_factory.mktemp("rewarded") / "run")
    add_grpo(path)
    return path


@pytest.fixture(scope="module")
def real(tmp_path_factory, tiny_model):
    """A GRPO run of four steps, each rollout for two; only read it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("real")
    rows = [{"question": f"What is {i} plus {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"} for i in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "paid.py").write_text(PAID)
    path = folder / "tiny.yaml"
    path.write_text(REAL.format(model=tiny_model("llama"), folder=folder))
    assert play(load_config(path, []), folder / "run", "test") == 0
    torch.set_num_threads(threads)
    return folder / "run"


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def test_curves_are_running_means_of_the_metrics_file(made):
    drawn = {plot.name: plot for plot in study.plots([read_run(made)])}
    (reward,) = drawn["reward"].series
    values = [row["reward"] for row in metrics(STEPS)]
    around = values[18:23]  # five steps about step 21
    mean, error = statistics.mean(around), statistics.stdev(around) / math.sqrt(5)
    assert reward.x == [float(step) for step in range(1, STEPS + 1)]
    assert (reward.low[20], reward.y[20], reward.high[20]) == pytest.approx((mean - 2 * error, mean, mean + 2 * error))
    assert reward.y[0] == pytest.approx(statistics.mean(values[:3]))
    assert drawn["rewards-gsm8k-mean"].title == "Reward by gsm8k"
    assert "kl" not in drawn  # beta is 0
    look = drawn["look-heldout-reward"].series[0]
    assert (look.x, look.y) == ([10.0, 20.0, 30.0, 40.0], values[9::10])
    assert look.high[0] - look.low[0] == pytest.approx(2 * 1.959964 * 0.05)
    assert drawn["heldout-reward"].series[0].y == [1.25]  # of the stages


def test_a_running_mean_is_of_what_is_finite():
    mean, low, high = (line[:4] for line in training._running([1.0, math.nan, 3.0, math.inf] + [math.nan] * 16))
    assert mean == [2.0, 2.0, 2.0, 3.0]
    assert (low[0], high[0]) == (1.0, 3.0)  # 0 to 4, within what there is
    assert math.isnan(low[3])
    assert all(map(math.isnan, training._running([math.nan])[0]))


def test_what_a_run_has_not_has_no_line_and_rows_are_called_what_they_are(real, made, played):
    text = page([read_run(real)])
    assert "<th>pairs</th>" not in text
    assert "<th>loss, first → last</th>" not in text
    assert "<th>GRPO</th>" in text
    drawn = {plot.name: plot for plot in study.plots([read_run(made)])}
    assert drawn["heldout-reward"].x_label == "stage"
    assert [rows_named(rows) for rows in (["base", 0, 1], ["base", "sft", 0])] == ["iteration", "stage"]


def test_of_few_steps_each_stands_for_itself(real):
    drawn = {plot.name: plot for plot in study.plots([read_run(real)])}
    rows = [row for row in read_run(real).steps if row["stage"] == "grpo"]
    assert drawn["completions-mean_length"].series[0].y == [row["completions/mean_length"] for row in rows]


def test_intervals_of_rewards_are_within_what_rewards_can_be(real):
    run = read_run(real)
    low, high = run.paid
    assert low >= 0
    estimates = {"value": low + (high - low) / 100, "stderr": (high - low) / 10, "n": 4}
    first, last = bounds(run, "heldout/reward", estimates)
    assert low <= first < estimates["value"] < last <= high


@pytest.mark.parametrize("several", [False, True])
def test_page(made, played, several):
    text = page(read_runs([made, played[1]] if several else [made]))
    parsed = Page(text)
    assert all(address.startswith(("#", "data:")) for address in parsed.addresses)
    assert "GRPO: the training reward went 0." in text
    assert "rewards 2 gsm8k + 0.5 format, 4 answers to each prompt, dapo loss" in text
    assert f"adamw, lr = [1e-05], {STEPS} steps of 8 prompts" in text
    assert "<th>reward in training</th>" in text
    assert ">1.250<span" in text  # held-out reward
    assert parsed.json["plot-data"]["reward"]["series"][0]["low"][3] is not None
    assert 'class="band s0 lap0"' in text


def test_no_two_parts_of_the_page_have_one_id(made):
    """The transcripts were once written over the section of rewards."""
    ids = re.findall(r' id="([^"]+)"', page([read_run(made)]))
    assert len(ids) == len({*ids}) > 10


def test_the_page_of_other_methods_has_no_rollouts(played):
    text = page(read_runs(played))
    for name in ("rollouts", "answers"):
        assert f'<section id="{name}"' not in text
        assert f'href="#{name}"' not in text


def test_rollouts_are_the_first_the_newest_and_some_between(made):
    run = read_run(made)
    shown = rollouts.chosen(run, 5, several=False)
    assert [each.title for each in shown] == ["step 1", "step 11", "step 21", "step 30", "step 40"]
    assert (shown[0].answers, shown[0].prompts, shown[0].dead) == (12, 3, 1)
    assert shown[0].functions == ["rewards/gsm8k", "rewards/format"]
    text = unescape(rollouts.section([run]))
    assert "12 of 40 rollouts are shown" in text
    assert text.count("<details") == 12
    assert "step 40: 12 answers to 3 prompts, 1 dead, mean reward of those shown 1.188" in text
    assert "What is 39 plus 0?<|im_end|>" in text
    assert "reward 2.25 <span class='better'>advantage +1.50</span>" in text
    assert "<small>gsm8k 0 · format –</small>" in text
    assert "<small>gsm8k 0 · format 0.5 · cut · not trained on</small>" in text
    assert 'format 0.5 · {"seen": 3}' in text


def test_steps_of_a_rollout_that_feeds_several(copy):
    config = copy / "config.yaml"
    config.write_text(
        config.read_text().replace("  samples: 4", "  samples: 4\n  num_iterations: 2\n  steps_per_generation: 3")
    )
    assert rollouts.chosen(read_run(copy), 2, several=True)[0].title == "run, steps 1 to 6"


def test_what_is_left_out_is_said(copy):
    long = [row | {"completion": "word " * 1000} for row in rollout(0, prompts=30, samples=20)]
    write_rollout(copy, 0, long)
    text = rollouts.section([read_run(copy)])
    assert "600 answers to 30 prompts, 8 shown" in text
    assert "4 more answers are not shown" in text
    assert "(3,000 more characters)" in text
    for number in range(40):
        write_rollout(copy, number, long)
    assert len(page([read_run(copy)])) < 6_000_000


def test_rollouts_of_a_stage_under_way_are_shown(copy):
    results = json.loads((copy / "results.json").read_text())
    (copy / "results.json").write_text(json.dumps(results[:-1]))
    assert "step 40:" in page([read_run(copy)])


def test_text_of_a_rollout_stays_text(copy):
    evil = "</div></details><script>alert(1)</script><img src=x onerror=alert(1)>\"'"
    rows = [row | {"prompt": evil, "completion": evil, "extra": json.dumps({evil: evil})} for row in rollout(0)]
    rows = [{name.replace("format", evil): value for name, value in row.items()} for row in rows]
    write_rollout(copy, STEPS - 1, rows)
    parsed = Page(page(read_runs([copy, copy])))
    assert "img" not in parsed.tags
    assert parsed.tags.count("script") == 3  # two of data, and the page's own
    assert not any(name.startswith("on") for name in parsed.attributes)


def test_every_metric_is_explained(real):
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    written = {name for row in read_run(real).steps for name in row} - {"stage", "phase", "step", "steps"}
    for name in (*learning.KEPT, *learning.LOOKS, *training.ANSWERS, *closing.ANSWERS, *written):
        general = re.sub(r"rewards/digits|rewards/gsm8k", "rewards/NAME", name).removesuffix("_stderr")
        assert f"`{general}`" in page, name


def test_the_closing_goes_by_what_greedy_answers_are_paid(real, copy):
    run = read_run(real)
    paid = [run.rewards(stage) for stage in run.stages]
    for row, values in zip(run.rows, paid, strict=True):
        assert statistics.mean(values.values()) == pytest.approx(row["evaluation"]["heldout/reward"]["value"])
    assert [sentence.partition(" stayed")[0] for sentence in closing.gains(run)][:2] == [
        "The reward of greedy answers",
        "Strict accuracy",
    ]
    path = copy / "grpo" / "heldout.jsonl"
    for stage, values in (("base", [0.5, 0.5]), ("grpo", [1.5, 1.25])):
        lines = [json.loads(line) for line in path.read_text().splitlines()[:2]]
        rows = [line | {"scores": {}, "reward": value} for line, value in zip(lines, values, strict=True)]
        (copy / stage / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sentence, *_ = closing.gains(read_run(copy))
    assert "The reward of greedy answers went from 0.5 to 1.38 on 2 held-out rows (base to GRPO): +0.875" in sentence


def test_a_real_run_is_shown_as_it_was(real):
    run = read_run(real)
    rows = [row for row in run.steps if row["stage"] == "grpo"]
    assert [row["step"] for row in rows] == list(range(1, 5))
    train = run.rows[-1]["train"]
    assert train["first"]["reward"]["value"] == pytest.approx(statistics.mean(row["reward"] for row in rows[:2]))
    assert learning.functions(train) == ["digits", "gsm8k"]
    shown = rollouts.chosen(run, 12, several=False)
    assert [each.title for each in shown] == ["steps 1 to 2", "steps 3 to 4"]
    assert [each.dead / each.prompts for each in shown] == pytest.approx([row["groups/dead"] for row in rows[::2]])
    for each, row in zip(shown, rows[::2], strict=True):
        rewards = [answer["reward"] for group in each.groups for answer in group]
        assert statistics.mean(rewards) == pytest.approx(row["reward"])
    text = unescape(page([run]))
    assert all(answer["completion"] in text for each in shown for group in each.groups for answer in group)
    assert "reward of greedy answers" in (real / "grpo" / "adapter" / "README.md").read_text()


def test_card(copy):
    shutil.copytree(copy / "iter_001" / "adapter", copy / "grpo" / "adapter")
    text = write_card(copy / "grpo" / "adapter", copy, "grpo").read_text()
    assert "tags:\n- lora\n- grpo\n- spinfast\n" in text
    assert "group relative policy optimisation (GRPO" in text
    settings = "dapo loss, 4 answers to each prompt, group scaling, temperature 1, KL weight 0, learning rate 1e-05"
    assert f"| made by | GRPO, {settings}, {STEPS} steps of 8 prompts, seed 0 |" in text
    assert "| rewards | 2 gsm8k + 0.5 format |" in text
    assert "| training reward | 0." in text
    assert "| reward of greedy answers | – | 1.250 [1.005, 1.495] | 8 |" in text
