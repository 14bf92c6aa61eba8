"""pass@k of a run, first against last evaluation, and between two runs: what the gate made of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_bpdg.evaluation.benchmark import EvalResult
from megatron_bpdg.evaluation.bootstrap import Interval, bootstrap, paired_bootstrap
from megatron_bpdg.report.run import Run

# Settings that name places and sinks; two runs that differ in nothing else are the same experiment.
_INCIDENTAL = ("output", "logging")


@dataclass(frozen=True)
class Comparison:
    """pass@k of two evaluations of one benchmark; `difference` (after - before) is None where they are not paired."""

    benchmark: str
    k: int
    problems: int
    samples: int
    steps: tuple[int, int]
    before: Interval
    after: Interval
    difference: Interval | None


@dataclass(frozen=True)
class Verdict:
    """What two runs say about the gate.

    Attributes:
        reference: name of the run that is subtracted: the one without a gate, else the report's own.
        treated: name of the other.
        rows: last evaluations, `before` being the reference's.
        sentence: the answer, with its intervals.
        basis: what the intervals are of, and what else differs between the runs.
    """

    reference: str
    treated: str
    rows: list[Comparison]
    sentence: str
    basis: str


def difference(before: EvalResult, after: EvalResult, k: int) -> Interval | None:
    """pass@k of `after` minus that of `before`, resampling problems in pairs.

    None where the two did not draw the same number of samples for the same problems: there is nothing to pair.
    """
    if before.samples != after.samples or set(before.problem_ids) != set(after.problem_ids):
        return None
    counts = dict(zip(after.problem_ids, after.correct))
    return paired_bootstrap(before.correct, [counts[problem] for problem in before.problem_ids], before.samples, k)


def comparison(before: EvalResult, after: EvalResult, k: int) -> Comparison:
    """Both values and their paired difference."""
    return Comparison(
        benchmark=after.benchmark,
        k=k,
        problems=len(after.problem_ids),
        samples=after.samples,
        steps=(before.step, after.step),
        before=bootstrap(before.correct, before.samples, k),
        after=bootstrap(after.correct, after.samples, k),
        difference=difference(before, after, k),
    )


def before_and_after(run: Run) -> list[Comparison]:
    """First against last evaluation, by benchmark and k; benchmarks evaluated only once are left out."""
    histories = [run.evaluations(benchmark) for benchmark in run.benchmarks]
    return [comparison(history[0], history[-1], k) for history in histories if len(history) > 1 for k in run.ks]


def judge(run: Run, other: Run) -> Verdict:
    """The question is what the gate adds: where only one of two runs has one, the run without is subtracted."""
    one_gated = run.gated != other.gated
    reference, treated = (other, run) if one_gated and run.gated else (run, other)
    rows = [
        comparison(reference.evaluations(name)[-1], treated.evaluations(name)[-1], k)
        for name in reference.benchmarks
        if name in treated.benchmarks
        for k in reference.ks
        if k in treated.ks
    ]
    paired = [(row, row.difference) for row in rows if row.difference is not None]
    others = [name for name in differing(*map(_settings, (reference, treated))) if name.split(".")[0] != "gate"]
    if not paired:
        sentence = (
            f"No answer: {treated.name} and {reference.name} share no benchmark of the same problems and samples."
        )
        return Verdict(reference.name, treated.name, rows, sentence, "")
    clear = {interval.value > 0 for _, interval in paired if interval.excludes_zero}
    if not one_gated:
        subject = f"Both runs {'have' if run.gated else 'lack'} a gate, so this is another question: {treated.name}"
        words = ("ended higher", "ended lower", "ended higher in part and lower in part", "ended no different")
    elif others:
        subject = "The gated run"
        words = ("ended higher", "ended lower", "ended higher in part and lower in part", "ended no different")
    else:
        subject = "The gate"
        words = ("helped", "hurt", "helped in part and hurt in part", "made no difference")
    claim = words[{(True,): 0, (False,): 1, (False, True): 2, (): 3}[tuple(sorted(clear))]]
    clauses = ", ".join(f"{points(interval)} points of pass@{row.k} on {row.benchmark}" for row, interval in paired)
    beyond = "" if clear else " beyond what the choice of problems explains"
    sentence = f"{subject} {claim}{beyond}: {treated.name} minus {reference.name} is {clauses}."
    return Verdict(reference.name, treated.name, rows, sentence, _basis(reference, treated, paired[0][0], others))


def _basis(reference: Run, treated: Run, row: Comparison, others: list[str]) -> str:
    seeds = [str(run.config.get("seed", "?")) for run in (treated, reference)]
    steps = f"step {row.steps[0]}" if row.steps[0] == row.steps[1] else f"steps {row.steps[1]} and {row.steps[0]}"
    text = (
        f"Brackets are 95 % intervals of a paired bootstrap over the {row.problems} problems of two single runs at "
        f"{steps}, one seed each ({' and '.join(seeds)}): they cover the choice of problems, not what another seed of "
        "training would give."
    )
    more = f" and {len(others) - 6} more settings" if len(others) > 6 else ""
    return f"{text} Besides the gate, the runs differ in {', '.join(others[:6])}{more}." if others else text


def _settings(run: Run) -> dict[str, Any]:
    """The config with the gate in one place, wherever it was given."""
    return {**run.config, "gate": run.gate, "weights": run.other_weights}


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Dotted names of the settings in which two configs differ, sorted; those of places and sinks left out."""
    flat_a, flat_b = dict(_flat(a)), dict(_flat(b))
    names = {name for name in flat_a.keys() | flat_b.keys() if flat_a.get(name) != flat_b.get(name)}
    return sorted(name for name in names if name.split(".")[0] not in _INCIDENTAL)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def percent(interval: Interval) -> str:
    """A fraction: 45.6 [40.1, 51.0]."""
    return f"{100 * interval.value:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def points(interval: Interval) -> str:
    """A difference in percentage points: +12.3 [+8.0, +16.5]."""
    return f"{100 * interval.value:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
