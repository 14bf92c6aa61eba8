"""`bpdg report`: the page, and its answers in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from megatron_bpdg.report.compare import Comparison, before_and_after, judge, points
from megatron_bpdg.report.health import health, verdict
from megatron_bpdg.report.page import write_report
from megatron_bpdg.report.run import load_runs
from megatron_bpdg.tracking.tables import summary_table


def report(run: Path, compare: Sequence[Path], console: Console) -> Path:
    """Write RUN/report.html and return its path; print pass@k, the differences between the runs and the verdicts.

    Raises:
        As `write_report`.
    """
    page = write_report(run, compare)
    runs = load_runs(run, list(compare))
    if changes := [
        {"run": each.name, **row} for each in runs for row in _rows(before_and_after(each), "before", "after")
    ]:
        console.print(summary_table(changes, title="pass@k in %, 95 % bootstrap intervals over problems"))
    for judged in (judge(runs[0], other) for other in runs[1:]):
        if rows := _rows(judged.rows, judged.reference, judged.treated):
            console.print(summary_table(rows, title=f"{judged.treated} minus {judged.reference}, last evaluations"))
        console.print(Text(f"{judged.sentence}\n{judged.basis}".rstrip()))
    for each in runs:
        console.print(Text(f"{each.name}: {verdict(health(each))}"))
    return page


def _rows(rows: Iterable[Comparison], before: str, after: str) -> list[dict[str, object]]:
    """For `summary_table`: percent, with the interval of the difference."""
    return [
        {
            "benchmark": row.benchmark,
            "metric": f"pass@{row.k}",
            f"{before} %": f"{100 * row.before.value:.1f}",
            f"{after} %": f"{100 * row.after.value:.1f}",
            "difference, 95 % interval": "not paired" if row.difference is None else points(row.difference),
        }
        for row in rows
    ]
