"""Megatron-Core's `torch_dist` checkpoints in plain torch: no process group, no Megatron import, no GPU.

On disk it is a torch.distributed.checkpoint (DCP) directory::

    DIR/latest_checkpointed_iteration.txt     "release", or the number of an iteration
    DIR/release/ or DIR/iter_0000100/         .metadata, *.distcp, common.pt, metadata.json
    DIR/hf/                                   config.json, tokenizer files, bpdg_source.json

Layers are stacked on dimension 0 under keys without a layer index (``decoder.layers.mlp.linear_fc2.weight``
[L, H, F]); the older spelling with one key per layer is read as well. Keys are Transformer Engine's whichever layer
spec a model uses. The vocabulary is stored with its true rows: Megatron-Core loads it into a padded model, at any
tensor-parallel size, as it allows a shape mismatch there.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_bpdg.checkpoint.patterns import Shape

TRACKER_FILE = "latest_checkpointed_iteration.txt"
METADATA_FILE = ".metadata"
RELEASE = "release"
HF_FOLDER = "hf"
SOURCE_FILE = "bpdg_source.json"

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_STACKED = "decoder.layers."
# Training checkpoints carry these besides the weights.
_NOT_WEIGHTS = re.compile(r"^(chained_\d+\.)?optimizer\.")


@dataclass(frozen=True)
class Source:
    """What the weights alone do not tell about the HF checkpoint they came from.

    Attributes:
        has_lm_head: whether `lm_head.weight` was stored (some tied releases carry it).
        vocab_size: true vocabulary rows.
        dtype: torch dtype of the weights, without "torch.".
    """

    has_lm_head: bool
    vocab_size: int
    dtype: str
    format: int = 1


def stacked_key(key: str) -> tuple[str, int | None]:
    """Per-layer name -> (name in the file, index on its dimension 0); other names unchanged with None."""
    layer = _LAYER.match(key)
    if layer is None:
        return key, None
    return _STACKED + key[layer.end() :], int(layer.group(1))


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


class _SafeReader(dcp.FileSystemReader):
    """DCP's reader with metadata that cannot run code (tensors are loaded with weights_only already)."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / METADATA_FILE).open("rb") as stream:
            metadata: Metadata = _MetadataUnpickler(stream).load()
        return metadata


class _OneTensor(LoadPlanner):
    """Receives the pieces of one tensor."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        return None

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("only tensors are planned")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        region = self._target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            region = region.narrow(dim, start, length)
        return region

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        return None


@dataclass(frozen=True)
class _Stored:
    """Where one layer's tensor lies: the file's keys (two for a split gate and up), and the index on dimension 0."""

    keys: tuple[str, ...]
    layer: int | None
    shape: Shape
    dtype: torch.dtype


class TorchDistCheckpoint:
    """The weights of a torch_dist checkpoint, readable tensor by tensor. Optimizer state is ignored.

    Attributes:
        root: DIR of the module docstring (the parent, where a step's own directory was given).
        directory: the step's directory, as the tracker says.
        shapes: canonical key (global layer index) -> full shape.
        dtypes: canonical key -> dtype.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a tracker or metadata that is not what it should be.
    """

    def __init__(self, path: str | Path) -> None:
        self.root, self.directory = _resolve(Path(path))
        self._reader = _SafeReader(self.directory)
        try:
            self._metadata = self._reader.read_metadata()
        except (pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise ValueError(f"{self.directory / METADATA_FILE} is not checkpoint metadata: {error}") from error
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._stored = self._index()

    @property
    def shapes(self) -> dict[str, Shape]:
        return {key: stored.shape for key, stored in self._stored.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {key: stored.dtype for key, stored in self._stored.items()}

    @property
    def hf_folder(self) -> Path | None:
        """DIR/hf, where it exists."""
        folder = self.root / HF_FOLDER
        return folder if (folder / "config.json").is_file() else None

    def _index(self) -> dict[str, _Stored]:
        stored: dict[str, _Stored] = {}
        tensors = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not _NOT_WEIGHTS.match(key)
        }
        for key, entry in tensors.items():
            size, dtype = tuple(entry.size), entry.properties.dtype
            base = key.removesuffix("_w")
            if key.endswith("_v") and f"{key.removesuffix('_v')}_w" in tensors:
                continue  # the up half, taken together with its gate
            if base != key and f"{base}_v" in tensors:
                stored[base] = _Stored((key, f"{base}_v"), None, (2 * size[0], *size[1:]), dtype)
            elif key.startswith(_STACKED) and _LAYER.match(key) is None:
                for layer in range(size[0]):
                    name = f"{_STACKED}{layer}.{key.removeprefix(_STACKED)}"
                    stored[name] = _Stored((key,), layer, size[1:], dtype)
            else:
                stored[key] = _Stored((key,), None, size, dtype)
        return stored

    def read(self, key: str) -> Tensor:
        """One full tensor, by canonical key.

        Raises:
            ValueError: where the files do not cover the tensor.
        """
        stored = self._stored[key]
        parts = [self._read_stored(name, stored.layer) for name in stored.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read_stored(self, key: str, layer: int | None) -> Tensor:
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        offsets = [0] * len(entry.size)
        sizes = list(entry.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [chunk])
        if sum(torch.Size(item.lengths).numel() for item in items) != target.numel():
            raise ValueError(f"{self.directory}: the saved pieces of {key} do not cover it exactly")
        self._reader.read_data(LoadPlan(items), _OneTensor(target))
        return target if layer is None else target[0]


def is_torch_dist(path: Path) -> bool:
    """Whether `path` is DIR of the module docstring or one step's directory."""
    return (path / TRACKER_FILE).is_file() or (path / METADATA_FILE).is_file()


def _resolve(path: Path) -> tuple[Path, Path]:
    """(DIR, the step's directory)."""
    if (path / METADATA_FILE).is_file():
        return path.parent, path
    tracker = path / TRACKER_FILE
    if not tracker.is_file():
        raise FileNotFoundError(
            f"{path} is no torch_dist checkpoint: it has neither {TRACKER_FILE} nor {METADATA_FILE}"
        )
    step = tracker.read_text(encoding="utf-8").strip()
    if step != RELEASE and not step.isdecimal():
        raise ValueError(f"{tracker} holds {step!r}; expected 'release' or an iteration number")
    directory = path / (RELEASE if step == RELEASE else f"iter_{int(step):07d}")
    if not (directory / METADATA_FILE).is_file():
        raise FileNotFoundError(f"{tracker} points at {directory}, which has no {METADATA_FILE}: not a torch_dist save")
    return path, directory


def read_source(hf_folder: Path) -> Source | None:
    """`Source` kept in an hf folder, or None where there is none (a checkpoint of another program)."""
    file = hf_folder / SOURCE_FILE
    if not file.is_file():
        return None
    try:
        return Source(**json.loads(file.read_text(encoding="utf-8")))
    except TypeError as error:
        raise ValueError(f"{file} was not written by this program: {error}") from error
