"""Blockwise policy-drift gating (arXiv 2606.24084), on plain tensors.

    d[t] = log pi(y_t) - log pi_old(y_t)          token drift, response tokens only
    s[b] = |mean of d over the valid tokens of b| block drift (other aggregators: AGGREGATORS)
    g[b] = exp(-tau * s[b])                       detached, in (0, 1]
    L    = sum m g~ l / sum m                     g~ = g / mean of g over valid tokens

Nothing here knows a process group. Sums over tokens go through an injected `SumReduce`: the identity where a rank holds
every token, an all-reduce where the tokens of a block are spread over sequence-parallel or context-parallel shards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SumReduce = Callable[[Tensor], Tensor]
"""Completes a float64 tensor of partial sums over the ranks that share the tokens."""

UnitMean = Literal["global", "sequence", "microbatch"]

# token drift -> what is averaged over a block, and what the average becomes
AGGREGATORS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "abs_mean": (lambda d: d, torch.abs),
    "mean_abs": (torch.abs, lambda s: s),
    "rms": (torch.square, torch.sqrt),
    "k3": (lambda d: torch.expm1(d) - d, lambda s: s),
}


def no_reduce(sums: Tensor) -> Tensor:
    """This rank holds every token."""
    return sums


def segment_mean(
    values_N: Tensor, segment_N: Tensor, num_segments: int, mask_N: Tensor, reduce: SumReduce = no_reduce
) -> tuple[Tensor, Tensor]:
    """Mean of `values_N` over the valid tokens of each segment.

    Sums are taken in float64, so that the result does not depend on how the tokens are spread over ranks beyond the
    last bit of a float32.

    Args:
        values_N: any float dtype ``[N]``; entries outside the mask may hold anything, NaN included.
        segment_N: int64 ``[N]`` in ``[0, num_segments)``.
        mask_N: bool ``[N]``.
        reduce: completes ``[2, num_segments]`` sums over ranks.

    Returns:
        (mean, count), float64 ``[num_segments]``; the mean of an empty segment is 0.
    """
    valid_N = mask_N.to(torch.float64)
    values_N = torch.where(mask_N, values_N.to(torch.float64), 0.0)
    sums_2S = torch.zeros(2, num_segments, dtype=torch.float64, device=values_N.device)
    sums_2S.index_add_(1, segment_N, torch.stack([values_N, valid_N]))
    total_S, count_S = reduce(sums_2S)
    return total_S / count_S.clamp(min=1.0), count_S


@dataclass(frozen=True)
class Gated:
    """What the gate makes of one micro-batch.

    Attributes:
        weight_N: float32 ``[N]``, detached, 0 outside the mask: multiply the per-token loss with it.
        mass: float64 scalar, this rank's share of the denominator. ``sum(weight * loss) / sum(mass)`` over all
            micro-batches and ranks is the loss of method.md section 1. For scope `global` the mass is the gate mass
            (dividing by it is the same as a unit mean over all valid tokens); else it is the token count.
        gate_N: float32 ``[N]``, the raw gate in (0, 1], 0 outside the mask.
        drift_N: float32 ``[N]``, token drift, 0 outside the mask.
        block_drift_S: float64 ``[num_blocks]``.
        block_count_S: float64 ``[num_blocks]``, valid tokens per block.
    """

    weight_N: Tensor
    mass: Tensor
    gate_N: Tensor
    drift_N: Tensor
    block_drift_S: Tensor
    block_count_S: Tensor


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
    def __call__(
        self,
        logprobs_N: Tensor,
        old_logprobs_N: Tensor,
        mask_N: Tensor,
        block_N: Tensor,
        num_blocks: int,
        sequence_N: Tensor,
        num_sequences: int,
        reduce: SumReduce = no_reduce,
    ) -> Gated:
        """Gate the N response tokens (or this rank's shard of them) of one micro-batch.

        Args:
            logprobs_N: current student's log-probs of the sampled tokens, float ``[N]``.
            old_logprobs_N: behaviour policy's log-probs of the same tokens, float ``[N]``.
            mask_N: valid tokens, bool ``[N]``. Log-probs outside it may hold anything.
            block_N: block numbers, unique over the micro-batch (a block never spans two sequences), int64 ``[N]``.
            num_blocks: over the whole micro-batch, the same on every rank of `reduce`.
            sequence_N: sequence numbers within the micro-batch, int64 ``[N]``.
            num_sequences: the same on every rank of `reduce`.
            reduce: sums over the ranks that share the micro-batch's tokens.
        """
        drift_N = torch.where(mask_N, logprobs_N.detach().float() - old_logprobs_N.detach().float(), 0.0)
        inner, outer = AGGREGATORS[self.aggregator]
        mean_S, count_S = segment_mean(inner(drift_N.double()), block_N, num_blocks, mask_N, reduce)
        block_drift_S = outer(mean_S)
        gate_S = torch.exp(-self.tau * block_drift_S).clamp(min=self.clip_min)
        gate_N = torch.where(mask_N, gate_S[block_N], 0.0)

        if self.unit_mean == "global":
            weight_N, mass = gate_N, gate_N.sum()
        else:
            by_sequence = self.unit_mean == "sequence"
            scope_N = sequence_N if by_sequence else torch.zeros_like(sequence_N)
            mean_S, _ = segment_mean(gate_N, scope_N, num_sequences if by_sequence else 1, mask_N, reduce)
            weight_N = torch.where(mask_N, gate_N / mean_S[scope_N], 0.0)
            mass = mask_N.sum(dtype=torch.float64)
        return Gated(weight_N.float(), mass, gate_N.float(), drift_N, block_drift_S, count_S)
