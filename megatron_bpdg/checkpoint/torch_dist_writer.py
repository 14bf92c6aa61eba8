"""Writing Megatron-Core's `torch_dist` checkpoints in plain torch, one tensor in memory at a time."""

from __future__ import annotations

import io
import itertools
import json
import math
import pickle
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_bpdg.checkpoint.directory import HF_FOLDER, METADATA_FILE, RELEASE, SOURCE_FILE, TRACKER_FILE, Source
from megatron_bpdg.checkpoint.files import copy_sidecars, fsync_path, write_text
from megatron_bpdg.checkpoint.mapping import FAMILIES, MappingError, ModelMapping, moe_layers
from megatron_bpdg.checkpoint.patterns import Expert, Shape, Weight
from megatron_bpdg.checkpoint.torch_dist import stacked_key

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


@dataclass(frozen=True)
class DistFile:
    """A data file that is going to be written.

    Attributes:
        name: its path in the step's directory.
        weights: what it holds.
        extra_states: keys of empty extra states.
    """

    name: str
    weights: tuple[Weight, ...]
    extra_states: tuple[str, ...] = ()


def plan_dist_files(
    mapping: ModelMapping, dtypes: Mapping[str, torch.dtype], max_file_size: int = MAX_FILE_SIZE
) -> list[DistFile]:
    """Spread the weights, in order, over files of at most `max_file_size` bytes; a larger one has its own.

    Args:
        mapping: the model's weights.
        dtypes: canonical key -> dtype.
        max_file_size: bytes.

    Raises:
        MappingError: where the layers or experts of one stacked tensor have different dtypes.
        ValueError: a `max_file_size` below 1.
    """
    if max_file_size < 1:
        raise ValueError(f"max_file_size {max_file_size} must be at least 1 byte")
    _check_stacked_dtypes(mapping, dtypes)
    groups: list[list[Weight]] = [[]]
    size = 0
    for weight in mapping.weights:
        num_bytes = weight_bytes(weight, dtypes[weight.key])
        if groups[-1] and size + num_bytes > max_file_size:
            groups.append([])
            size = 0
        groups[-1].append(weight)
        size += num_bytes
    files = [DistFile(f"__0_{number}.distcp", tuple(group)) for number, group in enumerate(groups)]
    return [*files[:-1], replace(files[-1], extra_states=tuple(_extra_state_keys(mapping)))]


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
def without_crc32() -> Iterator[None]:
    """Let `torch.save` leave out the archive's own checksums, which nothing reads back and which take most of the time.

    The option is the process's.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def write_dist_file(
    file: DistFile, mapping: ModelMapping, stream: IO[bytes], weights: Iterable[tuple[Weight, Tensor]]
) -> dict[str, Any]:
    """Append the tensors of one file to `stream`; returns what `write_dist_metadata` needs to know of it."""
    places: dict[str, tuple[int, int]] = {}
    for weight, tensor in weights:
        if tuple(tensor.shape) != weight.megatron_shape:
            raise MappingError(f"{weight.key}: read {tuple(tensor.shape)}, planned {weight.megatron_shape}")
        start = stream.tell()
        leading = (1,) * len(stacked_key(weight.key, layers=mapping.homogeneous).index)
        torch.save(tensor.contiguous().view(*leading, *tensor.shape), stream)
        del tensor  # before the next one is asked for
        places[weight.key] = (start, stream.tell() - start)
    for key in file.extra_states:
        start = stream.tell()
        empty = io.BytesIO()
        torch.save([None], empty)
        stream.write(empty.getbuffer())
        places[key] = (start, stream.tell() - start)
    return {"places": places}


def write_dist_metadata(
    release: Path,
    mapping: ModelMapping,
    dtypes: Mapping[str, torch.dtype],
    records: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write the metadata that makes the data files one checkpoint of torch.distributed.checkpoint.

    Args:
        release: the step's directory.
        mapping: the model's weights.
        dtypes: canonical key -> dtype.
        records: file name -> what `write_dist_file` returned.
    """
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    places = {
        key: _StorageInfo(name, start, length)
        for name, record in records.items()
        for key, (start, length) in record["places"].items()
    }
    sizes = _leading_sizes(mapping)
    for weight in mapping.weights:
        where = stacked_key(weight.key, layers=mapping.homogeneous)
        shape = weight.megatron_shape
        offsets = torch.Size((*where.index, *(0 for _ in shape)))
        entry = tensors.setdefault(
            where.key,
            TensorStorageMetadata(
                TensorProperties(dtype=dtypes[weight.key]), torch.Size((*sizes[where.key], *shape)), []
            ),
        )
        assert isinstance(entry, TensorStorageMetadata)
        entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size((*(1 for _ in where.index), *shape))))
        storage[MetadataIndex(where.key, offsets)] = places.pop(weight.key)
    for key, place in places.items():
        tensors[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = place
    metadata = Metadata(tensors, storage_data=storage, storage_meta=StorageMeta(release.name))
    with (release / METADATA_FILE).open("wb") as stream:
        pickle.dump(metadata, stream)
    fsync_path(release / METADATA_FILE)


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


def _check_stacked_dtypes(mapping: ModelMapping, dtypes: Mapping[str, torch.dtype]) -> None:
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


def write_hf_folder(directory: Path, source_model: Path, source: Source) -> None:
    """Make DIR/hf: config and tokenizer files from `source_model`, and what `Source` keeps."""
    folder = directory / HF_FOLDER
    copy_sidecars(source_model, folder)
    write_text(folder / SOURCE_FILE, json.dumps(asdict(source), indent=2) + "\n")
