"""The lm-evaluation-harness on a spinfast engine: any of its generation and multiple-choice tasks, by its own code.

Needs lm_eval (0.4.13 was tried); imported only when asked for, as `spinfast eval --harness`.
"""

from __future__ import annotations

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from spinfast.errors import UserError
from spinfast.evaluate.benchmark import Engine
from spinfast.evaluate.tasks import cut
from spinfast.generation import prompt_seed
from spinfast.types import Group, Request, Sampling

SUPPORTED = ("multiple_choice", "generate_until")


class HarnessModel(TemplateLM):
    """lm_eval's model interface over generator and one-sweep head."""

    backend = "causal"

    def __init__(self, engine: Engine):
        super().__init__()
        self.engine = engine
        self.tokenizer = engine.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            self.engine.conversation(chat_history),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self.engine.settings.get("template", {}),
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return list(self.engine.ids(string))

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        room = self.engine.max_length + 1
        groups = [Group(tuple(text[-max(1, room - len(rest)) :]), (tuple(rest),)) for _, text, rest in requests]
        # "is greedy" is not computed; the tasks that read it are refused in run()
        return [(sums[0], False) for sums in self.engine.sequence_logps(groups)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise UserError("spinfast's harness adapter has no rolling likelihood; use a task that asks questions")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asked, samplings, stops = [], [], []
        for index, request in enumerate(requests):  # each may have its own length and temperature
            text, wanted = request.args
            sampling = Sampling(
                float(wanted.get("temperature", 0.0)) if wanted.get("do_sample") else 0.0,
                float(wanted.get("top_p", 1.0)),
                min(int(wanted.get("max_gen_toks", 256)), self.engine.max_length // 2),
                self.engine.stop_ids,
            )
            ids = self.engine.ids(text)[-(self.engine.max_length - sampling.max_tokens) :]
            seed = prompt_seed(self.engine.seed, 0, index, "harness")
            asked.append(Request(index, ids, seed))
            samplings.append(sampling)
            stops.append(wanted.get("until", []))
        answers = [""] * len(requests)
        for answer in self.engine.generate(asked, samplings):
            answers[answer.index] = cut(self.engine.text(answer.token_ids), stops[answer.index])
        return answers


def run(engine: Engine, tasks: list[str], **options) -> dict:
    """lm_eval.simple_evaluate on this engine; its whole result, samples included. A task may be a .yaml file."""
    from lm_eval.tasks import TaskManager

    own = all(task.endswith(".yaml") for task in tasks)
    manager = TaskManager(include_defaults=not own)  # reading lm_eval's thousands of task files takes seconds
    loaded = manager.load(tasks)["tasks"]
    if refused := [name for name, task in loaded.items() if task.OUTPUT_TYPE not in SUPPORTED]:
        raise UserError(f"harness task {refused[0]}: expected one that generates or chooses ({', '.join(SUPPORTED)})")
    return lm_eval.simple_evaluate(
        model=HarnessModel(engine), tasks=tasks, task_manager=manager, bootstrap_iters=0, **options
    )
