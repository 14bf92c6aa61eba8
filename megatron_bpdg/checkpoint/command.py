"""`bpdg convert`: tell the direction from what the source is, and prove the result on request."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from megatron_bpdg.checkpoint.convert import Options, hf_to_megatron, megatron_to_hf, verify_conversion
from megatron_bpdg.checkpoint.legacy import is_legacy
from megatron_bpdg.checkpoint.mapping import MappingError
from megatron_bpdg.checkpoint.source import DTYPES, is_megatron
from megatron_bpdg.checkpoint.torch_dist import is_torch_dist
from megatron_bpdg.checkpoint.transfer import Ranks, converter_ranks


def options_of(
    dtype: str | None,
    max_file_gb: float | None,
    memory_gb: float,
    workers: int | None,
    *,
    overwrite: bool,
) -> Options:
    """Options in the command line's units.

    Raises:
        ValueError: an unknown dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is not known; choose {', '.join(DTYPES)}")
    return Options(
        dtype=None if dtype is None else DTYPES[dtype],
        max_file_size=None if max_file_gb is None else int(max_file_gb * 10**9),
        workers=workers or min(8, os.cpu_count() or 1),
        memory=int(memory_gb * 10**9),
        overwrite=overwrite,
    )


def convert(
    source: Path,
    target: Path,
    options: Options,
    *,
    to: str | None = None,
    hf_source: Path | None = None,
    verify: bool = False,
    agree: Callable[[Path, Path], str] | None = None,
) -> None:
    """Convert HF -> torch_dist, or Megatron -> HF; under torchrun, shared by its ranks.

    Args:
        source: HF directory, torch_dist or mp_rank checkpoint.
        target: new directory.
        options: see `Options`.
        to: format of the target; None: the one that the source is not in. An mp_rank checkpoint can become either.
        hf_source: config and tokenizer of a Megatron checkpoint that has no hf folder.
        verify: take the target back to the source and compare every tensor's name, shape, dtype and bytes.
        agree: given the HF directory and the torch_dist checkpoint, compares their models and says how; or raises.

    Raises:
        FileNotFoundError, FileExistsError, MappingError, OSError, ValueError: see `hf_to_megatron`.
    """
    if to not in (None, "hf", "megatron"):
        raise ValueError(f"--to {to!r} is not known; choose hf or megatron")
    kind = to or ("hf" if is_megatron(source) else "megatron")
    _check(source, kind, agree is not None)
    console = Console(stderr=True)
    run = megatron_to_hf if kind == "hf" else hf_to_megatron
    with converter_ranks() as ranks:
        if agree is not None and ranks.size > 1:
            raise ValueError("--verify-logits runs in one process: convert under torchrun, then compare without it")
        run(source, target, hf_source=hf_source, options=options, console=console, ranks=ranks)
        if verify:
            _verify(source, target, hf_source, options, console, ranks)
        if ranks.first:
            console.print(f"written: {target}")
    if agree is not None:
        hf, megatron = (target, source) if kind == "hf" else (source, target)
        console.print(agree(hf, megatron))


def _check(source: Path, kind: str, logits: bool) -> None:
    if kind == "hf" and not is_megatron(source):
        raise ValueError(f"{source} is not a Megatron checkpoint: it cannot be converted to HF")
    if kind == "megatron" and is_torch_dist(source) and not is_legacy(source):
        raise ValueError(f"{source} is a Megatron checkpoint already; it loads at any parallel layout as it is")
    if logits and is_megatron(source) and not is_torch_dist(source):
        raise ValueError(
            "--verify-logits compares an HF directory with a torch_dist checkpoint, not with mp_rank files"
        )


def _verify(
    source: Path, target: Path, hf_source: Path | None, options: Options, console: Console, ranks: Ranks
) -> None:
    differences = verify_conversion(
        source,
        target,
        hf_source=hf_source,
        dtype=options.dtype,
        workers=options.workers,
        memory=options.memory,
        ranks=ranks,
    )
    if differences:
        raise MappingError("the round trip is not exact:\n  " + "\n  ".join(differences))
    if ranks.first:
        console.print("verified: names, shapes, dtypes and bytes of all tensors survive the round trip")
