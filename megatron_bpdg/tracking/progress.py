"""Progress in the terminal: of a run (a live bar on a TTY, plain periodic lines in a log file), and in bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LINE_INTERVAL_S = 10.0  # between lines where there is no TTY


class TrainingProgress:
    """Step counter with rate, ETA and a few live metrics on standard error; use as a context manager.

    Args:
        total_steps: steps the bar ends at.
        description: shown first, e.g. the run's name.
    """

    def __init__(self, total_steps: int, description: str) -> None:
        self.total_steps = total_steps
        self.description = description
        self._started = time.monotonic()
        self._last_line = -float("inf")
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"),
            console=Console(stderr=True),
            expand=True,
        )
        self._live = self._bar.console.is_terminal
        self._task = self._bar.add_task(description, total=total_steps, status="starting")

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report that `step` of `total_steps` is done, with metrics to show beside the bar."""
        seconds = (time.monotonic() - self._started) / step
        rate = f"{seconds:.2f} s/step" if seconds >= 1 else f"{1 / max(seconds, 1e-9):.2f} steps/s"
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        status = f"{rate}  ETA {format_seconds(seconds * (self.total_steps - step))}  {shown}"
        if self._live:
            self._bar.update(self._task, completed=step, status=status)
        elif time.monotonic() - self._last_line >= LINE_INTERVAL_S or step >= self.total_steps:
            self._print_line(f"step {step}/{self.total_steps}  {status}")

    def status(self, text: str) -> None:
        """Show what a step is at, beside the live bar; without a TTY, a line at the same pace as steps."""
        if self._live:
            self._bar.update(self._task, status=text)
        elif time.monotonic() - max(self._started, self._last_line) >= LINE_INTERVAL_S:
            self._print_line(text)

    def note(self, text: str) -> None:
        """Print a line above the bar, e.g. an evaluation result."""
        self._bar.console.print(Text(text), soft_wrap=True)

    def _print_line(self, text: str) -> None:
        self._last_line = time.monotonic()
        self.note(f"{self.description}: {text.rstrip()}")

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._bar.stop()


def format_seconds(seconds: float) -> str:
    """1:02:03 from an hour on, else 2:03."""
    minutes, second = divmod(max(round(seconds), 0), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


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
