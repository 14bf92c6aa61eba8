"""The head without logits, with Triton kernels where torch would make a pass over memory per operation.

The forward sweep is one kernel: tiles of logits live in registers and leave running statistics, nothing else. The
backward recomputes a chunk with the vendor's matrix product, turns it into its gradient in place with one elementwise
kernel, and leaves the two other products to the vendor again. Logits of given ids have kernels of their own
(`fused_sparse.py`). A sweep that looks for a top-K is `ChunkedVocab`'s.

Logits are rounded to the dtype of the hidden states, as everywhere else, and everything after them is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from megatron_bpdg.parallel.chunked import ChunkedVocab, Term
from megatron_bpdg.parallel.fused_sparse import FusedPairs

BLOCK_TOKENS = 128
BLOCK_COLUMNS = 128
BLOCK_HIDDEN = 64
# Parts of the vocabulary. Programs that run at the same time are those of all parts of a few blocks of tokens, whose
# hidden states stay in the cache; and there are enough programs to fill any GPU a few times over, whatever N is.
MIN_PARTS = 16
MIN_PROGRAMS = 512

# Kernels see no globals: `_gradient_` has these as numbers.
_LSE, _LOGPROB, _ENTROPY = range(3)


class FusedVocab(ChunkedVocab):
    """`ChunkedVocab` for float32, bfloat16 and float16 on CUDA devices (and on a CPU in Triton's interpreter).

    Raises:
        ValueError: also for float64, or tensors that are on no CUDA device.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype != torch.float32:
            raise ValueError(f"training.head: fused computes in float32, not {self.hidden_NH.dtype}: use chunked")
        if not (self.hidden_NH.is_cuda or isinstance(_sweep, InterpretedFunction)):
            raise ValueError("training.head: fused runs on CUDA devices only: use chunked")

    def sweep_shard(self, k: int, keep: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        num_tokens, hidden_size = self.hidden_NH.shape
        num_columns = len(self.ids)
        if k or not num_columns or not num_tokens:
            return super().sweep_shard(k, keep)
        token_blocks, column_blocks = triton.cdiv(num_tokens, BLOCK_TOKENS), triton.cdiv(num_columns, BLOCK_COLUMNS)
        blocks_per_part = triton.cdiv(column_blocks, max(MIN_PARTS, triton.cdiv(MIN_PROGRAMS, token_blocks)))
        num_parts = triton.cdiv(column_blocks, blocks_per_part)
        parts_3CN = self.hidden_NH.new_empty(3, num_parts, num_tokens, dtype=torch.float32)
        _sweep[num_parts, token_blocks](
            self.hidden_NH.contiguous(),
            self.weight_VH.contiguous(),
            parts_3CN,
            num_tokens,
            num_columns,
            hidden_size,
            1.0 / self.temperature,
            blocks_per_part,
            num_parts,
            BLOCK_N=BLOCK_TOKENS,
            BLOCK_V=BLOCK_COLUMNS,
            BLOCK_H=BLOCK_HIDDEN,
            num_warps=8,
            # So that two programs share a multiprocessor: one multiplies while the other takes exponentials.
            maxnreg=128,
        )
        return parts_3CN, None

    def pairs(self, ids_NK: Tensor) -> FusedPairs:
        return FusedPairs(ids_NK - self.ids.start, len(self.ids), self.temperature, self.chunk_bytes)

    def chunk_gradient(self, start: int, stop: int, term: Term, grad_N: Tensor) -> Tensor:
        logits_Nv = self.kept_or_again(start, stop)
        num_tokens, width = logits_Nv.shape
        kind, extra_N = _LSE, term.lse_N
        if term.column_N is not None:
            kind, extra_N = _LOGPROB, term.column_N - start
        if term.entropy_N is not None:
            kind, extra_N = _ENTROPY, term.entropy_N
        if num_tokens:
            _gradient_[num_tokens, triton.cdiv(width, 1024)](
                logits_Nv,
                term.lse_N,
                extra_N,
                (grad_N.float() / self.temperature).contiguous(),
                width,
                1.0 / self.temperature,
                KIND=kind,
                BLOCK_V=1024,
            )
        return logits_Nv


@triton.jit
def _sweep(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    parts,
    num_tokens,
    num_columns,
    hidden_size,
    inverse_temperature,
    blocks_per_part,
    num_parts,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Statistics of one block of tokens over one part of the columns; see `ChunkedVocab.sweep_shard`."""
    part = tl.program_id(0)
    token = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_here = token < num_tokens
    token_row = hidden + token.to(tl.int64)[:, None] * hidden_size
    max_n = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    sum_n = tl.zeros((BLOCK_N,), tl.float32)
    shifted_n = tl.zeros((BLOCK_N,), tl.float32)
    first = part * blocks_per_part * BLOCK_V
    for start in range(first, min(first + blocks_per_part * BLOCK_V, num_columns), BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        column_here = column < num_columns
        column_row = weight + column.to(tl.int64)[None, :] * hidden_size
        logits = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for h in range(0, hidden_size, BLOCK_H):
            at = h + tl.arange(0, BLOCK_H)
            a = tl.load(token_row + at[None, :], mask=token_here[:, None] & (at[None, :] < hidden_size), other=0.0)
            b = tl.load(column_row + at[:, None], mask=column_here[None, :] & (at[:, None] < hidden_size), other=0.0)
            logits = tl.dot(a, b, logits, input_precision="ieee")
        logits = logits.to(hidden.dtype.element_ty).to(tl.float32) * inverse_temperature
        logits = tl.where(column_here[None, :], logits, float("-inf"))
        new_max_n = tl.maximum(max_n, tl.max(logits, 1))
        # The first block has no earlier maximum, and 0 * inf is NaN.
        lower_n = tl.where(max_n == float("-inf"), 0.0, max_n - new_max_n)
        scale_n = tl.exp(lower_n)
        shift = logits - new_max_n[:, None]
        exp = tl.exp(shift)
        shifted_n = scale_n * (shifted_n + lower_n * sum_n) + tl.sum(tl.where(exp > 0.0, exp * shift, exp), 1)
        sum_n = scale_n * sum_n + tl.sum(exp, 1)
        max_n = new_max_n
    out = parts + part * num_tokens + token
    plane = num_parts * num_tokens
    tl.store(out, max_n, mask=token_here)
    tl.store(out + plane, sum_n, mask=token_here)
    tl.store(out + 2 * plane, shifted_n, mask=token_here)


@triton.jit
def _gradient_(  # type: ignore[no-untyped-def]
    logits, lse, extra, grad, width, inverse_temperature, KIND: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Overwrites a chunk's undivided logits with their gradient; `extra` is what the kind of `Term` needs."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    at = logits + token.to(tl.int64) * width + column
    log_p = tl.load(at, mask=column < width, other=0.0).to(tl.float32) * inverse_temperature - tl.load(lse + token)
    p = tl.exp(log_p)
    result = p
    if KIND == 1:
        result = tl.where(column == tl.load(extra + token), 1.0, 0.0) - p
    if KIND == 2:
        result = -p * (log_p + tl.load(extra + token))
    result *= tl.load(grad + token)
    tl.store(at, result.to(logits.dtype.element_ty), mask=column < width)
