"""Blockwise policy-drift gating (arXiv 2606.24084), on plain tensors.

d[t] = log pi(y_t) - log pi_old(y_t)          token drift, response tokens only
s[b] = |mean of d over the valid tokens of b| block drift (other aggregators: AGGREGATORS)
g[b] = exp(-tau * s[b])                       detached, in (0, 1]
L    = sum m g~ l / sum m                     g~ = g / mean of g over valid tokens
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_bpdg.drift.signals import Factor, Segments, Signals

UnitMean = Literal["global", "sequence", "microbatch"]

# token drift -> what is averaged over a block, and what the average becomes
AGGREGATORS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "abs_mean": (lambda d: d, torch.abs),
    "mean_abs": (torch.abs, lambda s: s),
    "rms": (torch.square, torch.sqrt),
    "k3": (lambda d: torch.expm1(d) - d, lambda s: s),
}


@dataclass(frozen=True)
class Gated(Factor):
    """What the gate makes of one micro-batch: float32 weights and float64 masses, both 0 outside the mask.

    For scope `global` the mass is the gate itself (dividing by its sum is the same as a unit mean over all valid
    tokens); else weights have mean one already and the mass is the token count.

    Attributes:
        gate_n: float32 ``[n]``, the raw gate in (0, 1], 0 outside the mask.
        drift_n: float32 ``[n]``, token drift, 0 outside the mask.
        block_drift_G: float64 ``[num_blocks]``.
        block_count_G: float64 ``[num_blocks]``, valid tokens per block.
    """

    gate_n: Tensor
    drift_n: Tensor
    block_drift_G: Tensor
    block_count_G: Tensor


@dataclass(frozen=True)
class Gate:
    """The gate of arXiv 2606.24084 with its open choices as fields.

    Attributes:
        tau: sharpness; 0 makes every gate exactly 1 (for finite drift), which is how a run without a gate still
            measures its drift.
        aggregator: one of AGGREGATORS; the paper's is `abs_mean`.
        unit_mean: scope of the normalisation. `global` is exact over micro-batches and ranks in one pass.
        clip_min: lower bound on the raw gate.
    """

    tau: float = 1.0
    aggregator: str = "abs_mean"
    unit_mean: UnitMean = "global"
    clip_min: float = 0.0

    def __post_init__(self) -> None:
        if self.aggregator not in AGGREGATORS:
            raise ValueError(f"Gate.aggregator {self.aggregator!r}: choose one of {', '.join(AGGREGATORS)}")
        if self.tau < 0:
            raise ValueError(f"Gate.tau must not be negative, got {self.tau}")
        if not 0.0 <= self.clip_min <= 1.0:
            raise ValueError(f"Gate.clip_min must lie in [0, 1], got {self.clip_min}")
        if self.unit_mean not in ("global", "sequence", "microbatch"):
            raise ValueError(f"Gate.unit_mean {self.unit_mean!r}: choose global, sequence or microbatch")

    @torch.no_grad()
    def __call__(self, signals: Signals) -> Gated:
        """Gate the response tokens (or this rank's shard of them) of one micro-batch.

        A collective of the ranks that share its tokens.
        """
        mask_n = signals.mask_n
        inner, outer = AGGREGATORS[self.aggregator]
        mean_G, count_G = signals.mean(inner(signals.drift_n.double()), signals.blocks)
        block_drift_G = outer(mean_G)
        gate_G = torch.exp(-self.tau * block_drift_G).clamp(min=self.clip_min)
        gate_n = torch.where(mask_n, gate_G[signals.blocks.index_n], 0.0)

        if self.unit_mean == "global":
            weight_n = mass_n = gate_n
        else:
            everything = Segments(torch.zeros_like(signals.sequences.index_n), 1)
            scopes = signals.sequences if self.unit_mean == "sequence" else everything
            mean_G, _ = signals.mean(gate_n, scopes)
            weight_n = torch.where(mask_n, gate_n / mean_G[scopes.index_n], 0.0)
            mass_n = mask_n.double()
        return Gated(weight_n.float(), mass_n, gate_n.float(), signals.drift_n, block_drift_G, count_G)
