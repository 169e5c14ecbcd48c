"""A reward that gives every answer the same value teaches nothing: say so, with the likely cause."""

from __future__ import annotations

from spinfast.rewards.contract import Rewards, Scores

BATCHES = 10


class ConstantWatch:
    """Remembers for how many batches in a row each function told no answer from another."""

    def __init__(self, rewards: Rewards, batches: int = BATCHES):
        self._kinds = {reward.name: reward.kind for reward in rewards.functions}
        self._batches = batches
        self._seen: dict[str, list[tuple[float | None, float]]] = {name: [] for name in self._kinds}

    def __call__(self, scores: Scores, clipped_ratio: float) -> list[str]:
        """Sentences to say after this batch, one per function, once until it changes.

        clipped_ratio: share of the batch's answers that the length limit cut.
        """
        said = []
        for name, values in scores.values.items():
            seen = self._seen[name]
            if len(set(values)) == 1:
                seen.append((values[0], clipped_ratio))
            else:
                seen.clear()
            if len(seen) == self._batches and (cause := self._cause(name)):
                shown = {value for value, _ in seen}
                gave = f"gave {shown.pop()!r} to every answer" if len(shown) == 1 else "told no two answers apart"
                said.append(f"reward {name} {gave} of {self._batches} batches in a row: {cause}")
        return said

    def _cause(self, name: str) -> str | None:
        """The likely cause; None where it is no fault, as with a penalty that is never due."""
        values, clipped = zip(*self._seen[name], strict=True)
        kind = self._kinds[name]
        if set(values) == {None}:
            return "it applies to no row (None); does the data have the column that it looks at?"
        if min(clipped) >= 1:
            return "the length limit cuts every answer before its end; raise generation.max_tokens"
        if set(values) != {0.0}:
            return "it tells no answers apart; all are as good as it asks for, or it does not look at them"
        if kind == "penalty":
            return None
        if kind == "form":
            return (
                "no answer has its format; show the format in the system prompt, train it with an sft stage first, "
                "or add tag_count, which rewards its parts"
            )
        return (
            "no answer earns it; see in the rollouts whether it finds the results where the model writes them, and if "
            "it does take easier prompts or more samples"
        )
