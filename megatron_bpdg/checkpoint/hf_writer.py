"""Writing HF checkpoints as a stream: each tensor goes straight to its place in its final file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO

import torch
from torch import Tensor

from megatron_bpdg.checkpoint.directory import read_source
from megatron_bpdg.checkpoint.files import write_text
from megatron_bpdg.checkpoint.hf import DTYPES, INDEX_FILE, SINGLE_FILE, HFCheckpoint
from megatron_bpdg.checkpoint.mapping import LM_HEAD, MappingError, ModelMapping
from megatron_bpdg.checkpoint.patterns import Shape, Weight
from megatron_bpdg.checkpoint.raw import as_bytes

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is going to be written."""

    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class Shard:
    """A safetensors file that is going to be written.

    Attributes:
        tensors: what it holds.
        file: its name.
    """

    tensors: list[TensorPlan] = field(default_factory=list)
    file: str = ""

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def ordered(self) -> list[TensorPlan]:
        """The tensors as they follow one another in the file: wide dtypes first, so that all stay aligned."""
        return sorted(self.tensors, key=lambda tensor: -tensor.dtype.itemsize)

    def layout(self) -> tuple[bytes, dict[str, int]]:
        """The file's header and each tensor's absolute offset."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets: dict[str, int] = {}
        position = 0
        for tensor in self.ordered:
            offsets[tensor.name] = position
            end = position + tensor.num_bytes
            header[tensor.name] = {
                "dtype": _DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        return len(text).to_bytes(8, "little") + text, {name: start + offset for name, offset in offsets.items()}


def plan_shards(plan: Iterable[TensorPlan], max_shard_size: int) -> list[Shard]:
    """Spread tensors over files of at most `max_shard_size` bytes of tensors; a larger one has a file of its own.

    Raises:
        ValueError: a dtype that is not written, a repeated name, a `max_shard_size` below 1.
    """
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size {max_shard_size} must be at least 1 byte")
    names: set[str] = set()
    shards = [Shard()]
    size = 0
    for tensor in plan:
        if tensor.name in names:
            raise ValueError(f"{tensor.name} is planned twice")
        if tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"{tensor.name}: dtype {tensor.dtype} cannot be written")
        names.add(tensor.name)
        if shards[-1].tensors and size + tensor.num_bytes > max_shard_size:
            shards.append(Shard())
            size = 0
        shards[-1].tensors.append(tensor)
        size += tensor.num_bytes
    count = len(shards)
    for number, shard in enumerate(shards, 1):
        shard.file = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
    return shards


def write_index(directory: Path, shards: Sequence[Shard]) -> None:
    """Write the index of several files; one file needs none."""
    if len(shards) == 1:
        return
    total = sum(shard.num_bytes for shard in shards)
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(directory / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def write_shard(
    shard: Shard,
    groups: Sequence[Sequence[TensorPlan]],
    stream: IO[bytes],
    weights: Iterable[tuple[Weight, Tensor]],
) -> dict[str, Any]:
    """Append one file to `stream`.

    Args:
        shard: the file.
        groups: its tensors in order, in runs that come from one Megatron tensor each.
        stream: empty.
        weights: those Megatron tensors, in full.
    """
    stream.write(shard.layout()[0])
    for tensors, (weight, full) in zip(groups, weights, strict=True):
        parts = weight.split(full)
        del full  # before the next one is asked for
        for planned in tensors:
            # A tied model's repeated head is the only tensor under a name that its weight does not know.
            part = parts.get(planned.name, next(iter(parts.values())))
            if tuple(part.shape) != planned.shape or part.dtype != planned.dtype:
                raise MappingError(
                    f"{planned.name}: {tuple(part.shape)} {part.dtype}, planned {planned.shape} {planned.dtype}"
                )
            stream.write(as_bytes(part.contiguous()))
        del parts, part
    return {}


class HFWriter:
    """Safetensors files of at most `max_shard_size` bytes of tensors each, plus their index.

    All names, shapes and dtypes are declared first, so files have their final names and no tensor is held back.
    Use as a context manager inside a staged directory; a body that raises leaves incomplete files behind.

    Args:
        directory: an existing directory.
        plan: every tensor, in the order in which it should be laid out; `add` may come in any order.
        max_shard_size: bytes; a tensor larger than this has a file of its own.

    Raises:
        ValueError: a dtype that is not written, a repeated name, a `max_shard_size` below 1.
        MappingError: a tensor added twice, not in the plan or of another shape or dtype; on exit, tensors not added.
    """

    def __init__(self, directory: Path, plan: Iterable[TensorPlan], max_shard_size: int = 5 * 10**9) -> None:
        self._directory = directory
        self._shards = plan_shards(plan, max_shard_size)
        self._plan = {tensor.name: tensor for shard in self._shards for tensor in shard.tensors}
        self._offsets: dict[str, int] = {}
        self._streams: dict[str, BinaryIO] = {}
        self._file_of: dict[str, str] = {}
        self._written: set[str] = set()

    def __enter__(self) -> HFWriter:
        for shard in self._shards:
            header, offsets = shard.layout()
            stream = (self._directory / shard.file).open("wb")
            stream.write(header)
            stream.truncate(len(header) + shard.num_bytes)
            self._streams[shard.file] = stream
            self._offsets |= offsets
            self._file_of |= {tensor.name: shard.file for tensor in shard.tensors}
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor (any device)."""
        planned = self._plan.get(name)
        if planned is None:
            raise MappingError(f"{name} is not in the plan of {self._directory}")
        if name in self._written:
            raise MappingError(f"{name} is written twice to {self._directory}")
        if tuple(tensor.shape) != planned.shape or tensor.dtype != planned.dtype:
            raise MappingError(f"{name}: {tuple(tensor.shape)} {tensor.dtype}, planned {planned.shape} {planned.dtype}")
        stream = self._streams[self._file_of[name]]
        stream.seek(self._offsets[name])
        stream.write(as_bytes(tensor.detach().cpu().contiguous()))
        self._written.add(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._streams.values():
            if error is None:
                stream.flush()
                os.fsync(stream.fileno())
            stream.close()
        if error is not None:
            return
        if missing := [name for name in self._plan if name not in self._written]:
            raise MappingError(f"{self._directory}: tensors never written: {', '.join(missing)}")
        write_index(self._directory, self._shards)


def emits_lm_head(hf_folder: Path) -> bool:
    """Whether a tied model's HF form should repeat its embedding as `lm_head.weight`, as its source did."""
    source = read_source(hf_folder)
    if source is not None:
        return source.has_lm_head
    has_weights = any(hf_folder.glob("*.safetensors"))
    return has_weights and HFCheckpoint(hf_folder).has_lm_head


def hf_plan(mapping: ModelMapping, dtypes: Mapping[str, torch.dtype], *, lm_head: bool) -> list[TensorPlan]:
    """What `hf_parts` will yield over all weights, by canonical key's dtype."""
    plan = [
        TensorPlan(name, shape, dtypes[weight.key])
        for weight in mapping.weights
        for name, shape in zip(weight.hf_names, weight.hf_shapes, strict=True)
    ]
    if mapping.tied and lm_head:
        plan.append(TensorPlan(LM_HEAD, mapping.embedding.hf_shapes[0], dtypes[mapping.embedding.key]))
    return plan


def hf_parts(mapping: ModelMapping, weight: Weight, full: Tensor, *, lm_head: bool) -> Iterator[tuple[str, Tensor]]:
    """The HF tensors of one full Megatron tensor; for a tied model with `lm_head`, the embedding under both names."""
    for name, tensor in weight.megatron_to_hf(full).items():
        yield name, tensor
        if mapping.tied and lm_head and weight is mapping.embedding:
            yield LM_HEAD, tensor


def set_config_dtype(file: Path, dtype: torch.dtype) -> None:
    """Make config.json name the dtype that the weights now have, in the spelling the file uses."""
    config = json.loads(file.read_text(encoding="utf-8"))
    field = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    if config.get(field) == (name := str(dtype).removeprefix("torch.")):
        return
    config[field] = name
    write_text(file, json.dumps(config, indent=2) + "\n")
