"""The weights of a live model as something that can be streamed or saved as often as needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from megatron_bpdg.checkpoint.live import iter_hf_weights, save_hf


class LiveWeights:
    """`megatron_bpdg.serving.sglang.weights.base.Weights` of a Megatron model.

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
