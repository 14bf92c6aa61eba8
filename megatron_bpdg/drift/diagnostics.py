"""What the gate did, as additive sums: add them up over micro-batches and ranks, then read the statistics off.

Quantiles come from a histogram of the gate, which adds up like everything else and is exact to 1/BINS.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_bpdg.drift.gate import Gated

BINS = 200
# One bin more than intervals: gates of exactly 1 are counted by themselves.
_EDGES = BINS + 1
_QUANTILES = {"min": 0.0, "q05": 0.05, "q50": 0.5, "q95": 0.95}


def drift_shapes(max_blocks: int) -> dict[str, int]:
    """Name -> size of what `drift_sums` returns, 0 for scalars."""
    scalars = dict.fromkeys(("tokens", "gate", "gate_sq", "abs_drift", "drift", "block_drift", "blocks"), 0)
    return {**scalars, "gate_histogram": _EDGES, "drift_by_index": max_blocks, "tokens_by_index": max_blocks}


@torch.no_grad()
def drift_sums(
    gated: Gated, mask_n: Tensor, block_index_G: Tensor, max_blocks: int, owns_blocks: bool
) -> dict[str, Tensor]:
    """Sums over this rank's tokens, float64, as `drift_shapes` lists them.

    Args:
        gated, mask_n: of one micro-batch.
        block_index_G: position of each block within its own response, int64 ``[num_blocks]`` (the heat map's rows).
        max_blocks: rows of the heat map; blocks beyond are added to the last row.
        owns_blocks: whether this rank counts the blocks. Block means are complete on every rank that shares the
            tokens, so only one of those ranks may count them.
    """
    gate = gated.gate_n[mask_n].double()
    drift = gated.drift_n[mask_n].double()
    counted = (gated.block_count_G > 0) & owns_blocks
    block_drift_G = torch.where(counted, gated.block_drift_G, 0.0)
    histogram = torch.zeros(_EDGES, dtype=torch.float64, device=gate.device)
    bins = (gate.nan_to_num() * BINS).long()
    histogram.index_add_(0, bins, torch.ones_like(gate))
    heat = torch.zeros(2, max_blocks, dtype=torch.float64, device=gate.device)
    count_G = torch.where(counted, gated.block_count_G, 0.0)
    rows = block_index_G.clamp(max=max_blocks - 1)
    heat.index_add_(1, rows, torch.stack([block_drift_G * count_G, count_G]))
    return {
        "tokens": mask_n.sum().double(),
        "gate": gate.sum(),
        "gate_sq": gate.square().sum(),
        "abs_drift": drift.abs().sum(),
        "drift": drift.sum(),
        "block_drift": block_drift_G.sum(),
        "blocks": counted.sum().double(),
        "gate_histogram": histogram,
        "drift_by_index": heat[0],
        "tokens_by_index": heat[1],
    }


def drift_statistics(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Named statistics from summed `drift_sums`; other names among the sums are left alone.

    `gate/ess` is the effective sample size as a fraction, (sum g)^2 / (n sum g^2); `drift/cancellation` is
    mean |s_b| / mean |d|, both over tokens: 1 where drifts within a block agree in sign, near 0 where they cancel.
    """
    moments = {name: float(values) for name, values in sums.items() if values.ndim == 0}
    tokens = moments["tokens"]
    if tokens == 0:
        return {}
    statistics = {
        "gate/mean": moments["gate"] / tokens,
        "gate/ess": moments["gate"] ** 2 / (tokens * moments["gate_sq"]),
        "gate/mass": moments["gate"],
        **{f"gate/{name}": _quantile(sums["gate_histogram"], q) for name, q in _QUANTILES.items()},
        "drift/abs_mean": moments["abs_drift"] / tokens,
        "drift/mean": moments["drift"] / tokens,
    }
    if moments["blocks"]:
        statistics["drift/block_mean"] = moments["block_drift"] / moments["blocks"]
        if moments["abs_drift"]:
            # Weighted by tokens, as mean |d| is: a plain mean over blocks would let a short tail block push it above 1.
            token_block_drift = float(sums["drift_by_index"].sum()) / tokens
            statistics["drift/cancellation"] = token_block_drift / statistics["drift/abs_mean"]
    return statistics


def drift_by_block(sums: Mapping[str, Tensor]) -> tuple[list[float], list[int]]:
    """Heat-map column: (token-weighted mean block drift, valid tokens) by block index within the response."""
    total, count = sums["drift_by_index"], sums["tokens_by_index"]
    used = int((count > 0).nonzero().max()) + 1 if bool((count > 0).any()) else 0
    return (total / count.clamp(min=1))[:used].tolist(), count[:used].long().tolist()


def _quantile(histogram: Tensor, q: float) -> float:
    """Lower edge of the bin that holds quantile q."""
    cumulative = histogram.cumsum(0)
    return int(((cumulative > 0) & (cumulative >= q * cumulative[-1])).nonzero()[0]) / BINS
