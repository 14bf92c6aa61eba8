"""Tokens spread over sequence shards: block sums that are exact whichever rank holds which token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bpdg.drift.gate import SumReduce, no_reduce


def sum_over(groups: Sequence[dist.ProcessGroup]) -> SumReduce:
    """The `SumReduce` for tokens that are spread over these groups, one after the other.

    One small all-reduce of ``[2, num_blocks]`` float64 per group makes the means of blocks that straddle shards exact.
    With no group of more than one rank this is the identity.
    """
    shared = [group for group in groups if group.size() > 1]
    if not shared:
        return no_reduce

    def reduce(sums: Tensor) -> Tensor:
        for group in shared:
            dist.all_reduce(sums, group=group)
        return sums

    return reduce


def pad_to_multiple(index_N: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Repeat the first position until the length is a positive multiple of `multiple`.

    Returns (index, real): real is False for the repeats. An empty index becomes `multiple` repeats of position 0, so
    that every rank still takes part in the step's collectives and its gradient is zero.
    """
    length = max(-(-len(index_N) // multiple), 1) * multiple
    fill = index_N[:1] if len(index_N) else index_N.new_zeros(1)
    padding = fill.expand(length - len(index_N))
    real = torch.arange(length, device=index_N.device) < len(index_N)
    return torch.cat([index_N, padding]), real
