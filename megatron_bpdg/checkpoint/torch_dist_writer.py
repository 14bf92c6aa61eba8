"""Writing Megatron-Core's `torch_dist` checkpoints in plain torch, one tensor in memory at a time."""

from __future__ import annotations

import io
import json
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_bpdg.checkpoint.files import copy_sidecars, write_text
from megatron_bpdg.checkpoint.mapping import MappingError, ModelMapping
from megatron_bpdg.checkpoint.patterns import Weight
from megatron_bpdg.checkpoint.torch_dist import HF_FOLDER, RELEASE, SOURCE_FILE, TRACKER_FILE, Source, stacked_key

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
        directory: DIR of `torch_dist`; stage it (`files.staged_directory`) to make it appear whole.
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
        try:
            dcp.save({}, storage_writer=dcp.FileSystemWriter(release), planner=planner, no_dist=True)
        except CheckpointException as failure:  # a BaseException around the real one, which callers expect to see
            cause, _ = failure.failures[0]
            raise cause from failure
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
