"""One run as its methods see it: an open session, the data, the run directory, the display.

A method is a generator function (run, last stage) -> rows of results.json; phases.py has the verbs that methods share.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field, replace
from itertools import chain, groupby
from pathlib import Path

from spinfast import spread
from spinfast.config import Config
from spinfast.data import LoadedData, load_data
from spinfast.errors import UserError
from spinfast.evaluate.heldout import asked
from spinfast.evaluate.rewarded import load_rewards, tried
from spinfast.generation import Generator, prompt_seed
from spinfast.memory.planner import Load, StepPlan
from spinfast.objectives import Pairwise
from spinfast.policy import Policy
from spinfast.policy.adapters import files as adapters
from spinfast.progress import Display
from spinfast.rewards import Rewards
from spinfast.scoring import Budget
from spinfast.session import Machine, Session, check_rows, choose_backend, look, open_session, plan_steps
from spinfast.store import files, room
from spinfast.store.record import RunDir, Stage
from spinfast.types import Adapter, Completion, Example, Request, Sampling
from spinfast.weights.spectrum import LISTS

log = logging.getLogger("spinfast")


@dataclass
class Run:
    """`base` is the checksum of the frozen weights that the stage is played on, `played` all stages so far."""

    session: Session
    directory: RunDir
    display: Display
    examples: Sequence[Example]
    heldout: Sequence[Example]
    longest: int  # packed tokens of the longest group that there can be, cut as small as its objective allows
    game: Pairwise  # what stages that are no game themselves are held out against
    rewards: Rewards | None = None  # the functions that rate answers, where a method has them
    each_step: Callable[[Stage, int, int, dict], None] | None = None  # (stage, step, of how many, its metrics)
    budget: Budget = field(init=False)
    base: str | None = None
    played: list[Stage] = field(default_factory=list)

    def __post_init__(self):
        tokens = files.read_sealed(plan_path(self.directory), "plan")["microbatch_tokens"]
        attention, shares = self.session.machine.device.attention, self.config.train.virtual_shards
        self.budget = Budget(tokens, attention, shares=shares, shrunk=self._shrink)

    @property
    def config(self) -> Config:
        return self.session.config

    @property
    def policy(self) -> Policy:
        return self.session.policy

    @property
    def generator(self) -> Generator:
        return self.session.generator

    def _shrink(self, tokens: int) -> None:
        """Memory ran out: smaller microbatches for the rest of the run, with room for the longest possible group."""
        tokens = max(tokens, min(self.budget.microbatch_tokens, self.longest))
        self.budget = replace(self.budget, microbatch_tokens=tokens)
        path = plan_path(self.directory)
        files.write_sealed(path, files.read_sealed(path, "plan") | {"microbatch_tokens": tokens}, "plan")

    def generate(
        self, requests: Sequence[Request], sampling: Sampling | Sequence[Sampling], adapter: Adapter | None
    ) -> Iterator[Completion]:
        """Generator.generate by all ranks, each for its share of the prompts: own answers as they come, others' then.

        Requests that stand side by side with one index are to one prompt, and stay together.
        """
        given = [sampling] * len(requests) if isinstance(sampling, Sampling) else sampling
        prompts = [list(of_one) for _, of_one in groupby(range(len(requests)), lambda i: requests[i].index)]
        own = []
        for share in spread.shares(len(prompts), self.budget.shares):
            rows = [row for prompt in share for row in prompts[prompt]]
            asked = [requests[row] for row in rows], [given[row] for row in rows]
            for answer in self.generator.generate(*asked, adapter):
                own.append(answer)
                yield answer
        if spread.world() > 1:
            of_ranks = spread.gather("answers", [astuple(answer) for answer in own])
            of_ranks[spread.rank()] = []
            for index, ids, reason, logps, sample, cached in chain(*of_ranks):
                yield Completion(index, tuple(ids), reason, tuple(logps), sample, cached)

    def stage(self, name: str, last: Stage | None, method: str, number: int = 0) -> Stage:
        """A stage's directory; `number` counts the rounds of its method."""
        return Stage(self.directory, name, last, method, number)

    def become(self, last: Stage) -> Adapter:
        """Put the policy where a stage starts, the result of the last one, and return its adapter there.

        With adapter.init: merge that result, if it was trained, moves into the base and a fresh adapter starts, B zero.
        """
        self.policy.restore(adapters.load(last.path("adapter"), self.session.machine.model.revision))
        if self.config.adapter.init == "merge" and last.method != "base":
            self.policy.merge_and_restart(seed=prompt_seed(self.config.seed, len(self.policy.folded), 0, "adapter"))
        self.base = self.policy.base_checksum()
        start = self.policy.adapter()
        self.session.check_generator(self.examples[0].prompt_ids + self.examples[0].real_ids, start)
        return start

    def check_base(self) -> None:
        """No stage may change the frozen weights: the engine's, the policy's and the reference's are the same ones."""
        if self.base is not None and self.policy.base_checksum() != self.base:
            raise RuntimeError(
                "the base's weights changed while a round was played; its results cannot be trusted. "
                "Please report this with the run's log.txt and environment.json"
            )


@dataclass(frozen=True)
class Ready:
    """All of a run but the session."""

    config: Config
    machine: Machine
    examples: Sequence[Example]
    heldout: Sequence[Example]
    rewards: Rewards | None
    work: Sequence[Load]
    generate: bool  # whether it writes answers at all

    def plan(self, directory: RunDir, others: dict[str, StepPlan] | None = None) -> StepPlan:
        """Of a run that goes on the one it has, as far as memory corrected it, so that its batches stay the same.

        `others`: plans of this session, which a run of the same settings and lengths shares.
        """
        known = files.read_sealed(plan_path(directory), "plan")
        if known is not None:
            return StepPlan(**known)
        others = {} if others is None else others
        like = self._like()
        if like not in others:
            engine = choose_backend(self.config, self.generate)[0]
            others[like] = plan_steps(self.config, self.machine, self.work, engine)
        return others[like]

    def _like(self) -> str:
        """What a plan on one machine is made of: a run's config but for its seed and data, and their lengths."""
        tree = self.config.model_dump(mode="json", exclude={"seed", "data", "heldout"})
        lengths = [
            [load.rounds, load.answers, *((len(g.prompt_ids), *map(len, g.answers), *g.lengths) for g in load.groups)]
            for load in self.work
        ]
        return json.dumps([tree, self.generate, lengths])

    def begin(self, session: Session, directory: RunDir, display: Display) -> Run:
        needed = room.of_run(self.config, self.work, room.of(session.policy.trainable_parameters().values()))
        room.check(directory.path, needed - room.taken(directory.path), "the run")
        return begin(session, directory, display, self.examples, self.heldout, self.rewards)


@contextmanager
def open_run(config: Config, directory: RunDir, display: Display) -> Iterator[Run]:
    """Load data and weights, start the generator, begin or continue the run in `directory`."""
    with spread.ahead("model and tokenizer"):
        machine = look(config)
    ready = prepare(config, machine, directory)
    plan = StepPlan(**spread.told("the memory plan", lambda: asdict(ready.plan(directory))))
    with open_session(config, ready.machine, plan, ready.generate) as session:
        yield ready.begin(session, directory, display)


def prepare(config: Config, machine: Machine, directory: RunDir) -> Ready:
    """Load and check the data, and note in `directory` what the run is made from."""
    with spread.ahead("data"):
        data = load_data(config, machine.renderer)
    made_from = inputs(config, machine, data)
    if apart := dict(made_from.items() ^ spread.told("inputs", lambda: made_from).items()):
        raise UserError(f"{min(apart)}: not the same on rank {spread.rank()} as on rank 0; give all machines one")
    directory.remember(made_from)
    examples = data["data"].examples
    work = loads(config, examples)
    heldout = data["heldout"].examples if "heldout" in data else []
    check_rows(machine, work)
    rewards = load_rewards(config, examples, heldout)
    if rewards:
        spread.told("rewards, tried", lambda: tried(config, machine.renderer, rewards, examples) and None)
        directory.remember_rewards(rewards.fingerprints())
    generate = generates(config, work, heldout)
    sampled = sorted(config.generation.model_fields_set & {"temperature", "top_p", "max_tokens"})
    if config.evaluate.every > 1 and "spin" not in config.method:
        log.warning("evaluate.every has no use: only spin plays iterations, every other stage is evaluated")
    if sampled and not any(load.answers for load in work):
        log.warning("generation.%s has no use: no method of the run samples answers", sampled[0])
    return Ready(config, machine, examples, heldout, rewards, work, generate)


def inputs(config: Config, machine: Machine, data: Mapping[str, LoadedData]) -> dict[str, str]:
    """Fingerprints of all that a run is made from, beside its config."""
    fingerprints = {name: loaded.fingerprint for name, loaded in data.items()}
    if machine.start:
        fingerprints["adapter.start"] = adapters.fingerprint(machine.start)
    if machine.augmenting:
        fingerprints["augmenting"] = machine.augmenting.revision
    if Path(named := str(getattr(config.adapter, "target_modules", ""))).suffix in LISTS:
        fingerprints["adapter.target_modules"] = files.sha256(files.expanded(named))
    return {"model": machine.model.revision} | fingerprints


def begin(
    session: Session,
    directory: RunDir,
    display: Display,
    examples: Sequence[Example],
    heldout: Sequence[Example],
    rewards: Rewards | None = None,
) -> Run:
    """A run in an open session, from a fresh adapter."""
    session.fresh()
    if not spread.told("plan.json", plan_path(directory).exists):
        files.write_sealed(plan_path(directory), asdict(session.plan), "plan")
        spread.told("plan.json, written", lambda: None)
    work = loads(session.config, examples)
    longest = max(load.longest for load in work)
    game = next((load.objective for load in work if isinstance(load.objective, Pairwise)), Pairwise())
    return Run(session, directory, display, examples, heldout, longest, game, rewards)


def loads(config: Config, examples: Sequence[Example]) -> list[Load]:
    """What each method of the config asks of a step at its fullest; without examples the config's limits count."""
    from spinfast.methods import METHODS

    return [METHODS[name].load(config, examples) for name in config.method]


def generates(config: Config, work: Sequence[Load], heldout: Sequence[Example]) -> bool:
    """Whether the run writes answers at all: a method's, or those to held-out problems."""
    return any(load.answers for load in work) or bool(config.evaluate.problems and asked(heldout))


def plan_path(directory: RunDir) -> Path:
    return directory.path / "plan.json"
