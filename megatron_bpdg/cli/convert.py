"""`bpdg convert`: between HF and Megatron checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_bpdg.cli.common import quiet_libraries


def convert(
    source: Annotated[Path, typer.Argument(help="HF directory or Megatron checkpoint; told apart by content.")],
    target: Annotated[Path, typer.Argument(help="New directory; appears only when complete.")],
    to: Annotated[str | None, typer.Option(help="hf | megatron; default: what the source is not.")] = None,
    hf_source: Annotated[
        Path | None, typer.Option(help="HF directory with config and tokenizer, for a Megatron checkpoint without any.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 | bfloat16 | float16; default: as stored, byte for byte.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Go back from the result and compare every tensor's bytes.")] = False,
    verify_logits: Annotated[
        str | None, typer.Option(help="Text on which HF transformers and Megatron-Core must agree.")
    ] = None,
    max_file_gb: Annotated[float | None, typer.Option(min=1e-6, help="GB per data file; default 5 (HF), 2.")] = None,
    memory_gb: Annotated[float, typer.Option(min=1e-3, help="GB of tensors held at once, or the largest.")] = 1.0,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that read and that write.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing target.")] = False,
) -> None:
    """Convert between HF safetensors and Megatron checkpoints, byte for byte; see docs/converters.md.

    Of an interrupted conversion nothing is left. Under torchrun its ranks share the work.
    """
    from functools import partial

    from megatron_bpdg.checkpoint.convert import Options
    from megatron_bpdg.checkpoint.convert import convert as run_convert
    from megatron_bpdg.checkpoint.source import DTYPES

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is not known; choose {', '.join(DTYPES)}")
    options = Options(
        dtype=None if dtype is None else DTYPES[dtype],
        max_file_size=None if max_file_gb is None else int(max_file_gb * 10**9),
        workers=workers or min(8, os.cpu_count() or 1),
        memory=int(memory_gb * 10**9),
        overwrite=overwrite,
    )
    agree = None
    if verify_logits is not None:
        quiet_libraries()
        from megatron_bpdg.evaluation import logits

        agree = partial(logits.verify_logits, text=verify_logits)
    run_convert(source, target, options, to=to, hf_source=hf_source, verify=verify, agree=agree)
