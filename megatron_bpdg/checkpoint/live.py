"""Weights of live Megatron-Core models: load from HF or torch_dist, save torch_dist, stream out under HF names.

A model is the list of GPTModel chunks of this rank (one, or one per virtual pipeline stage), bare or wrapped (DDP,
Float16Module). Both layer specs work: parameters are addressed by their Transformer-Engine names with global layer
indices. Optimizer state is no business of this module.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_bpdg.checkpoint.files import check_free, copy_sidecars, publish_directory, staged_directory, write_text
from megatron_bpdg.checkpoint.hf import HFCheckpoint, read_hf_config
from megatron_bpdg.checkpoint.hf_writer import HFWriter
from megatron_bpdg.checkpoint.mapping import EMBEDDING, OUTPUT_LAYER, ModelMapping, mapping_for, raise_on_mismatch
from megatron_bpdg.checkpoint.patterns import Shape, Weight
from megatron_bpdg.checkpoint.torch_dist import (
    TRACKER_FILE,
    Source,
    TorchDistCheckpoint,
    is_torch_dist,
)
from megatron_bpdg.checkpoint.torch_dist_writer import megatron_args, write_hf_folder
from megatron_bpdg.checkpoint.verify import emits_lm_head, hf_parts, hf_plan, set_config_dtype

_LOCAL_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class _Stage:
    """This rank's parameters and the mapping of the whole model at its padded vocabulary.

    Attributes:
        mapping: the whole model's weights.
        parameters: canonical key -> this rank's parameter.
        owners: canonical key -> (first pipeline rank that holds it, shape of its shards there, dtype).
        tp_rank: tensor-parallel rank.
        tp_size: tensor-parallel size.
    """

    mapping: ModelMapping
    parameters: dict[str, nn.Parameter]
    owners: dict[str, tuple[int, Shape, torch.dtype]]
    tp_rank: int
    tp_size: int

    @classmethod
    def of(cls, chunks: Sequence[nn.Module], config: Mapping[str, Any]) -> _Stage:
        """Match the live model with the config's table.

        Collective over the pipeline group (one all_gather_object). Raises MappingError on all its ranks, listing every
        problem of every stage, unless the stages together hold each weight exactly once and in the right shape.
        """
        tp_size = parallel_state.get_tensor_model_parallel_world_size()
        named = _global_names(chunks)
        vocab_rows = [named[key].shape[0] * tp_size for key in (EMBEDDING, OUTPUT_LAYER) if key in named]
        padded = vocab_rows[0] if vocab_rows and vocab_rows[0] >= config["vocab_size"] else None
        mapping = mapping_for(config, padded)
        parameters = {mapping.canonical(name): parameter for name, parameter in named.items()}
        held: dict[str, tuple[Shape, torch.dtype]] = {}
        wrong: dict[str, str] = {}
        for key, parameter in parameters.items():
            shape = tuple(parameter.shape)
            if not (mapping.tied and key == OUTPUT_LAYER):  # that one is a copy of the embedding
                held[key] = (shape, parameter.dtype)
            if key in mapping.by_key and (problem := _shard_problem(mapping.by_key[key], shape, tp_size)):
                wrong[key] = problem
        group = parallel_state.get_pipeline_model_parallel_group()
        stages: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(stages, (held, wrong), group=group)
        owners: dict[str, tuple[int, Shape, torch.dtype]] = {}
        for rank, (their_held, their_wrong) in enumerate(stages):
            wrong |= their_wrong
            for key, (shape, dtype) in their_held.items():
                if key in owners:
                    wrong[key] = f"held by pipeline stages {owners[key][0]} and {rank}"
                owners.setdefault(key, (rank, shape, dtype))
        raise_on_mismatch(mapping.by_key, owners, wrong, "live model")
        return cls(mapping, parameters, owners, parallel_state.get_tensor_model_parallel_rank(), tp_size)


def _shard_problem(weight: Weight, shape: Shape, tp_size: int) -> str | None:
    try:
        expected = weight.shard_shape(tp_size)
    except ValueError as error:
        return str(error)
    if shape != expected:
        return f"shape {shape} on one of {tp_size} tensor-parallel ranks, expected {expected}"
    return None


def _global_names(chunks: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """Parameter names with the layer index in the whole model, whatever stage or chunk the layer is on."""
    named: dict[str, nn.Parameter] = {}
    for chunk in map(unwrap_model, chunks):
        for name, parameter in chunk.named_parameters():
            layer = _LOCAL_LAYER.match(name)
            if layer:
                # The layer knows its place; deriving it from the stage would break under uneven or virtual stages.
                number = chunk.decoder.layers[int(layer.group(1))].layer_number
                name = f"decoder.layers.{number - 1}.{name[layer.end() :]}"
            if name in named:
                raise ValueError(f"{name} is in two model chunks")
            named[name] = parameter
    return named


# --- loading -----------------------------------------------------------------------------------------------------


def load_weights(chunks: Sequence[nn.Module], path: str | Path) -> dict[str, Any]:
    """Fill every parameter of this rank exactly once from an HF directory or a torch_dist checkpoint.

    Each rank reads its own part from disk; there is no communication beyond an agreement that all is complete. Values
    are cast to the parameters' dtype. Padded vocabulary rows become zero; with tied embeddings both copies are filled.

    Args:
        chunks: this rank's model chunks.
        path: HF model directory, or checkpoint directory with an hf folder.

    Returns:
        The normalised HF config of the checkpoint.

    Raises:
        FileNotFoundError: nothing to load at `path`.
        MappingError: checkpoint, config and model do not fit together; lists every tensor.
    """
    path = Path(path)
    if is_torch_dist(path):
        checkpoint = TorchDistCheckpoint(path)
        if checkpoint.hf_folder is None:
            raise FileNotFoundError(
                f"{checkpoint.root} has no hf/config.json (it was not written by this program); copy the model's "
                "config.json and tokenizer files there"
            )
        config = read_hf_config(checkpoint.hf_folder)
        mapping_for(config).check_megatron(checkpoint.shapes, str(checkpoint.directory))
        _fill(chunks, config, _torch_dist_shards(checkpoint))
        return config
    hf = HFCheckpoint(path)
    hf.check()
    _fill(chunks, hf.config, lambda weight, rank, size: weight.read_shard(hf.read, rank, size))
    return hf.config


ReadShard = Callable[[Weight, int, int], Tensor]


def _torch_dist_shards(checkpoint: TorchDistCheckpoint) -> ReadShard:
    def read(weight: Weight, tp_rank: int, tp_size: int) -> Tensor:
        # Through the HF parts: the stored vocabulary padding need not be this model's.
        parts = weight.megatron_to_hf(checkpoint.read(weight.key))
        return weight.shard(weight.hf_to_megatron(list(parts.values())), tp_rank, tp_size)

    return read


def _fill(chunks: Sequence[nn.Module], config: Mapping[str, Any], read: ReadShard) -> None:
    stage = _Stage.of(chunks, config)
    with torch.no_grad():
        for key, parameter in stage.parameters.items():
            shard = read(stage.mapping.weight_for(key), stage.tp_rank, stage.tp_size)
            if shard.shape != parameter.shape:
                raise ValueError(f"{key}: read {tuple(shard.shape)} for a parameter of {tuple(parameter.shape)}")
            parameter.copy_(shard)


# --- streaming out -----------------------------------------------------------------------------------------------


def iter_hf_weights(
    chunks: Sequence[nn.Module],
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    *,
    lm_head: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Stream the full weights under their HF names; every rank yields the same tensors in the same order.

    Collective over the tensor- and pipeline-parallel groups (each data-parallel replica by itself): all ranks must
    exhaust the iterator. Per weight one broadcast over the pipeline group and one all-gather over the tensor-parallel
    group; one layer's tensor in memory at a time. Padded vocabulary rows are cut; tied embeddings come once.

    Args:
        chunks: this rank's model chunks.
        config: normalised HF config (see `hf.read_hf_config`): the true vocabulary is not in the model.
        dtype: cast to this before communication; None: as the parameters are.
        lm_head: for a tied model, yield the embedding as `lm_head.weight` too.

    Yields:
        (HF name, tensor on the parameters' device that shares no memory with the model).

    Raises:
        MappingError: where the model's parameters are not those of the config.
    """
    stage = _Stage.of(chunks, config)
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    tp_group = parallel_state.get_tensor_model_parallel_group()
    pp_ranks = dist.get_process_group_ranks(pp_group)
    pp_rank = dist.get_rank(pp_group)
    device = next(iter(stage.parameters.values())).device
    for weight in stage.mapping.weights:
        owner, shape, held_dtype = stage.owners[weight.key]
        if owner == pp_rank:
            shard = stage.parameters[weight.key].detach().to(dtype or held_dtype, copy=True).contiguous()
        else:
            shard = torch.empty(shape, dtype=dtype or held_dtype, device=device)
        if len(pp_ranks) > 1:
            dist.broadcast(shard, src=pp_ranks[owner], group=pp_group)
        shards = [shard]
        if stage.tp_size > 1 and weight.tp_dim is not None:
            shards = [torch.empty_like(shard) for _ in range(stage.tp_size)]
            dist.all_gather(shards, shard, group=tp_group)
        full = weight.unshard(shards)
        del shard, shards
        yield from hf_parts(stage.mapping, weight, full, lm_head=lm_head)


def save_hf(
    chunks: Sequence[nn.Module],
    hf_source: str | Path,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Write a live model as an HF directory. Collective over all ranks; global rank 0 writes.

    Args:
        chunks: this rank's model chunks.
        hf_source: HF directory (or a checkpoint's hf folder) that gives config and tokenizer.
        path: new HF directory.
        dtype: cast to this; None: as the parameters are.
        max_shard_size: bytes per safetensors file.
        overwrite: replace an existing `path`.
    """
    hf_source, path = Path(hf_source), Path(path)
    config = read_hf_config(hf_source)
    lm_head = emits_lm_head(hf_source)
    stage = _Stage.of(chunks, config)
    dtypes = {key: dtype or held for key, (_, _, held) in stage.owners.items()}
    _on_rank_zero(lambda: check_free(path, overwrite=overwrite))
    weights = iter_hf_weights(chunks, config, dtype, lm_head=lm_head)
    if dist.get_rank() == 0:
        plan = hf_plan(stage.mapping, dtypes, lm_head=lm_head)
        with staged_directory(path, overwrite=overwrite) as staging, HFWriter(staging, plan, max_shard_size) as writer:
            for name, tensor in weights:
                writer.add(name, tensor)
            copy_sidecars(hf_source, staging)
            set_config_dtype(staging / "config.json", dtypes[EMBEDDING])
    elif parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0:
        for _ in weights:  # rank 0's partners in the collectives
            pass
    dist.barrier()


def _on_rank_zero(check: Callable[[], None]) -> None:
    """Run a check on global rank 0 and raise its error on every rank, so that none waits for the others."""
    outcome: list[Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            check()
        except Exception as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0]


# --- saving ------------------------------------------------------------------------------------------------------


def save_weights(chunks: Sequence[nn.Module], path: str | Path, hf_source: str | Path, iteration: int) -> Path:
    """Save the weights as ``path/iter_XXXXXXX`` in torch_dist format, move the tracker to it, keep path/hf.

    Collective over all ranks; every rank writes its own shards. The step's directory and the tracker appear only when
    complete; a step saved before under the same number is replaced.

    Args:
        chunks: this rank's model chunks.
        path: checkpoint directory on a file system that all ranks share.
        hf_source: HF directory (or a checkpoint's hf folder) that gives config and tokenizer.
        iteration: the step's number.

    Returns:
        The step's directory.
    """
    path, hf_source = Path(path), Path(hf_source)
    config = read_hf_config(hf_source)
    stage = _Stage.of(chunks, config)
    step = path / f"iter_{iteration:07d}"
    staging = path / f".{step.name}.tmp"
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    dist.barrier()
    state: dict[str, Any] = {"args": megatron_args(config), "checkpoint_version": 3.0, "iteration": iteration}
    for number, chunk in enumerate(map(unwrap_model, chunks)):
        name = "model" if len(chunks) == 1 else f"model{number}"
        state[name] = chunk.sharded_state_dict(metadata={})
    dist_checkpointing.save(state, str(staging))
    dist.barrier()
    if rank == 0:
        if not (path / "hf" / "config.json").is_file():
            dtype = str(stage.owners[EMBEDDING][2]).removeprefix("torch.")
            write_hf_folder(path, hf_source, Source(emits_lm_head(hf_source), config["vocab_size"], dtype))
        publish_directory(staging, step)
        write_text(path / TRACKER_FILE, str(iteration))
    dist.barrier()
    return step
