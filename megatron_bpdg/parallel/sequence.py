"""Tokens spread over sequence shards: who holds which, and block sums that are exact whoever does.

Under context parallelism a sequence is cut into twice as many chunks as there are ranks, and rank r holds chunk r and
the r-th from the end (zigzag): in causal attention each rank then has the same work. It is the layout that Megatron-
Core and Transformer Engine assume.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_bpdg.drift.signals import SumReduce, no_reduce


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


def zigzag(length: int, rank: int, size: int) -> Tensor:
    """Positions of a sequence that one of `size` context-parallel ranks holds, int64 ``[length / size]``.

    Args:
        length: a multiple of ``2 * size`` where `size` is more than 1.
    """
    positions = torch.arange(length)
    if size == 1:
        return positions
    chunks = positions.chunk(2 * size)
    return torch.cat([chunks[rank], chunks[-1 - rank]])


def unzigzag(shards: Tensor) -> Tensor:
    """The whole sequence ``[size * s, ...]`` from the shards of all ranks in order, ``[size, s, ...]``."""
    # First chunks come in the order of the ranks, second ones against it.
    front, back = shards.chunk(2, dim=1)
    return torch.cat([front.flatten(0, 1), back.flip(0).flatten(0, 1)])


def gather_tokens(rows: Tensor, token_n: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
    """All tokens' rows ``[num_tokens, ...]`` on every rank of `group`, each from the one rank that holds it.

    One all-reduce; without gradients.

    Args:
        rows: this rank's ``[n, ...]``.
        token_n: their numbers, int64.
    """
    if group.size() == 1:
        return rows
    whole = rows.new_zeros(num_tokens, *rows.shape[1:])
    whole[token_n] = rows
    dist.all_reduce(whole, group=group)
    return whole


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
