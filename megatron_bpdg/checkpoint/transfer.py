"""What the threads of one conversion share: memory, progress, and the news that one of them failed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

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
            running = [pool.submit(job) for job in jobs]
            try:
                for future in as_completed(running):
                    future.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [future.result() for future in running]


class _Rate(ProgressColumn):
    """GB/s of late."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("- GB/s" if speed is None else f"{speed / 1e9:.2f} GB/s")


@contextmanager
def progress_bar(console: Console | None, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show bytes done of `total`, GB/s and remaining time; yields the function that advances it, from any thread.

    Without a console there is none.
    """
    if console is None:
        yield lambda num_bytes: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total)
        yield lambda num_bytes: progress.advance(task, num_bytes)
