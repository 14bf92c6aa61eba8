import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from megatron_bpdg.data import graders
from megatron_bpdg.data.graders import grader_named


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
    monkeypatch.setattr(graders, "_TIMEOUT_S", 1)
    assert graders.grade_math(r"\boxed{9^{9^{9^{9}}}}", "7") is False


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
