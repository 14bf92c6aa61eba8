"""Files of `torch.save` from anywhere, without running code from them, and single tensors out of them."""

from __future__ import annotations

import errno
import pickle
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.utils import _create_file_view


class _Inert:
    """Stands for every class that a training checkpoint mentions besides tensors; nothing of it is looked at."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load_foreign(file: Path) -> dict[str, Any]:
    """What a training program saved in `file`, its tensors mapped, which costs no memory until they are read.

    Objects of classes other than Namespace are replaced by empty ones; the classes are never imported.

    Raises:
        ValueError: not a file of torch.save, or truncated, or it would run code, or holds no dictionary.
    """
    with _errors_of(file), file.open("rb") as stream:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(stream)
        classes: list[Any] = [
            (Namespace if name == "argparse.Namespace" else type(name.rpartition(".")[2], (_Inert,), {}), name)
            for name in names
        ]
        with torch.serialization.safe_globals(classes):
            state = torch.load(file, weights_only=True, mmap=True)
    if not isinstance(state, dict):
        raise ValueError(f"{file} holds {type(state).__name__}, expected a dictionary with the model's state")
    return state


def arguments_of(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Megatron-LM's arguments, where a training program saved them."""
    arguments = state.get("args")
    return vars(arguments) if isinstance(arguments, Namespace) else {}


def load_piece(file: Path, offset: int, length: int) -> Any:
    """What `torch.save` wrote to a part of a file, tensors on the meta device; see `read_stored`.

    Raises:
        ValueError: nothing of torch.save (or truncated), or more than tensors and plain values.
    """
    with _errors_of(file), file.open("rb") as stream:
        view = cast(IO[bytes], _create_file_view(stream, offset, length))
        return torch.load(view, map_location="meta", weights_only=True)


@contextmanager
def _errors_of(file: Path) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        # torch's own text advises to run what the file says.
        raise ValueError(f"{file} holds objects that are no tensors or plain values, or is damaged") from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a seek to before the start of a short file
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{file} is truncated or was not written by torch.save: {reason}") from error


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
