"""Is a response's final answer right?"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable

import numpy as np

Grader = Callable[[str, str], bool]

# Seconds per parse and per comparison: an answer such as 9^{9^{9}} would keep sympy busy for good.
_TIMEOUT_S = 5


def get_grader(name: str) -> Grader:
    """The function ``(response, answer) -> right?`` that `data.grader` names.

    Names: `math_verify` and `exact` of this module, or ``module:function`` for one's own, imported.

    Raises:
        ValueError: there is no such grader, or the import fails.
    """
    if name in _GRADERS:
        return _GRADERS[name]
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise ValueError(f"data.grader = {name!r}: should be one of {', '.join(_GRADERS)} or module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"data.grader = {name!r}: cannot import {module_name!r} ({error}); is it on PYTHONPATH?"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"data.grader = {name!r}: {module_name!r} has no function {function_name!r}")
    return _checked(function, name)


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
