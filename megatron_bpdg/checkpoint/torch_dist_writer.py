"""Writing Megatron-Core's `torch_dist` checkpoints in plain torch, one tensor in memory at a time."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_bpdg.checkpoint.directory import RELEASE, TRACKER_FILE
from megatron_bpdg.checkpoint.files import in_files
from megatron_bpdg.checkpoint.mapping import MappingError, ModelMapping
from megatron_bpdg.checkpoint.patterns import Expert, Shape, Weight, owned
from megatron_bpdg.checkpoint.torch_dist import stacked_key
from megatron_bpdg.checkpoint.transfer import Transfer
from megatron_bpdg.models.families import FAMILIES, moe_layers
from megatron_bpdg.parallel.together import my_share, this_rank
from megatron_bpdg.tracking.files import fsync_path, write_text

MAX_FILE_SIZE = 2 * 10**9
# Modules to which Megatron-Core may attach an (empty, outside FP8) extra state that its strict loaders ask for.
_EXTRA_STATES = (
    "self_attention.linear_qkv",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "self_attention.core_attention",
    "self_attention.linear_proj",
)
_DENSE_EXTRA_STATES = ("mlp.linear_fc1", "mlp.linear_fc2")
_EXPERT_EXTRA_STATES = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")


def write_torch_dist(
    step: Path,
    mapping: ModelMapping,
    dtypes: Mapping[str, torch.dtype],
    read: Callable[[Weight], Tensor],
    cost: Callable[[Weight], int],
    transfer: Transfer,
    *,
    max_file_size: int = MAX_FILE_SIZE,
) -> None:
    """Write all tensors of a model with torch.distributed.checkpoint; collective over the world, which shares them.

    Args:
        step: the step's directory.
        mapping: the model's weights.
        dtypes: canonical key -> dtype, which `check_stacked_dtypes` let pass.
        read: one full Megatron tensor; called in several threads, just before it is written.
        cost: bytes held while a tensor is read and written.
        transfer: threads and memory of this rank.
        max_file_size: bytes of tensors per data file; a larger tensor has a file of its own.

    Raises:
        MappingError: a tensor is not as planned.
        RuntimeError: another rank failed.
        Others: what `read` raises.
    """
    planner = _StreamingPlanner(mapping, dtypes, read, cost)
    with _without_crc32(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        try:
            writer = _BoundedWriter(step, transfer, max_file_size)
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=not dist.is_initialized())
        except CheckpointException as caught:  # no Exception, and it hides what happened
            errors = {rank: error for rank, (error, _) in caught.failures.items()}
            if this_rank() in errors:
                raise errors[this_rank()] from None
            raise RuntimeError(f"rank {min(errors)} failed: {errors[min(errors)]}") from errors[min(errors)]


class _StreamingPlanner(SavePlanner):
    """Plans from the mapping alone, and makes a tensor only when it is to be written."""

    def __init__(
        self,
        mapping: ModelMapping,
        dtypes: Mapping[str, torch.dtype],
        read: Callable[[Weight], Tensor],
        cost: Callable[[Weight], int],
    ) -> None:
        self._mapping, self._dtypes, self._read, self._cost = mapping, dtypes, read, cost
        self._weights: dict[MetadataIndex, Weight] = {}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass  # there is no state dict

    def create_local_plan(self) -> SavePlan:
        """This rank's share of the tensors: pieces of the stacked ones, each of one layer, and of one expert."""
        sizes = _leading_sizes(self._mapping)
        items = []
        for weight in (self._mapping.weights[i] for i in my_share(len(self._mapping.weights))):
            where = stacked_key(weight.key, layers=self._mapping.homogeneous)
            shape = weight.megatron_shape
            offsets = torch.Size((*where.index, *(0 for _ in shape)))
            chunk = ChunkStorageMetadata(offsets, torch.Size((*(1 for _ in where.index), *shape)))
            index = MetadataIndex(where.key, offsets)
            data = TensorWriteData(
                chunk, TensorProperties(dtype=self._dtypes[weight.key]), torch.Size((*sizes[where.key], *shape))
            )
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
            self._weights[index] = weight
        if this_rank() == 0:
            keys = _extra_state_keys(self._mapping)
            items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in keys]
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def size_and_cost(self, item: WriteItem) -> tuple[int, int]:
        """Bytes of what `resolve_data` makes, and bytes held meanwhile."""
        if item.type == WriteItemType.BYTE_IO:
            return 0, 0
        weight = self._weights[item.index]
        return weight_bytes(weight, self._dtypes[weight.key]), self._cost(weight)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            torch.save([None], empty := io.BytesIO())
            return empty
        weight = self._weights[write_item.index]
        tensor = self._read(weight)
        if tuple(tensor.shape) != weight.megatron_shape or tensor.dtype != self._dtypes[weight.key]:
            raise MappingError(
                f"{weight.key}: read {tuple(tensor.shape)} {tensor.dtype}, planned {weight.megatron_shape} "
                f"{self._dtypes[weight.key]}"
            )
        assert write_item.tensor_data is not None
        return owned(tensor).view(write_item.tensor_data.chunk.sizes)


class _BoundedWriter(dcp.FileSystemWriter):
    """Files of bounded size, several at once, in bounded memory.

    torch's own loop over a file keeps its tensors until the file is complete, and loses the errors of its threads.
    """

    def __init__(self, path: Path, transfer: Transfer, max_file_size: int) -> None:
        super().__init__(path)
        self._directory, self._transfer, self._max_file_size = path, transfer, max_file_size

    def storage_meta(self) -> StorageMeta:
        # Not the place where it is being built, which nobody will find.
        return StorageMeta(self._directory.name)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        assert isinstance(planner, _StreamingPlanner)
        files = in_files(plan.items, [planner.size_and_cost(item)[0] for item in plan.items], self._max_file_size)
        names = (f"{plan.storage_data.prefix}{number}.distcp" for number in itertools.count())
        jobs = [partial(self._write_file, name, items, planner) for name, items in zip(names, files, strict=False)]
        done: Future[list[WriteResult]] = Future()
        done.set_result([result for results in self._transfer.run(jobs) for result in results])
        return done

    def _write_file(self, name: str, items: list[WriteItem], planner: _StreamingPlanner) -> list[WriteResult]:
        results = []
        with (self._directory / name).open("wb") as stream:
            for item in items:
                start = stream.tell()
                with self._transfer.tensor(*planner.size_and_cost(item)):
                    data = planner.resolve_data(item)
                    if isinstance(data, Tensor):
                        torch.save(data, stream)
                    else:
                        stream.write(data.getbuffer())
                    del data
                length = stream.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
            stream.flush()
            os.fsync(stream.fileno())
        return results


def weight_bytes(weight: Weight, dtype: torch.dtype) -> int:
    """Size of a full Megatron tensor."""
    return math.prod(weight.megatron_shape) * dtype.itemsize


def _extra_state_keys(mapping: ModelMapping) -> Iterator[str]:
    """``module._extra_state/shard_I_N``, with one number per stacked dimension: index and size."""
    num_experts = next((weight.num_experts for weight in mapping.weights if isinstance(weight, Expert)), 0)
    for layer, moe in enumerate(mapping.moe_layers):
        prefix, index, sizes = f"decoder.layers.{layer}", ["0"], ["1"]
        if mapping.homogeneous:
            prefix, index, sizes = "decoder.layers", [str(layer)], [str(len(mapping.moe_layers))]
        shard = f"_extra_state/shard_{index[0]}_{sizes[0]}"
        for module in (*_EXTRA_STATES, *(("pre_mlp_layernorm",) if moe else _DENSE_EXTRA_STATES)):
            yield f"{prefix}.{module}.{shard}"
        if not mapping.homogeneous:
            index, sizes = [], []
        for module, e in itertools.product(_EXPERT_EXTRA_STATES, range(num_experts if moe else 0)):
            yield (
                f"{prefix}.{module}._extra_state/shard_{'.'.join([*index, str(e)])}_"
                f"{'.'.join([*sizes, str(num_experts)])}"
            )
    yield "decoder.final_layernorm._extra_state/shard_0_1"


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Let `torch.save` leave out the archive's own checksums, which nothing reads back and which take most of the time.

    The option is the process's.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _leading_sizes(mapping: ModelMapping) -> dict[str, Shape]:
    """Stored key -> sizes of its stacked dimensions."""
    largest: dict[str, Shape] = {}
    for weight in mapping.weights:
        where = stacked_key(weight.key, layers=mapping.homogeneous)
        before = largest.get(where.key, where.index)
        largest[where.key] = tuple(max(pair) for pair in zip(before, where.index, strict=True))
    return {key: tuple(index + 1 for index in indices) for key, indices in largest.items()}


def write_dist_common(directory: Path, config: Mapping[str, Any]) -> None:
    """Write what surrounds the data of a `release`: arguments for Megatron-LM's loader, format marker, tracker.

    Args:
        directory: DIR of `torch_dist`.
        config: normalised HF config.
    """
    release = directory / RELEASE
    common = {"args": megatron_args(config), "checkpoint_version": 3.0, "iteration": 0}
    torch.save(common, release / "common.pt")
    fsync_path(release / "common.pt")
    write_text(release / "metadata.json", json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    write_text(directory / TRACKER_FILE, RELEASE)


def check_stacked_dtypes(mapping: ModelMapping, dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise MappingError where the layers or experts of one stacked tensor have different dtypes."""
    seen: dict[str, torch.dtype] = {}
    mixed = []
    for weight in mapping.weights:
        key = stacked_key(weight.key, layers=mapping.homogeneous).key
        first = seen.setdefault(key, dtypes[weight.key])
        if first != dtypes[weight.key]:
            mixed.append(f"{weight.key} is {dtypes[weight.key]}, earlier ones are {first}")
    if mixed:
        raise MappingError(
            "one Megatron tensor holds all layers and has one dtype (cast with --dtype), but\n  " + "\n  ".join(mixed)
        )


def megatron_args(config: Mapping[str, Any]) -> Namespace:
    """Model arguments under Megatron-LM's names, as its loader compares them and `--use-checkpoint-args` reads them."""
    family = FAMILIES[config["model_type"]]
    return Namespace(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        group_query_attention=True,
        num_query_groups=config["num_key_value_heads"],
        kv_channels=config["head_dim"],
        max_position_embeddings=config.get("max_position_embeddings"),
        add_position_embedding=True,
        use_rotary_position_embeddings=True,
        rotary_base=config["rope_theta"],
        rotary_percent=1.0,
        **_rope_args(config.get("rope_scaling")),
        normalization="RMSNorm",
        norm_epsilon=config["rms_norm_eps"],
        qk_layernorm=family.qk_norm,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=family.qkv_bias,
        **(_moe_args(config) if family.moe else {}),
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


def _rope_args(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    if scaling is None:
        return {"position_embedding_type": "rope"}
    if scaling["rope_type"] == "llama3":
        return {
            "position_embedding_type": "rope",
            "use_rope_scaling": True,
            "rope_scaling_factor": scaling["factor"],
        }
    return {
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": scaling["factor"],
        "yarn_original_max_position_embeddings": scaling["original_max_position_embeddings"],
        "yarn_beta_fast": scaling.get("beta_fast", 32.0),
        "yarn_beta_slow": scaling.get("beta_slow", 1.0),
        "yarn_mscale": scaling.get("mscale"),
        "yarn_mscale_all_dim": scaling.get("mscale_all_dim"),
        "yarn_correction_range_round_to_int": scaling.get("truncate", True),
    }


def _moe_args(config: Mapping[str, Any]) -> dict[str, Any]:
    layers = moe_layers(config)
    return {
        "num_experts": config["num_experts"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_router_pre_softmax": not config["norm_topk_prob"],
        "moe_router_score_function": "softmax",
        "moe_layer_freq": 1 if all(layers) else [int(layer) for layer in layers],
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": 1,
    }
