"""Work that any rank can do, spread over all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


def my_share(count: int) -> range:
    """This rank's items out of ``range(count)``; every item is on exactly one rank of the world."""
    return range(dist.get_rank(), count, dist.get_world_size())


def gather_shares(done: Mapping[int, Result], count: int) -> list[Result]:
    """All results in order, on every rank, from each rank's own by item number. Collective over the world."""
    gathered: list[dict[int, Result]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, dict(done))
    merged = {item: result for part in gathered for item, result in part.items()}
    return [merged[item] for item in range(count)]
