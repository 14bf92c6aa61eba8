"""A progress bar in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


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
