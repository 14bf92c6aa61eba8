"""What the gate did, as additive sums: add them up over micro-batches and ranks, then read the statistics off.

Quantiles come from a histogram of the gate, which adds up like everything else and is exact to 1/BINS.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_bpdg.drift.gate import Gated

BINS = 200
# One bin more than intervals: gates of exactly 1 are counted by themselves.
_EDGES = BINS + 1
_MOMENTS = ("tokens", "gate", "gate_sq", "abs_drift", "drift", "block_drift", "blocks")


def num_sums(max_blocks: int) -> int:
    """Length of the vector `drift_sums` returns."""
    return len(_MOMENTS) + _EDGES + 2 * max_blocks


@torch.no_grad()
def drift_sums(gated: Gated, mask_N: Tensor, block_index_S: Tensor, max_blocks: int, owns_blocks: bool) -> Tensor:
    """Sums over this rank's tokens, float64 ``[num_sums(max_blocks)]``.

    Args:
        gated: the gate's output for one micro-batch.
        mask_N: its mask.
        block_index_S: position of each block within its own response, int64 ``[num_blocks]`` (the heat map's rows).
        max_blocks: rows of the heat map; blocks beyond are added to the last row.
        owns_blocks: whether this rank counts the blocks. Block means are complete on every rank that shares the
            tokens, so only one of those ranks may count them.
    """
    gate = gated.gate_N[mask_N].double()
    drift = gated.drift_N[mask_N].double()
    counted = (gated.block_count_S > 0) & owns_blocks
    block_drift_S = torch.where(counted, gated.block_drift_S, 0.0)
    moments = torch.stack(
        [
            mask_N.sum().double(),
            gate.sum(),
            gate.square().sum(),
            drift.abs().sum(),
            drift.sum(),
            block_drift_S.sum(),
            counted.sum().double(),
        ]
    )
    histogram = torch.zeros(_EDGES, dtype=torch.float64, device=gate.device)
    bins = (gate.nan_to_num() * BINS).long()
    histogram.index_add_(0, bins, torch.ones_like(gate))
    heat_2R = torch.zeros(2, max_blocks, dtype=torch.float64, device=gate.device)
    count_S = torch.where(counted, gated.block_count_S, 0.0)
    rows = block_index_S.clamp(max=max_blocks - 1)
    heat_2R.index_add_(1, rows, torch.stack([block_drift_S * count_S, count_S]))
    return torch.cat([moments, histogram, heat_2R.flatten()])


def drift_statistics(sums: Tensor) -> dict[str, float]:
    """Named statistics from summed `drift_sums`.

    `gate/ess` is the effective sample size as a fraction, (sum g)^2 / (n sum g^2); `drift/cancellation` is
    mean |s_b| / mean |d|, both over tokens: 1 where drifts within a block agree in sign, near 0 where they cancel.
    """
    moment_sums, histogram, heat_2R = _parts(sums)
    moments = dict(zip(_MOMENTS, moment_sums.tolist()))
    tokens = moments["tokens"]
    if tokens == 0:
        return {}
    # Weighted by tokens, as mean |d| is: a plain mean over blocks would let a short tail block push the ratio above 1.
    token_block_drift = float(heat_2R[0].sum()) / tokens
    statistics = {
        "gate/mean": moments["gate"] / tokens,
        "gate/ess": moments["gate"] ** 2 / (tokens * moments["gate_sq"]),
        "gate/mass": moments["gate"],
        "gate/min": _quantile(histogram, 0.0),
        "gate/q05": _quantile(histogram, 0.05),
        "gate/q50": _quantile(histogram, 0.5),
        "gate/q95": _quantile(histogram, 0.95),
        "drift/abs_mean": moments["abs_drift"] / tokens,
        "drift/mean": moments["drift"] / tokens,
    }
    if moments["blocks"]:
        statistics["drift/block_mean"] = moments["block_drift"] / moments["blocks"]
        if moments["abs_drift"]:
            statistics["drift/cancellation"] = token_block_drift / statistics["drift/abs_mean"]
    return statistics


def drift_by_block(sums: Tensor) -> tuple[list[float], list[int]]:
    """Heat-map column: (token-weighted mean block drift, valid tokens) by block index within the response."""
    total_R, count_R = _parts(sums)[2]
    used = int((count_R > 0).nonzero().max()) + 1 if bool((count_R > 0).any()) else 0
    return (total_R / count_R.clamp(min=1))[:used].tolist(), count_R[:used].long().tolist()


def _parts(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `drift_sums` concatenated: moments, histogram, heat map ``[2, max_blocks]``."""
    heat = len(sums) - len(_MOMENTS) - _EDGES
    moments, histogram, heat_sums = sums.split([len(_MOMENTS), _EDGES, heat])
    return moments, histogram, heat_sums.view(2, -1)


def _quantile(histogram: Tensor, q: float) -> float:
    """Lower edge of the bin that holds quantile q."""
    cumulative = histogram.cumsum(0)
    return int(((cumulative > 0) & (cumulative >= q * cumulative[-1])).nonzero()[0]) / BINS
