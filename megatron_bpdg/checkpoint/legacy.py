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
from argparse import Namespace
from collections.abc import Iterable, Mapping
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
    OUTPUT_LAYER,
    MappingError,
    ModelMapping,
    canonical_name,
    raise_on_mismatch,
)
from megatron_bpdg.checkpoint.patterns import Expert, Weight
from megatron_bpdg.checkpoint.raw import load_foreign

_RANK = re.compile(r"^mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?$")
_FILES = ("model_optim_rng.pt", "model_rng.pt")
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
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
        sizes: model-parallel sizes: tensor, pipeline, expert, expert_tensor.

    Raises:
        FileNotFoundError: no checkpoint there, or a rank's file is absent.
        ValueError: a file that is not what it should be, or a layout that is not supported.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._states = {name: _load(self._file(name)) for name in self._names()}
        first = next(iter(self._states.values()))
        self.arguments = vars(first["args"]) if isinstance(first.get("args"), Namespace) else {}
        self._positions = self._place_ranks()
        self.sizes = self._sizes()
        self._shards = self._index()

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.directory.iterdir() if _RANK.match(path.name))

    def _file(self, name: str) -> Path:
        for candidate in _FILES:
            if (file := self.directory / name / candidate).is_file():
                return file
        raise FileNotFoundError(f"{self.directory / name} has no {_FILES[0]}")

    def _place_ranks(self) -> dict[str, _Position]:
        experts = int(self.arguments.get("expert_model_parallel_size") or 1) > 1
        positions = {}
        for name in self._states:
            match = _RANK.match(name)
            assert match is not None
            tensor, *rest = (int(digits) for digits in match.groups() if digits is not None)
            if len(rest) == 1 and experts:
                rest = [0, *rest]  # the suffix of the only other parallelism in use
            positions[name] = _Position(tensor, *rest, *[0] * (2 - len(rest)))
        return positions

    def _sizes(self) -> dict[str, int]:
        positions = self._positions.values()
        tensor, pipeline, expert = (
            1 + max(getattr(position, axis) for position in positions) for axis in ("tensor", "pipeline", "expert")
        )
        expert_tensor = int(self.arguments.get("expert_tensor_parallel_size") or tensor)
        if expert_tensor not in (1, tensor):
            raise ValueError(
                f"{self.directory}: expert-tensor-parallel size {expert_tensor} beside tensor-parallel size {tensor} "
                "is not supported in this format (only 1 or the same); save it as torch_dist"
            )
        absent = [
            f"tensor {t} pipeline {p}"
            for t in range(tensor)
            for p in range(pipeline)
            if not any((position.tensor, position.pipeline) == (t, p) for position in positions)
        ]
        absent += [
            f"expert {e} pipeline {p}"
            for e in range(expert)
            for p in range(pipeline)
            if not any((position.expert, position.pipeline) == (e, p) for position in positions)
        ]
        if absent:
            raise FileNotFoundError(f"{self.directory}: no file of rank {', '.join(absent)}")
        return {"tensor": tensor, "pipeline": pipeline, "expert": expert, "expert_tensor": expert_tensor}

    def _chunks(self, name: str) -> list[dict[str, Any]]:
        """State dicts of a file's model chunks: one, or one per virtual stage."""
        state = self._states[name]
        keys = ["model"] if "model" in state else sorted(key for key in state if re.fullmatch(r"model\d+", key))
        chunks = [state[key] for key in keys]
        if not chunks or not all(isinstance(chunk, dict) for chunk in chunks):
            raise ValueError(f"{self._file(name)} has no model weights; its entries: {', '.join(map(str, state))}")
        if any("language_model" in chunk for chunk in chunks):
            raise ValueError(f"{self._file(name)} is of a model from before Megatron-Core, which is not supported")
        return chunks

    def _index(self) -> dict[str, dict[_Position, Tensor]]:
        """Canonical key -> shard of each rank that holds it."""
        found: dict[str, dict[_Position, Tensor]] = {}
        offsets = self._layer_offsets()
        for name, position in self._positions.items():
            for number, chunk in enumerate(self._chunks(name)):
                offset = offsets[number, position.pipeline]
                for key, shard in self._tensors(position, chunk, offset):
                    found.setdefault(key, {})[position] = shard
        return found

    def _layer_offsets(self) -> dict[tuple[int, int], int]:
        """(virtual stage, pipeline rank) -> global index of its first layer: virtual stages go over all ranks in turn.

        Counted from the layers that are there, so uneven stages need no further arguments.
        """
        names = {position.pipeline: name for name, position in self._positions.items()}
        counts = {}
        for rank, name in names.items():
            for number, chunk in enumerate(self._chunks(name)):
                layers = [int(match.group(1)) for key in chunk if (match := _LAYER.match(key))]
                counts[number, rank] = max(layers, default=-1) + 1
        offsets, total = {}, 0
        for at in sorted(counts):
            offsets[at] = total
            total += counts[at]
        return offsets

    def _tensors(
        self, position: _Position, chunk: Mapping[str, Any], layer_offset: int
    ) -> Iterable[tuple[str, Tensor]]:
        routers = {
            match.group() for key in chunk if (match := _LAYER.match(key)) and key.endswith(".mlp.router.weight")
        }
        for key, tensor in chunk.items():
            if not isinstance(tensor, Tensor) or key.endswith("_extra_state"):
                continue
            layer = _LAYER.match(key)
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
    def files(self) -> list[Path]:
        """Data files."""
        return [self._file(name) for name in self._names()]

    @property
    def has_optimizer(self) -> bool:
        """Whether optimizer state was saved along."""
        return any("optimizer" in state for state in self._states.values())

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
            self._check_tied_head(mapping.embedding)

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

    def _check_tied_head(self, embedding: Weight) -> None:
        """The last pipeline stage of a tied model keeps a copy of the embedding."""
        for position, head in self._shards[OUTPUT_LAYER].items():
            for other, shard in self._shards[EMBEDDING].items():
                if other.tensor == position.tensor and not same_bytes(head, shard):
                    raise MappingError(
                        f"{self.directory}: the model's config says tie_word_embeddings true, but {OUTPUT_LAYER} "
                        f"differs from {embedding.key}; is this the config of another model?"
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


def _load(file: Path) -> dict[str, Any]:
    state = load_foreign(file)
    if not isinstance(state, dict):
        raise ValueError(f"{file} holds {type(state).__name__}, expected a dictionary with the model's state")
    return state
