"""What is known of a micro-batch's response tokens, and how sums over them are completed.

Gate, factors and objectives read `Signals` and nothing else. Nothing here knows a process group: sums over tokens go
through an injected `SumReduce`, the identity where a rank holds every token, an all-reduce where the tokens of a block
are spread over sequence-parallel or context-parallel shards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

SumReduce = Callable[[Tensor], Tensor]
"""Completes a float64 tensor of partial sums over the ranks that share the tokens."""


def no_reduce(sums: Tensor) -> Tensor:
    """This rank holds every token."""
    return sums


@dataclass(frozen=True)
class Segments:
    """One way to divide the tokens of a micro-batch: into blocks, or into sequences.

    Attributes:
        index_n: each token's segment, int64 ``[n]``; a block never spans two sequences.
        count: segments in the whole micro-batch, the same on every rank that shares its tokens.
    """

    index_n: Tensor
    count: int


@dataclass(frozen=True)
class Factor:
    """How much each token weighs.

    Attributes:
        weight_n: float ``[n]``, detached: multiplies the per-token loss.
        mass_n: float64 ``[n]``, detached: each token's share of the denominator. ``sum(weight * loss) / sum(mass)``
            over all micro-batches and ranks is the loss of the step.
    """

    weight_n: Tensor
    mass_n: Tensor

    @property
    def mass(self) -> Tensor:
        """This rank's share of the denominator, float64 scalar."""
        return self.mass_n.sum()


@dataclass(frozen=True)
class TeacherSignal:
    """What the teacher says about N sampled positions.

    Attributes:
        logprobs_n: log q of the sampled tokens, this rank's rows, float ``[n]``.
        support_NK: the teacher's top-K ids, int64 ``[N, K]``, replicated; None unless asked for.
        support_logprobs_nK: their log-probs, this rank's rows, float ``[n, K]``.
        full_logprobs_NV: the teacher's whole distribution in the student's layout, this rank's part of the
            vocabulary, float ``[N, V_local]``, detached; None unless asked for.
    """

    logprobs_n: Tensor
    support_NK: Tensor | None = None
    support_logprobs_nK: Tensor | None = None
    full_logprobs_NV: Tensor | None = None


@dataclass(frozen=True)
class Signals:
    """A micro-batch's response tokens, this rank's n rows of them.

    Attributes:
        logprobs_n: the current student's log-probs of the sampled tokens, float ``[n]``; they carry a gradient where
            the objective wants one.
        old_logprobs_n: the behaviour policy's, float ``[n]``.
        mask_n: valid tokens, bool ``[n]``. All else may hold anything outside it.
        blocks, sequences: which block and which sequence each token belongs to.
        reduce: sums over the ranks that share the micro-batch's tokens.
        sampled_N: the sampled ids, int64 ``[N]``, replicated; None where no objective reads them.
        teacher: what the objective asked of the teacher; None where there is none.
    """

    logprobs_n: Tensor
    old_logprobs_n: Tensor
    mask_n: Tensor
    blocks: Segments
    sequences: Segments
    reduce: SumReduce = no_reduce
    sampled_N: Tensor | None = None
    teacher: TeacherSignal | None = None

    @cached_property
    def drift_n(self) -> Tensor:
        """``log pi - log pi_old``, float32 ``[n]``, detached, 0 outside the mask."""
        drift_n = self.logprobs_n.detach().float() - self.old_logprobs_n.detach().float()
        return torch.where(self.mask_n, drift_n, 0.0)

    def mean(self, values_n: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        """Mean of `values_n` over the valid tokens of each segment, and their number, exact whoever holds them.

        A collective of the ranks that share the tokens. Sums are taken in float64, so that the result does not depend
        on how the tokens are spread over ranks beyond the last bit of a float32.

        Args:
            values_n: any float dtype ``[n]``; entries outside the mask may hold anything, NaN included.

        Returns:
            (mean, count), float64 ``[segments.count]``; the mean of an empty segment is 0.
        """
        valid_n = self.mask_n.to(torch.float64)
        values_n = torch.where(self.mask_n, values_n.to(torch.float64), 0.0)
        sums_2G = torch.zeros(2, segments.count, dtype=torch.float64, device=values_n.device)
        sums_2G.index_add_(1, segments.index_n, torch.stack([values_n, valid_n]))
        total_G, count_G = self.reduce(sums_2G)
        return total_G / count_G.clamp(min=1.0), count_G
