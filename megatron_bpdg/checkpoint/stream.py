"""The weights of a checkpoint on disk under their HF names, whichever format it is in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megatron_bpdg.checkpoint.cast import Cast
from megatron_bpdg.checkpoint.source import open_source


def iter_checkpoint(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Stream (HF name, full tensor), one layer's tensor in memory at a time; needs neither Megatron nor ranks.

    A tied model's repeated head is left out. A tensor may share its memory with others of the same layer.

    Raises:
        FileNotFoundError: there is no checkpoint, or it lacks its hf folder.
        MappingError: tensors are missing, unknown or misshapen.
    """
    model = open_source(path, mixed=True)
    for weight in model.mapping.weights:
        yield from model.parts(weight, Cast()).items()
