"""The commands together, and how their errors are shown.

What a command needs beyond its options is imported when it runs: `bpdg --help` loads neither torch nor transformers.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.markup import escape

from megatron_bpdg import __version__
from megatron_bpdg.cli import convert, doctor, evaluate, init, inspect, report, schema, serve, task, text_of, train
from megatron_bpdg.cli.common import console
from megatron_bpdg.parallel.launch import report_to_launcher

app = typer.Typer(
    help="On-policy distillation with blockwise policy-drift gating on Megatron-Core.\n\n"
    "A run is one YAML file: `bpdg train examples/quickstart/opd.yaml` trains, `bpdg report RUN` draws it.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
app.command()(train.train)
app.command("eval")(evaluate.evaluate)
app.command()(convert.convert)
app.command()(inspect.inspect)
app.command()(init.init)
app.command()(report.report)
app.command()(schema.schema)
app.command()(serve.serve)
app.command()(doctor.doctor)
tasks = typer.Typer(help="Make the data of the embedded task.", no_args_is_help=True)
tasks.command()(task.arithmetic)
app.add_typer(tasks, name="task")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"bpdg {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """What stands before the command."""


def run() -> None:
    """Errors that name their remedy are printed as one message, without a traceback."""
    try:
        app(standalone_mode=True)
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        if os.environ.get("BPDG_TRACEBACK"):
            raise
        if not report_to_launcher(text_of(error)):
            console.print(f"[bold red]error:[/] {escape(text_of(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except Exception as error:
        # Python prints the traceback; the launcher should quote this rank and not one that it dragged along.
        report_to_launcher(f"{type(error).__name__}: {error}; the traceback is above")
        raise
