"""`bpdg convert`: tell the direction from what the source is, and prove the result on request."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

from megatron_bpdg.checkpoint.mapping import MappingError
from megatron_bpdg.checkpoint.torch_dist import is_torch_dist
from megatron_bpdg.checkpoint.verify import compare_hf, hf_to_megatron, megatron_to_hf


def convert(source: Path, target: Path, *, verify: bool = False, overwrite: bool = False) -> None:
    """Convert HF -> torch_dist or torch_dist -> HF.

    With `verify`, convert back to HF in a temporary directory beside the target and compare every tensor's name,
    shape, dtype and bytes.

    Raises:
        FileNotFoundError, FileExistsError, MappingError, OSError, ValueError: see `hf_to_megatron`.
    """
    console = Console(stderr=True)
    to_hf = is_torch_dist(source)
    if to_hf:
        megatron_to_hf(source, target, overwrite=overwrite, console=console)
    else:
        hf_to_megatron(source, target, overwrite=overwrite, console=console)
    if verify:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.verify") as scratch:
            back = Path(scratch)
            if to_hf:
                hf_to_megatron(target, back / "megatron", console=console)
                megatron_to_hf(back / "megatron", back / "hf", console=console)
                differences = compare_hf(target, back / "hf")
            else:
                megatron_to_hf(target, back / "hf", console=console)
                differences = compare_hf(source, back / "hf")
        if differences:
            raise MappingError("the round trip is not exact:\n  " + "\n  ".join(differences))
        console.print("verified: the round trip is byte-exact")
    console.print(f"written: {target}")
