"""Early warnings in plain words: what the rows of results.json show, and what to try.

A rule sees one row beside the row before it and returns a sentence or None; those of a GRPO stage's steps are in
learning.py. Thresholds are judgement, not theory; those that compare two numbers ask for two standard errors between
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spinfast.evaluate import learning
from spinfast.evaluate.statistics import apart
from spinfast.names import label

Row = dict
Rule = Callable[[Row, Row], str | None]
LOOK = 10  # steps


def warnings(rows: Sequence[Row]) -> list[str]:
    """Every rule over every row, beside the last one before it that was evaluated; the base beside itself.

    A rule speaks once, of the last row on which it has something to say, and names those before.
    """
    found, previous = {}, rows[0] if rows else {}
    for row in rows:
        said = {rule.__name__: rule(row, previous) for rule in RULES}
        said |= learning.advise(row["train"]) if "window" in row["train"] else {}
        for rule in filter(said.get, said):
            names, _ = found.get(rule, ((), ""))
            found[rule] = (label(row["iteration"]), *names), said[rule]
        previous = row if row["evaluation"] else previous
    return [_named(*names) + sentence for names, sentence in found.values()]


def _named(last: str, *before: str) -> str:
    too = f" (as {', '.join(reversed(before))} before)" if before else ""
    return f"{last[0].upper()}{last[1:]}{too}: "


def on_the_way(rows: Sequence[Row]) -> list[str]:
    """What there is to say after the last of a stage's metrics lines, and was not said after an earlier one.

    It is looked at every LOOK steps, later at every tenth of what was done.
    """
    if not rows or "reward" not in rows[-1] or not _due(len(rows)):
        return []
    looks = (learning.summary(rows[:n]) for n in range(LOOK, len(rows) + 1) if _due(n))
    *before, now = (learning.advise(seen, patience=200) for seen in looks)
    told = {"_constant", *(rule for said in before for rule in said)}  # rewards.ConstantWatch says that at once
    return [sentence for rule, sentence in now.items() if rule not in told]


def _due(steps: int) -> bool:
    return steps % (LOOK * max(1, steps // (10 * LOOK))) == 0


def _real_falls(row: Row, previous: Row) -> str | None:
    change = row["evaluation"].get("heldout/real_logp_change")
    if change and _below(change, 0.0):
        return (
            f"log p(real) fell by {-change['value']:.2f} nats per answer on held-out prompts. The policy wins by "
            "pushing generated answers down, not by learning the real ones. Try a smaller learning rate, fewer "
            "steps, a larger beta, or one more SFT pass first."
        )
    return None


def _chosen_falls(row: Row, previous: Row) -> str | None:
    change = row["evaluation"].get("heldout/chosen_logp_change")
    if change and change["value"] < -0.1 and _below(change, 0.0):
        return (
            f"log p(chosen) is {-change['value']:.2f} nats per answer below the reference's on held-out rows: what is "
            "preferred became less likely too, however the margin grew. Try a smaller learning rate, a larger beta, "
            "SFT on such answers first or, of pairs, a likelihood term (dpo.loss {sigmoid: 1, sft: 1})."
        )
    return None


def _longer_wins(row: Row, previous: Row) -> str | None:
    longer = row["evaluation"].get("heldout/chosen_longer")
    if row.get("method") == "dpo" and longer and not 0.2 < longer["value"] < 0.8:
        share, word = max((longer["value"], "longer"), (1 - longer["value"], "shorter"))
        return (
            f"the chosen answer is the {word} one in {share:.0%} of the held-out comparisons: a policy can win by "
            "length alone. Look at the lengths of answers before and after."
        )
    return None


def _told_apart_at_once(row: Row, previous: Row) -> str | None:
    early = row["train"].get("early_accuracy")
    if early is not None and early > 0.98:
        return (
            f"{early:.0%} of the pairs were told apart within the first quarter of the steps. Chosen and rejected "
            "differ by something easy (format, length, an end token, another model's style); that is what is learnt."
        )
    return None


def _forgets(row: Row, previous: Row) -> str | None:
    now, before = (r["evaluation"].get("heldout/nll") for r in (row, previous))
    if row.get("method") == "sft" and now and before and now["value"] > before["value"] and apart(now, before):
        return (
            f"the held-out loss rose from {before['value']:.3f} to {now['value']:.3f} nats per token: the data is "
            "learnt by heart. Fewer epochs, a smaller learning rate, or sft.evaluate_every with keep: best."
        )
    return None


def _loss_at_zero(row: Row, previous: Row) -> str | None:
    loss = row["train"].get("last_loss")
    if loss is not None and loss < 0.02 and row.get("method") not in ("sft", "grpo"):
        return (
            f"the training loss ended at {loss:.4f}: every pair is already told apart, and further steps only "
            "widen the gap. Look for a give-away (length, end token, formatting), lower the learning rate or "
            "the number of epochs."
        )
    return None


def _length(row: Row, previous: Row) -> str | None:
    now, before = (r["evaluation"].get("heldout/length") for r in (row, previous))
    if now and before and not 0.67 < now["value"] / before["value"] < 1.5 and apart(now, before):
        change = "grew" if now["value"] > before["value"] else "shrank"
        return (
            f"answers {change} from {before['value']:.0f} to {now['value']:.0f} tokens since the last look. Length has "
            "become part of the game. Check that real answers end with the end-of-turn token, raise "
            "max_tokens if answers are cut, or lower the learning rate."
        )
    return None


def _shortcut(row: Row, previous: Row) -> str | None:
    features = {"fresh/auc_length": "their length", "fresh/auc_eos": "whether they end with the end token"}
    for metric, name in features.items():
        area = row["evaluation"].get(metric)
        if area and area["value"] > 0.9:
            return (
                f"real and fresh answers can be told apart by {name} alone (AUC {area['value']:.2f}). That is a bug "
                "or a difference of format, not quality. Compare some pairs by eye: chat template, end token, "
                "answers cut at max_tokens."
            )
    return None


def _never_ends(row: Row, previous: Row) -> str | None:
    now, before = (r["evaluation"].get("heldout/eos_rate") for r in (row, previous))
    if now and before and now["value"] < 0.5 and apart(now, before) and now["value"] < before["value"]:
        return (
            f"only {now['value']:.0%} of the answers end by themselves ({before['value']:.0%} before). Raise "
            "max_tokens or leave cut answers out of the pairs."
        )
    return None


def _loops(row: Row, previous: Row) -> str | None:
    now, before = (r["evaluation"].get("heldout/repeated_4grams") for r in (row, previous))
    if now and before and now["value"] > 0.25 and now["value"] > before["value"] and apart(now, before):
        return (
            f"{now['value']:.0%} of all 4-grams are repetitions ({before['value']:.0%} before): the model loops. Go "
            "back to the previous adapter and lower the learning rate."
        )
    return None


def _worse(row: Row, previous: Row) -> str | None:
    for metric in ("heldout/accuracy_strict", "heldout/accuracy_flexible"):
        now, before = (r["evaluation"].get(metric) for r in (row, previous))
        if now and before and now["value"] < before["value"] and apart(now, before):
            return (
                f"{metric.split('/')[1].replace('_', ' (')}) fell from {before['value']:.1%} to {now['value']:.1%}, "
                "more than noise explains. Keep the earlier adapter."
            )
    return None


def _paid_less(row: Row, previous: Row) -> str | None:
    now, before = (r["evaluation"].get("heldout/reward") for r in (row, previous))
    if now and before and now["value"] < before["value"] and apart(now, before):
        return (
            f"the held-out reward fell from {before['value']:.3g} to {now['value']:.3g}, more than noise explains. "
            "Keep the earlier adapter; a smaller learning rate, fewer steps, or grpo.beta above 0."
        )
    return None


def _game_over(row: Row, previous: Row) -> str | None:
    area = row["evaluation"].get("fresh/auc_log_ratio")
    if area and area["stderr"] and abs(area["value"] - 0.5) < 2 * area["stderr"]:
        return (
            f"the policy's log-ratio no longer tells real answers from its own fresh ones (AUC {area['value']:.2f}): "
            "the game is over, another iteration has nothing to learn from."
        )
    return None


def _few_pairs(row: Row, previous: Row) -> str | None:
    lost = sum(row["rejected"].values())
    if lost > row["pairs"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(row["rejected"].items()))
        return f"more pairs were rejected ({reasons}) than kept ({row['pairs']})."
    return None


def _below(of: dict, bound: float) -> bool:
    return of["stderr"] is not None and of["value"] + 2 * of["stderr"] < bound


RULES: tuple[Rule, ...] = (
    _real_falls,
    _chosen_falls,
    _longer_wins,
    _told_apart_at_once,
    _forgets,
    _loss_at_zero,
    _length,
    _shortcut,
    _never_ends,
    _loops,
    _worse,
    _paid_less,
    _game_over,
    _few_pairs,
)
