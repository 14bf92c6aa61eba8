"""Who shares the work of one conversion: the ranks of torchrun, and the threads of each, in bounded memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")

# Ranks meet only after each has written its share, which takes as long as it takes.
_TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those of the conversion, whose number has nothing to do with a layout.

    Attributes:
        rank: of this process.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def each(self, work: Callable[[], Result]) -> Result:
        """Do this rank's part; an error on any rank is raised on all of them, so that none waits for the others."""
        result: Result | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        errors = self.gather(error)
        if error is not None:
            raise error
        for rank, other in enumerate(errors):
            if other is not None:
                raise RuntimeError(f"rank {rank} of the conversion failed: {other}") from other
        return result  # type: ignore[return-value]

    def on_first(self, work: Callable[[], Result]) -> Result | None:
        """Do something on the first rank alone while the others wait; None on those."""
        return self.each(lambda: work() if self.first else None)


@contextmanager
def converter_ranks() -> Iterator[Ranks]:
    """The ranks that torchrun started, in a gloo group of their own for as long as it takes; else one process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


class Budget:
    """Bytes that may be held at once over all threads. Something larger than all of it goes alone."""

    def __init__(self, num_bytes: int) -> None:
        self._total = self._free = num_bytes
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Wait until `num_bytes` are free and hold them during the with-block."""
        needed = min(num_bytes, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= needed)
            self._free -= needed
        try:
            yield
        finally:
            with self._changed:
                self._free += needed
                self._changed.notify_all()


class Transfer:
    """Threads that each bring one tensor after the other from a source to where it belongs.

    Args:
        workers: threads.
        memory: bytes of tensors held at once, or the largest one.
        advance: told the bytes done, from several threads.
    """

    def __init__(self, workers: int, memory: int, advance: Callable[[int], None] = lambda num_bytes: None) -> None:
        self._workers, self._budget, self._advance = workers, Budget(memory), advance
        self._stop = threading.Event()

    @contextmanager
    def tensor(self, num_bytes: int, cost: int) -> Iterator[None]:
        """Around reading and writing one tensor, which must not outlive the with-block.

        Args:
            num_bytes: its progress.
            cost: memory held meanwhile.

        Raises:
            RuntimeError: another thread failed; the one that did raises its own error.
        """
        with self._budget.hold(cost):
            if self._stop.is_set():
                raise RuntimeError("another thread of the conversion failed")
            yield
        self._advance(num_bytes)

    def run(self, jobs: Iterable[Callable[[], Result]]) -> list[Result]:
        """Results of all jobs, in order. The first error (or an interrupt) ends the others at their next tensor."""
        with ThreadPoolExecutor(self._workers) as pool:
            running = [pool.submit(job) for job in jobs]
            try:
                for future in as_completed(running):
                    future.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [future.result() for future in running]
