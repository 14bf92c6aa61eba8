"""Threads that share the work of one conversion in bounded memory: `Transfer` holds each tensor against a `Budget`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import copy_context
from typing import TypeVar

Result = TypeVar("Result")


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
            # torch keeps options in context variables, which threads do not take over by themselves.
            running = [pool.submit(copy_context().run, job) for job in jobs]
            try:
                for future in as_completed(running):
                    future.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [future.result() for future in running]
