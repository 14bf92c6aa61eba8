"""Logits of given ids as products of gathered rows: what the loss reads of K ids per token, forward and backward.

Only the pairs whose id lies on this shard are gathered, a bounded number at a time: neither ``[N, K, H]`` nor
``[N, V_local]`` ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_bpdg.parallel.vocab import TokenLayout
from megatron_bpdg.parallel.weight_gradient import WeightGradient


@dataclass(frozen=True)
class SparseIds:
    """The entries of an ``[N, K]`` table that this rank's shard holds.

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


def dot(hidden_NH: Tensor, weight_VH: Tensor, ids: SparseIds) -> Tensor:
    """Logits of this shard's entries, zero elsewhere: ``[N, K]``, float32 or float64.

    Summed in float32 and rounded to the dtype of the hidden states, as logits of a matrix product are.
    """
    dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
    logits = hidden_NH.new_zeros(ids.shape[0] * ids.shape[1], dtype=dtype)
    for entry_e, token_e, column_e in ids.chunks(hidden_NH.shape[1]):
        products_eH = hidden_NH[token_e].to(dtype).mul_(weight_VH[column_e])
        logits[entry_e] = products_eH.sum(1).to(hidden_NH.dtype).to(dtype)
    return logits.view(ids.shape).div_(ids.temperature)


class Gather(torch.autograd.Function):
    """Logits of K ids per token; repeated ids add up in the backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, ids: SparseIds, layout: TokenLayout, accumulate: bool
    ) -> Tensor:
        ctx.save_for_backward(hidden_NH, weight_VH)
        ctx.ids, ctx.layout, ctx.accumulate = ids, layout, accumulate
        return layout.reduce(dot(hidden_NH, weight_VH, ids))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_NH, weight_VH = ctx.saved_tensors
        ids: SparseIds = ctx.ids
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        grad = ctx.layout.expand(grads[0]).flatten().to(dtype) / ids.temperature
        hidden_grad_NH = torch.zeros_like(hidden_NH, dtype=dtype) if needs_hidden else None
        weight_grad = WeightGradient(weight_VH, ctx.accumulate, dtype) if needs_weight else None
        for entry_e, token_e, column_e in ids.chunks(hidden_NH.shape[1]):
            grad_e1 = grad[entry_e][:, None]
            if hidden_grad_NH is not None:
                hidden_grad_NH.index_add_(0, token_e, weight_VH[column_e].to(dtype).mul_(grad_e1))
            if weight_grad is not None:
                weight_grad.add_rows(column_e, hidden_NH[token_e].to(dtype).mul_(grad_e1))
        return (
            hidden_grad_NH.to(hidden_NH.dtype) if hidden_grad_NH is not None else None,
            weight_grad.result() if weight_grad is not None else None,
            None,
            None,
            None,
        )
