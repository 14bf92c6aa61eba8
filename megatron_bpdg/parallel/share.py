"""Work that any rank can do, spread over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_bpdg.parallel.platform import default_device

Result = TypeVar("Result")

_MEETING_S = 1.0


def my_share(count: int) -> range:
    """This rank's items out of ``range(count)``; every item is on exactly one rank of the world."""
    return range(dist.get_rank(), count, dist.get_world_size())


def gather_shares(done: Mapping[int, Result], count: int) -> list[Result]:
    """All results in order, on every rank, from each rank's own by item number. Collective over the world."""
    gathered: list[dict[int, Result]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, dict(done))
    merged = {item: result for part in gathered for item, result in part.items()}
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
