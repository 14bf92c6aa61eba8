"""pass@k of a run: over steps with intervals, before against after, and between runs."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bpdg.evaluation.benchmark import EvalResult
from megatron_bpdg.evaluation.bootstrap import Interval, bootstrap, paired_bootstrap
from megatron_bpdg.report.run import Run


@dataclass(frozen=True)
class Comparison:
    """pass@k of two evaluations of one benchmark; `difference` is None where they are not paired."""

    benchmark: str
    k: int
    problems: int
    samples: int
    before: Interval
    after: Interval
    difference: Interval | None


def difference(before: EvalResult, after: EvalResult, k: int) -> Interval | None:
    """pass@k of `after` minus that of `before`, resampling problems in pairs.

    None where the two did not draw the same number of samples for the same problems: there is nothing to pair.
    """
    if before.samples != after.samples or set(before.problem_ids) != set(after.problem_ids):
        return None
    counts = dict(zip(after.problem_ids, after.correct))
    return paired_bootstrap(before.correct, [counts[problem] for problem in before.problem_ids], before.samples, k)


def estimate(result: EvalResult, k: int) -> Interval:
    """pass@k of one evaluation with its interval over problems."""
    return bootstrap(result.correct, result.samples, k)


def comparison(before: EvalResult, after: EvalResult, k: int) -> Comparison:
    """Both values and their paired difference."""
    return Comparison(
        benchmark=after.benchmark,
        k=k,
        problems=len(after.problem_ids),
        samples=after.samples,
        before=estimate(before, k),
        after=estimate(after, k),
        difference=difference(before, after, k),
    )


def before_and_after(run: Run) -> list[Comparison]:
    """First against last evaluation, by benchmark and k; benchmarks evaluated only once are left out."""
    histories = [run.evaluations(benchmark) for benchmark in run.benchmarks]
    return [comparison(history[0], history[-1], k) for history in histories if len(history) > 1 for k in run.ks]


def summary_rows(run: Run) -> list[dict[str, object]]:
    """Rows for `tables.summary_table`: percent, with the interval of the difference."""
    return [
        {
            "benchmark": row.benchmark,
            "metric": f"pass@{row.k}",
            "before %": f"{100 * row.before.value:.1f}",
            "after %": f"{100 * row.after.value:.1f}",
            "difference, 95 % interval": "not paired" if row.difference is None else points(row.difference),
        }
        for row in before_and_after(run)
    ]


def points(interval: Interval) -> str:
    """A difference in percentage points: +12.3 [+8.0, +16.5]."""
    return f"{100 * interval.value:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
