"""Weights of live Megatron-Core models: load from any checkpoint, save torch_dist, stream out under HF names.

A model is the list of GPTModel chunks of this rank (one, or one per virtual pipeline stage), bare or wrapped (DDP,
Float16Module). Both layer specs work: parameters are addressed by their Transformer-Engine names with global layer
indices. Optimizer state is no business of this module.
"""

from __future__ import annotations

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

from megatron_bpdg.checkpoint.directory import HF_FOLDER, TRACKER_FILE, Source, write_hf_folder
from megatron_bpdg.checkpoint.files import publish_directory, staged_directory
from megatron_bpdg.checkpoint.hf import dtype_name, emits_lm_head, hf_plan, plan_shards, write_hf_common, write_shard
from megatron_bpdg.checkpoint.mapping import (
    EMBEDDING,
    LAYER,
    OUTPUT_LAYER,
    ModelMapping,
    mapping_for,
    raise_on_mismatch,
)
from megatron_bpdg.checkpoint.patterns import Expert, Shape, Weight, owned
from megatron_bpdg.checkpoint.source import open_source
from megatron_bpdg.checkpoint.torch_dist_writer import megatron_args
from megatron_bpdg.models.hf_config import read_hf_config
from megatron_bpdg.parallel.together import everyone, on_first
from megatron_bpdg.tracking.files import write_text


@dataclass(frozen=True)
class _Stage:
    """This rank's parameters and the mapping of the whole model at its padded vocabulary.

    Attributes:
        mapping: the whole model's weights.
        parameters: canonical key -> this rank's parameter.
        owners: canonical key -> (first pipeline rank that holds it, shape of its shards there, dtype).
        pipeline, expert: over which ranks the layers and the experts of a layer are spread.
        tensor, expert_tensor: over which ranks a matrix is cut, an expert's and every other.
    """

    mapping: ModelMapping
    parameters: dict[str, nn.Parameter]
    owners: dict[str, tuple[int, Shape, torch.dtype]]
    pipeline: dist.ProcessGroup
    expert: dist.ProcessGroup
    tensor: dist.ProcessGroup
    expert_tensor: dist.ProcessGroup

    @classmethod
    def of(cls, chunks: Sequence[nn.Module], config: Mapping[str, Any]) -> _Stage:
        """Match the live model with the config's table.

        Collective over the ranks that hold the model's parts (one all_gather_object). Raises MappingError on all of
        them, listing every problem of every stage, unless the stages together hold each weight exactly once and in
        the right shape.
        """
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        expert = parallel_state.get_expert_model_parallel_group()
        tensor = parallel_state.get_tensor_model_parallel_group()
        expert_tensor = parallel_state.get_expert_tensor_parallel_group()
        named = _global_names(chunks)
        vocab_rows = [named[key].shape[0] * tensor.size() for key in (EMBEDDING, OUTPUT_LAYER) if key in named]
        padded = vocab_rows[0] if vocab_rows and vocab_rows[0] >= config["vocab_size"] else None
        mapping = mapping_for(config, padded)
        first_expert = config.get("num_experts", 0) // expert.size() * expert.rank()
        parameters = {mapping.canonical(name, first_expert): parameter for name, parameter in named.items()}
        held: dict[str, tuple[Shape, torch.dtype]] = {}
        wrong: dict[str, str] = {}
        for key, parameter in parameters.items():
            shape = tuple(parameter.shape)
            if not (mapping.tied and key == OUTPUT_LAYER):  # that one is a copy of the embedding
                held[key] = (shape, parameter.dtype)
            weight = mapping.by_key.get(key)
            if weight is not None:
                cut = expert_tensor if isinstance(weight, Expert) else tensor
                if problem := _shard_problem(weight, shape, cut.size()):
                    wrong[key] = problem
        # Ranks that differ in their tensor-parallel place alone say the same.
        group = parallel_state.get_expert_tensor_model_pipeline_parallel_group()
        said = everyone((pipeline.rank(), held, wrong), group)
        owners: dict[str, tuple[int, Shape, torch.dtype]] = {}
        for rank, their_held, their_wrong in sorted(said, key=lambda one: one[0]):
            wrong |= their_wrong
            for key, (shape, dtype) in their_held.items():
                if key in owners and owners[key][0] != rank:
                    wrong[key] = f"held by pipeline stages {owners[key][0]} and {rank}"
                owners.setdefault(key, (rank, shape, dtype))
        raise_on_mismatch(mapping.by_key, owners, wrong, "live model")
        return cls(mapping, parameters, owners, pipeline, expert, tensor, expert_tensor)

    def cut(self, weight: Weight) -> dist.ProcessGroup:
        """Over which ranks this weight's matrix is cut."""
        return self.expert_tensor if isinstance(weight, Expert) else self.tensor

    def full(self, weight: Weight) -> Tensor:
        """The whole tensor on every rank: from its expert-parallel rank to the others of its pipeline stage, from its
        stage to the others, and put together from the tensor-parallel parts."""
        owner, shape, dtype = self.owners[weight.key]
        if (parameter := self.parameters.get(weight.key)) is not None:
            shard = parameter.detach().clone(memory_format=torch.contiguous_format)
        else:
            shard = torch.empty(shape, dtype=dtype, device=next(iter(self.parameters.values())).device)
        if isinstance(weight, Expert) and self.pipeline.rank() == owner and self.expert.size() > 1:
            dist.broadcast(shard, group=self.expert, group_src=weight.ep_rank(self.expert.size()))
        if self.pipeline.size() > 1:
            dist.broadcast(shard, group=self.pipeline, group_src=owner)
        cut = self.cut(weight)
        if weight.tp_dim is None or cut.size() == 1:
            return shard
        shards = [torch.empty_like(shard) for _ in range(cut.size())]
        dist.all_gather(shards, shard, group=cut)
        return weight.unshard(shards)


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
            layer = LAYER.match(name)
            if layer:
                # The layer knows its place; deriving it from the stage would break under uneven or virtual stages.
                number = chunk.decoder.layers[int(layer.group(1))].layer_number
                name = f"decoder.layers.{number - 1}.{name[layer.end() :]}"
            if name in named:
                raise ValueError(f"{name} is in two model chunks")
            named[name] = parameter
    return named


def load_weights(chunks: Sequence[nn.Module], path: str | Path) -> dict[str, Any]:
    """Fill every parameter of this rank exactly once from a checkpoint of any format.

    Each rank reads its own part from disk; there is no communication beyond an agreement that all is complete. Values
    are cast to the parameters' dtype. Padded vocabulary rows become zero; with tied embeddings both copies are filled.

    Args:
        path: HF model directory, or checkpoint directory with an hf folder.

    Returns:
        The normalised HF config of the checkpoint.

    Raises:
        FileNotFoundError: nothing to load at `path`.
        MappingError: checkpoint, config and model do not fit together; lists every tensor.
    """
    model = open_source(Path(path))
    _fill(chunks, model.config, model.read_shard)
    return model.config


def _fill(chunks: Sequence[nn.Module], config: Mapping[str, Any], read: Callable[[Weight, int, int], Tensor]) -> None:
    stage = _Stage.of(chunks, config)
    with torch.no_grad():
        for key, parameter in stage.parameters.items():
            weight = stage.mapping.weight_for(key)
            cut = stage.cut(weight)
            shard = read(weight, cut.rank(), cut.size())
            if shard.shape != parameter.shape:
                raise ValueError(f"{key}: read {tuple(shard.shape)} for a parameter of {tuple(parameter.shape)}")
            parameter.copy_(shard)


def iter_hf_weights(
    chunks: Sequence[nn.Module], config: Mapping[str, Any], *, lm_head: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Stream the full weights under their HF names; every rank yields the same tensors in the same order.

    Collective: all ranks must exhaust the iterator. Per weight one broadcast over the pipeline group and one all-gather
    over the tensor-parallel group; for an expert's, one broadcast over the expert-parallel group first, and the gather
    over the expert-tensor-parallel one. One such tensor in memory at a time. Padded vocabulary rows are cut; tied
    embeddings come once.

    Args:
        config: normalised HF config (see `hf.read_hf_config`): the true vocabulary is not in the model.
        lm_head: for a tied model, yield the embedding as `lm_head.weight` too.

    Yields:
        (HF name, tensor on the parameters' device that shares no memory with the model).

    Raises:
        MappingError: where the model's parameters are not those of the config.
    """
    stage = _Stage.of(chunks, config)
    for weight in stage.mapping.weights:
        for name, part in stage.mapping.hf_parts(weight, stage.full(weight), lm_head).items():
            yield name, owned(part)


def save_hf(chunks: Sequence[nn.Module], hf_source: str | Path, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a live model as an HF directory. Collective over all ranks; global rank 0 writes.

    Args:
        hf_source: HF directory (or a checkpoint's hf folder) that gives config and tokenizer.
        path: new HF directory.
        overwrite: replace an existing `path`.
    """
    hf_source, path = Path(hf_source), Path(path)
    config = read_hf_config(hf_source)
    lm_head = emits_lm_head(hf_source)
    stage = _Stage.of(chunks, config)
    dtypes = {key: dtype for key, (_, _, dtype) in stage.owners.items()}
    shards = plan_shards(hf_plan(stage.mapping, dtypes, lm_head=lm_head))
    with staged_directory(path, overwrite=overwrite) as staging:
        weights = iter_hf_weights(chunks, config, lm_head=lm_head)
        if dist.get_rank() == 0:
            for shard in shards:
                write_shard(staging, shard, weights)
            write_hf_common(staging, shards, hf_source, dtypes[EMBEDDING])
        for _ in weights:  # the other ranks take part in the collectives
            pass


@dataclass(frozen=True)
class LiveWeights:
    """`megatron_bpdg.serving.sglang.weights.base.Weights` of a Megatron model.

    Attributes:
        hf_config: normalised HF config.
        hf_folder: gives config and tokenizer of the saved directory.
    """

    chunks: Sequence[nn.Module]
    hf_config: Mapping[str, Any]
    hf_folder: Path

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter_hf_weights(self.chunks, self.hf_config)

    def save(self, path: Path) -> None:
        save_hf(self.chunks, self.hf_folder, path, overwrite=True)


def save_weights(chunks: Sequence[nn.Module], path: str | Path, hf_source: str | Path, iteration: int) -> Path:
    """Save the weights as ``path/iter_XXXXXXX`` in torch_dist format, move the tracker to it, keep path/hf.

    Collective over all ranks; every rank writes its own shards. The step's directory and the tracker appear only when
    complete; a step saved before under the same number is replaced.

    Args:
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

    def clear() -> None:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)

    def publish() -> None:
        if not (path / HF_FOLDER / "config.json").is_file():
            dtype = dtype_name(stage.owners[EMBEDDING][2])
            write_hf_folder(path, hf_source, Source(emits_lm_head(hf_source), config["vocab_size"], dtype))
        publish_directory(staging, step)
        write_text(path / TRACKER_FILE, str(iteration))

    on_first(clear)
    state: dict[str, Any] = {"args": megatron_args(config), "checkpoint_version": 3.0, "iteration": iteration}
    for number, chunk in enumerate(map(unwrap_model, chunks)):
        name = "model" if len(chunks) == 1 else f"model{number}"
        state[name] = chunk.sharded_state_dict(metadata={})
    dist_checkpointing.save(state, str(staging))
    dist.barrier()
    on_first(publish)
    return step
