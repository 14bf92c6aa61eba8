"""Writing the files of a conversion: several at once, in bounded memory, each whole or not at all.

A file is written under a temporary name, flushed, renamed, and only then recorded with its size and checksum; a
conversion that is started again keeps the files whose records still hold.
"""

from __future__ import annotations

import io
import json
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from megatron_bpdg.checkpoint.files import fsync_path, write_text
from megatron_bpdg.checkpoint.patterns import Weight

RECORDS = ".done"
_CHUNK = 16 * 2**20

Make = Callable[[Weight], Tensor]
# Writes a file from its weights' full Megatron tensors, in order; returns what the record should keep.
Write = Callable[["ChecksumStream", Iterator[tuple[Weight, Tensor]]], dict[str, Any]]


@dataclass(frozen=True)
class OutputFile:
    """One file of the target.

    Attributes:
        name: path in the target directory.
        num_bytes: size of its tensors.
        weights: what it is made from, each with the bytes held while it is under way, in the order of writing.
        write: see `Write`.
    """

    name: str
    num_bytes: int
    weights: Sequence[tuple[Weight, int]]
    write: Write


class Budget:
    """Bytes that may be held at once over all threads. Something larger than all of it goes alone."""

    def __init__(self, num_bytes: int) -> None:
        self._total = self._free = num_bytes
        self._changed = threading.Condition()

    def acquire(self, num_bytes: int, *, wait: bool) -> bool:
        """Take up to `num_bytes`; without `wait`, return False rather than block."""
        needed = min(num_bytes, self._total)
        with self._changed:
            while self._free < needed:
                if not wait:
                    return False
                self._changed.wait()
            self._free -= needed
        return True

    def release(self, num_bytes: int) -> None:
        with self._changed:
            self._free += min(num_bytes, self._total)
            self._changed.notify_all()


class ChecksumStream(io.RawIOBase):
    """Appends to a file and keeps the CRC-32 of what went through."""

    def __init__(self, stream: BinaryIO, advance: Callable[[int], None]) -> None:
        self._stream, self._advance = stream, advance
        self.crc32 = 0
        self.size = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):
            part = view[start : start + _CHUNK]
            written = 0
            while written < len(part):
                written += self._stream.write(part[written:])
            self.crc32 = zlib.crc32(part, self.crc32)
            self._advance(len(part))
        self.size += len(view)
        return len(view)


def transfer(
    files: Sequence[OutputFile],
    directory: Path,
    make: Make,
    *,
    workers: int,
    memory: int,
    advance: Callable[[int], None],
) -> None:
    """Write `files` into `directory`, `workers` at a time, and record each.

    Args:
        files: those not yet recorded.
        directory: of the target (staged).
        make: reads one full Megatron tensor; called in several threads.
        workers: files written at once, and also tensors read at once.
        memory: bytes of weights under way at once (or one weight, where that is larger).
        advance: told the bytes written, from several threads.
    """
    budget = Budget(memory)
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(workers) as writers:

        def write(file: OutputFile) -> None:
            if stop.is_set():
                return
            try:
                _write_file(file, directory, _prefetch(readers, budget, file.weights, make, stop), advance)
            except BaseException:
                stop.set()
                raise

        running = [writers.submit(write, file) for file in files]
        try:
            for future in running:
                future.result()
        except BaseException:
            stop.set()  # an interrupt lands here, in the main thread: let the others end at their next tensor
            raise


class _Stopped(Exception):
    """Another file failed."""


def _prefetch(
    readers: ThreadPoolExecutor,
    budget: Budget,
    weights: Iterable[tuple[Weight, int]],
    make: Make,
    stop: threading.Event,
) -> Iterator[tuple[Weight, Tensor]]:
    """Weights in order, read ahead as far as memory allows, but always one.

    A file holds memory only for a run of tensors that begins with the one it writes next, so it never waits for memory
    that it holds itself, nor for a file that waits for it.
    """
    pending: deque[tuple[Weight, int, Future[Tensor]]] = deque()
    todo = iter(weights)
    following = next(todo, None)
    try:
        while True:
            if stop.is_set():
                raise _Stopped
            while following is not None and budget.acquire(following[1], wait=not pending):
                pending.append((*following, readers.submit(make, following[0])))
                following = next(todo, None)
            if not pending:
                return
            weight, cost, future = pending.popleft()
            try:
                tensor = future.result()
                del future
                yield weight, tensor
                del tensor
            finally:
                budget.release(cost)
    finally:
        for _, cost, future in pending:
            future.cancel()
            budget.release(cost)


def _write_file(
    file: OutputFile, directory: Path, weights: Iterator[tuple[Weight, Tensor]], advance: Callable[[int], None]
) -> None:
    target = directory / file.name
    temporary = target.with_name(f"{target.name}.part")
    try:
        with temporary.open("wb", buffering=0) as raw:
            stream = ChecksumStream(raw, advance)
            record = file.write(stream, weights)
            os.fsync(raw.fileno())
    except _Stopped:
        return
    temporary.rename(target)
    fsync_path(target.parent)
    write_text(_record_file(directory, file.name), json.dumps({"size": stream.size, "crc32": stream.crc32, **record}))


def _record_file(directory: Path, name: str) -> Path:
    return directory / RECORDS / f"{Path(name).name}.json"


def has_record(directory: Path, name: str) -> bool:
    """Whether a file was recorded as complete."""
    return _record_file(directory, name).is_file()


def read_record(directory: Path, name: str) -> dict[str, Any]:
    """What `Write` returned for a completed file."""
    return dict(json.loads(_record_file(directory, name).read_text(encoding="utf-8")))


def is_complete(directory: Path, name: str) -> bool:
    """Whether a file was recorded and still has the size and checksum that it had then."""
    file = directory / name
    if not has_record(directory, name) or not file.is_file():
        return False
    record = read_record(directory, name)
    if file.stat().st_size != record["size"]:
        return False
    crc32 = 0
    with file.open("rb", buffering=0) as stream:
        while data := stream.read(_CHUNK):
            crc32 = zlib.crc32(data, crc32)
    return bool(crc32 == record["crc32"])
