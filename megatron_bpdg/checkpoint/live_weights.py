"""The weights of a live model as something that can be streamed or saved as often as needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from megatron_bpdg.checkpoint.live import iter_hf_weights, save_hf


class Weights(Protocol):
    """A model's weights under their HF names. Every iteration streams the current values of all of them.

    Iterating and saving are collective over the trainer's ranks.
    """

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...

    def save(self, path: Path) -> None:
        """Write them as a complete HF directory that appears at once."""
        ...


class LiveWeights:
    """`Weights` of a Megatron model.

    Args:
        chunks: this rank's model chunks.
        hf_config: normalised HF config.
        hf_folder: gives config and tokenizer of the saved directory.
    """

    def __init__(self, chunks: Sequence[nn.Module], hf_config: Mapping[str, Any], hf_folder: Path) -> None:
        self.chunks, self.hf_config, self.hf_folder = chunks, hf_config, hf_folder

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter_hf_weights(self.chunks, self.hf_config)

    def save(self, path: Path) -> None:
        save_hf(self.chunks, self.hf_folder, path, overwrite=True)
