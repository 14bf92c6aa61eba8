"""`bpdg inspect`: what a checkpoint holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def inspect(
    path: Annotated[Path, typer.Argument(help="HF directory, torch_dist or mp_rank checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what a checkpoint holds, from its headers: format, layout, dtypes, parameters, iteration, completeness."""

    from megatron_bpdg.checkpoint.describe import describe, description_table

    description = describe(path)
    if as_json:
        print(json.dumps(description, indent=2))
    else:
        Console().print(description_table(description))
