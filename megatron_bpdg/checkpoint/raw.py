"""Tensors straight from a byte range of a file: no memory map, so what is read is all that is held.

(Pages of a mapped file count as the process's memory once touched, and a checkpoint is touched whole.)
"""

from __future__ import annotations

import io
import math
import os
import pickle
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor

from megatron_bpdg.checkpoint.patterns import Shape

_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        file: path of the file.
        offset: byte at which it begins.
        shape: of the tensor.
        dtype: of the tensor.
        stride: of the tensor, in elements; None: row-major.
    """

    file: Path
    offset: int
    shape: Shape
    dtype: torch.dtype
    stride: Shape | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def select(self, index: int) -> StoredTensor:
        """Entry `index` of dimension 0."""
        shape, stride = self.shape[1:], self.stride and self.stride[1:]
        step = self.stride[0] if self.stride else math.prod(shape)
        return StoredTensor(self.file, self.offset + index * step * self.dtype.itemsize, shape, self.dtype, stride)

    def read(self, dim: int | None = None, start: int = 0, length: int | None = None) -> Tensor:
        """The tensor, or ``[start, start + length)`` of its dimension `dim`.

        Raises:
            ValueError: where the file ends too early.
        """
        if self.stride is not None:
            whole = self._read_strided()
            return whole if dim is None else whole.narrow(dim, start, length or 0)
        if dim is None:
            return self._read_rows(self.offset, self.shape)
        assert length is not None
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        inner = math.prod(self.shape[dim + 1 :]) * self.dtype.itemsize
        if dim == 0:
            return self._read_rows(self.offset + start * inner, shape)
        # Columns: read whole rows, a block at a time, and keep a part of each.
        out = torch.empty(shape, dtype=self.dtype)
        rows, row_bytes = math.prod(self.shape[:dim]), self.shape[dim] * inner
        flat = out.view(rows, length, -1) if out.numel() else out.view(rows, length, 0)
        step = max(1, _BLOCK_BYTES // max(1, row_bytes))
        for first in range(0, rows, step):
            count = min(step, rows - first)
            block = self._read_rows(self.offset + first * row_bytes, (count, self.shape[dim], *self.shape[dim + 1 :]))
            flat[first : first + count] = block.view(count, self.shape[dim], -1)[:, start : start + length]
        return out

    def _read_strided(self) -> Tensor:
        assert self.stride is not None
        span = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return self._read_rows(self.offset, (span,)).as_strided(self.shape, self.stride).contiguous()

    def _read_rows(self, offset: int, shape: Shape) -> Tensor:
        out = torch.empty(shape, dtype=self.dtype)
        read_into(self.file, offset, out)
        return out


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.detach().flatten().view(torch.uint8).numpy().data


def read_into(file: Path, offset: int, out: Tensor) -> None:
    """Fill a contiguous tensor from a byte range. Safe in several threads at once.

    Raises:
        ValueError: where the file ends too early.
    """
    if not out.numel():
        return
    view = as_bytes(out)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise ValueError(
                    f"{file} is truncated: it ends at byte {offset + done}, {len(view) - done} are missing"
                )
            done += count
    finally:
        os.close(descriptor)


class FileRange(io.RawIOBase):
    """A read-only view of ``[offset, offset + length)`` of an open file."""

    def __init__(self, stream: BinaryIO, offset: int, length: int) -> None:
        self._stream, self._offset, self._length, self._position = stream, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._position)
        self._stream.seek(self._offset + self._position)
        data = self._stream.read(left if size < 0 else min(size, left))
        self._position += len(data)
        return data


class _Inert:
    """Stands for every class that a training checkpoint mentions besides tensors; nothing of it is looked at."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load_structure(file: Path, offset: int = 0, length: int | None = None, *, foreign: bool = False) -> Any:
    """What `torch.save` wrote, with tensors on the meta device; see `stored`. Runs no code from the file.

    Args:
        file: path.
        offset, length: part of the file; default: all of it.
        foreign: accept objects of any class; those other than Namespace are replaced by empty ones, never imported.

    Raises:
        ValueError: not a file of torch.save (or truncated); without `foreign`, it holds more than tensors and plain
            values.
    """
    length = file.stat().st_size - offset if length is None else length
    with file.open("rb") as raw:
        view = cast(IO[bytes], FileRange(raw, offset, length))
        try:
            allowed: list[Any] = []
            if foreign:
                names = torch.serialization.get_unsafe_globals_in_checkpoint(view)
                allowed = [(Namespace if name == "argparse.Namespace" else _inert(name), name) for name in names]
                view.seek(0)
            with torch.serialization.safe_globals(allowed):
                return torch.load(view, map_location="meta", weights_only=True)
        except pickle.UnpicklingError as error:
            # torch's own text advises to run what the file says.
            raise ValueError(f"{file} holds objects that are no tensors or plain values, or is damaged") from error
        except (RuntimeError, EOFError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{file} is truncated or was not written by torch.save: {reason}") from error


def _inert(name: str) -> type[_Inert]:
    return type(name.rpartition(".")[2], (_Inert,), {})


def stored(tensor: Tensor, file: Path, offset: int = 0) -> StoredTensor:
    """Where the bytes of a tensor from `load_structure` are.

    Raises:
        ValueError: for a tensor that is not from there.
    """
    start = tensor.untyped_storage()._checkpoint_offset
    if start is None:
        raise ValueError(f"{file}: the place of a tensor of shape {tuple(tensor.shape)} cannot be told")
    begin = start + int(tensor.storage_offset()) * tensor.element_size()
    stride = None if tensor.is_contiguous() else tuple(tensor.stride())
    return StoredTensor(file, offset + begin, tuple(tensor.shape), tensor.dtype, stride)
