"""Threads that share the work of one conversion in bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import copy_context
from typing import TypeVar

Result = TypeVar("Result")


class Transfer:
    """Threads that each bring one tensor after the other from a source to where it belongs.

    Args:
        workers: threads.
        memory: bytes of tensors held at once over all threads, or the largest one.
        advance: told the bytes done, from several threads.
    """

    def __init__(self, workers: int, memory: int, advance: Callable[[int], None] = lambda num_bytes: None) -> None:
        self._workers, self._memory, self._advance = workers, memory, advance
        self._free = memory
        self._changed = threading.Condition()
        self._stop = threading.Event()

    @contextmanager
    def tensor(self, num_bytes: int, cost: int) -> Iterator[None]:
        """Around reading and writing one tensor, which must not outlive the with-block; waits until memory is free.

        Args:
            num_bytes: its progress.
            cost: memory held meanwhile; what is larger than all of it goes alone.

        Raises:
            RuntimeError: another thread failed; the one that did raises its own error.
        """
        held = min(cost, self._memory)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= held)
            self._free -= held
        try:
            if self._stop.is_set():
                raise RuntimeError("another thread of the conversion failed")
            yield
        finally:
            with self._changed:
                self._free += held
                self._changed.notify_all()
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
