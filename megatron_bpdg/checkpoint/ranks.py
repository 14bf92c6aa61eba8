"""The processes that share one conversion: one, or those of torchrun. Their number has nothing to do with a layout."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
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
    """Where this process stands among those of the conversion.

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
