from pathlib import Path

import pytest

from megatron_bpdg.evaluation.benchmark import EvalResult
from megatron_bpdg.report.health import Finding, health, verdict
from megatron_bpdg.report.run import Run

GATED = {"kind": "opd", "gate": {"tau": 1.0}, "evaluation": {"k": [1]}}


def logged(name: str, values: list[float | None], config: dict[str, object] = GATED) -> Run:
    rows = [
        {"step": step, "time": 1.0, name: value, "nonfinite": [] if value is not None else [name]}
        for step, value in enumerate(values, start=1)
    ]
    return Run("run", Path("run"), config, rows, [], [], [])


def found(run: Run, check: str) -> Finding | None:
    return {finding.check: finding for finding in health(run)}.get(check)


# Ten values: a fifth is two, and the median of two their mean.
@pytest.mark.parametrize(
    ("check", "metric", "values", "healthy", "text"),
    [
        ("gate acts", "gate/ess", [0.999, 0.99, 0.998], True, "lowest effective sample size 0.99"),
        ("gate acts", "gate/ess", [0.999, 0.991], False, "lowest effective sample size 0.991: the gate is inert"),
        ("entropy holds", "actor/entropy", [2.0] * 8 + [0.3, 0.1], True, "2 to 0.2 nats a token"),
        ("entropy holds", "actor/entropy", [2.0] * 8 + [0.2, 0.18], False, "2 to 0.19 nats a token"),
        ("responses end", "rollout/truncated_fraction", [0.9] * 8 + [0.05, 0.15], True, "10.0% cut at the length"),
        ("responses end", "rollout/truncated_fraction", [0.0] * 8 + [0.1, 0.12], False, "11.0% cut at the length"),
        ("gradient norm steady", "train/grad_norm", [1.0, 1.0, 9.0] + [1.0] * 5 + [1.0, 3.0], True, "1 to 2"),
        ("gradient norm steady", "train/grad_norm", [1.0] * 8 + [2.0, 2.2], False, "1 to 2.1"),
        ("sampler = trainer", "mismatch/abs_mean", [0.05, 0.05, 3.0], True, "0.05 nats apart on a token"),
        ("sampler = trainer", "mismatch/abs_mean", [0.06, 0.06, 0.0], False, "0.06 nats apart on a token"),
        ("responses not empty", "rollout/empty", [0.0, 0.0], True, "none was empty"),
        (
            "responses not empty",
            "rollout/empty",
            [2.0, 0.0, 1.0],
            False,
            "3 empty responses were dropped, over 2 steps",
        ),
        ("finite", "loss/opd", [1.0, 2.0], True, "every metric was finite"),
        ("finite", "loss/opd", [1.0, None], False, "loss/opd was not finite at 1 step (2)"),
    ],
)
def test_both_sides_of_every_rule(check: str, metric: str, values: list[float], healthy: bool, text: str) -> None:
    finding = found(logged(metric, values), check)
    assert finding is not None
    assert finding.healthy is healthy
    assert finding.text.startswith(text)
    assert ("inert" in finding.text) == (check == "gate acts" and not healthy)


def test_long_lists_of_steps_are_cut() -> None:
    finding = found(logged("loss/opd", [None] * 9), "finite")
    assert finding is not None
    assert finding.text == "loss/opd was not finite at 9 steps (1, 2, 3, 4, 5, 6, 7, 8, ...)"


@pytest.mark.parametrize(
    ("after", "healthy", "text"),
    [
        ([1, 1], False, "bench pass@1 -50.0 [-50.0, -50.0]"),
        ([2, 1], True, "bench pass@1 -25.0 [-50.0, +0.0]"),
        ([2, 2], True, "bench pass@1 +0.0 [+0.0, +0.0]"),
    ],
)
def test_pass_at_k_falls_where_its_interval_lies_below_zero(after: list[int], healthy: bool, text: str) -> None:
    evals = [EvalResult("bench", step, 2, ["p", "q"], right, 0.0, 1.0) for step, right in ((0, [2, 2]), (5, after))]
    finding = found(Run("run", Path("run"), GATED, [], [], evals, []), "pass@k holds")
    assert finding == Finding("pass@k holds", healthy, text)
    assert found(Run("run", Path("run"), GATED, [], [], evals[:1], []), "pass@k holds") is None


def test_rules_without_their_subject_are_left_out() -> None:
    assert found(logged("gate/ess", [1.0], {"gate": None}), "gate acts") is None
    assert found(logged("gate/ess", [1.0], {"gate": {"tau": 0.0}}), "gate acts") is None
    assert found(logged("actor/entropy", [1.0, 0.0], {"kind": "sft"}), "entropy holds") is None
    assert health(Run("run", Path("run"), {}, [], [], [], [])) == []


def test_the_verdict_counts_and_names_what_failed() -> None:
    fine, bad = Finding("finite", True, ""), Finding("gate acts", False, "")
    assert verdict([fine, fine]) == "healthy in 2 checks"
    assert verdict([fine, bad]) == "1 of 2 checks failed: gate acts"
    assert verdict([]) == "nothing recorded to judge"
