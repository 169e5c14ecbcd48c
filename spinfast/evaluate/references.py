r"""What a row's correct result is, and whether an answer gives it: one parser for data, held-out problems and `eval`.

A reference is what a column says (verl's reward_model.ground_truth is one), else what the real answer states: after
#### at its end (GSM8K) or in \boxed{} (MATH, AIME). A level-4 Markdown heading is no reference. An answer is read
twice: strict is the result stated as the problem's own real answer states it, flexible the result wherever it is, else
GSM8K's last number. A reading that the real answer itself does not pass can be passed by none that imitates it: the
problem is left out of that reading.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from spinfast.evaluate.answers import INVALID, boxed, gsm8k_flexible, gsm8k_strict, same_math, yes_no

if TYPE_CHECKING:
    from spinfast.types import Example

STRICT, FLEXIBLE = "exact_match,strict-match", "exact_match,flexible-extract"
ACCURACY = {STRICT: "heldout/accuracy_strict", FLEXIBLE: "heldout/accuracy_flexible"}  # the first there is decides
EXPLICIT = ("reference", "expected_answer", "final_answer", "ground_truth")  # columns that hold a result
IMPLICIT = ("answer", "solution")  # columns that hold one where they are not the real answer themselves
JSON = ('{"', "[{", '["')  # how the tests and rules of a reward function begin, as text
LONGEST = 60  # characters of a result after ####

_TYPOGRAPHY = str.maketrans("−–‐‑﹣－\u00a0\u2009\u202f\u2007’", "------    '")
_MARKS = re.compile(r"\*\*|__|`|\\[,!;: ()\[\]]|\\(?:left|right|displaystyle)(?![a-z])")  # emphasis, LaTeX's spacing
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|operatorname)\{([^{}]*)\}")
_LEAD = re.compile(r"(?:(?:so|thus|therefore),? )?(?:the )?(?:final )?(?:answer|result)(?: is)?(?:\s*[:=]|\s)\s*", re.I)
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))")
_ANOTHER_VALUE = r"(?!(?:pi|dozen|hundred|thousand|[mbtr]+illion)s?\b)"  # words that are no unit of the number
_UNIT = (
    rf"(?:\s*[%‰°$€£¥₹¢]|(?<=°)[CFK]\b|\s+{_ANOTHER_VALUE}(?:a|[^\W\d_]{{2,}})\b|\s*[^\W\d_]{{1,4}}/[^\W\d_]+\b|(?<=[^\W\d_])"
    r"(?:[.²³]|\^\{?[23]\}?)|(?<=\d)(?:[kcm]?m|[km]?g|m[lL]|hrs?|min|[ap]m|ft|lbs?|oz|mph|[KMGT]B)\b)"
)
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s*[$€£¥₹]?\s*(?P<minus>-?)(?:"
    r"(?P<fraction>(?:\d{1,40}\s+)?\d{1,40}\s*/\s*\d{1,40})|(?:"
    r"(?P<thousands>\d{1,3}(?:(?P<by>[,' _])\d{3})(?:(?P=by)\d{3})*(?:\.\d+)?|\d{1,2}(?:,\d\d)+,\d{3})|"
    r"(?P<comma>\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}|\d{1,3}(?: \d{3})+,\d+)|"
    r"(?P<simple>\d*\.?\d+))"
    r"(?:[eE](?P<e>[-+]?\d{1,3})|\s*(?:×|x|\*|\\times|\\cdot)\s*10\^\{?(?P<power>[-+]?\d{1,3})\}?)?)"
    rf"{_UNIT}{{0,6}}",
    re.ASCII,
)
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*(\S[^\n]*)")
_FORM = re.compile(r"(?!\d+[.)]\s*[^\d\s(])(?:[-+]?[$€£¥₹]?\s*[\d.(\[{\\]|[^\W\d]\w?\s*=)")  # how a result begins
_WORD = re.compile(r"(?<![\\\w])[^\W\d_]{2,}")
_CHOICE = re.compile(r"yes|no|true|false|[A-Z]", re.I)


def reference_of(row: Mapping[str, Any], answer: str) -> str | None:
    r"""The result of a row whose real answer is `answer`, or None: from a column, after ####, in \boxed{}."""
    if (text := named(row)) is not None:
        return stated(text) or plain(text)
    if (result := stated(answer)) is not None or row.get("answer") == answer:
        return result
    for name in IMPLICIT:
        text = _written(row.get(name)) or ""
        if (result := stated(text)) is not None or _is_result(result := plain(text)):
            return result
    return None


def named(row: Mapping[str, Any]) -> str | None:
    """What a column that is there for it gives as the result, as it is written."""
    told = row.get("reward_model")
    values = [*(row.get(name) for name in EXPLICIT), told.get("ground_truth") if isinstance(told, Mapping) else None]
    return next((text for value in values if (text := _written(value)) is not None), None)


def _written(value: Any) -> str | None:
    """A column's value as text; None where there is none, or none that an answer could be compared with."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or isinstance(value, list | Mapping) or value != value:
        return None
    text = str(value)
    return None if not text.strip() or text.lstrip().startswith(JSON) else text


def stated(text: str) -> str | None:
    r"""The result that a text states: after its last ####, else in its last \boxed{}."""
    result = after_hashes(text)
    return in_box(text) if result is None else result


def after_hashes(text: str) -> str | None:
    """The result after the last ####, which ends the text or is repeated in one sentence; None for a heading."""
    found = list(_HASHES.finditer(text))
    if not found:
        return None
    result, rest = plain(found[-1][1]), text[found[-1].end() :].strip()
    if not _is_result(result):
        return None
    repeated = "\n" not in rest and re.search(rf"(?<!\w){re.escape(result)}$", plain(rest))
    return result if not rest or repeated else None


def first_hashes(text: str) -> str | None:
    """The first result after any ####, wherever it stands: what is read of a model that goes on after its result."""
    results = (plain(found[1]) for found in _HASHES.finditer(text))
    number = gsm8k_strict(text)
    return next(filter(_is_result, results), None if number == INVALID else number)


def in_box(text: str) -> str | None:
    r"""The content of the last \boxed{}; None where there is none or nothing in it."""
    return plain(boxed(text) or "") or None


def whole(text: str) -> str:
    """The text as a result, for answers that are nothing else."""
    return plain(text)


WAYS = (first_hashes, after_hashes, in_box, whole)


def plain(text: str) -> str:
    r"""A result without its dress: "$1,234.00" is 1234.00, **42 apples** 42, \boxed{50\%} 50, (B) B, −5 -5."""
    text = text.translate(_TYPOGRAPHY).replace("{,}", ",").replace("\\$", "$").replace("\\%", "%")
    text = _TEXT.sub(r" \1", _MARKS.sub("", text)).strip(" \t\n*_")
    text = _LEAD.sub("", text, count=1) if _LEAD.match(text) else text
    text = text.rstrip(" .,;")
    if text.startswith("\\boxed") and (inside := boxed(text)):
        return plain(inside)
    if len(text) > 1 and text[0] == text[-1] == "$":
        return plain(text[1:-1])
    text = re.sub(r"^\(([A-Za-z])\)$", r"\1", text)
    number = _number(text)
    return number[0] if number else text


def _number(text: str) -> tuple[str, Fraction] | None:
    """(its digits, its value) where the text is one number: thousands, decimal commas, units, currency, 6.02e23."""
    found = _NUMBER.fullmatch(_FRACTION.sub(r" \1\2/\3\4", text).strip()) if len(text) <= 2 * LONGEST else None
    if not found:
        return None
    if found["fraction"]:
        *ones, above, below = re.findall(r"\d+", found["fraction"])
        if not int(below):
            return None
        digits, value = found["fraction"], Fraction(int(above), int(below)) + sum(map(int, ones))
    else:
        digits = found["simple"] or re.sub("[,' _]", "", found["thousands"] or "")
        digits = digits or re.sub("[. ]", "", found["comma"]).replace(",", ".")
        if exponent := found["e"] or found["power"]:
            digits += f"e{int(exponent)}"
        value = Fraction(digits)
    negative = "-" in (found["sign"], found["minus"])
    return "-" * negative + digits, -value if negative else value


def _is_result(text: str) -> bool:
    """Whether a line looks like a result rather than like a heading."""
    if _number(text) or _CHOICE.fullmatch(text):
        return True
    formula = _FORM.match(text) and re.search(r"[\d\\=]", text) and not re.search(r"://|</|<\|", text)
    return bool(formula) and len(text) <= LONGEST and len(_WORD.findall(text)) <= 3


def same_result(answer: str | None, reference: str) -> bool:
    """Equal as numbers where both are, else after MATH's normalisation, letter case aside."""
    if answer is None:
        return False
    answer, reference = plain(answer), plain(reference)
    numbers = _number(answer), _number(reference)
    if all(numbers):
        return numbers[0][1] == numbers[1][1]
    return same_math(answer.casefold(), reference.casefold())


def _stated_as(real: str, reference: str) -> Callable[[str], str | None] | None:
    """The way in which a real answer gives its reference."""
    return next((way for way in WAYS if same_result(way(real), reference)), None)


def _flexibly(text: str, reference: str) -> bool:
    if (found := after_hashes(text)) is not None:
        return same_result(found, reference)
    if any(same_result(found, reference) for found in (in_box(text), whole(text))):
        return True
    if _number(reference):
        return same_result(gsm8k_flexible(text.translate(_TYPOGRAPHY)), reference)
    if reference.casefold() in ("yes", "no"):
        return yes_no(text) == reference.casefold()
    shown = re.escape(reference)
    return bool(re.search(rf"^\W*{shown}[.,:;)]|(?<!\w){shown}$", plain(text), re.IGNORECASE))


def score(text: str, reference: str, real: str) -> dict[str, float]:
    r"""{STRICT, FLEXIBLE: 1 or 0}; without a reading that the real answer does not pass itself.

    Without a real answer ("", a prompt alone) strict is the result after ####, in \boxed{}, or as all there is.
    """
    if not real:
        strictly = same_result(stated(text) or whole(text), reference)
        return {STRICT: float(strictly), FLEXIBLE: float(_flexibly(text, reference))}
    way, scores = _stated_as(real, reference), {}
    if way:
        scores[STRICT] = float(same_result(way(text), reference))
    if _flexibly(real, reference):
        scores[FLEXIBLE] = float(_flexibly(text, reference))
    return scores


def unmatched(examples: Sequence[Example]) -> list[str]:
    """What to say of a data set whose real answers do not give their own references, with counts and a row each."""
    referred = [e for e in examples if e.reference is not None and e.answer]
    scores = [(e, score(e.answer, e.reference, e.answer)) for e in referred]
    said = []
    for lacking, what in (
        ([e for e, found in scores if not found], "do not give their own reference and are not scored"),
        (
            [e for e, found in scores if STRICT not in found and found],
            "give their reference in passing only, not after #### or in \\boxed{}: no strict accuracy of them",
        ),
        (
            [e for e, found in scores if FLEXIBLE not in found and found],
            "state their reference in a way that no reading of free text finds: no flexible accuracy of them",
        ),
    ):
        if lacking:
            first = lacking[0]
            said.append(
                f"{len(lacking)} of {len(referred)} real answers {what} (row {first.index + 1}: reference "
                f"{first.reference[:LONGEST]!r}, the answer ends in {first.answer.rstrip()[-LONGEST:]!r})"
            )
    return said
