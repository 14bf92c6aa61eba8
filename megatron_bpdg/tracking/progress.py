"""Progress in the terminal: of a run (a live bar on a TTY, plain periodic lines in a log file), and in bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
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


class TrainingProgress:
    """Step counter with rate, ETA and a few live metrics; use as a context manager.

    Args:
        total_steps: steps the bar ends at.
        description: shown first, e.g. the run's name.
        start_step: steps done before this process started (resume); they do not enter the rate.
        line_interval_s: seconds between lines where there is no TTY.
        console: where to write; standard error by default, so that piped output stays clean.
    """

    def __init__(
        self,
        total_steps: int,
        description: str,
        *,
        start_step: int = 0,
        line_interval_s: float = 10.0,
        console: Console | None = None,
    ) -> None:
        self.total_steps = total_steps
        self.description = description
        self.start_step = start_step
        self.line_interval_s = line_interval_s
        self.console = console or Console(stderr=True)
        self._started = time.monotonic()
        self._last_line = -float("inf")
        self._live = self.console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            expand=True,
        )
        self._task = self._progress.add_task(description, total=total_steps, completed=start_step, status="starting")

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Report that `step` of `total_steps` is done, with metrics to show beside the bar."""
        rate, eta = self._pace(step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in (metrics or {}).items())
        if self._live:
            self._progress.update(self._task, completed=step, status=f"{rate}  ETA {eta}  {shown}")
            return
        now = time.monotonic()
        if now - self._last_line >= self.line_interval_s or step >= self.total_steps:
            self._last_line = now
            line = f"{self.description}: step {step}/{self.total_steps}  {rate}  ETA {eta}  {shown}".rstrip()
            self.console.print(Text(line), soft_wrap=True)

    def status(self, text: str) -> None:
        """Show what a step is at, beside the live bar; without a TTY, a line at the same pace as steps."""
        if self._live:
            self._progress.update(self._task, status=text)
        elif time.monotonic() - max(self._started, self._last_line) >= self.line_interval_s:
            self._last_line = time.monotonic()
            self.console.print(Text(f"{self.description}: {text}"), soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line above the bar, e.g. an evaluation result."""
        self.console.print(Text(text), soft_wrap=True)

    def _pace(self, step: int) -> tuple[str, str]:
        done = step - self.start_step
        if done <= 0:
            return "- s/step", "-"
        seconds = (time.monotonic() - self._started) / done
        rate = f"{seconds:.2f} s/step" if seconds >= 1 else f"{1 / max(seconds, 1e-9):.2f} steps/s"
        return rate, format_seconds(seconds * (self.total_steps - step))

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._progress.stop()


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
