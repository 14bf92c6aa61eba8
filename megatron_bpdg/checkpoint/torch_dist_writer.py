"""Writing Megatron-Core's `torch_dist` checkpoints in plain torch, one tensor in memory at a time."""

from __future__ import annotations

import itertools
import json
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
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
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization import config as torch_save_options

from megatron_bpdg.checkpoint.directory import RELEASE, TRACKER_FILE
from megatron_bpdg.checkpoint.mapping import MappingError, ModelMapping
from megatron_bpdg.checkpoint.patterns import Expert, Shape, Weight, owned
from megatron_bpdg.checkpoint.source import SourceModel
from megatron_bpdg.checkpoint.torch_dist import stacked_key
from megatron_bpdg.checkpoint.transfer import Transfer
from megatron_bpdg.data.batch import up_to
from megatron_bpdg.models.families import FAMILIES, moe_layers
from megatron_bpdg.parallel.together import each, everyone, my_share, on_first, this_rank
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


@dataclass(frozen=True)
class _Piece:
    """What is saved as one: a tensor of the mapping, in its place of a stacked one; or an extra state.

    Attributes:
        index: its name in the metadata.
        weight: None for an extra state.
        shape: the tensor's, with a leading 1 for each dimension that is stacked.
    """

    index: MetadataIndex
    weight: Weight | None = None
    shape: Shape = ()


def write_torch_dist(step: Path, model: SourceModel, transfer: Transfer, *, max_file_size: int = MAX_FILE_SIZE) -> None:
    """Write all tensors of a model; collective over the world, which shares them.

    Where everything lies is known from the mapping alone, so each tensor is made just before it is written. torch's
    own writer keeps the tensors of a file until it is complete.

    Args:
        step: the step's directory.
        model: its dtypes are those that `check_stacked_dtypes` let pass.
        transfer: threads and memory of this rank.
        max_file_size: bytes of tensors per data file; a larger tensor has a file of its own.

    Raises:
        MappingError: a tensor is not as planned.
        RuntimeError: another rank failed.
        Others: what `model.read` raises.
    """
    stored: dict[str, TensorStorageMetadata] = {}
    pieces = [_add_piece(stored, model, weight) for weight in model.mapping.weights]
    extra = list(_extra_state_keys(model.mapping))
    mine = [pieces[i] for i in my_share(len(pieces))]
    if this_rank() == 0:
        mine += [_Piece(MetadataIndex(key)) for key in extra]
    sizes = (model.num_bytes(piece.weight) if piece.weight else 0 for piece in mine)
    jobs = [
        partial(_write_file, step / f"__{this_rank()}_{number}.distcp", held, model, transfer)
        for number, held in enumerate(up_to(mine, sizes, max_file_size))
    ]
    step.mkdir(exist_ok=True)
    # Nothing reads the checksums of torch.save's archives back, and they take most of the time.
    with torch_save_options.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
        written = everyone(each(lambda: transfer.run(jobs)))
    metadata = Metadata({**stored, **{key: BytesStorageMetadata() for key in extra}})
    on_first(lambda: _MetadataWriter(step).finish(metadata, list(itertools.chain(*written))))


class _MetadataWriter(dcp.FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        # Not the place where it is being built, which nobody will find.
        return StorageMeta(Path(self.path).name)


def _add_piece(stored: dict[str, TensorStorageMetadata], model: SourceModel, weight: Weight) -> _Piece:
    """Give a tensor its place in what is stored: in a stacked tensor, a piece of one layer, and of one expert."""
    key, index, leading = stacked_key(weight, model.mapping)
    shape = weight.megatron_shape
    properties = TensorProperties(dtype=model.dtypes[weight.key])
    entry = TensorStorageMetadata(properties, torch.Size((*leading, *shape)), [])
    chunks = stored.setdefault(key, entry).chunks
    offsets = torch.Size((*index, *(0 for _ in shape)))
    sizes = torch.Size((*(1 for _ in index), *shape))
    chunks.append(ChunkStorageMetadata(offsets, sizes))
    return _Piece(MetadataIndex(key, offsets, len(chunks) - 1), weight, sizes)


def _write_file(file: Path, pieces: list[_Piece], model: SourceModel, transfer: Transfer) -> list[WriteResult]:
    results = []
    with file.open("wb") as stream:
        for piece in pieces:
            start = stream.tell()
            if piece.weight is None:
                torch.save([None], stream)
            else:
                with transfer.tensor(model.num_bytes(piece.weight), model.cost(piece.weight)):
                    torch.save(_read(model, piece.weight).view(piece.shape), stream)
            length = stream.tell() - start
            results.append(WriteResult(piece.index, length, _StorageInfo(file.name, start, length)))
        stream.flush()
        os.fsync(stream.fileno())
    return results


def _read(model: SourceModel, weight: Weight) -> Tensor:
    tensor, dtype = model.read(weight), model.dtypes[weight.key]
    if tuple(tensor.shape) != weight.megatron_shape or tensor.dtype != dtype:
        raise MappingError(
            f"{weight.key}: read {tuple(tensor.shape)} {tensor.dtype}, planned {weight.megatron_shape} {dtype}"
        )
    return owned(tensor)


def _extra_state_keys(mapping: ModelMapping) -> Iterator[str]:
    """``module._extra_state/shard_I_N``, with one number per stacked dimension: index and size."""
    num_experts = next((weight.num_experts for weight in mapping.weights if isinstance(weight, Expert)), 0)
    for layer, moe in enumerate(mapping.moe_layers):
        prefix, index, sizes = f"decoder.layers.{layer}", Shape(), Shape()
        if mapping.homogeneous:
            prefix, index, sizes = "decoder.layers", (layer,), (len(mapping.moe_layers),)
        for module in (*_EXTRA_STATES, *(("pre_mlp_layernorm",) if moe else _DENSE_EXTRA_STATES)):
            yield _extra_state_key(f"{prefix}.{module}", index or (0,), sizes or (1,))
        for module, e in itertools.product(_EXPERT_EXTRA_STATES, range(num_experts if moe else 0)):
            yield _extra_state_key(f"{prefix}.{module}", (*index, e), (*sizes, num_experts))
    yield _extra_state_key("decoder.final_layernorm", (0,), (1,))


def _extra_state_key(module: str, index: Shape, sizes: Shape) -> str:
    return f"{module}._extra_state/shard_{'.'.join(map(str, index))}_{'.'.join(map(str, sizes))}"


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


def check_stacked_dtypes(model: SourceModel) -> None:
    """Raise MappingError where the layers or experts of one stacked tensor have different dtypes."""
    seen: dict[str, torch.dtype] = {}
    mixed = []
    for weight in model.mapping.weights:
        dtype = model.dtypes[weight.key]
        first = seen.setdefault(stacked_key(weight, model.mapping)[0], dtype)
        if first != dtype:
            mixed.append(f"{weight.key} is {dtype}, earlier ones are {first}")
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
