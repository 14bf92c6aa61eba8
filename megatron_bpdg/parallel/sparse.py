"""Logits of given ids as products of gathered rows: what the loss reads of K ids per token, forward and backward.

Only the pairs whose id lies on this shard are gathered, a bounded number at a time: neither ``[N, K, H]`` nor
``[N, V_local]`` ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_bpdg.parallel.vocab import TokenLayout
from megatron_bpdg.parallel.weight_gradient import WeightGradient


class RowPairs(Protocol):
    """K ids for each of N tokens, and the products of their rows of a shard with the tokens' hidden states."""

    def dot(self, hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        """Logits of this shard's ids, zero elsewhere: ``[N, K]``, float32 or float64.

        Summed in float32 and rounded to the dtype of the hidden states, as logits of a matrix product are.
        """

    def hidden_gradient(self, grad_NK: Tensor, hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        """Of the hidden states, from that of the logits: ``[N, H]``."""

    def weight_gradient(self, grad_NK: Tensor, hidden_NH: Tensor, weight_VH: Tensor, accumulate: bool) -> Tensor:
        """Of the weight, repeated ids added up; see `WeightGradient` for `accumulate`."""


@dataclass(frozen=True)
class SparseIds:
    """`RowPairs` in torch: the entries of an ``[N, K]`` table that this rank's shard holds.

    Attributes:
        shape: (N, K).
        entry_E: flat numbers ``n K + k`` of the entries, ascending, int64.
        column_E: their rows of the shard's weight, int64.
        temperature: divides the logits.
        chunk_bytes: bound on float32 rows gathered at a time.
    """

    shape: tuple[int, int]
    entry_E: Tensor
    column_E: Tensor
    temperature: float
    chunk_bytes: float

    @classmethod
    def of_shard(cls, column_NK: Tensor, num_columns: int, temperature: float, chunk_bytes: float) -> SparseIds:
        """Of columns relative to the shard; those outside of ``0 ... num_columns - 1`` are other shards'."""
        columns = column_NK.flatten()
        entry_E = ((columns >= 0) & (columns < num_columns)).nonzero()[:, 0]
        num_rows, k = column_NK.shape
        return cls((num_rows, k), entry_E, columns[entry_E], temperature, chunk_bytes)

    def chunks(self, hidden_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(entries, token of each, column of each), so many that their rows fit."""
        length = max(int(self.chunk_bytes / (4 * max(hidden_size, 1))), 1)
        for entry_e, column_e in zip(self.entry_E.split(length), self.column_E.split(length)):
            yield entry_e, entry_e // self.shape[1], column_e

    def dot(self, hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        logits = hidden_NH.new_zeros(self.shape[0] * self.shape[1], dtype=dtype)
        for entry_e, token_e, column_e in self.chunks(hidden_NH.shape[1]):
            products_eH = hidden_NH[token_e].to(dtype).mul_(weight_VH[column_e])
            logits[entry_e] = products_eH.sum(1).to(hidden_NH.dtype).to(dtype)
        return logits.view(self.shape).div_(self.temperature)

    def hidden_gradient(self, grad_NK: Tensor, hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        grad = grad_NK.flatten() / self.temperature
        total_NH = torch.zeros_like(hidden_NH, dtype=grad.dtype)
        for entry_e, token_e, column_e in self.chunks(hidden_NH.shape[1]):
            total_NH.index_add_(0, token_e, weight_VH[column_e].to(grad.dtype).mul_(grad[entry_e][:, None]))
        return total_NH.to(hidden_NH.dtype)

    def weight_gradient(self, grad_NK: Tensor, hidden_NH: Tensor, weight_VH: Tensor, accumulate: bool) -> Tensor:
        grad = grad_NK.flatten() / self.temperature
        total = WeightGradient(weight_VH, accumulate, grad.dtype)
        for entry_e, token_e, column_e in self.chunks(hidden_NH.shape[1]):
            total.add_rows(column_e, hidden_NH[token_e].to(grad.dtype).mul_(grad[entry_e][:, None]))
        return total.result()


class Gather(torch.autograd.Function):
    """Logits of K ids per token; repeated ids add up in the backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, pairs: RowPairs, layout: TokenLayout, accumulate: bool
    ) -> Tensor:
        ctx.save_for_backward(hidden_NH, weight_VH)
        ctx.pairs, ctx.layout, ctx.accumulate = pairs, layout, accumulate
        return layout.reduce(pairs.dot(hidden_NH, weight_VH))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_NH, weight_VH = ctx.saved_tensors
        pairs: RowPairs = ctx.pairs
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_NK = ctx.layout.expand(grads[0]).to(torch.promote_types(hidden_NH.dtype, torch.float32))
        return (
            pairs.hidden_gradient(grad_NK, hidden_NH, weight_VH) if needs_hidden else None,
            pairs.weight_gradient(grad_NK, hidden_NH, weight_VH, ctx.accumulate) if needs_weight else None,
            None,
            None,
            None,
        )
