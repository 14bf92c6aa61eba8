"""`bpdg report`: the page of a run, and its answers in the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from megatron_bpdg.cli.common import console

if TYPE_CHECKING:
    from megatron_bpdg.report.compare import Comparison


def report(
    run: Annotated[Path, typer.Argument(help="Run directory of `bpdg train`.")],
    compare: Annotated[list[Path] | None, typer.Option(help="Another run to overlay; repeatable.")] = None,
) -> None:
    """Write RUN/report.html: pass@k, loss, gates, the drift heat map."""
    from megatron_bpdg.report.compare import before_and_after, judge
    from megatron_bpdg.report.health import health, verdict
    from megatron_bpdg.report.page import write_report
    from megatron_bpdg.report.run import load_runs
    from megatron_bpdg.tracking.tables import summary_table

    page = write_report(run, compare or [])
    answers = Console()
    runs = load_runs(run, compare or [])
    if changes := [
        {"run": each.name, **row} for each in runs for row in _rows(before_and_after(each), "before", "after")
    ]:
        answers.print(summary_table(changes, title="pass@k in %, 95 % bootstrap intervals over problems"))
    for judged in (judge(runs[0], other) for other in runs[1:]):
        if rows := _rows(judged.rows, judged.reference, judged.treated):
            answers.print(summary_table(rows, title=f"{judged.treated} minus {judged.reference}, last evaluations"))
        answers.print(Text(f"{judged.sentence}\n{judged.basis}".rstrip()))
    for each in runs:
        answers.print(Text(f"{each.name}: {verdict(health(each))}"))
    console.print(f"report: {page}")


def _rows(rows: Iterable[Comparison], before: str, after: str) -> list[dict[str, object]]:
    """For `summary_table`: percent, with the interval of the difference."""
    return [
        {
            "benchmark": row.benchmark,
            "metric": f"pass@{row.k}",
            f"{before} %": f"{100 * row.before.value:.1f}",
            f"{after} %": f"{100 * row.after.value:.1f}",
            "difference, 95 % interval": "not paired" if row.difference is None else row.difference.points,
        }
        for row in rows
    ]
