"""The weights of a checkpoint on disk under their HF names, whichever format it is in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megatron_bpdg.checkpoint.hf import HFCheckpoint, read_hf_config
from megatron_bpdg.checkpoint.mapping import mapping_for
from megatron_bpdg.checkpoint.torch_dist import TorchDistCheckpoint, is_torch_dist


def iter_checkpoint(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Stream (HF name, full tensor), one layer's tensor in memory at a time; needs neither Megatron nor ranks.

    Raises:
        FileNotFoundError: there is no checkpoint, or it lacks its hf folder.
        MappingError: tensors are missing, unknown or misshapen.
    """
    if is_torch_dist(path):
        checkpoint = TorchDistCheckpoint(path)
        if checkpoint.hf_folder is None:
            raise FileNotFoundError(f"{path} has no hf/config.json; copy the model's config.json and tokenizer there")
        mapping = mapping_for(read_hf_config(checkpoint.hf_folder))
        mapping.check_megatron(checkpoint.shapes, str(checkpoint.directory))
        for weight in mapping.weights:
            yield from weight.megatron_to_hf(checkpoint.read(weight.key)).items()
    else:
        hf = HFCheckpoint(path)
        hf.check()
        for name in hf.names:
            yield name, hf.read(name)
