from pathlib import Path

import pytest

from megatron_bpdg.evaluation.benchmark import EvalResult
from megatron_bpdg.report.compare import before_and_after, comparison, differing, judge
from megatron_bpdg.report.facts import headline, run_facts
from megatron_bpdg.report.run import Run


def record(step: int, correct: list[int], samples: int = 4, first_id: int = 0) -> EvalResult:
    ids = [f"p{first_id + index}" for index in range(len(correct))]
    return EvalResult("bench", step, samples, ids, correct, 0.0, 10.0)


def run_with(evals: list[EvalResult], config: dict[str, object] | None = None) -> Run:
    return Run("run", Path("run"), config or {}, [], [], evals, [])


def test_pass_at_k_and_its_interval() -> None:
    result = comparison(record(0, [0, 4, 2, 2]), record(1, [4] * 4), k=1).before
    assert result.value == pytest.approx(0.5)
    assert result.low < 0.5 < result.high
    # k = 2 of n = 4: 1 - C(2,2)/C(4,2) = 5/6 where two are right.
    assert comparison(record(0, [0, 4, 2, 2]), record(1, [4] * 4), k=2).before.value == pytest.approx(
        (0 + 1 + 5 / 6 + 5 / 6) / 4
    )


def test_difference_is_paired_by_problem_id() -> None:
    before = record(0, [0, 1, 2, 3])
    shuffled = EvalResult("bench", 9, 4, ["p3", "p2", "p1", "p0"], [4, 3, 2, 1], 0.0, 10.0)
    result = comparison(before, shuffled, k=1).difference
    assert result is not None
    # Every problem gained exactly one of four: paired resampling sees no variance at all.
    assert (result.value, result.low, result.high) == pytest.approx((0.25, 0.25, 0.25))
    assert result.excludes_zero
    assert comparison(before, record(9, [1, 1, 1, 1], first_id=1), k=1).difference is None
    assert comparison(before, record(9, [1, 1, 1, 1], samples=8), k=1).difference is None


def test_before_and_after_use_first_and_last_step() -> None:
    run = run_with([record(50, [4] * 4), record(0, [0] * 4), record(25, [2] * 4)], {"evaluation": {"k": [1, 4, 8]}})
    rows = before_and_after(run)
    assert [(row.k, row.before.value, row.after.value) for row in rows] == [(1, 0.0, 1.0), (4, 0.0, 1.0)]
    assert rows[0].difference is not None
    assert rows[0].difference.points == "+100.0 [+100.0, +100.0]"
    assert before_and_after(run_with([record(0, [1])])) == []
    assert run_with([record(0, [1])]).ks == [1, 4]


GATE = {"tau": 1.0}


def final(name: str, correct: list[int], config: dict[str, object], step: int = 9, **changes: int) -> Run:
    """A run with one evaluation and pass@1 of two samples a problem."""
    config = {"seed": 1, "evaluation": {"k": [1]}, **config}
    return Run(name, Path(name), config, [], [], [record(step, correct, **{"samples": 2, **changes})], [])


# Every problem gains or loses one of two samples (no variance), or one gains what another loses.
@pytest.mark.parametrize(
    ("correct", "claim", "figures"),
    [
        ([2, 2], "The gate helped", "+50.0 [+50.0, +50.0]"),
        ([0, 0], "The gate hurt", "-50.0 [-50.0, -50.0]"),
        ([2, 0], "The gate made no difference beyond what the choice of problems explains", "+0.0 [-50.0, +50.0]"),
    ],
)
def test_the_verdict_subtracts_the_run_without_a_gate(correct: list[int], claim: str, figures: str) -> None:
    gated, plain = final("gated", correct, {"gate": GATE}), final("plain", [1, 1], {"gate": None})
    for verdict in (judge(gated, plain), judge(plain, gated)):
        assert verdict.sentence == f"{claim}: gated minus plain is {figures} points of pass@1 on bench."
        assert (verdict.reference, verdict.treated) == ("plain", "gated")
        assert "paired bootstrap over the 2 problems of two single runs at step 9, one seed each" in verdict.basis
        assert "(1 and 1)" in verdict.basis
        assert "differ" not in verdict.basis


def test_the_verdict_can_be_divided() -> None:
    config = {"seed": 1, "evaluation": {"k": [1]}}
    low, high = [EvalResult("b", 9, 2, ["p"], [count], 0.0, 1.0) for count in (0, 2)]
    gated = Run("gated", Path("g"), {**config, "gate": GATE}, [], [], [record(9, [2], 2), low], [])
    plain = Run("plain", Path("p"), config, [], [], [record(9, [0], 2), high], [])
    assert judge(gated, plain).sentence == (
        "The gate helped in part and hurt in part: gated minus plain is +100.0 [+100.0, +100.0] points of pass@1 on "
        "bench, -100.0 [-100.0, -100.0] points of pass@1 on b."
    )


def test_a_gate_that_does_nothing_is_none() -> None:
    off, gated = final("off", [1], {"gate": {"tau": 0.0}}), final("gated", [2], {"gate": GATE})
    assert judge(gated, off).reference == judge(off, gated).reference == "off"


def test_a_gate_among_the_weights_is_the_gate() -> None:
    gated = final("gated", [2, 1, 2], {"gate": None, "weights": [{"name": "drift_gate", **GATE}]})
    assert gated.gate == GATE
    assert "The gate helped" in judge(gated, final("plain", [1, 0, 1], {"gate": None})).sentence
    assert "Both runs have a gate" in judge(gated, final("short", [1, 0, 1], {"gate": GATE})).sentence
    both = final("both", [2, 1, 2], {"weights": [{"name": "own:Factor"}, {"name": "drift_gate", **GATE}]})
    assert judge(both, final("plain", [1, 0, 1], {})).basis.endswith("Besides the gate, the runs differ in weights.")
    assert dict(run_facts(both))["Other weights"] == "own:Factor"
    assert headline(final("run", [1], {"objective": {"name": "lsm"}, **both.config})).endswith(
        "gate over blocks of 64 tokens"
    )


def test_other_differences_are_named_and_take_the_credit_from_the_gate() -> None:
    gated = final("gated", [2, 2], {"gate": GATE, "seed": 2, "training": {"lr": 1e-3}, "output": "runs/a"}, step=8)
    verdict = judge(final("plain", [1, 1], {"training": {"lr": 1e-4}, "output": "runs/b"}), gated)
    assert verdict.sentence.startswith("The gated run ended higher: gated minus plain is +50.0")
    assert "at steps 8 and 9, one seed each (2 and 1)" in verdict.basis
    assert verdict.basis.endswith("Besides the gate, the runs differ in seed, training.lr.")


def test_many_other_differences_are_counted() -> None:
    plain, gated = final("plain", [1], {"training": dict.fromkeys("abcdefgh", 1)}), final("gated", [1], {"gate": GATE})
    assert judge(plain, gated).basis.endswith("training.e, training.f and 2 more settings.")


@pytest.mark.parametrize(("gate", "word"), [(GATE, "have"), (None, "lack")])
def test_runs_that_do_not_ask_about_the_gate(gate: dict[str, float] | None, word: str) -> None:
    verdict = judge(final("one", [1], {"gate": gate}), final("two", [2], {"gate": gate}))
    expected = f"Both runs {word} a gate, so this is another question: two ended higher: two minus one is +50.0"
    assert verdict.sentence.startswith(expected)


@pytest.mark.parametrize("change", [{"samples": 3}, {"first_id": 1}])
def test_what_cannot_be_paired_has_no_verdict(change: dict[str, int]) -> None:
    verdict = judge(final("plain", [1], {}), final("gated", [1], {"gate": GATE}, **change))
    assert verdict.sentence == "No answer: gated and plain share no benchmark of the same problems and samples."
    assert [row.difference for row in verdict.rows] == [None]


def test_differing_settings_are_dotted_and_leave_out_places() -> None:
    a = {"output": "x", "logging": {"wandb": "p"}, "gate": None, "training": {"lr": 1, "steps": 5}}
    b = {"output": "y", "logging": {}, "gate": {"tau": 1}, "training": {"lr": 2, "steps": 5, "epochs": 2}}
    assert differing(a, b) == ["gate.tau", "training.epochs", "training.lr"]
