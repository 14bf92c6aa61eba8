"""Megatron-LM's older `torch` checkpoints: one file of torch.save per model-parallel rank, fixed to its layout.

On disk::

    DIR/latest_checkpointed_iteration.txt
    DIR/iter_0000100/ or DIR/release/
        mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt     tensor-, pipeline-, expert-parallel rank

``PPP`` is there with pipeline stages, ``EEE`` with expert parallelism; the arguments saved in the files tell which is
which. Only Megatron-Core models are read (``decoder.layers...``), of either layer spec, grouped or sequential experts,
virtual stages included. Files are mapped without running code from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_bpdg.checkpoint.directory import StepDirectory, step_directory
from megatron_bpdg.checkpoint.hf import same_bytes
from megatron_bpdg.checkpoint.mapping import (
    EMBEDDING,
    LAYER,
    OUTPUT_LAYER,
    MappingError,
    ModelMapping,
    canonical_name,
    raise_on_mismatch,
)
from megatron_bpdg.checkpoint.patterns import Expert, Weight
from megatron_bpdg.checkpoint.raw import arguments_of, load_foreign

_RANK = re.compile(r"^mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?$")
_FILES = ("model_optim_rng.pt", "model_rng.pt")
# All local experts in one matrix (Megatron-Core's former GroupedMLP), input dimension first.
_FUSED_EXPERTS = re.compile(r"mlp\.experts\.weight([12])$")


@dataclass(frozen=True)
class _Position:
    """Ranks that a file belongs to."""

    tensor: int
    pipeline: int
    expert: int


class LegacyCheckpoint(StepDirectory):
    """The weights of an mp_rank checkpoint, whole tensors over all its ranks. Optimizer state is ignored.

    Attributes:
        files: data files, one per rank.
        arguments: Megatron-LM's, as the first file has them.
        has_optimizer: whether optimizer state was saved along.
        sizes: model-parallel sizes: tensor, pipeline, expert, expert_tensor.

    Raises:
        FileNotFoundError: no checkpoint there, or a rank's file is absent.
        ValueError: a file that is not what it should be, or a layout that is not supported.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        names = sorted(entry.name for entry in self.directory.iterdir() if _RANK.match(entry.name))
        self.files = [self._file(name) for name in names]
        states = [load_foreign(file) for file in self.files]
        self.arguments = arguments_of(states[0])
        self.has_optimizer = any("optimizer" in state for state in states)
        self._positions = [self._position(name) for name in names]
        self.sizes = self._sizes()
        self._shards = self._index([_chunks(*pair) for pair in zip(self.files, states, strict=True)])

    def _file(self, name: str) -> Path:
        for candidate in _FILES:
            if (file := self.directory / name / candidate).is_file():
                return file
        raise FileNotFoundError(f"{self.directory / name} has no {_FILES[0]}")

    def _position(self, name: str) -> _Position:
        match = _RANK.match(name)
        assert match is not None
        tensor, *rest = (int(digits) for digits in match.groups() if digits is not None)
        if len(rest) == 1 and int(self.arguments.get("expert_model_parallel_size") or 1) > 1:
            rest = [0, *rest]  # the suffix of the only other parallelism in use
        return _Position(tensor, *rest, *[0] * (2 - len(rest)))

    def _sizes(self) -> dict[str, int]:
        sizes = {
            axis: 1 + max(getattr(position, axis) for position in self._positions)
            for axis in ("tensor", "pipeline", "expert")
        }
        expert_tensor = int(self.arguments.get("expert_tensor_parallel_size") or sizes["tensor"])
        if expert_tensor not in (1, sizes["tensor"]):
            raise ValueError(
                f"{self.directory}: expert-tensor-parallel size {expert_tensor} beside tensor-parallel size "
                f"{sizes['tensor']} is not supported in this format (only 1 or the same); save it as torch_dist"
            )
        absent = [
            f"{axis} {rank} pipeline {stage}"
            for axis in ("tensor", "expert")
            for rank in range(sizes[axis])
            for stage in range(sizes["pipeline"])
            if not any((getattr(position, axis), position.pipeline) == (rank, stage) for position in self._positions)
        ]
        if absent:
            raise FileNotFoundError(f"{self.directory}: no file of rank {', '.join(absent)}")
        return sizes | {"expert_tensor": expert_tensor}

    def _index(self, chunks: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, dict[_Position, Tensor]]:
        """Canonical key -> shard of each rank that holds it; `chunks` of each file, one per virtual stage."""
        held = [
            (position, number, chunk)
            for position, of_file in zip(self._positions, chunks, strict=True)
            for number, chunk in enumerate(of_file)
        ]
        # Virtual stages go over all pipeline ranks in turn. Their layers are counted, so uneven ones need no arguments.
        counts = {(number, position.pipeline): _num_layers(chunk) for position, number, chunk in held}
        first_layers, total = {}, 0
        for stage in sorted(counts):
            first_layers[stage] = total
            total += counts[stage]
        found: dict[str, dict[_Position, Tensor]] = {}
        for position, number, chunk in held:
            for key, shard in self._tensors(position, chunk, first_layers[number, position.pipeline]):
                found.setdefault(key, {})[position] = shard
        return found

    def _tensors(
        self, position: _Position, chunk: Mapping[str, Any], layer_offset: int
    ) -> Iterable[tuple[str, Tensor]]:
        routers = {match.group() for key in chunk if (match := LAYER.match(key)) and key.endswith(".mlp.router.weight")}
        for key, tensor in chunk.items():
            if not isinstance(tensor, Tensor) or key.endswith("_extra_state"):
                continue
            layer = LAYER.match(key)
            has_experts = layer is not None and layer.group() in routers
            if layer:
                key = f"decoder.layers.{int(layer.group(1)) + layer_offset}.{key[layer.end() :]}"
            if fused := _FUSED_EXPERTS.search(key):
                yield from self._split_experts(key[: fused.start()], int(fused.group(1)), tensor, position)
                continue
            first_expert = self._experts_per_rank * position.expert
            yield canonical_name(key, has_experts=has_experts, first_expert=first_expert), tensor

    @cached_property
    def _experts_per_rank(self) -> int:
        experts = int(self.arguments.get("num_experts") or 0)
        if not experts and self.sizes["expert"] > 1:
            raise ValueError(f"{self.directory}: expert-parallel files without num_experts among their arguments")
        return experts // self.sizes["expert"]

    def _split_experts(
        self, prefix: str, number: int, fused: Tensor, position: _Position
    ) -> Iterable[tuple[str, Tensor]]:
        """``weight1`` [H, e * 2F] seen as [e, H, 2F], ``weight2`` [e * F, H] as [e, F, H], for e local experts."""
        count = self._experts_per_rank
        rows, columns = fused.shape
        experts = fused.view(count, rows, columns // count) if number == 1 else fused.view(count, -1, columns)
        for e, expert in enumerate(experts):
            key = f"{prefix}mlp.experts.experts.{count * position.expert + e}.linear_fc{number}.weight"
            yield key, expert.T

    @property
    def stored_sizes(self) -> list[tuple[torch.dtype, int]]:
        """dtype and bytes of every rank's part of every tensor."""
        shards = (shard for ranks in self._shards.values() for shard in ranks.values())
        return [(shard.dtype, shard.nbytes) for shard in shards]

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {key: next(iter(shards.values())).dtype for key, shards in self._shards.items()}

    def _parts(self, weight: Weight) -> list[Tensor]:
        """Shards of one tensor in the order of its tensor-parallel ranks."""
        shards = self._shards[weight.key]
        axis_size = self.sizes["expert_tensor" if isinstance(weight, Expert) else "tensor"]
        if weight.tp_dim is None or axis_size == 1:
            return [next(iter(shards.values()))]
        by_rank = {position.tensor: shard for position, shard in shards.items()}
        return [by_rank[rank] for rank in sorted(by_rank)]

    def check(self, mapping: ModelMapping) -> None:
        """Raise MappingError, listing every problem, unless the shards are exactly this model's."""
        wrong = {}
        for key, weight in mapping.by_key.items():
            if key in self._shards and (problem := self._problem(weight)):
                wrong[key] = problem
        found = [key for key in self._shards if not (mapping.tied and key == OUTPUT_LAYER)]
        raise_on_mismatch(mapping.by_key, found, wrong, str(self.directory))
        if mapping.tied and OUTPUT_LAYER in self._shards:
            self._check_tied_head()

    def _problem(self, weight: Weight) -> str | None:
        size = self.sizes["expert_tensor" if isinstance(weight, Expert) else "tensor"]
        parts = self._parts(weight)
        if weight.tp_dim is not None and len(parts) != size:
            return f"{len(parts)} shards, expected {size}"
        shapes = {tuple(part.shape) for part in parts}
        full = list(parts[0].shape)
        if weight.tp_dim is not None:
            full[weight.tp_dim] *= size
        if len(shapes) > 1 or not weight.accepts(tuple(full)):
            return f"shape {', '.join(map(str, shapes))} on {size} ranks, expected {weight.megatron_shape} together"
        return None

    def _check_tied_head(self) -> None:
        """The last pipeline stage of a tied model keeps a copy of the embedding."""
        for position, head in self._shards[OUTPUT_LAYER].items():
            for other, shard in self._shards[EMBEDDING].items():
                if other.tensor == position.tensor and not same_bytes(head, shard):
                    raise MappingError(
                        f"{self.directory}: the model's config says tie_word_embeddings true, but {OUTPUT_LAYER} "
                        f"differs from {EMBEDDING}; is this the config of another model?"
                    )

    def read_weight(self, weight: Weight) -> Tensor:
        """The full tensor of an entry of the mapping, a view of its file where that holds all of it."""
        return weight.unshard(self._parts(weight))


def is_legacy(path: Path) -> bool:
    """Whether `path` is DIR of the module docstring or one step's directory."""
    try:
        _, directory = step_directory(path)
    except (FileNotFoundError, ValueError):
        return False
    return any(_RANK.match(entry.name) for entry in directory.iterdir())


def _chunks(file: Path, state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """State dicts of a file's model chunks: one, or one per virtual stage."""
    stages = sorted(int(match.group(1)) for key in state if (match := re.fullmatch(r"model(\d+)", key)))
    keys = ["model"] if "model" in state else [f"model{stage}" for stage in stages]
    chunks = [state[key] for key in keys]
    if not chunks or not all(isinstance(chunk, dict) for chunk in chunks):
        raise ValueError(f"{file} has no model weights; its entries: {', '.join(map(str, state))}")
    if any("language_model" in chunk for chunk in chunks):
        raise ValueError(f"{file} is of a model from before Megatron-Core, which is not supported")
    return chunks


def _num_layers(chunk: Mapping[str, Any]) -> int:
    return 1 + max((int(match.group(1)) for key in chunk if (match := LAYER.match(key))), default=-1)
