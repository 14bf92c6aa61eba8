"""Logits of given ids as products of gathered rows: what the loss reads of K ids per token, forward and backward.

Only the pairs whose id lies on this shard are gathered, a bounded number at a time: neither ``[N, K, H]`` nor
``[N, V_local]`` ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_bpdg.parallel.weight_gradient import WeightGradient


@dataclass(frozen=True)
class RowPairs:
    """K ids for each of N tokens, and the products of their rows of a shard with the tokens' hidden states.

    Attributes:
        column_NK: the ids' columns, int64; those outside of ``0 ... num_columns - 1`` are other shards'.
        num_columns: valid columns of the shard.
        temperature: divides the logits.
        chunk_bytes: bound on float32 rows gathered at a time.
    """

    column_NK: Tensor
    num_columns: int
    temperature: float
    chunk_bytes: float

    @cached_property
    def _entries(self) -> tuple[Tensor, Tensor]:
        """The pairs of this shard: their flat numbers ``n K + k``, ascending, and their columns, int64 ``[E]``."""
        columns = self.column_NK.flatten()
        entry_E = ((columns >= 0) & (columns < self.num_columns)).nonzero()[:, 0]
        return entry_E, columns[entry_E]

    def _chunks(self, hidden_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(entries, token of each, column of each), so many that their rows fit."""
        length = max(int(self.chunk_bytes / (4 * max(hidden_size, 1))), 1)
        for entry_e, column_e in zip(*(x_E.split(length) for x_E in self._entries)):
            yield entry_e, entry_e // self.column_NK.shape[1], column_e

    def dot(self, hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        """Logits of this shard's ids, zero elsewhere: ``[N, K]``, float32 or float64.

        Summed in float32 and rounded to the dtype of the hidden states, as logits of a matrix product are.
        """
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        logits = hidden_NH.new_zeros(self.column_NK.numel(), dtype=dtype)
        for entry_e, token_e, column_e in self._chunks(hidden_NH.shape[1]):
            products_eH = hidden_NH[token_e].to(dtype).mul_(weight_VH[column_e])
            logits[entry_e] = products_eH.sum(1).to(hidden_NH.dtype).to(dtype)
        return logits.view(self.column_NK.shape).div_(self.temperature)

    def hidden_gradient(self, grad_NK: Tensor, hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        """Of the hidden states, from that of the logits: ``[N, H]``."""
        grad = grad_NK.flatten() / self.temperature
        total_NH = torch.zeros_like(hidden_NH, dtype=grad.dtype)
        for entry_e, token_e, column_e in self._chunks(hidden_NH.shape[1]):
            total_NH.index_add_(0, token_e, weight_VH[column_e].to(grad.dtype).mul_(grad[entry_e][:, None]))
        return total_NH.to(hidden_NH.dtype)

    def weight_gradient(self, grad_NK: Tensor, hidden_NH: Tensor, weight_VH: Tensor, accumulate: bool) -> Tensor:
        """Of the weight, repeated ids added up; see `WeightGradient` for `accumulate`."""
        grad = grad_NK.flatten() / self.temperature
        total = WeightGradient(weight_VH, accumulate, grad.dtype)
        for entry_e, token_e, column_e in self._chunks(hidden_NH.shape[1]):
            total.add_rows(column_e, hidden_NH[token_e].to(grad.dtype).mul_(grad[entry_e][:, None]))
        return total.result()

    def gradients(
        self, accumulate: bool, grad_NK: Tensor, hidden_NH: Tensor, weight_VH: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Both, where they are wanted."""
        grad_NK = grad_NK.to(torch.promote_types(hidden_NH.dtype, torch.float32))
        return (
            self.hidden_gradient(grad_NK, hidden_NH, weight_VH) if hidden_NH.requires_grad else None,
            self.weight_gradient(grad_NK, hidden_NH, weight_VH, accumulate) if weight_VH.requires_grad else None,
        )
