"""torch_dist checkpoints as Megatron-Core's ranks leave them: each tensor in one piece per rank that holds a part."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_bpdg.checkpoint.hf import HFCheckpoint
from megatron_bpdg.checkpoint.mapping import mapping_for
from megatron_bpdg.checkpoint.patterns import Expert, GatedMLP, Weight


@dataclass(frozen=True)
class DistLayout:
    """How the pieces are cut and named."""

    tensor: int = 1
    expert_tensor: int = 1
    # Megatron-Core's spellings: layers stacked; one key per layer; one key per layer and expert, gate and up apart
    keys: str = "stacked"
    # Its own torch-only spec keeps the norm before experts under the key of the dense MLP's fused norm.
    fused_norms: bool = False


def save_dist(hf: Path, path: Path, layout: DistLayout, *, padded_rows: int | None = None) -> Path:
    """Write `hf` as iteration 3 under `path`."""
    source = HFCheckpoint(hf)
    mapping = mapping_for(source.config, padded_rows)
    num_layers = source.config["num_hidden_layers"]
    step = path / "iter_0000003"
    step.mkdir(parents=True)
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    streams: dict[int, io.BytesIO] = {}
    for weight in mapping.weights:
        full = weight.hf_to_megatron([source.read(name) for name in weight.hf_names])
        key, lead, sizes = _place(weight, layout, num_layers)
        for suffix, rank, start, piece, shape in _pieces(weight, full, layout):
            offsets = torch.Size((*lead, *start))
            name = f"{key}{suffix}"
            saved = piece.reshape(*(1 for _ in lead), *piece.shape).clone()
            entry = entries.setdefault(
                name,
                TensorStorageMetadata(TensorProperties(dtype=full.dtype), torch.Size((*sizes, *shape)), []),
            )
            assert isinstance(entry, TensorStorageMetadata)
            entry.chunks.append(ChunkStorageMetadata(offsets, saved.shape))
            stream = streams.setdefault(rank, io.BytesIO())
            begin = stream.tell()
            torch.save(saved, stream)
            storage[MetadataIndex(name, offsets)] = _StorageInfo(f"__{rank}_0.distcp", begin, stream.tell() - begin)
    for rank, stream in streams.items():
        (step / f"__{rank}_0.distcp").write_bytes(stream.getbuffer())
    (step / ".metadata").write_bytes(pickle.dumps(Metadata(entries, storage_data=storage)))
    (path / "latest_checkpointed_iteration.txt").write_text("3")
    return path


def _place(weight: Weight, layout: DistLayout, num_layers: int) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Stored key, index in its leading dimensions, and their sizes."""
    key, lead, sizes = weight.key, [], []
    if layout.fused_norms:
        key = key.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
    if layout.keys == "stacked" and key.startswith("decoder.layers."):
        layer = key.split(".")[2]
        key = key.replace(f"decoder.layers.{layer}.", "decoder.layers.")
        lead, sizes = [int(layer)], [num_layers]
    if isinstance(weight, Expert) and layout.keys != "singleton":
        key = key.replace(f"experts.experts.{weight.expert}.", "experts.experts.")
        lead, sizes = [*lead, weight.expert], [*sizes, weight.num_experts]
    return key, tuple(lead), tuple(sizes)


def _pieces(
    weight: Weight, full: Tensor, layout: DistLayout
) -> Iterator[tuple[str, int, tuple[int, ...], Tensor, tuple[int, ...]]]:
    """Key suffix, rank, offset, piece, and the full shape under that key."""
    ranks = layout.expert_tensor if isinstance(weight, Expert) else layout.tensor
    zeros = [0] * full.dim()
    if weight.tp_dim is None:
        yield "", 0, tuple(zeros), full, tuple(full.shape)
    elif isinstance(weight, GatedMLP):
        half = full.shape[0] // 2
        for number, part in enumerate(full.chunk(2)):
            singleton = layout.keys == "singleton"
            shape = (half, *full.shape[1:]) if singleton else tuple(full.shape)
            for rank, piece in enumerate(part.chunk(ranks)):
                first = (0 if singleton else number * half) + rank * (half // ranks)
                yield ("_w", "_v")[number] if singleton else "", rank, (first, *zeros[1:]), piece, shape
    else:
        for rank, piece in enumerate(full.chunk(ranks, weight.tp_dim)):
            offsets = list(zeros)
            offsets[weight.tp_dim] = rank * piece.shape[weight.tp_dim]
            yield "", rank, tuple(offsets), piece, tuple(full.shape)
