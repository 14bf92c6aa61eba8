"""Is a response's final answer right?"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from megatron_bpdg.config.data import GraderConfig
from megatron_bpdg.config.user import UserClass
from megatron_bpdg.data import math_answers
from megatron_bpdg.data.prompts import Problem
from megatron_bpdg.data.records import DataError

Grader = Callable[[str, str], bool]

# An answer such as 9^{9^{9}} would keep sympy busy for good.
_CPU_SECONDS = 5.0
_SHOWN = 10


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
    r"""Mathematical equality of the final answers; see `math_answers`.

    In the response the last ``\boxed{}`` counts, whatever the text around it says; where it is empty or was not
    finished, the response is wrong. Without a box, what the math-verify package finds (the last formula or number).
    `answer` is LaTeX, with or without ``\boxed{}``. Reading and comparing stop after 5 s of CPU time together, however
    busy the machine is, and then count as wrong; the clock is a signal, which only the main thread may set, so other
    threads have no such limit.

    Raises:
        ValueError: no expression can be read from `answer`.
    """
    from math_verify import parse

    gold = math_answers.read(_unboxed(answer))
    if not gold:
        raise ValueError(
            f"math_verify reads no expression from the answer {answer!r}: correct it or use another grader"
        )
    boxed = math_answers.last_box(response)
    try:
        with _cpu_limit(_CPU_SECONDS):
            given = (
                parse(response, parsing_timeout=None) if boxed is None else math_answers.read(boxed) if boxed else []
            )
            return math_answers.equal(gold, given)
    except _OutOfTime:
        return False


def check_answers(grader: Grader, problems: Sequence[Problem], path: Path) -> None:
    """Raise DataError, naming the problems, where the grader could read nothing from their answers."""
    if grader is not grade_math:
        return
    if bad := [problem for problem in problems if not math_answers.readable(_unboxed(problem.answer))]:
        lines = "\n".join(f"  - {problem.id}: {problem.answer!r:.80}" for problem in bad[:_SHOWN])
        more = f"\n  - ... and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise DataError(
            f"{path}: {len(bad)} answer(s) from which math_verify reads no expression: correct them or use another "
            f"grader (data.grader, --grader)\n{lines}{more}"
        )


def _unboxed(answer: str) -> str:
    boxed = math_answers.last_box(answer)
    return answer if boxed is None else boxed


class _OutOfTime(BaseException):
    """No Exception: math-verify catches those."""


@contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Raise _OutOfTime inside once this process has computed for so long; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)  # again, where a library catches even that
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)


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
