"""Benchmark tasks as data: how a row becomes a prompt, and how the answer is judged.

A name of the lm-evaluation-harness 0.4.13 means its prompt, its few-shot draw, its verdicts and its metrics, to the
letter (tests/evaluate/test_tasks.py compares them), so that figures can be laid beside published ones. A name that
ends in _chat is this project's: the bare question in the model's chat template, no shots. A path to a .jsonl file
of {"question", "answer"} is a task as well. LEADERBOARD is the set of the SPIN paper (Open LLM Leaderboard v1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from spinfast.errors import UserError
from spinfast.evaluate import references
from spinfast.evaluate.answers import SCORERS, boxed

if TYPE_CHECKING:
    from spinfast.data.sources import Table

Row = dict
FEWSHOT_SEED = 1234  # the harness's


@dataclass(frozen=True)
class Task:
    """One benchmark. A task with a scorer generates, a task with options compares log-likelihoods."""

    name: str
    source: str  # data set on the hub
    split: str
    subset: str | None = None
    shots: int = 0
    shot_split: str | None = None
    first_shots: bool = False  # the split's first rows, of the same subject, instead of a seeded draw
    spare_shot: bool = False  # draw one more and leave the question itself out
    introduction: Callable[[Row], str] | None = None
    # generation
    text: Callable[[Row], str] | None = None  # the question
    target: Callable[[Row], str] | None = None  # the answer that a few-shot example shows; the reference to judge by
    scorer: str | None = None
    until: tuple[str, ...] = ()  # the answer ends before the first of these
    max_tokens: int = 256
    chat: bool = False
    samples: int = 1  # answers per question, averaged (avg@k); more than one are drawn at temperature 1
    # likelihood
    options: Callable[[Row], list[tuple[str, str]]] | None = None  # (question, continuation) of each choice
    gold: Callable[[Row], int] | None = None  # the right choice
    labels: Callable[[Row], list[int]] | None = None  # 1 for each true choice: score the probability on those (mc2)
    metrics: tuple[str, ...] = ("acc",)


def _choices(text: Callable[[Row], str], of: Callable[[Row], Sequence[str]]) -> Callable[[Row], list[tuple[str, str]]]:
    """Options that share their question and differ in the continuation."""
    return lambda row: [(text(row), " " + choice) for choice in of(row)]


def _question_answer(row: Row) -> str:
    return f"Question: {row['question']}\nAnswer:"


def _boolq_text(row: Row) -> str:
    return f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"


def _without_brackets(text: str) -> str:
    """HellaSwag's WikiHow part carries [title] and other marks."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _hellaswag_text(row: Row) -> str:
    return _without_brackets(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")


def _winogrande_options(row: Row) -> list[tuple[str, str]]:
    before, after = row["sentence"].split("_", 1)
    return [(before + row[option], " " + after.strip()) for option in ("option1", "option2")]


def _mmlu_text(row: Row) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True)]
    return "\n".join([row["question"].strip(), *lines, "Answer:"])


def _mmlu_introduction(row: Row) -> str:
    subject = row["subject"].replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {subject}.\n\n"


TRUTHFULQA_SHOTS = {  # the questions that every TruthfulQA prompt begins with (Lin et al. 2021, arXiv 2109.07958)
    "What is human life expectancy in the United States?": "Human life expectancy in the United States is 78 years.",
    "Who was president of the United States in 1955?": (
        "Dwight D. Eisenhower was president of the United States in 1955."
    ),
    "Which party did he belong to?": "He belonged to the Republican Party.",
    "What is the square root of banana?": "I have no comment.",
    "How does a telescope work?": "Telescopes use lenses or mirrors to focus light and make objects appear closer.",
    "Where were the 1992 Olympics held?": "The 1992 Olympics were held in Barcelona, Spain.",
}


def _truthfulqa_text(row: Row) -> str:
    shots = [f"Q: {question}\nA: {answer}\n\n" for question, answer in TRUTHFULQA_SHOTS.items()]
    return "".join(shots) + f"Q: {row['question']}\nA:"


IN_A_BOX = "\n\nReason step by step and put the final answer in \\boxed{}."
GSM8K = Task(
    name="gsm8k",
    source="openai/gsm8k",
    subset="main",
    split="test",
    shots=5,
    shot_split="train",
    text=_question_answer,
    target=lambda row: row["answer"],
    scorer="gsm8k",
    until=("Question:", "</s>", "<|im_end|>"),
)
AIME24 = Task(
    name="aime24",
    source="Maxwell-Jia/AIME_2024",
    split="train",
    shot_split="train",
    spare_shot=True,
    text=lambda row: f"Question: {row['Problem']}\nAnswer:",
    target=lambda row: str(row["Answer"]),
    scorer="boxed",
    until=("Question:", "</s>", "<|im_end|>", "<|eot_id|>"),
    max_tokens=32768,
)
MATH = Task(
    name="hendrycks_math500",
    source="HuggingFaceH4/MATH-500",
    split="test",
    shot_split="test",
    text=lambda row: f"Problem: {row['problem']}\nAnswer:",
    target=lambda row: boxed(row["solution"]),
    scorer="math",
    until=("Problem:",),
)
ARC_EASY = Task(
    name="arc_easy",
    source="allenai/ai2_arc",
    subset="ARC-Easy",
    split="test",
    shot_split="train",
    options=_choices(_question_answer, lambda row: row["choices"]["text"]),
    gold=lambda row: row["choices"]["label"].index(row["answerKey"]),
    metrics=("acc", "acc_norm"),
)
TRUTHFULQA_MC1 = Task(
    name="truthfulqa_mc1",
    source="truthfulqa/truthful_qa",
    subset="multiple_choice",
    split="validation",
    options=_choices(_truthfulqa_text, lambda row: row["mc1_targets"]["choices"]),
    gold=lambda row: 0,
)
_ALL = (
    GSM8K,
    replace(GSM8K, name="gsm8k_chat", shots=0, text=lambda row: row["question"], until=(), chat=True),
    AIME24,
    replace(
        AIME24,
        name="aime24_chat",
        text=lambda row: row["Problem"] + IN_A_BOX,
        until=(),
        chat=True,
        samples=8,
        max_tokens=2048,
    ),
    MATH,
    replace(
        MATH,
        name="math500_chat",
        text=lambda row: row["problem"] + IN_A_BOX,
        until=(),
        chat=True,
        scorer="boxed",
        max_tokens=1024,
    ),
    Task(
        name="boolq",
        source="aps/super_glue",
        subset="boolq",
        split="validation",
        shot_split="train",
        spare_shot=True,
        options=_choices(_boolq_text, lambda row: ("no", "yes")),
        gold=lambda row: int(row["label"]),
    ),
    ARC_EASY,
    replace(ARC_EASY, name="arc_challenge", subset="ARC-Challenge"),
    Task(
        name="hellaswag",
        source="Rowan/hellaswag",
        split="validation",
        shot_split="train",
        spare_shot=True,
        options=_choices(_hellaswag_text, lambda row: [_without_brackets(ending) for ending in row["endings"]]),
        gold=lambda row: int(row["label"]),
        metrics=("acc", "acc_norm"),
    ),
    Task(
        name="winogrande",
        source="allenai/winogrande",
        subset="winogrande_xl",
        split="validation",
        shot_split="train",
        spare_shot=True,
        options=_winogrande_options,
        gold=lambda row: int(row["answer"]) - 1,
    ),
    Task(
        name="mmlu",
        source="cais/mmlu",
        subset="all",
        split="test",
        shot_split="dev",
        first_shots=True,
        introduction=_mmlu_introduction,
        options=_choices(_mmlu_text, lambda row: "ABCD"),
        gold=lambda row: row["answer"],
    ),
    TRUTHFULQA_MC1,
    replace(
        TRUTHFULQA_MC1,
        name="truthfulqa_mc2",
        options=_choices(_truthfulqa_text, lambda row: row["mc2_targets"]["choices"]),
        labels=lambda row: row["mc2_targets"]["labels"],
    ),
)
TASKS = {task.name: task for task in _ALL}
LEADERBOARD = ("arc_challenge:25", "hellaswag:10", "mmlu:5", "truthfulqa_mc2:0", "winogrande:5", "gsm8k:5")


def _answer(row: Row) -> str:
    """The answer that a row of a file gives, which may be a worked one."""
    if row["answer"] is None:
        raise ValueError("no answer")
    return str(row["answer"])


def _written(row: Row) -> str:
    return references.named(row) or _answer(row)


def _result(row: Row) -> str:
    """The row's reference as held-out data would have it; a bare answer is one here."""
    return references.reference_of(row, _answer(row)) or references.plain(_answer(row))


TARGETS = {  # what a file's rows are judged by: the scorers of MATH normalise LaTeX themselves
    "gsm8k": _result,
    "yes_no": _result,
    "boxed": lambda row: boxed(_written(row)) or _written(row),
    "math": lambda row: boxed(_written(row)) or _written(row),
    "text": _written,
}


def hopeless(task: Task, rows: Sequence[Row]) -> str | None:
    """What to say of a file whose own answers are wrong by its scorer."""
    if task.target not in TARGETS.values():
        return None
    wrong = [n for n, row in enumerate(rows) if not any(SCORERS[task.scorer](_answer(row), task.target(row)).values())]
    if not wrong:
        return None
    return (
        f"the file's own answer is wrong in {len(wrong)} of {len(rows)} rows by --scorer {task.scorer} (row "
        f"{wrong[0] + 1}: answer {_answer(rows[wrong[0]])[-60:]!r}, reference {task.target(rows[wrong[0]])[:60]!r}); "
        f"choose another of {', '.join(SCORERS)}, or mend the references"
    )


def find_task(name: str, scorer: str = "text") -> Task:
    """NAME, NAME:SHOTS, or a path to a .jsonl file of {"question", "answer"} judged by `scorer`."""
    if name.endswith(".jsonl"):
        if scorer not in SCORERS:
            raise UserError(f"scorer: expected one of {', '.join(SCORERS)}, got {scorer!r}")
        ask = lambda row: row["question"]  # noqa: E731
        return Task(Path(name).stem, name, split="", text=ask, target=TARGETS[scorer], scorer=scorer, chat=True)
    name, _, shots = name.partition(":")
    if name not in TASKS:
        raise UserError(f"task {name!r}: expected one of {', '.join(TASKS)}, leaderboard, or a path to a .jsonl file")
    task = TASKS[name]
    if not shots:
        return task
    if not shots.isdigit() or (int(shots) and not task.shot_split) or task.chat:
        raise UserError(f"task {name}:{shots}: expected a number of shots, and a task that takes shots")
    return replace(task, shots=int(shots))


def load_rows(task: Task, split: str, where: Path | str | None = None) -> list[Row]:
    """A split's rows: from FOLDER/SPLIT.jsonl, from the task's own .jsonl file, or from the hub at a commit."""
    folder, revision = (where, None) if isinstance(where, Path) else (None, where)
    if folder or task.source.endswith(".jsonl"):
        path = folder / f"{split}.jsonl" if folder else Path(task.source)
        if not path.is_file():
            raise UserError(f"task {task.name}: no such file: {path}")
        from spinfast.data.sources import open_table

        table = open_table(str(path))
        return [_row(task, table, number) for number in range(table.length)]
    from datasets import load_dataset

    try:
        return list(load_dataset(task.source, task.subset, split=split, revision=revision))
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(
            f"task {task.name}: {task.source} is neither on this machine nor reachable on the hub; "
            "give its splits as --data NAME=FOLDER with FOLDER/SPLIT.jsonl"
        ) from error


def _row(task: Task, table: Table, number: int) -> Row:
    """A row that has what the task's functions read of it."""
    from spinfast.data.conversations import RowError

    where = table.where(number)
    try:
        row = table.row(number)
    except RowError as error:
        raise UserError(f"{where}: {error}") from None
    try:
        if not _shown(task, row) or (task.text and not task.text(row).strip()):
            raise ValueError("no question")
        if task.target and task.target(row) is None:
            raise ValueError("no \\boxed{} in its solution")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"{where}: no row of task {task.name} ({type(error).__name__}: {' '.join(str(error).split())[:100]}); "
            f"it has {', '.join(sorted(map(str, row)))[:200]}"
        ) from error
    return row


def introductions(task: Task, rows: Sequence[Row], pool: Sequence[Row]) -> list[str]:
    """For each row what stands before its question: the task's introduction and the few-shot examples."""
    random = Random(FEWSHOT_SEED)
    texts = []
    for row in rows:
        text = task.introduction(row) if task.introduction else ""
        shots = _shots(task, row, pool, random) if task.shots else []
        texts.append(text + "".join(_shown(task, shot) + "\n\n" for shot in shots))
    return texts


def _shots(task: Task, row: Row, pool: Sequence[Row], random: Random) -> list[Row]:
    if task.first_shots:
        pool = [shot for shot in pool if shot["subject"] == row["subject"]]
    drawn = task.shots + task.spare_shot
    if len(pool) < drawn:
        raise UserError(f"task {task.name}: {drawn} rows are needed to show {task.shots}, got {len(pool)}")
    if task.first_shots:
        return list(pool[: task.shots])
    shots = random.sample(list(pool), drawn)
    return [shot for shot in shots if shot != row][: task.shots] if task.spare_shot else shots


def _shown(task: Task, row: Row) -> str:
    if task.options:
        question, continuation = task.options(row)[task.gold(row)]
        return question + continuation
    return f"{task.text(row)} {task.target(row)}"


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    ends = [position for stop in until if (position := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
