"""`bpdg task`: the data of the embedded task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_bpdg.cli.common import console


def arithmetic(
    output: Annotated[Path, typer.Argument(help="Directory for splits, traces, tokenizer and two configs.")],
    seed: Annotated[int, typer.Option()] = 0,
    train_problems: Annotated[int, typer.Option(min=1)] = 20_000,
    test_problems: Annotated[int, typer.Option(min=1)] = 200,
) -> None:
    """Worked arithmetic: seeded problems, their worked traces, a character tokenizer, two model shapes."""
    from megatron_bpdg.data.arithmetic import make_arithmetic

    make_arithmetic(output, seed, train_problems, test_problems)
    console.print(f"arithmetic task: {output}")
