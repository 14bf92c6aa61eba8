"""Megatron-Core's `torch_dist` checkpoints in plain torch: no process group, no Megatron import, no GPU.

On disk it is a torch.distributed.checkpoint (DCP) directory::

    DIR/latest_checkpointed_iteration.txt     "release", or the number of an iteration
    DIR/release/ or DIR/iter_0000100/         .metadata, *.distcp, common.pt, metadata.json
    DIR/hf/                                   config.json, tokenizer files, bpdg_source.json

Layers are stacked on dimension 0 under keys without a layer index (``decoder.layers.mlp.linear_fc2.weight``
[L, H, F]), experts on the next dimension (``decoder.layers.mlp.experts.experts.linear_fc2.weight`` [L, E, H, F]). One
key per layer (as Megatron-Core writes models whose layers differ) and one per expert are read as well. Keys are
Transformer Engine's whichever layer spec a model uses. The vocabulary is stored with its true rows: Megatron-Core loads
it into a padded model, at any tensor-parallel size, as it allows a shape mismatch there.
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_bpdg.checkpoint.directory import METADATA_FILE, StepDirectory
from megatron_bpdg.checkpoint.mapping import LAYER, ModelMapping
from megatron_bpdg.checkpoint.patterns import Expert, Shape, Weight
from megatron_bpdg.checkpoint.raw import arguments_of, load_foreign, load_piece, read_stored

_STACKED = "decoder.layers."
_EXPERT = re.compile(r"\.mlp\.experts\.experts\.(\d+)\.")
_EXPERTS = ".mlp.experts.experts."
# Training checkpoints carry this besides the weights.
_OPTIMIZER = re.compile(r"^(chained_\d+\.)?optimizer\.")


def stacked_key(weight: Weight, mapping: ModelMapping) -> tuple[str, Shape, Shape]:
    """Where Megatron-Core stores a tensor: layers are stacked where all have the same tensors, experts always.

    Returns:
        Name in the file, index in the leading dimensions that are stacked (layer, expert), and their sizes.
    """
    key, index, sizes = weight.key, Shape(), Shape()
    if mapping.homogeneous and (layer := LAYER.match(key)):
        key = _STACKED + key[layer.end() :]
        index, sizes = (int(layer.group(1)),), (len(mapping.moe_layers),)
    if isinstance(weight, Expert):
        key = key.replace(f"{_EXPERTS}{weight.expert}.", _EXPERTS)
        index, sizes = (*index, weight.expert), (*sizes, weight.num_experts)
    return key, index, sizes


_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}


class _MetadataUnpickler(pickle.Unpickler):
    """DCP's metadata is a pickle; this one builds its plain data classes and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class("pathlib" if module == "pathlib._local" else module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in checkpoint metadata")


@dataclass(frozen=True)
class _Piece:
    """A saved piece of one tensor.

    Attributes:
        offsets: where it lies in the tensor.
        sizes: of the piece within the tensor.
        index: of the tensor in the leading dimensions that the piece has in its file.
        saved: shape in its file.
        place: file, offset, length.
    """

    offsets: Shape
    sizes: Shape
    index: Shape
    saved: Shape
    place: tuple[Path, int, int]

    def read(self) -> Tensor:
        file, offset, length = self.place
        tensor = load_piece(file, offset, length)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != self.saved:
            raise ValueError(f"{file}: the piece at byte {offset} is not the tensor {self.saved} of the metadata")
        return read_stored(tensor[self.index], file, offset)


@dataclass
class _Stored:
    """One tensor: full shape, dtype, and the pieces of it (of gate and up, where they have separate keys)."""

    shape: Shape
    dtype: torch.dtype
    pieces: list[_Piece]

    def read(self) -> Tensor:
        if len(self.pieces) == 1:
            return self.pieces[0].read()
        full = torch.empty(self.shape, dtype=self.dtype)
        for piece in self.pieces:
            region = (slice(start, start + size) for start, size in zip(piece.offsets, piece.sizes, strict=True))
            full[tuple(region)] = piece.read()
        return full


class TorchDistCheckpoint(StepDirectory):
    """The weights of a torch_dist checkpoint, readable tensor by tensor. Optimizer state is ignored.

    Attributes:
        shapes: canonical key (global layer index) -> full shape.
        dtypes: canonical key -> dtype.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a tracker or metadata that is not what it should be.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        if not (self.directory / METADATA_FILE).is_file():
            raise FileNotFoundError(f"{self.root}: the step is {self.directory}, which has no {METADATA_FILE}")
        self._metadata = _read_metadata(self.directory / METADATA_FILE)
        self._stored = self._index()

    @property
    def shapes(self) -> dict[str, Shape]:
        return {key: stored.shape for key, stored in self._stored.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {key: stored.dtype for key, stored in self._stored.items()}

    @property
    def stacked(self) -> bool:
        """Whether one stored tensor holds all layers."""
        return not any(LAYER.match(key) for key in self._metadata.state_dict_metadata)

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Megatron-LM's, where they were saved."""
        file = self.directory / "common.pt"
        return arguments_of(load_foreign(file)) if file.is_file() else {}

    @property
    def has_optimizer(self) -> bool:
        """Whether optimizer state was saved along."""
        return any(_OPTIMIZER.match(key) for key in self._metadata.state_dict_metadata)

    @property
    def stored_sizes(self) -> list[tuple[torch.dtype, int]]:
        """dtype and bytes of every tensor."""
        return [(stored.dtype, math.prod(stored.shape) * stored.dtype.itemsize) for stored in self._stored.values()]

    @cached_property
    def files(self) -> list[Path]:
        """Data files, each with its pieces inside."""
        return sorted({self.directory / info.relative_path for info in self._metadata.storage_data.values()})

    def _index(self) -> dict[str, _Stored]:
        self._check_files()
        found: dict[str, _Stored] = {}
        tensors = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
            and not _OPTIMIZER.match(key)
            and not key.endswith("._extra_state")
        }
        for key, entry in tensors.items():
            # Gate and up halves under keys of their own count as the two halves of the rows.
            base, half = key, 0
            if key.endswith(("_w", "_v")) and {f"{key[:-2]}_w", f"{key[:-2]}_v"} <= tensors.keys():
                base, half = key[:-2], 1 + key.endswith("_v")
            self._add_tensor(found, key, entry, base, half)
        for name, tensor in found.items():
            if sum(math.prod(piece.sizes) for piece in tensor.pieces) != math.prod(tensor.shape):
                raise ValueError(f"{self.directory}: the saved pieces of {name} do not cover it exactly")
        return _rename_expert_norms(found)

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self._metadata.storage_data.values():
            if getattr(info, "transform_descriptors", None):
                raise ValueError(f"{self.directory}: compressed or encrypted checkpoints are not supported")
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        if absent := [name for name in sorted(ends) if not (self.directory / name).is_file()]:
            raise FileNotFoundError(
                f"{self.directory}: {METADATA_FILE} names files that are absent: {', '.join(absent)}"
            )
        for name, end in ends.items():
            if (size := (self.directory / name).stat().st_size) < end:
                raise ValueError(f"{self.directory / name} is truncated: {size} bytes, the metadata asks for {end}")

    def _add_tensor(
        self, found: dict[str, _Stored], key: str, entry: TensorStorageMetadata, base: str, half: int
    ) -> None:
        stacked_layers = key.startswith(_STACKED) and LAYER.match(key) is None
        stacked_experts = _EXPERTS in key and _EXPERT.search(key) is None
        leading = stacked_layers + stacked_experts
        shape = tuple(entry.size)[leading:]
        rows = shape[0] if shape and half else 0
        full = (2 * rows, *shape[1:]) if half else shape
        for chunk in entry.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            info = self._metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
            if info is None:
                continue  # found out when the pieces do not cover the tensor
            place = (self.directory / info.relative_path, info.offset, info.length)
            within = offsets[leading:]
            if half:
                within = (within[0] + rows * (half - 1), *within[1:])
            for index in itertools.product(*(range(size) for size in sizes[:leading])):
                at = [start + i for start, i in zip(offsets, index, strict=False)]
                name = base
                if stacked_layers:
                    name = f"{_STACKED}{at.pop(0)}.{name.removeprefix(_STACKED)}"
                if stacked_experts:
                    name = name.replace(_EXPERTS, f"{_EXPERTS}{at.pop(0)}.")
                tensor = found.setdefault(name, _Stored(full, entry.properties.dtype, []))
                tensor.pieces.append(_Piece(within, sizes[leading:], index, sizes, place))

    def check(self, mapping: ModelMapping) -> None:
        """Raise MappingError, listing every problem, unless the tensors are exactly this model's."""
        mapping.check_megatron(self.shapes, str(self.directory))

    def read_weight(self, weight: Weight) -> Tensor:
        """The full tensor of an entry of the mapping. Safe in several threads at once."""
        return self._stored[weight.key].read()


def _rename_expert_norms(found: dict[str, _Stored]) -> dict[str, _Stored]:
    """Megatron-Core's torch-only spec stores the norm before experts under the key of the dense MLP's fused norm."""
    fused = ".mlp.linear_fc1.layer_norm_weight"
    renamed = {}
    for name, tensor in found.items():
        layer = name.removesuffix(fused)
        if layer != name and f"{layer}.mlp.router.weight" in found:
            name = f"{layer}.pre_mlp_layernorm.weight"
        renamed[name] = tensor
    return renamed


def _read_metadata(file: Path) -> Metadata:
    content = io.BytesIO(file.read_bytes())
    try:
        metadata = _MetadataUnpickler(content).load()
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{file} is not checkpoint metadata: {error}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError(f"{file} is not checkpoint metadata: it holds {type(metadata).__name__}")
    return metadata
