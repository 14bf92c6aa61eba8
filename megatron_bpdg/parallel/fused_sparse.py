"""`RowPairs` with Triton kernels: every row is read once and multiplied where it lands, nothing is gathered.

The weight's gradient is made row by row of the weight, from its entries in the order of the tokens: no atomic
operations, so that equal inputs give equal bits, float32 sums, and one rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_bpdg.parallel.sparse import RowPairs
from megatron_bpdg.parallel.weight_gradient import WeightGradient

BLOCK_IDS = 32
BLOCK_HIDDEN = 128
# Fewer and longer pieces of rows: most programs find that their row has no entries.
BLOCK_ENTRIES = 8
BLOCK_ROW = 512


class FusedPairs(RowPairs):
    """`RowPairs` by the kernels below."""

    def dot(self, hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        num_tokens, k = self.column_NK.shape
        logits_NK = hidden_NH.new_empty(num_tokens, k, dtype=torch.float32)
        if logits_NK.numel():
            _dot[num_tokens, triton.cdiv(k, BLOCK_IDS)](
                hidden_NH.contiguous(),
                weight_VH.contiguous(),
                self.column_NK.contiguous(),
                logits_NK,
                k,
                self.num_columns,
                hidden_NH.shape[1],
                1.0 / self.temperature,
                BLOCK_K=min(triton.next_power_of_2(k), BLOCK_IDS),
                BLOCK_H=BLOCK_HIDDEN,
            )
        return logits_NK

    def hidden_gradient(self, grad_NK: Tensor, hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        num_tokens, k = self.column_NK.shape
        grad_NH = torch.zeros_like(hidden_NH, memory_format=torch.contiguous_format)
        if grad_NK.numel():
            _hidden_gradient[num_tokens, triton.cdiv(hidden_NH.shape[1], BLOCK_HIDDEN)](
                (grad_NK / self.temperature).contiguous(),
                weight_VH.contiguous(),
                self.column_NK.contiguous(),
                grad_NH,
                k,
                self.num_columns,
                hidden_NH.shape[1],
                BLOCK_K=min(triton.next_power_of_2(k), BLOCK_IDS),
                BLOCK_H=BLOCK_HIDDEN,
            )
        return grad_NH

    def weight_gradient(self, grad_NK: Tensor, hidden_NH: Tensor, weight_VH: Tensor, accumulate: bool) -> Tensor:
        k, hidden_size = self.column_NK.shape[1], hidden_NH.shape[1]
        total = WeightGradient(weight_VH, accumulate, weight_VH.dtype)
        if grad_NK.numel() and self.num_columns:
            here_NK = (self.column_NK >= 0) & (self.column_NK < self.num_columns)
            column_E = torch.where(here_NK, self.column_NK, self.num_columns).flatten()
            sorted_E, entry_E = column_E.sort(stable=True)
            bounds = torch.arange(self.num_columns + 1, device=sorted_E.device)
            _weight_gradient[self.num_columns, triton.cdiv(hidden_size, BLOCK_ROW)](
                (grad_NK / self.temperature).contiguous(),
                hidden_NH.contiguous(),
                entry_E,
                torch.searchsorted(sorted_E, bounds),
                total.total_VH,
                k,
                hidden_size,
                BLOCK_E=BLOCK_ENTRIES,
                BLOCK_H=BLOCK_ROW,
            )
        return total.result()


@triton.jit
def _dot(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    columns,
    logits,
    k,
    num_columns,
    hidden_size,
    inverse_temperature,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Logits of one token's ids."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.load(columns + token * k + slot, mask=slot < k, other=-1)
    here = (column >= 0) & (column < num_columns)
    row = weight + tl.where(here, column, 0)[:, None] * hidden_size
    total = tl.zeros((BLOCK_K,), tl.float32)
    for h in range(0, hidden_size, BLOCK_H):
        at = h + tl.arange(0, BLOCK_H)
        a = tl.load(hidden + token * hidden_size + at, mask=at < hidden_size, other=0.0)
        b = tl.load(row + at[None, :], mask=here[:, None] & (at[None, :] < hidden_size), other=0.0)
        total += tl.sum(a[None, :].to(tl.float32) * b.to(tl.float32), 1)
    total = total.to(hidden.dtype.element_ty).to(tl.float32) * inverse_temperature
    tl.store(logits + token * k + slot, tl.where(here, total, 0.0), mask=slot < k)


@triton.jit
def _hidden_gradient(  # type: ignore[no-untyped-def]
    grad, weight, columns, grad_hidden, k, num_columns, hidden_size, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr
):
    """A piece of one token's gradient, contiguous."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for first in range(0, k, BLOCK_K):
        slot = first + tl.arange(0, BLOCK_K)
        column = tl.load(columns + token * k + slot, mask=slot < k, other=-1)
        here = (column >= 0) & (column < num_columns)
        scale = tl.load(grad + token * k + slot, mask=here, other=0.0)
        row = weight + tl.where(here, column, 0)[:, None] * hidden_size
        b = tl.load(row + at[None, :], mask=here[:, None] & (at[None, :] < hidden_size), other=0.0)
        total += tl.sum(scale[:, None] * b.to(tl.float32), 0)
    tl.store(grad_hidden + token * hidden_size + at, total.to(grad_hidden.dtype.element_ty), mask=at < hidden_size)


@triton.jit
def _weight_gradient(  # type: ignore[no-untyped-def]
    grad, hidden, entries, bounds, grad_weight, k, hidden_size, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Adds to a piece of one row of the weight's gradient; the row's entries are bounds[row] ... bounds[row + 1]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    first = tl.load(bounds + row)
    stop = tl.load(bounds + row + 1)
    if first == stop:
        return
    total = tl.zeros((BLOCK_H,), tl.float32)
    for start in range(first, stop, BLOCK_E):
        place = start + tl.arange(0, BLOCK_E)
        here = place < stop
        entry = tl.load(entries + place, mask=here, other=0)
        scale = tl.load(grad + entry, mask=here, other=0.0)
        token_row = hidden + (entry // k)[:, None] * hidden_size
        a = tl.load(token_row + at[None, :], mask=here[:, None] & (at[None, :] < hidden_size), other=0.0)
        total += tl.sum(scale[:, None] * a.to(tl.float32), 0)
    out = grad_weight + row * hidden_size + at
    total += tl.load(out, mask=at < hidden_size, other=0.0).to(tl.float32)
    tl.store(out, total.to(grad_weight.dtype.element_ty), mask=at < hidden_size)
