"""From an answer's text to a verdict, as the lm-evaluation-harness 0.4.13 decides it.

GSM8K has two readings: strict takes the number after the first "#### ", flexible the last number anywhere.
Both are compared with the reference after the same clean-up (thousands commas, $, worked solution and final
full stop removed). MATH and AIME compare LaTeX after Hendrycks et al.'s normalisation (arXiv 2103.03874,
appendix): what that normalisation cannot parse is compared as it stands. The names of the metrics are the
harness's, "metric,filter". tests/evaluate/test_answers.py holds the harness itself against these functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable

INVALID = "[invalid]"  # the harness's word for "no answer found"; equal to no reference

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = tuple(re.compile(pattern) for pattern in (r",", r"\$", r"(?s).*#### ", r"\.$"))


def gsm8k_strict(text: str) -> str:
    """The number after the first "#### ", or INVALID."""
    found = _STRICT.search(text)
    return found[1] if found else INVALID


def gsm8k_flexible(text: str) -> str:
    """The last thing that looks like a number (it may be a lone "..."), or INVALID."""
    found = list(_FLEXIBLE.finditer(text))
    return found[-1][0] if found else INVALID


def same_number(answer: str, reference: str) -> bool:
    """GSM8K's exact match; the reference may be "42" or a whole solution that ends in "#### 42"."""
    return _cleaned(answer) == _cleaned(reference)


def _cleaned(text: str) -> str:
    for pattern in _IGNORED:
        text = pattern.sub("", text)
    return text.lower()


def yes_no(text: str) -> str:
    """The first "yes" or "no" that stands as a word, in lower case, or INVALID."""
    found = re.search(r"\b(yes|no)\b", text, re.IGNORECASE)
    return found[1].lower() if found else INVALID


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, braces balanced, or of "\boxed 42 $"; None where there is none."""
    if "\\boxed " in text:
        return text.rsplit("\\boxed ", 1)[1].split("$")[0]
    start = text.rfind("\\boxed{")
    if start < 0 or start != text.rfind("\\boxed"):
        return None
    depth = 0
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0 and text[end] == "}":
            return text[start + len("\\boxed{") : end]
    return None


def between_dollars(text: str) -> str:
    """What stands between the first and the last $, or the whole text where there are fewer than two."""
    first, last = text.find("$"), text.rfind("$")
    return text[first + 1 : last] if first != last else text


def math_answer(text: str) -> str:
    """The boxed answer, else what stands between dollars, else the whole text."""
    inside = boxed(text)
    return between_dollars(text) if inside is None else inside


def same_math(answer: str, reference: str) -> bool:
    """Equal after the MATH normalisation; as they stand where one of them does not parse."""
    try:
        return _normalised(answer) == _normalised(reference)
    except _Unparsed:
        return answer == reference


class _Unparsed(ValueError):
    pass


_BEFORE_UNITS = (
    *(("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", "")),
    *(("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", "")),
)
_AFTER_UNITS = (("\\%", ""), (" .", " 0."), ("{.", "{0."))


def _normalised(text: str) -> str:
    for old, new in _BEFORE_UNITS:
        text = text.replace(old, new)
    text, *units = text.split("\\text{ ")
    if len(units) > 1:
        raise _Unparsed("two units")
    for old, new in _AFTER_UNITS:
        text = text.replace(old, new)
    if text.startswith("."):
        text = "0" + text
    name, *value = text.split("=")
    if len(value) == 1 and len(name) <= 2:  # "x = 5" is 5
        text = value[0]
    text = _braced_fractions(_braced_roots(text).replace(" ", ""))
    return _slash_as_fraction("\\frac{1}{2}" if text == "0.5" else text)


def _braced_roots(text: str) -> str:
    r"""\sqrt3 -> \sqrt{3}"""
    head, *parts = text.split("\\sqrt")
    if "" in parts:
        raise _Unparsed("root of nothing")
    return head + "".join("\\sqrt" + (p if p[0] == "{" else f"{{{p[0]}}}{p[1:]}") for p in parts)


def _braced_fractions(text: str) -> str:
    r"""\frac12 -> \frac{1}{2}, \frac1{72} -> \frac{1}{72}"""
    result, *parts = text.split("\\frac")
    for part in parts:
        if not part:
            raise _Unparsed("fraction of nothing")
        if part[0] != "{":
            if len(part) == 1:
                return text
            below = part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"
            part = f"{{{part[0]}}}{below}"
        result += "\\frac" + part
    return result


def _slash_as_fraction(text: str) -> str:
    r"""3/4 -> \frac{3}{4}"""
    if text.count("/") != 1:
        return text
    try:
        above, below = map(int, text.split("/"))
    except ValueError as error:
        raise _Unparsed("fraction of something else") from error
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text


def score_gsm8k(text: str, reference: str) -> dict[str, float]:
    return {
        "exact_match,strict-match": float(same_number(gsm8k_strict(text), reference)),
        "exact_match,flexible-extract": float(same_number(gsm8k_flexible(text), reference)),
    }


def score_boxed(text: str, reference: str) -> dict[str, float]:
    """AIME, and MATH for a chat model: the boxed answer."""
    return {"exact_match,none": float(same_math(math_answer(text), reference))}


def score_math(text: str, reference: str) -> dict[str, float]:
    """hendrycks_math as the harness has it: between dollars, a box is not looked for."""
    return {"exact_match,none": float(same_math(between_dollars(text), reference))}


def score_yes_no(text: str, reference: str) -> dict[str, float]:
    return {"exact_match,none": float(yes_no(text) == reference.strip().lower())}


def score_text(text: str, reference: str) -> dict[str, float]:
    """Any other question: the whole answer, outer blanks and case aside."""
    return {"exact_match,none": float(text.strip().lower() == reference.strip().lower())}


SCORERS: dict[str, Callable[[str, str], dict[str, float]]] = {
    "gsm8k": score_gsm8k,
    "boxed": score_boxed,
    "math": score_math,
    "yes_no": score_yes_no,
    "text": score_text,
}
