"""What ranks do together: one does a thing and all learn the result or the error; each says a thing and all hear it.

Where no process group is up there is one rank, and all of this is plain function calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_bpdg.parallel.platform import default_device

Result = TypeVar("Result")

_MEETING_S = 1.0


def this_rank() -> int:
    """This process's place in the world."""
    return dist.get_rank() if dist.is_initialized() else 0


def everyone(value: Result, group: dist.ProcessGroup | None = None) -> list[Result]:
    """Every rank's value, in rank order, on every rank of `group` (None: the world). Collective."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    values = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def on_first(work: Callable[[], Result]) -> Result:
    """The result of what rank 0 alone does, on every rank. Collective over the world.

    Raises:
        Exception: rank 0's own, on every rank alike, so that none waits for the others.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    result, problem = outcome
    if problem is not None:
        raise problem
    return result


def each(work: Callable[[], Result]) -> Result:
    """What this rank's part of a work gave it. Collective over the world.

    Raises:
        Exception: this rank's own.
        RuntimeError: another rank failed; so none waits for the others.
    """
    problem = None
    try:
        result = work()
    except Exception as error:
        problem = error
    problems = everyone(problem)
    if problem is not None:
        raise problem
    for rank, other in enumerate(problems):
        if other is not None:
            raise RuntimeError(f"rank {rank} failed: {other}") from other
    return result


def my_share(count: int) -> range:
    """This rank's items out of ``range(count)``; every item is on exactly one rank of the world."""
    if not dist.is_initialized():
        return range(count)
    return range(dist.get_rank(), count, dist.get_world_size())


def gather_shares(done: Mapping[int, Result], count: int) -> list[Result]:
    """All results in order, on every rank, from each rank's own by item number. Collective over the world."""
    merged = {item: result for part in everyone(dict(done)) for item, result in part.items()}
    return [merged[item] for item in range(count)]


def wait_together(mine: Sequence[Future[Any]]) -> None:
    """Return when every rank's futures are done. Collective over the world.

    The ranks meet again and again: what some of them wait for may take longer than a collective is given.
    """
    while True:
        waiting = torch.tensor(any(not future.done() for future in mine), dtype=torch.int32, device=default_device())
        dist.all_reduce(waiting, op=dist.ReduceOp.MAX)
        if not waiting.item():
            return
        wait(mine, timeout=_MEETING_S)
