"""`bpdg report`: the page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megatron_bpdg.cli.common import console


def report(
    run: Annotated[Path, typer.Argument(help="Run directory of `bpdg train`.")],
    compare: Annotated[list[Path] | None, typer.Option(help="Another run to overlay; repeatable.")] = None,
) -> None:
    """Write RUN/report.html: pass@k, loss, gates, the drift heat map."""
    from megatron_bpdg.report.command import report as write

    console.print(f"report: {write(run, compare or [], Console())}")
