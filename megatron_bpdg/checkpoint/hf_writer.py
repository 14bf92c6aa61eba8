"""Writing HF checkpoints as a stream: each tensor goes straight to its place in its final file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_bpdg.checkpoint.files import write_text
from megatron_bpdg.checkpoint.hf import DTYPES, INDEX_FILE, SINGLE_FILE
from megatron_bpdg.checkpoint.mapping import MappingError
from megatron_bpdg.checkpoint.patterns import Shape

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
class _Shard:
    tensors: list[TensorPlan] = field(default_factory=list)
    file: str = ""

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    def layout(self) -> tuple[bytes, dict[str, int]]:
        """The file's header and each tensor's absolute offset. Wide dtypes first, so that all stay aligned."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets: dict[str, int] = {}
        position = 0
        for tensor in sorted(self.tensors, key=lambda tensor: -tensor.dtype.itemsize):
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
        if max_shard_size < 1:
            raise ValueError(f"max_shard_size {max_shard_size} must be at least 1 byte")
        self._directory = directory
        self._plan: dict[str, TensorPlan] = {}
        shards = [_Shard()]
        for tensor in plan:
            if tensor.name in self._plan:
                raise ValueError(f"{tensor.name} is planned twice")
            if tensor.dtype not in _DTYPE_NAMES:
                raise ValueError(f"{tensor.name}: dtype {tensor.dtype} cannot be written")
            self._plan[tensor.name] = tensor
            if shards[-1].tensors and shards[-1].num_bytes + tensor.num_bytes > max_shard_size:
                shards.append(_Shard())
            shards[-1].tensors.append(tensor)
        self._shards = shards
        self._offsets: dict[str, int] = {}
        self._streams: dict[str, BinaryIO] = {}
        self._file_of: dict[str, str] = {}
        self._written: set[str] = set()

    def __enter__(self) -> HFWriter:
        count = len(self._shards)
        for number, shard in enumerate(self._shards, 1):
            shard.file = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
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
        stream.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
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
        if len(self._shards) > 1:
            total = sum(shard.num_bytes for shard in self._shards)
            index: Mapping[str, object] = {"metadata": {"total_size": total}, "weight_map": self._file_of}
            write_text(self._directory / INDEX_FILE, json.dumps(index, indent=2) + "\n")
