"""Is a response's final answer right?"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from pydantic import TypeAdapter, ValidationError

from megatron_bpdg.config.data import GraderConfig
from megatron_bpdg.config.user import UserClass

Grader = Callable[[str, str], bool]

# Seconds per parse and per comparison: an answer such as 9^{9^{9}} would keep sympy busy for good.
_TIMEOUT_S = 5


def get_grader(config: GraderConfig) -> Grader:
    """The function ``(response, answer) -> right?`` that a config section names."""
    if isinstance(config, UserClass):
        return _checked(config.make(), config.name)
    return _GRADERS[config.name]


def grader_named(name: str) -> Grader:
    """The same for a bare name: math_verify, exact, or module:function for one's own.

    Raises:
        ValueError: there is no such grader, or the import fails.
    """
    try:
        return get_grader(TypeAdapter[GraderConfig](GraderConfig).validate_python({"name": name}))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]["msg"]
        raise ValueError(
            f"grader {name!r}: should be one of {', '.join(_GRADERS)} or module:function ({problem})"
        ) from error


def grade_math(response: str, answer: str) -> bool:
    r"""Mathematical equality of the final answers, decided by the math-verify package.

    In the response the last ``\boxed{}`` counts, else what the package finds (the last formula or number). `answer` is
    LaTeX, with or without ``\boxed{}``. Parsing and comparing stop after 5 s each and then count as wrong; the clock is
    a signal, which only the main thread may set, so other threads have no such limit.

    Raises:
        ValueError: no expression can be read from `answer`.
    """
    from math_verify import parse, verify

    timeout = _TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
    # Plain text is taken for prose; inside \boxed it is read as LaTeX. Boxes may be nested.
    gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=timeout)
    if not gold:
        raise ValueError(
            f"math_verify reads no expression from the answer {answer!r}: correct it or use another grader"
        )
    return bool(verify(gold, parse(response, parsing_timeout=timeout), timeout_seconds=timeout))


def grade_exact(response: str, answer: str) -> bool:
    """The text after the last '#' of the response, stripped, is the answer; no '#' is a wrong answer."""
    _, mark, final = response.rpartition("#")
    return bool(mark) and final.strip() == answer


def _checked(function: Callable[[str, str], object], name: str) -> Grader:
    def grade(response: str, answer: str) -> bool:
        verdict = function(response, answer)
        if not isinstance(verdict, bool | np.bool_):
            # A score of -1 for a wrong answer would count as true.
            raise ValueError(f"data.grader = {name!r} returned {verdict!r}; it should return True or False")
        return bool(verdict)

    return grade


_GRADERS: dict[str, Grader] = {"math_verify": grade_math, "exact": grade_exact}
