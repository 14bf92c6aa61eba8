"""How one Megatron-Core tensor is laid out from HF tensors, and how it is cut over tensor-parallel ranks.

One class per layout. Everything here is a pure function of tensors: no process groups, no files, no Megatron import.
Shapes: V vocabulary, H hidden, F feed-forward, N query heads, G query groups (key/value heads), D head size, E experts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


class TensorReader(Protocol):
    """Reads a named HF tensor, or rows/columns ``[start, start + length)`` of its dimension `dim`."""

    def __call__(self, name: str, dim: int | None = None, start: int = 0, length: int | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Weight(ABC):
    """One Megatron tensor and the HF tensors it is made of.

    Attributes:
        key: Megatron name with a global layer index, in the Transformer-Engine spelling (``decoder.layers.3.mlp...``).
        hf_names: HF names of the parts, in the order in which the layout takes them.
        hf_shapes: their shapes.
    """

    key: str
    hf_names: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]

    # Dimension that tensor parallelism divides; None: every rank holds the whole tensor.
    tp_dim: ClassVar[int | None]

    @abstractmethod
    def _merge(self, parts: Sequence[Tensor]) -> Tensor:
        """HF parts -> Megatron tensor; also right for equal tensor-parallel slices of all parts."""

    @abstractmethod
    def _split(self, full: Tensor) -> Sequence[Tensor]:
        """Inverse of `_merge`."""

    @property
    def megatron_shape(self) -> Shape:
        """Shape of the full tensor as a model of one tensor-parallel rank holds it."""
        rows = sum(shape[0] for shape in self.hf_shapes)
        return (rows, *self.hf_shapes[0][1:])

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Size of the full tensor."""
        return math.prod(self.megatron_shape) * dtype.itemsize

    def accepts(self, shape: Shape) -> bool:
        """Whether a stored full tensor of this shape can be read."""
        return shape == self.megatron_shape

    def fit(self, full: Tensor) -> Tensor:
        """A stored full tensor that `accepts` let pass, in exactly `megatron_shape`."""
        return full

    def shard_shape(self, tp_size: int) -> Shape:
        """Shape of one tensor-parallel rank's part.

        Raises:
            ValueError: where `tp_size` does not divide the tensor.
        """
        shape = list(self.megatron_shape)
        if self.tp_dim is not None:
            shape[self.tp_dim] = self._divide(shape[self.tp_dim], tp_size)
        return tuple(shape)

    def _divide(self, length: int, tp_size: int) -> int:
        if length % tp_size:
            raise ValueError(f"{self.key}: tensor-parallel size {tp_size} does not divide {length}")
        return length // tp_size

    def hf_to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        """HF tensors in the order of `hf_names` -> the full Megatron tensor, bit for bit."""
        return self._merge(tensors)

    def split(self, full: Tensor) -> dict[str, Tensor]:
        """Full Megatron tensor -> HF name to tensor, views of it where the layout allows."""
        return dict(zip(self.hf_names, self._split(full), strict=True))

    def shard(self, full: Tensor, tp_rank: int, tp_size: int) -> Tensor:
        """The part of the full Megatron tensor that tensor-parallel rank `tp_rank` of `tp_size` holds."""
        if self.tp_dim is None:
            return full
        length = self._divide(full.shape[self.tp_dim], tp_size)
        return full.narrow(self.tp_dim, tp_rank * length, length)

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """Parts of all tensor-parallel ranks, in rank order -> the full Megatron tensor."""
        if self.tp_dim is None or len(shards) == 1:
            return shards[0]
        return torch.cat(list(shards), self.tp_dim)

    def read_shard(self, read: TensorReader, tp_rank: int, tp_size: int) -> Tensor:
        """One rank's part straight from the HF tensors, reading no more than it needs.

        Equals ``shard(hf_to_megatron(all parts), tp_rank, tp_size)``.
        """
        if self.tp_dim is None or tp_size == 1:
            return self.hf_to_megatron([read(name) for name in self.hf_names])
        parts = []
        for name, shape in zip(self.hf_names, self.hf_shapes, strict=True):
            length = self._divide(shape[self.tp_dim], tp_size)
            parts.append(read(name, self.tp_dim, tp_rank * length, length))
        return self._merge(parts)


def owned(tensor: Tensor) -> Tensor:
    """Contiguous, and no part of a larger storage: consumers may serialise whole storages."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class _Single(Weight):
    """One HF tensor, unchanged."""

    def _merge(self, parts: Sequence[Tensor]) -> Tensor:
        (part,) = parts
        return part

    def _split(self, full: Tensor) -> Sequence[Tensor]:
        return [full]


class Replicated(_Single):
    """The same tensor on every rank: norms, routers."""

    tp_dim = None


class ColumnParallel(_Single):
    """``[out, in]`` with the output rows divided over ranks."""

    tp_dim = 0


class RowParallel(_Single):
    """``[out, in]`` with the input columns divided over ranks."""

    tp_dim = 1


@dataclass(frozen=True)
class VocabRows(ColumnParallel):
    """``[V, H]`` with vocabulary rows divided over ranks, zero rows appended up to `padded_rows`.

    Attributes:
        padded_rows: rows over all ranks, at least V; None means V.
    """

    padded_rows: int | None = None

    def __post_init__(self) -> None:
        if self.padded_rows is not None and self.padded_rows < self.rows:
            raise ValueError(f"{self.key}: padded vocabulary {self.padded_rows} is smaller than the true {self.rows}")

    @property
    def rows(self) -> int:
        """True vocabulary rows."""
        return self.hf_shapes[0][0]

    @property
    def megatron_shape(self) -> Shape:
        return (self.padded_rows or self.rows, *self.hf_shapes[0][1:])

    def accepts(self, shape: Shape) -> bool:
        return shape[0] >= self.rows and shape[1:] == self.hf_shapes[0][1:]

    def fit(self, full: Tensor) -> Tensor:
        rows = self.megatron_shape[0]
        return full if len(full) == rows else self._pad(full[: self.rows], rows)

    def _pad(self, tensor: Tensor, rows: int) -> Tensor:
        missing = rows - tensor.shape[0]
        return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor

    def hf_to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        return self._pad(self._merge(tensors), self.megatron_shape[0])

    def _split(self, full: Tensor) -> Sequence[Tensor]:
        return [full[: self.rows]]

    def read_shard(self, read: TensorReader, tp_rank: int, tp_size: int) -> Tensor:
        length = self.shard_shape(tp_size)[0]
        start = min(tp_rank * length, self.rows)
        (name,) = self.hf_names
        return self._pad(read(name, 0, start, min(length, self.rows - start)), length)


@dataclass(frozen=True)
class QKV(Weight):
    """Query, key and value rows interleaved by query group: ``[q heads of g; k_g; v_g]`` for g = 0..G-1.

    Parts are q ``[N*D, ...]``, k ``[G*D, ...]``, v ``[G*D, ...]`` (weights, or biases without trailing dimensions);
    the result is ``[(N + 2G)*D, ...]``. Ranks take equal runs of rows, whole groups where the tensor-parallel size
    divides G.

    Attributes:
        head_dim: D.
    """

    head_dim: int = 0

    tp_dim = 0

    def __post_init__(self) -> None:
        q, k, v = (shape[0] for shape in self.hf_shapes)
        if self.head_dim < 1 or k != v or k % self.head_dim or q % k:
            raise ValueError(f"{self.key}: rows q {q}, k {k}, v {v} do not make groups of heads of {self.head_dim}")

    @property
    def heads_per_group(self) -> int:
        """N / G."""
        return self.hf_shapes[0][0] // self.hf_shapes[1][0]

    def _merge(self, parts: Sequence[Tensor]) -> Tensor:
        q, k, v = parts
        groups = k.shape[0] // self.head_dim
        rest = q.shape[1:]
        return torch.cat([part.reshape(groups, -1, *rest) for part in (q, k, v)], 1).reshape(-1, *rest)

    def _split(self, full: Tensor) -> Sequence[Tensor]:
        rest = full.shape[1:]
        grouped = full.reshape(-1, (self.heads_per_group + 2) * self.head_dim, *rest)
        sizes = [self.heads_per_group * self.head_dim, self.head_dim, self.head_dim]
        return [part.reshape(-1, *rest) for part in grouped.split(sizes, 1)]

    def read_shard(self, read: TensorReader, tp_rank: int, tp_size: int) -> Tensor:
        groups = self.hf_shapes[1][0] // self.head_dim
        if groups % tp_size == 0:
            return super().read_shard(read, tp_rank, tp_size)
        # More ranks than groups: a rank's rows cut through a group, so no slice of q, k and v alone makes them.
        return self.shard(self._merge([read(name) for name in self.hf_names]), tp_rank, tp_size)


class GatedMLP(Weight):
    """``[gate; up]``, each ``[F, H]``. Every rank holds its gate rows followed by its up rows, so a rank's part is
    not a run of rows of the full tensor."""

    tp_dim = 0

    def _merge(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    def _split(self, full: Tensor) -> Sequence[Tensor]:
        return full.chunk(2)

    def shard(self, full: Tensor, tp_rank: int, tp_size: int) -> Tensor:
        length = self._divide(full.shape[0] // 2, tp_size)
        return self._merge([half.narrow(0, tp_rank * length, length) for half in self._split(full)])

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        if len(shards) == 1:
            return shards[0]
        gates, ups = zip(*(self._split(shard) for shard in shards), strict=True)
        return torch.cat([*gates, *ups])


@dataclass(frozen=True)
class Expert(Weight):
    """A matrix of one of E experts. Expert-parallel ranks hold equal runs of experts; within an expert the layout is
    the dense one, cut over *expert*-tensor-parallel ranks: `tp_rank` and `tp_size` here mean those.

    Attributes:
        expert: index among all experts of the layer.
        num_experts: E.
    """

    expert: int = 0
    num_experts: int = 1

    def ep_rank(self, ep_size: int) -> int:
        """The expert-parallel rank that holds this expert.

        Raises:
            ValueError: where `ep_size` does not divide E.
        """
        if self.num_experts % ep_size:
            raise ValueError(f"{self.key}: expert-parallel size {ep_size} does not divide {self.num_experts} experts")
        return self.expert // (self.num_experts // ep_size)


class ExpertGatedMLP(Expert, GatedMLP):
    """``[gate; up]`` of one expert."""


class ExpertRowParallel(Expert, RowParallel):
    """The down projection of one expert."""
