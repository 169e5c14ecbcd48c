"""A GRPO stage in figures and, from these figures alone, in plain words why it does not learn.

`summary` keeps the means over the first and the last tenth of the steps (at least MIN_STEPS, where there are as many),
with standard errors over steps; `advise` reads nothing else, so what is said on the way and at the end agrees.
Thresholds are judgement, not theory; rules that compare two numbers ask for two standard errors between them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from spinfast.evaluate.statistics import Estimate, apart, estimate
from spinfast.rewards.kinds import kind

MIN_STEPS = 10  # of either end
KEPT = (
    *("reward", "reward_std", "frac_reward_zero_std", "groups/dead", "groups/refilled", "entropy", "kl"),
    *("completions/mean_length", "completions/mean_terminated_length", "completions/clipped_ratio"),
    *("clip_ratio/region_mean", "cispo_clip_ratio", "sampling/importance_sampling_ratio/mean"),
    *("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"),
)
BY_FUNCTION = re.compile(r"rewards/(?P<name>.+)/(mean|std)")
LOOKS = ("heldout/reward", "heldout/accuracy_strict", "heldout/accuracy_flexible")

Summary = dict
Rule = Callable[[Summary], str | None]


def summary(rows: Sequence[dict]) -> Summary:
    """Of the lines of metrics.jsonl of one stage, one or more.

    {"steps", "window": steps at either end, "first": {metric: estimate}, "last": ..., "heldout": {metric: [the first
    look's estimate, the last one's]}, "length_correlation": Pearson's r of reward and length over steps, or None,
    "constant": {reward function: the value that it gave every answer of every step}}
    """
    size = min(max(MIN_STEPS, len(rows) // 10), max(1, len(rows) // 2))
    looks = {name: [look for row in rows if (look := _look(row, name))] for name in LOOKS}
    return {
        "steps": len(rows),
        "window": size,
        "first": _means(rows[:size]),
        "last": _means(rows[-size:]),
        "heldout": {name: [found[0], found[-1]] for name, found in looks.items() if found},
        "length_correlation": _correlation(rows[:: max(1, len(rows) // 500)], "reward", "completions/mean_length"),
        "constant": _unchanging(rows),
    }


def functions(seen: Summary) -> list[str]:
    """The names of the reward functions."""
    return [found["name"] for name in seen["last"] if (found := BY_FUNCTION.fullmatch(name)) and name.endswith("/mean")]


def advise(seen: Summary, patience: int = 50) -> dict[str, str]:
    """Rule -> what it says, for the rules that have something to say.

    `patience`: steps before which what has not come yet is no news.
    """
    rules = (*RULES, *(LATE if seen["steps"] >= patience else ()))
    said = {rule.__name__: sentence for rule in rules if (sentence := rule(seen))}
    if not said and seen["steps"] >= patience and (sentence := _flat(seen)):
        return {"_flat": sentence}
    return said


def _unchanging(rows: Sequence[dict]) -> dict[str, float]:
    """Reward function -> its value, where it told no answer of these steps from another."""
    found = {}
    for name in dict.fromkeys(match["name"] for row in rows for key in row if (match := BY_FUNCTION.fullmatch(key))):
        means, spreads = ([_finite(row.get(f"rewards/{name}/{what}")) for row in rows] for what in ("mean", "std"))
        if None in means or None in spreads:
            continue
        bound = 1e-6 * max(1.0, abs(means[-1]))
        if max(max(map(abs, spreads)), max(means) - min(means)) <= bound:
            found[name] = means[-1]
    return found


def _finite(value) -> float | None:
    """A number that can be averaged; not "nan" and "inf", which stand as words in metrics.jsonl."""
    number = isinstance(value, int | float) and math.isfinite(value) and abs(value) < 1e100
    return float(value) if number else None


def _means(rows: Sequence[dict]) -> dict[str, Estimate]:
    names = dict.fromkeys(name for row in rows for name in row if name in KEPT or BY_FUNCTION.fullmatch(name))
    found = {name: [x for row in rows if (x := _finite(row.get(name))) is not None] for name in names}
    return {name: estimate(values) for name, values in found.items() if values}


def _look(row: dict, name: str) -> Estimate | None:
    value = _finite(row.get(name))
    return None if value is None else {"value": value, "stderr": _finite(row.get(f"{name}_stderr")), "n": None}


def _correlation(rows: Sequence[dict], *names: str) -> float | None:
    pairs = [pair for row in rows if None not in (pair := tuple(_finite(row.get(name)) for name in names))]
    if len(pairs) < MIN_STEPS:
        return None
    x, y = np.array(pairs).T
    if min(np.ptp(x) - 1e-9 * abs(x).max(), np.ptp(y) - 1e-9 * abs(y).max()) <= 0:
        return None
    x, y = ((v - v.mean()) / np.ptp(v) for v in (x, y))
    return float((x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum()))


# Rules -----------------------------------------------------------------------------------------------------------


def _value(seen: Summary, name: str, end: str = "last") -> float | None:
    found = seen[end].get(name)
    return found and found["value"]


def _moved(seen: Summary, name: str, sign: int) -> tuple[float, float] | None:
    """(first, last) of a metric that rose (sign 1) or fell (-1) by more than noise."""
    first, last = seen["first"].get(name), seen["last"].get(name)
    if first and last and sign * (last["value"] - first["value"]) > 0 and apart(first, last):
        return first["value"], last["value"]
    return None


def _lately(seen: Summary) -> str:
    return f"{seen['window']} steps" if seen["window"] > 1 else "step"


def _right(seen: Summary) -> float | None:
    """About the share of right answers, where rewards are 0 or one value M; None where they look otherwise.

    Then M is mean + variance / mean and the share is mean / M. M is taken for one if it is near a multiple of 0.5.
    """
    names = sorted(functions(seen), key=lambda name: kind(name) != "result")  # correctness first
    if not names:
        return None
    mean, spread = (_value(seen, f"rewards/{names[0]}/{what}") for what in ("mean", "std"))
    if mean is None or spread is None:
        return None
    if mean <= 0:
        return 0.0  # what pays for right answers costs for wrong ones
    right = mean + spread * (spread / mean)
    return mean / right if 0.4 < right < math.inf and abs(math.remainder(right, 0.5)) < 0.06 else None


def _constant(seen: Summary) -> str | None:
    found = [*seen.get("constant", {}).items()]
    never = [(name, value) for name, value in found if value <= 0 and kind(name) != "penalty"]
    found = never or (found if len(found) == len(functions(seen)) else [])  # one that always pays may be learnt
    if not found:
        return None
    named = ", ".join(f"{name} (always {value:g})" for name, value in found)
    return (
        f"a reward that {'never fires' if never else 'is the same for every answer'} teaches nothing: {named}. Look at "
        "some answers (the rollouts in the report): does the function find what it looks for, does the prompt ask for "
        "that form, does the data have the column? If so the model cannot do it yet: SFT on a few examples first, or "
        "easier problems."
    )


def _cut(seen: Summary) -> str | None:
    share = _value(seen, "completions/clipped_ratio")
    if share is not None and share > 0.5:
        return (
            f"{share:.0%} of the answers are cut at the length limit, so their results are never seen. Raise "
            "generation.max_tokens, ask for shorter answers in the prompt, or check that the model ends its turn."
        )
    return None


def _dead(seen: Summary) -> str | None:
    share = _value(seen, "groups/dead")
    share = _value(seen, "frac_reward_zero_std") if share is None else share
    alike = bool(functions(seen)) and {*functions(seen)} <= {*seen.get("constant", ())}
    if share is None or share <= 0.5 or alike:  # rewards that never change are no matter of difficulty
        return None
    right = _right(seen)
    if right is None:
        why = "Look at the rollouts whether all are right or all are wrong; harder or easier problems help."
    elif right < 0.25:
        why = (
            "Nearly all answers are wrong: the problems are too hard for it. More grpo.samples per prompt, easier "
            "problems, a reward that pays for steps in between, or SFT first."
        )
    elif right > 0.75:
        why = "Nearly all answers are right: the problems are too easy. Harder ones, or stop here."
    else:
        why = "Some prompts are always solved, others never: problems in between, or a higher temperature."
    return (
        f"in the last {_lately(seen)} {share:.0%} of the groups are dead: all answers to a prompt have the same "
        "reward, so it teaches nothing. "
        f"{why} grpo.refill replaces dead groups by fresh prompts."
    )


def _only_form(seen: Summary) -> str | None:
    names = functions(seen)
    form = [name for name in names if kind(name) != "result"]
    rose = [name for name in form if _moved(seen, f"rewards/{name}/mean", 1)]
    rest = [name for name in names if name not in form]
    if rose and rest and not any(_moved(seen, f"rewards/{name}/mean", 1) for name in rest):
        return (
            f"so far only the form improves ({', '.join(rose)}), not {', '.join(rest)}. Give correctness more weight, "
            "take the form's reward away once it is learnt, or take easier problems and more samples."
        )
    return None


def _hacked(seen: Summary) -> str | None:
    r, rose, length = seen["length_correlation"], _moved(seen, "reward", 1), "completions/mean_length"
    longer = _moved(seen, length, 1) or _moved(seen, length, -1)
    looks = [pair for pair in seen["heldout"].values() if None not in (pair[0]["stderr"], pair[1]["stderr"])]
    gained = any(last["value"] > first["value"] and apart(first, last) for first, last in looks)
    if gained or not looks or r is None or abs(r) < 0.5:
        return None
    if rose and longer and max(longer) > 1.2 * min(longer):
        return (
            f"the reward rose from {rose[0]:.3g} to {rose[1]:.3g} along with the length of answers ({longer[0]:.0f} to "
            f"{longer[1]:.0f} tokens, correlation {r:.2f}), but nothing held out improved: length may be what is paid "
            "for. Read some rollouts; look at rewards that grow with length; try grpo.loss: dr_grpo."
        )
    return None


def _heldout_falls(seen: Summary) -> str | None:
    for name, (first, last) in seen["heldout"].items():
        if last["value"] < first["value"] and apart(first, last):
            what = name.removeprefix("heldout/").replace("_", ", ")
            return (
                f"held-out {what} fell on the way from {first['value']:.3g} to {last['value']:.3g}, more than noise "
                "explains. A smaller grpo.lr, grpo.keep: best with evaluate_every, or grpo.beta above 0."
            )
    return None


def _entropy(seen: Summary) -> str | None:
    fell, right = _moved(seen, "entropy", -1), _right(seen)
    if fell and fell[1] < 0.2 * fell[0] and (right is None or right < 0.8):
        return (
            f"the entropy collapsed from {fell[0]:.3g} to {fell[1]:.3g} nats per token before the problems were "
            "solved: answers grow alike and there is nothing left to choose from. A smaller grpo.lr, a higher "
            "grpo.epsilon_high (0.28), a higher temperature, or grpo.beta above 0."
        )
    return None


def _kl(seen: Summary) -> str | None:
    rose = _moved(seen, "kl", 1)
    if rose and rose[1] > 0.5:
        return (
            f"the KL to the reference ran away, from {rose[0]:.3g} to {rose[1]:.3g} nats per token. A larger grpo.beta "
            "or a smaller grpo.lr."
        )
    return None


def _mismatch(seen: Summary) -> str | None:
    difference = _value(seen, "sampling/sampling_logp_difference/mean")
    if difference is not None and difference > 0.1:
        return (
            f"sampler and trainer differ by {difference:.2g} nats per token about the same answers: they are not the "
            "same model. Usual causes: the engine plays with another adapter, sampling cut by top_p or top_k, another "
            "precision or chat template. Until that is found, keep grpo.correction on."
        )
    return None


def _clipped(seen: Summary) -> str | None:
    shares = [share for name in ("clip_ratio/region_mean", "cispo_clip_ratio") if (share := _value(seen, name))]
    if shares and max(shares) > 0.3:
        return (
            f"{max(shares):.0%} of the tokens are clipped: the policy moves too far from the one that sampled. A "
            "smaller grpo.lr, fewer num_iterations, or fewer steps_per_generation."
        )
    return None


def _falls(seen: Summary) -> str | None:
    if fell := _moved(seen, "reward", -1):
        return (
            f"the training reward fell from {fell[0]:.3g} to {fell[1]:.3g}. A smaller grpo.lr, more prompts_per_step "
            "or samples, and a look at what the rollouts do now."
        )
    return None


def _flat(seen: Summary) -> str | None:
    """For a run of which no rule says more."""
    first, last = seen["first"].get("reward"), seen["last"].get("reward")
    if not first or not last or _moved(seen, "reward", 1):
        return None
    right = _right(seen)
    if right is not None and right > 0.8:
        return None
    return (
        f"the training reward did not rise beyond noise ({first['value']:.3g} to {last['value']:.3g}). A larger "
        "grpo.lr (LoRA takes about ten times that of full training), more samples per prompt, or more steps; and read "
        "some rollouts: does the reward tell good answers from bad ones?"
    )


RULES: tuple[Rule, ...] = (_constant, _cut, _dead, _heldout_falls, _entropy, _kl, _mismatch, _clipped)
LATE: tuple[Rule, ...] = (_only_form, _hacked, _falls)
