r"""Final answers in LaTeX: which part of a response is one, in which spelling, and when two are equal.

math-verify reads and compares expressions. What stands here is what it leaves open (which box counts), what it does not
read (spellings that models and data sets use for the same thing) and what it takes too lightly (numbers so small that
all of them round to 0, digits in another base).
"""

from __future__ import annotations

import logging
import re
import unicodedata
from fractions import Fraction
from typing import Any

# It warns of calls without its own clock, whose seconds pass faster on a busy machine; who grades has another.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(\{|\s)")
_DASHES = dict.fromkeys(map(ord, "−–—‐‑﹣－"), "-")
_SIGNS = {
    "∞": r"\infty ",
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "÷": r"\div ",
    "π": r"\pi ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "±": r"\pm ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∅": r"\emptyset ",
    r"\varnothing": r"\emptyset ",
}
_DEGREES = re.compile(r"\s*(°|\^\s*\\circ(?![a-zA-Z])|\^\s*\{\s*\\circ\s*\}|\\degrees?(?![a-zA-Z]))")
# Spaces that group the digits of one number.
_GROUPING = re.compile(r"(?<=\d)(?:\\[,;:! ]|~|\\thinspace\s?|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_OTHER_SPACES = re.compile(r"\\[,;:! ]|~|\\thinspace(?![a-zA-Z])|\\q?quad(?![a-zA-Z])")
_REPEATING = re.compile(r"(\d*)\.(\d*)(?:\\overline|\\bar|\\dot)\s*\{?(\d+)\}?")
_ROOT = re.compile(r"√\s*(?:\{([^{}]*)\}|\(([^()]*)\)|(\d+(?:\.\d+)?|[a-zA-Z]))")
_POWERS = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_INDICES = re.compile(r"[₀₁₂₃₄₅₆₇₈₉]+")
_BASED = re.compile(r"(?:0[xXbBoO])?([0-9A-Za-z]+)_\{?\(?(\d+)\)?\}?")
_PLAIN_NUMBER = re.compile(r"-?\d+(\.\d+)?")
# How far a decimal may be from an exact value, relative to it; math-verify's own bound is an absolute one.
_ROUNDED = 2e-6
_LARGEST_EXPONENT = 10**5


def last_box(response: str) -> str | None:
    r"""What the last ``\boxed{}`` holds, "" where it is empty or was not finished; None where there is no box."""
    boxes = list(_BOX.finditer(response))
    if not boxes:
        return None
    start = boxes[-1].end()
    if boxes[-1][1] != "{":  # \boxed 5
        return response[start:].split(maxsplit=1)[0] if response[start:].strip() else ""
    depth = 1
    for place in range(start, len(response)):
        if response[place - 1] == "\\" and response[place] in "{}":
            continue
        depth += {"{": 1, "}": -1}.get(response[place], 0)
        if depth == 0:
            return response[start:place].strip()
    return ""


def plain_latex(text: str) -> str:
    """The same answer in the spelling that math-verify reads."""
    text = text.translate(_DASHES)
    text = _GROUPING.sub("", text)
    text = _OTHER_SPACES.sub(" ", text)
    text = _DEGREES.sub("", text)
    text = _POWERS.sub(lambda found: f"^{{{unicodedata.normalize('NFKC', found[0]).translate(_DASHES)}}}", text)
    text = _INDICES.sub(lambda found: f"_{{{unicodedata.normalize('NFKC', found[0])}}}", text)
    text = "".join(
        _fraction(sign) if unicodedata.decomposition(sign).startswith("<fraction>") else sign for sign in text
    )
    text = _ROOT.sub(lambda found: rf"\sqrt{{{found[1] or found[2] or found[3]}}}", text)
    for sign, latex in _SIGNS.items():
        text = text.replace(sign, latex)
    text = _REPEATING.sub(_as_fraction, text)
    return text.strip().rstrip(".,;").strip()


def _fraction(sign: str) -> str:
    above, _, below = unicodedata.normalize("NFKC", sign).partition("⁄")
    return rf"\frac{{{above}}}{{{below}}}"


def _as_fraction(found: re.Match[str]) -> str:
    whole, fixed, repeated = found.groups()
    value = Fraction(int(repeated), 10 ** len(fixed) * (10 ** len(repeated) - 1))
    value += Fraction(int(f"{whole}{fixed}" or 0), 10 ** len(fixed))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def read(text: str) -> list[Any]:
    """What math-verify makes of an answer's LaTeX; an empty list where it is none."""
    from math_verify import parse  # seconds, and only needed by this grader

    # Plain text is taken for prose; inside \boxed it is read as LaTeX. Boxes may be nested.
    return list(parse(f"\\boxed{{{plain_latex(text)}}}", parsing_timeout=None))


def readable(text: str) -> bool:
    """Whether an expression can be read from an answer."""
    return bool(_PLAIN_NUMBER.fullmatch(text)) or bool(read(text))


def equal(gold: list[Any], given: list[Any]) -> bool:
    """Whether two answers of `read` are the same, by value; digits in a base only in the same base."""
    from math_verify import verify

    if not gold or not given:
        return False
    bases = [_BASED.fullmatch(answer[-1].strip()) if isinstance(answer[-1], str) else None for answer in (gold, given)]
    if all(bases):
        (one, other) = ((found[1].lower(), found[2]) for found in bases if found)
        return one == other
    try:
        if _numbers_differ(gold[0], given[0]):
            return False
        same = verify(gold, given, allow_set_relation_comp=True, timeout_seconds=None)
        return bool(same) or _same_where_positive(gold[0], given[0])
    except Exception:  # sympy raises anything; what it cannot compare is not the same
        return False


def _numbers_differ(one: Any, other: Any) -> bool:
    """Of two numbers, whether they are certainly not equal, however small or large they are."""
    import sympy

    values = (one, other)
    if not all(isinstance(value, sympy.Expr) and value.is_number and _moderate(value) for value in values):
        return False
    one, other = (value.doit() for value in values)
    if one.is_Rational and other.is_Rational:
        return bool(one != other)
    difference = abs((one - other).evalf(30))
    if one.atoms(sympy.Float) or other.atoms(sympy.Float):
        return bool(difference > _ROUNDED * (abs(one.evalf(30)) or 1))
    return False


def _moderate(value: Any) -> bool:
    """Whether a number can be worked out: a tower of powers takes longer than any clock can interrupt."""
    import sympy

    large = [power.exp for power in value.atoms(sympy.Pow)] + [f.args[0] for f in value.atoms(sympy.factorial)]
    return all(not size.has(sympy.Pow, sympy.factorial) and abs(size) <= _LARGEST_EXPONENT for size in large)


def _same_where_positive(one: Any, other: Any) -> bool:
    """Whether two expressions are equal where their variables are positive, as sqrt(1/n) and 1/sqrt(n) are."""
    import sympy

    if not all(
        isinstance(value, sympy.Expr) and value.free_symbols and not value.has(sympy.Abs) for value in (one, other)
    ):
        return False
    names = {symbol: sympy.Symbol(symbol.name, positive=True) for symbol in one.free_symbols | other.free_symbols}
    return bool(sympy.simplify(one.subs(names) - other.subs(names)) == 0)
