"""The seam between formulas and parallelism: what a loss may ask of a next-token distribution.

A `VocabOps` is bound to the logits of N positions. Its results have one row per position *on this rank*: all N rows
for a dense or replicated implementation, a 1/TP slice of them where the vocabulary reduction also scatters the tokens
over tensor-parallel ranks (sequence-parallel shards). `rows` cuts any replicated per-token tensor the same way.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron_bpdg.objectives.divergence import kl_terms

# Rows per chunk of the top-K search, which holds one int64 per logit.
_TOPK_ROWS = 256


class VocabOps(Protocol):
    """Operations on ``softmax(logits / temperature)`` of N positions; n = rows on this rank.

    All results are float32 (float64 for float64 logits) and differentiable unless stated. Ids are replicated,
    ``[N]`` or ``[N, K]`` int64, and may repeat.
    """

    vocab_size: int

    def rows(self, per_token: Tensor) -> Tensor:
        """This rank's rows of a replicated tensor ``[N, ...]`` -> ``[n, ...]``."""

    def logsumexp(self) -> Tensor:
        """``[n]``."""

    def logprob(self, ids_N: Tensor) -> Tensor:
        """Log-probability of one id per position, ``[n]``."""

    def gather(self, ids_NK: Tensor) -> Tensor:
        """Logits of K ids per position, ``[n, K]``."""

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits and their ids, ``[n, k]`` each; ties go to the lower id. Not differentiable."""

    def entropy(self) -> Tensor:
        """Entropy in nats, ``[n]``."""

    def log_softmax(self) -> Tensor:
        """Log-probabilities of this rank's part of the vocabulary, ``[N, V_local]``."""

    def vocab_sum(self, x_NV: Tensor) -> Tensor:
        """Sum over the whole vocabulary of a tensor shaped like `log_softmax`, ``[n]``."""


def ordered_topk(values_NV: Tensor, k: int, first_id: int = 0) -> tuple[Tensor, Tensor]:
    """Largest k values, or all that there are, and their ids; ties go to the lower id, however V is split.

    Values are compared in float32. Returns ``[N, k]`` values and int64 ids (column number + first_id).
    """
    column_V = torch.arange(values_NV.shape[1], device=values_NV.device)
    k = min(k, len(column_V))
    column_NK = column_V.new_empty(len(values_NV), k)
    for values, columns in zip(values_NV.split(_TOPK_ROWS), column_NK.split(_TOPK_ROWS)):
        bits = (values.float() + 0.0).view(torch.int32)
        # Two's complement order of float bits: flip the magnitude of negatives.
        order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
        # torch.topk says nothing of ties, so there are none: the lower column is the larger key.
        columns.copy_(((order << 32) | (0xFFFFFFFF - column_V)).topk(k, dim=1).indices)
    return values_NV.gather(1, column_NK), column_NK + first_id


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError for ids outside the vocabulary (they would read as a logit of 0)."""
    if ids.numel() and not bool(((ids >= 0) & (ids < vocab_size)).all()):
        raise ValueError(
            f"token ids from {int(ids.min())} to {int(ids.max())} do not fit a vocabulary of {vocab_size}: "
            "teacher, student and tokenizer must share one vocabulary"
        )


def check_topk(k: int, vocab_size: int) -> None:
    if not 1 <= k <= vocab_size:
        raise ValueError(f"top_k must be between 1 and the vocabulary size {vocab_size}, got {k}")


class DenseVocab:
    """Reference `VocabOps`: the whole vocabulary on this rank, plain autograd.

    Args:
        logits_NV: ``[N, V_padded]``, any float dtype.
        vocab_size: true size; columns beyond it are padding and never enter a softmax.
        temperature: divides the logits.
    """

    def __init__(self, logits_NV: Tensor, vocab_size: int, temperature: float = 1.0) -> None:
        self.vocab_size = vocab_size
        dtype = torch.promote_types(logits_NV.dtype, torch.float32)
        self.logits_NV = logits_NV[:, :vocab_size].to(dtype) / temperature

    def rows(self, per_token: Tensor) -> Tensor:
        return per_token

    def logsumexp(self) -> Tensor:
        return self.logits_NV.logsumexp(-1)

    def logprob(self, ids_N: Tensor) -> Tensor:
        return self.gather(ids_N[:, None])[:, 0] - self.logsumexp()

    def gather(self, ids_NK: Tensor) -> Tensor:
        check_ids(ids_NK, self.vocab_size)
        return self.logits_NV.gather(1, ids_NK)

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        check_topk(k, self.vocab_size)
        return ordered_topk(self.logits_NV.detach(), k)

    def entropy(self) -> Tensor:
        log_p_NV = self.log_softmax()
        return -kl_terms(log_p_NV, torch.zeros_like(log_p_NV)).sum(-1)

    def log_softmax(self) -> Tensor:
        return self.logits_NV.log_softmax(-1)

    def vocab_sum(self, x_NV: Tensor) -> Tensor:
        return x_NV.sum(-1)
