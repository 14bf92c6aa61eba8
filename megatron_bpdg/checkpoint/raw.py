"""Files of `torch.save` from anywhere, without running code from them, and single tensors out of them."""

from __future__ import annotations

import io
import pickle
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor


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


def load_foreign(file: Path) -> Any:
    """What a training program saved in `file`, its tensors mapped, which costs no memory until they are read.

    Objects of classes other than Namespace are replaced by empty ones; the classes are never imported.

    Raises:
        ValueError: not a file of torch.save, or truncated, or it would run code.
    """
    with _errors_of(file), file.open("rb") as stream:
        view = cast(IO[bytes], FileRange(stream, 0, file.stat().st_size))
        names = torch.serialization.get_unsafe_globals_in_checkpoint(view)
        classes: list[Any] = [(Namespace if name == "argparse.Namespace" else _inert(name), name) for name in names]
        with torch.serialization.safe_globals(classes):
            return torch.load(file, weights_only=True, mmap=True)


def load_piece(file: Path, offset: int, length: int) -> Any:
    """What `torch.save` wrote to a part of a file, tensors on the meta device; see `read_stored`.

    Raises:
        ValueError: nothing of torch.save (or truncated), or more than tensors and plain values.
    """
    with _errors_of(file), file.open("rb") as stream:
        view = cast(IO[bytes], FileRange(stream, offset, length))
        return torch.load(view, map_location="meta", weights_only=True)


@contextmanager
def _errors_of(file: Path) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        # torch's own text advises to run what the file says.
        raise ValueError(f"{file} holds objects that are no tensors or plain values, or is damaged") from error
    except (RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{file} is truncated or was not written by torch.save: {reason}") from error


def _inert(name: str) -> type[_Inert]:
    return type(name.rpartition(".")[2], (_Inert,), {})


def read_stored(tensor: Tensor, file: Path, offset: int) -> Tensor:
    """The values of a tensor from `load_piece`, or of a view of one: no more is read than that.

    Args:
        tensor: on the meta device.
        file, offset: what `load_piece` was given.

    Raises:
        ValueError: for a tensor that is not from there, or where the file ends too early.
    """
    start = tensor.untyped_storage()._checkpoint_offset
    if start is None:
        raise ValueError(f"{file}: the place of a tensor of shape {tuple(tensor.shape)} cannot be told")
    begin = offset + start + int(tensor.storage_offset()) * tensor.element_size()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    count = tensor.element_size() * (1 + sum((size - 1) * step for size, step in steps) if tensor.numel() else 0)
    data = np.fromfile(file, np.uint8, count, offset=begin)
    if len(data) < count:
        raise ValueError(f"{file} is truncated: {count - len(data)} bytes are missing after byte {begin + len(data)}")
    return torch.from_numpy(data).view(tensor.dtype).as_strided(tensor.shape, tensor.stride()).contiguous()
