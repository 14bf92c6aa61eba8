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
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_bpdg.checkpoint.files import copy_sidecars, write_text
from megatron_bpdg.checkpoint.mapping import MappingError, ModelMapping
from megatron_bpdg.checkpoint.patterns import Shape, Weight

TRACKER_FILE = "latest_checkpointed_iteration.txt"
METADATA_FILE = ".metadata"
RELEASE = "release"
HF_FOLDER = "hf"
SOURCE_FILE = "bpdg_source.json"

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_STACKED = "decoder.layers."
# Training checkpoints carry these besides the weights.
_NOT_WEIGHTS = re.compile(r"^(chained_\d+\.)?optimizer\.")
# Modules to which Megatron-Core may attach an (empty, outside FP8) extra state that its strict loaders ask for.
_EXTRA_STATES = (
    "self_attention.linear_qkv",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


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


# --- writing -----------------------------------------------------------------------------------------------------


class _StreamingSavePlanner(SavePlanner):
    """Plans every tensor from the mapping, and makes each only when DCP comes to write it."""

    def __init__(
        self, mapping: ModelMapping, dtypes: Mapping[str, torch.dtype], make: Callable[[Weight], Tensor]
    ) -> None:
        self._make = make
        self._weights: dict[MetadataIndex, Weight] = {}
        self._items: list[WriteItem] = []
        self._empty_state = io.BytesIO()
        torch.save([None], self._empty_state)
        self._empty_state.seek(0)
        num_layers = len({layer for weight in mapping.weights if (layer := stacked_key(weight.key)[1]) is not None})
        for weight in mapping.weights:
            self._plan_tensor(weight, dtypes[weight.key], num_layers)
        for module in _EXTRA_STATES:
            for layer in range(num_layers):
                self._plan_extra_state(f"decoder.layers.{module}", layer, num_layers)
        self._plan_extra_state("decoder.final_layernorm", 0, 1)

    def _plan_tensor(self, weight: Weight, dtype: torch.dtype, num_layers: int) -> None:
        key, layer = stacked_key(weight.key)
        prefix, leading = ((), ()) if layer is None else ((num_layers,), (layer,))
        shape = weight.megatron_shape
        offsets = torch.Size((*leading, *(0 for _ in shape)))
        sizes = torch.Size((*(1 for _ in leading), *shape))
        index = MetadataIndex(key, offsets)
        data = TensorWriteData(
            ChunkStorageMetadata(offsets, sizes), TensorProperties(dtype=dtype), torch.Size((*prefix, *shape))
        )
        self._weights[index] = weight
        self._items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))

    def _plan_extra_state(self, module: str, layer: int, num_layers: int) -> None:
        index = MetadataIndex(f"{module}._extra_state/shard_{layer}_{num_layers}")
        size = self._empty_state.getbuffer().nbytes
        self._items.append(WriteItem(index, WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(size)))

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        return None

    def create_local_plan(self) -> SavePlan:
        return SavePlan(self._items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return self._empty_state
        assert write_item.tensor_data is not None
        tensor = self._make(self._weights[write_item.index])
        return tensor.contiguous().view(write_item.tensor_data.chunk.sizes)


def write_torch_dist(
    directory: Path,
    mapping: ModelMapping,
    config: Mapping[str, Any],
    dtypes: Mapping[str, torch.dtype],
    make: Callable[[Weight], Tensor],
) -> None:
    """Write the weights of one model as a `release` checkpoint into an existing, empty directory.

    Args:
        directory: DIR of the module docstring; stage it (`files.staged_directory`) to make it appear whole.
        mapping: the model's weights.
        config: normalised HF config, for the arguments that Megatron-LM's loader looks up.
        dtypes: canonical key -> dtype.
        make: returns one full Megatron tensor; called once per weight, one at a time.

    Raises:
        MappingError: where the layers of one stacked tensor have different dtypes.
    """
    _check_stacked_dtypes(mapping, dtypes)
    release = directory / RELEASE
    release.mkdir()
    planner = _StreamingSavePlanner(mapping, dtypes, make)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what we intend
        dcp.save({}, storage_writer=dcp.FileSystemWriter(release), planner=planner, no_dist=True)
    common = {"args": megatron_args(config), "checkpoint_version": 3.0, "iteration": 0}
    torch.save(common, release / "common.pt")
    write_text(release / "metadata.json", json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    write_text(directory / TRACKER_FILE, RELEASE)


def _check_stacked_dtypes(mapping: ModelMapping, dtypes: Mapping[str, torch.dtype]) -> None:
    seen: dict[str, torch.dtype] = {}
    mixed = []
    for weight in mapping.weights:
        key = stacked_key(weight.key)[0]
        first = seen.setdefault(key, dtypes[weight.key])
        if first != dtypes[weight.key]:
            mixed.append(f"{weight.key} is {dtypes[weight.key]}, earlier layers are {first}")
    if mixed:
        raise MappingError("one Megatron tensor holds all layers and has one dtype, but\n  " + "\n  ".join(mixed))


def megatron_args(config: Mapping[str, Any]) -> Namespace:
    """Model arguments under Megatron-LM's names, as its loader compares them and `--use-checkpoint-args` reads them."""
    return Namespace(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        group_query_attention=True,
        num_query_groups=config["num_key_value_heads"],
        kv_channels=config["head_dim"],
        max_position_embeddings=config.get("max_position_embeddings"),
        position_embedding_type="rope",
        add_position_embedding=True,
        use_rotary_position_embeddings=True,
        rotary_base=config["rope_theta"],
        rotary_percent=1.0,
        normalization="RMSNorm",
        norm_epsilon=config["rms_norm_eps"],
        qk_layernorm=True,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        untie_embeddings_and_output_weights=not config["tie_word_embeddings"],
        tokenizer_type="HuggingFaceTokenizer",
        # Pads to a multiple of the tensor-parallel size only: nothing is padded where that divides the vocabulary.
        make_vocab_size_divisible_by=1,
        padded_vocab_size=config["vocab_size"],
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        ckpt_format="torch_dist",
        no_save_optim=True,
        no_save_rng=True,
    )


def write_hf_folder(directory: Path, source_model: Path, source: Source) -> None:
    """Make DIR/hf: config and tokenizer files from `source_model`, and what `Source` keeps."""
    folder = directory / HF_FOLDER
    copy_sidecars(source_model, folder)
    write_text(folder / SOURCE_FILE, json.dumps(asdict(source), indent=2) + "\n")


# --- reading -----------------------------------------------------------------------------------------------------

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
