"""Whether a run is what it looks like: rules over its metrics and evaluations, each with what it saw.

A rule is left out where the run recorded nothing that it could judge.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_bpdg.report.compare import before_and_after
from megatron_bpdg.report.run import Floats, Run

INERT_ESS = 0.99  # above it throughout, the gate changes no more than a hundredth of the batch's weight
COLLAPSED_ENTROPY = 0.1  # of the entropy at the start
TRUNCATED_FRACTION = 0.1
GROWN_NORM = 2.0  # times the gradient norm at the start
MISMATCH_NATS = 0.05  # mean on a token; bfloat16 kernels that differ stay near 0.01


@dataclass(frozen=True)
class Finding:
    """One rule's answer: what was checked, whether it is well, and the figures."""

    check: str
    healthy: bool
    text: str


def health(run: Run) -> list[Finding]:
    """The rules that apply to a run, in the page's order."""
    return [Finding(*found) for found in _findings(run)]


def verdict(findings: list[Finding]) -> str:
    """In words: healthy, or the checks that failed."""
    failed = [finding.check for finding in findings if not finding.healthy]
    if failed:
        return f"{len(failed)} of {len(findings)} checks failed: {', '.join(failed)}"
    return f"healthy in {len(findings)} checks" if findings else "nothing recorded to judge"


def _findings(run: Run) -> Iterator[tuple[str, bool, str]]:
    if run.metrics:
        not_finite: dict[str, list[str]] = defaultdict(list)
        for row in run.metrics:
            for name in row["nonfinite"]:
                not_finite[name].append(str(row["step"]))
        lines = [
            f"{name} was not finite at {len(steps)} step{'s' if len(steps) > 1 else ''} "
            f"({', '.join(steps[:8])}{', ...' if len(steps) > 8 else ''})"
            for name, steps in not_finite.items()
        ]
        yield "finite", not lines, "; ".join(lines) or "every metric was finite"
    ess = _finite(run, "gate/ess")
    if run.gated and len(ess):
        inert = bool(ess.min() > INERT_ESS)
        why = ": the gate is inert, it weighs all tokens alike" if inert else ""
        yield "gate acts", not inert, f"lowest effective sample size {ess.min():.4g}{why}"
    rows = [(row, row.difference) for row in before_and_after(run) if row.difference is not None]
    if rows:
        fell = any(change.high < 0 for _, change in rows)
        changes = [f"{row.benchmark} pass@{row.k} {change.points}" for row, change in rows]
        yield "pass@k holds", not fell, "; ".join(changes)
    if len(entropy := _finite(run, "actor/entropy")) and run.config.get("kind") != "sft":
        start, end = _ends(entropy)
        yield "entropy holds", end >= COLLAPSED_ENTROPY * start, f"{start:.3g} to {end:.3g} nats a token"
    if len(truncated := _finite(run, "rollout/truncated_fraction")):
        end = _ends(truncated)[1]
        yield "responses end", end <= TRUNCATED_FRACTION, f"{end:.1%} cut at the length limit at the end"
    if len(norms := _finite(run, "train/grad_norm")):
        start, end = _ends(norms)
        yield "gradient norm steady", end <= GROWN_NORM * start, f"{start:.3g} to {end:.3g}"
    if len(mismatch := _finite(run, "mismatch/abs_mean")):
        middle = float(np.median(mismatch))
        yield "sampler = trainer", middle <= MISMATCH_NATS, f"{middle:.2g} nats apart on a token"
    if len(empty := _finite(run, "rollout/empty")):
        dropped = int(empty.sum())
        text = (
            f"{dropped} empty responses were dropped, over {(empty > 0).sum()} steps" if dropped else "none was empty"
        )
        yield "responses not empty", not dropped, text


def _finite(run: Run, name: str) -> Floats:
    values = run.series(name)[1]
    return values[np.isfinite(values)]


def _ends(values: Floats) -> tuple[float, float]:
    """Medians of the first and the last fifth: one spike is no trend."""
    fifth = max(len(values) // 5, 1)
    return float(np.median(values[:fifth])), float(np.median(values[-fifth:]))
