import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_bpdg.data import graders
from megatron_bpdg.data.graders import check_answers, grader_named
from megatron_bpdg.data.prompts import Problem
from megatron_bpdg.data.records import DataError

# The same answer in other words, and answers that only look alike.
SPELLINGS = [
    (r"1\,234", "1234"),
    (r"12\,345\,678", "12345678"),
    (r"1\;234", "1234"),
    ("1~234", "1234"),
    ("1\u2009234", "1234"),
    ("33.", "33"),
    ("90°", r"90^\circ"),
    (r"90^{\circ}", "90"),
    ("–5", "-5"),
    ("−5", "-5"),
    ("½", r"\frac12"),
    ("2½", "2.5"),
    ("√2", r"\sqrt2"),
    ("√(x+1)", r"\sqrt{x+1}"),
    ("∞", r"\infty"),
    ("(−∞,3]", r"(-\infty,3]"),
    ("x²+1", "x^2+1"),
    ("x⁻¹", r"\frac1x"),
    ("2×3", "6"),
    (r"\varnothing", r"\emptyset"),
    (r"x\le 3", r"(-\infty,3]"),
    (r"(-\infty,3]", r"x\le 3"),
    (r"2<x\le5", "(2,5]"),
    (r"\sqrt{1/n}", r"\frac{1}{\sqrt{n}}"),
    (r"0.\overline{3}", r"\frac13"),
    (r"0.1\overline{6}", r"\frac16"),
    ("0.333333", r"\frac13"),
    ("2^{100}", "1267650600228229401496703205376"),
    ("1011_2", "1011_{2}"),
    ("1011", "1011_2"),
    (r"10\%", "0.1"),
]
DIFFERENT = [
    (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"),
    (r"\frac{1}{2006!}", r"\frac{1}{2004!}"),
    ("0", r"\frac{1}{2^{99}}"),
    (r"\frac{1}{2^{99}}", "0"),
    ("2^{100}", "2^{101}"),
    ("1011_2", "1011_3"),
    ("1010_2", "1011_2"),
    ("0.33333", r"\frac13"),
    (r"|x|", "x"),
    ("(2,5)", "(2,5]"),
    ("12,34", "1234"),
]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{34}.", "34"),
        (r"first \boxed{1}, a long way from here" + " and on" * 50 + r" \boxed{34}", "34"),
        (r"\boxed{\frac{3}{2}}", "1.5"),
        (r"\boxed{1.5}", r"\dfrac32"),
        (r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"\left( 3, \frac{\pi}{2} \right)"),
        (r"\boxed{q+p-2q}", "p - q"),
        (r"\boxed{113}", r"\boxed{113}"),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
        (r"\boxed{x=5}", "5"),
        ("The answer is 34", "34"),
        ("The answer is 33.", "33"),
        (r"I said \boxed{3}, but no: \boxed{5}", "5"),
        (r"\boxed 5", "5"),
        (r"\fbox{5}", "5"),
        *((rf"\boxed{{{given}}}", answer) for given, answer in SPELLINGS),
        (r"\boxed{ 1{,}000 }", "1000"),
    ],
)
def test_math_right(response: str, answer: str) -> None:
    assert grader_named("math_verify")(response, answer) is True


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{35}", "34"),
        (r"\boxed{34}" + " and on" * 50 + r" no, \boxed{35}", "34"),
        ("", "34"),
        ("no number", "34"),
        (r"\boxed{34", "35"),
        (r"\boxed{34", "34"),
        (r"\boxed{34} or rather \boxed{3", "34"),
        (r"\boxed{34} or rather \boxed{}", "34"),
        (r"\boxed{34}, so the final answer is not \boxed{35}", "34"),
        *((rf"\boxed{{{given}}}", answer) for given, answer in DIFFERENT),
        (r"\boxed{\left(\frac{\pi}{2}, 3\right)}", r"\left( 3, \frac{\pi}{2} \right)"),
    ],
)
def test_math_wrong(response: str, answer: str) -> None:
    assert grader_named("math_verify")(response, answer) is False


def test_math_works_in_threads() -> None:
    verdicts: list[object] = []

    def work() -> None:
        for response in (r"\boxed{\frac12}", r"\boxed{\frac13}"):
            try:
                verdicts.append(graders.grade_math(response, "0.5"))
            except ValueError as error:
                verdicts.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert verdicts == [True, False]


def test_math_gives_up_on_answers_that_never_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graders, "_CPU_SECONDS", 0.3)
    before = signal.getsignal(signal.SIGVTALRM)
    for given in ("9^{9^{9^{9}}}", "(9^{9^{9}})!", r"\sum_{k=1}^{10^{12}} \frac{1}{k^3}"):
        started = time.process_time()
        assert graders.grade_math(rf"\boxed{{{given}}}", "7") is False
        assert time.process_time() - started < 20.0
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_math_counts_computing_not_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine, on which everything takes longer, must not change a verdict."""
    read = graders.math_answers.read

    def slowly(text: str) -> list[object]:
        time.sleep(0.2)
        return read(text)

    monkeypatch.setattr(graders, "_CPU_SECONDS", 0.1)
    monkeypatch.setattr(graders.math_answers, "read", slowly)
    assert graders.grade_math(r"\boxed{7}", "7") is True


def test_unreadable_answers_are_named_when_data_is_loaded(tmp_path: Path) -> None:
    problems = [Problem(f"p{i}", [], answer) for i, answer in enumerate(["7", "}", r"\boxed{\frac12}", ""])]
    with pytest.raises(DataError, match=r"2 answer\(s\) from which math_verify reads no expression.*\n  - p1: '}'\n"):
        check_answers(graders.grade_math, problems, tmp_path)
    check_answers(graders.grade_exact, problems, tmp_path)
    check_answers(graders.grade_math, problems[::2], tmp_path)


def test_math_refuses_answers_it_cannot_read() -> None:
    with pytest.raises(ValueError, match="no expression from the answer"):
        graders.grade_math(r"\boxed{1}", "}")


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("37+8=45\n#45", True),
        ("#1 #45 \n", True),
        ("#45 #1", False),
        ("45", False),
        ("", False),
        ("#", False),
        ("#045", False),
    ],
)
def test_exact(response: str, verdict: bool) -> None:
    assert grader_named("exact")(response, "45") is verdict


def test_own_grader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_grader_module.py").write_text(
        "import numpy\n"
        "def ends(response, answer): return response.endswith(answer)\n"
        "def scores(response, answer): return -1.0\n"
        "def counts(response, answer): return numpy.bool_(True)\n"
        "constant = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    grade = grader_named("own_grader_module:ends")
    assert (grade("it is 7", "7"), grade("it is 7", "8")) == (True, False)
    assert grader_named("own_grader_module:counts")("", "") is True
    assert not isinstance(grader_named("own_grader_module:counts")("", ""), np.bool_)
    with pytest.raises(ValueError, match=r"own_grader_module:scores' returned -1\.0"):
        grader_named("own_grader_module:scores")("", "")
    for name in ("own_grader_module:absent", "own_grader_module:constant"):
        with pytest.raises(ValueError, match="has no class or function"):
            grader_named(name)
    del sys.modules["own_grader_module"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mathverify", "should be one of math_verify, exact or module:function"),
        (":f", "should be one of"),
        ("m:", "should be one of"),
        ("no_such_module_anywhere:f", "cannot import 'no_such_module_anywhere'.*is it on PYTHONPATH"),
    ],
)
def test_unknown_graders(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grader_named(name)
