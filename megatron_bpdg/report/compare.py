"""pass@k of a run, first against last evaluation, and between two runs: what the gate made of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_bpdg.evaluation.benchmark import EvalResult
from megatron_bpdg.evaluation.pass_at_k import Interval, bootstrap, pass_at_k_by_problem
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


def comparison(before: EvalResult, after: EvalResult, k: int) -> Comparison:
    """Both values and their difference, for which problems are resampled in pairs.

    Where the two did not draw the same number of samples for the same problems there is nothing to pair.
    """
    difference = None
    if before.samples == after.samples and set(before.problem_ids) == set(after.problem_ids):
        counts = dict(zip(after.problem_ids, after.correct))
        in_order = [counts[problem] for problem in before.problem_ids]
        after_P, before_P = (pass_at_k_by_problem(before.samples, c, k) for c in (in_order, before.correct))
        difference = bootstrap(after_P - before_P)
    return Comparison(
        benchmark=after.benchmark,
        k=k,
        problems=len(after.problem_ids),
        samples=after.samples,
        steps=(before.step, after.step),
        before=before.pass_at(k),
        after=after.pass_at(k),
        difference=difference,
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
    # The gate in one place, wherever it was given: what differs besides it.
    settings = ({**each.config, "gate": None, "weights": each.other_weights} for each in (reference, treated))
    others = differing(*settings)
    if not paired:
        sentence = (
            f"No answer: {treated.name} and {reference.name} share no benchmark of the same problems and samples."
        )
        return Verdict(reference.name, treated.name, rows, sentence, "")
    clear = {interval.value > 0 for _, interval in paired if interval.excludes_zero}
    if not one_gated:
        subject = (
            f"Both runs {'have' if run.gated else 'lack'} a gate, so this is another question: {treated.name} ended"
        )
    else:
        subject = "The gated run ended" if others else "The gate"
    # Only where the runs differ in nothing else is it the gate's doing.
    better, worse, same = ("higher", "lower", "no different")
    if one_gated and not others:
        better, worse, same = ("helped", "hurt", "made no difference")
    claims = {(): same, (True,): better, (False,): worse, (False, True): f"{better} in part and {worse} in part"}
    clauses = ", ".join(f"{interval.points} points of pass@{row.k} on {row.benchmark}" for row, interval in paired)
    beyond = "" if clear else " beyond what the choice of problems explains"
    sentence = f"{subject} {claims[tuple(sorted(clear))]}{beyond}: {treated.name} minus {reference.name} is {clauses}."
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
